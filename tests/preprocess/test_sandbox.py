# ruff: noqa: E501
"""Templates: what the interpreter writes is what Jinja writes, within limits, through marks."""

import json
import time

import jinja2.ext
import jinja2.sandbox
import pytest

from glm_edge.errors import DataError
from glm_edge.preprocess.chat import render, render_marked

MESSAGES = [
    {"role": "system", "content": "Be <b>brief</b>. "},
    {"role": "user", "content": " one two,three\n\nfour\t", "n": 3},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nDone", "tool_calls": [{"x": 1.5}]},
    {"role": "user", "content": [{"type": "text", "text": "Ünïcode 再见"}, {"type": "image"}]},
]
TOOLS = [
    {"type": "function", "function": {"name": "天气", "parameters": {"b": [1, None], "a": True}}}
]

SNIPPETS = {
    "loop": "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}"
    "{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.depth }}"
    "{{ loop.previtem.role if not loop.first }}{{ loop.nextitem.role if not loop.last }}"
    "{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{% endfor %}",
    "loop test": "{% for m in messages if m.role == 'user' %}{{ loop.length }}{{ m.n }}"
    "{% else %}none{% endfor %}{% for m in [] %}x{% else %}none{% endfor %}",
    "loop scope": "{% set x = 9 %}{% for i in range(3) %}{{ x }}{% set x = i %}{{ x }}{% endfor %}"
    "{{ x }}{% for i in range(2) %}{% if i == 0 %}{% set y = 5 %}{% endif %}{{ y }}{% endfor %}",
    "break": "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 4 %}{% break %}"
    "{% endif %}{{ i }}{% for j in [1, 2] %}{% break %}{% endfor %}{% endfor %}",
    "recursive": "{% for x in [[1, [2]], [3]] recursive %}{% if x is iterable %}({{ loop(x) }})"
    "{% else %}{{ x }}{{ loop.depth0 }}{% endif %}{% endfor %}",
    "unpacking": "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% endfor %}"
    "{% set a, b = 'xy' %}{{ b }}{{ a }}{% for k, (x, y) in [(1, (2, 3))] %}{{ k + x * y }}{% endfor %}",
    "macro": "{% macro f(a, b='B', c=a) %}[{{ a }}{{ b }}{{ c }}{{ varargs }}{{ kwargs }}]{% endmacro %}"
    "{{ f(1) }}{{ f(1, 2, 3, 4, 5) }}{{ f(b=1, d=2) }}{{ f.name }}{{ f.arguments }}",
    "late": "{% macro f() %}{{ x }}{% endmacro %}{% set x = 4 %}{{ f() }}{% set x = 5 %}{{ f() }}",
    "caller": "{% macro f(a) %}<{{ caller(a) if caller else '' }}{{ caller('z') }}>{% endmacro %}"
    "{% call(x) f('y') %}{{ x }}!{% endcall %}",
    "blocks": "{% set x %}a{{ 1 }}{% set y = 2 %}{% endset %}{{ x }}{{ y }}{% filter upper | trim %} b "
    "{% endfilter %}{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a }}"
    "{% set z | upper %}abc{% endset %}{{ z }}",
    "namespace": "{% set ns = namespace(a=[], n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.a = ns.a + [m.role] %}{% endfor %}{{ ns.n }}{{ ns.a }}{{ ns.missing is defined }}",
    "slices": "{{ messages[1:][0].role }}{{ messages[-1].role }}{{ messages[::-1][0].role }}"
    "{{ 'abcdef'[1:5:2] }}{{ messages[99] is defined }}{{ 'abc'[1] }}{{ (1, 2, 3)[:2] }}",
    "fields": "{{ messages[1]['n'] }}{{ messages[1].get('n') }}{{ messages[1].get('q', 'd') }}"
    "{{ messages[1].q is none }}{{ messages[1].q }}{{ 'n' in messages[1] }}{{ tools[0].function.keys() }}"
    "{{ messages[1]['q'] is undefined }}{{ {'items': 1}.items is callable }}{{ {'items': 1}['items'] }}",
    "compare": "{{ 1 < 2 <= 2 }}{{ 1 == 1.0 }}{{ 'a' in 'abc' }}{{ 'x' not in ['y'] }}{{ [1] == [1] }}"
    "{{ none == false }}{{ (1, 2) < (1, 3) }}{{ 3 in range(5) }}{{ missing == missing }}"
    "{{ 'b' in {'b': 1} }}{{ missing in [1] }}{{ 1 in missing }}",
    "logic": "{{ 0 or 'x' }}{{ 1 and [] }}{{ not '' }}{{ missing or 'd' }}{{ 'a' if 0 }}{{ 'a' if 1 else 'b' }}",
    "numbers": "{{ 7 // 2 }}{{ 7 / 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ -3 }}{{ +3 }}{{ 1.5 * 2 }}{{ true + 1 }}"
    "{{ 'ab' * 2 }}{{ [1] * 2 }}{{ [1] + [2] }}{{ 2 ** -1 }}{{ 1_000 }}{{ 0x1f }}{{ 1e3 }}",
    "concat": "{{ 1 ~ 'a' ~ none ~ true ~ [1, 'b'] ~ missing }}",
    "print": "{{ messages }}{{ none }}{{ 1.0 }}{{ {'a': (1,)} }}{{ range(3) }}{{ \"it's\" }}{{ [\"it's\", '\\u00e9\\n'] }}",
    "strings": "{{ 'a,b,,c'.split(',') }}{{ ' a  b '.split() }}{{ 'a,b,c'.rsplit(',', 1) }}"
    "{{ 'x'.join(['1', '2']) }}{{ ' x '.strip() + '|' }}{{ 'xxaxx'.strip('x') }}{{ 'abc'.startswith('ab') }}"
    "{{ 'abc'.endswith(('x', 'c')) }}{{ 'a.b.c'.partition('.') }}{{ 'a.b.c'.rpartition('.') }}"
    "{{ 'abcabc'.replace('b', 'XX', 1) }}{{ 'AbC'.lower() }}{{ 'abc'.upper() }}{{ 'ab cd'.title() }}"
    "{{ 'abc'.capitalize() }}{{ 'a\nb\n'.splitlines() }}{{ 'abc'.find('c') }}{{ '7'.zfill(3) }}"
    "{{ 'abc'.removeprefix('a').removesuffix('c') }}{{ '12'.isdigit() }}{{ 'a'.center(5, '*') }}"
    "{{ 'aXbX'.count('X') }}{{ ''.split(',') }}{{ 'abc'.replace('', '-') }}{{ 'a\tb'.expandtabs(4) }}",
    "format": "{{ '%s-%05.1f-%d-%%-%x' % ('a', 2.25, 3, 255) }}{{ '%(a)s' % {'a': 1} }}{{ '%s' | format(3) }}"
    "{{ '{} {1:>4} {x!s}'.format('a', 'b', x=[1]) if 0 else '' }}{{ '{0} {x}'.format('a', x=2) }}"
    "{{ '{:,.2f}'.format(1234.5) }}{{ '%-5s|' % 'a' }}{{ '%c' % 65 }}",
    "tojson": "{{ tools | tojson }}{{ tools[0] | tojson(indent=2) }}{{ {'b': 1, 'a': 'é<'} | tojson(sort_keys=true) }}"
    "{{ 'é\U0001f600' | tojson(ensure_ascii=true) }}{{ [1, 2] | tojson(separators=(',', ':')) }}",
    "text filters": "{{ ' a ' | trim }}{{ 'abc' | upper | lower | capitalize }}{{ 'a b-c' | title }}{{ 'abc' | replace('b', 'x') }}"
    "{{ 'a\nb\n\nc' | indent }}{{ 'a\nb' | indent(2, true) }}{{ 'a\n\nb' | indent('> ', blank=true) }}"
    "{{ 'a b c d e f' | truncate(7, leeway=0) }}{{ 'abcdef' | truncate(5, true, '-', 0) }}{{ 'a b' | wordcount }}"
    "{{ 'abc' | length }}{{ 'abc' | reverse }}{{ 'a/b c' | urlencode }}{{ 'x' | center(5) }}{{ 'a&<' | escape }}",
    "number filters": "{{ '12' | int + 1 }}{{ 'x' | int(7) }}{{ '3.7' | int }}{{ '1f' | int(0, 16) }}{{ '2.5' | float }}{{ -3 | abs }}"
    "{{ 2.567 | round(1) }}{{ 2.1 | round(0, 'ceil') }}{{ [1, 2, 3] | sum }}{{ [3, 1] | max }}{{ [3, 1] | min }}",
    "list filters": "{{ [3, 1, 2] | sort }}{{ ['b', 'A'] | sort(reverse=true) }}{{ messages | map(attribute='role') | join(',') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ [1, 2, 3] | select('odd') | list }}"
    "{{ messages | rejectattr('n') | map(attribute='role') | list }}{{ ['a', 'A', 'b'] | unique | list }}"
    "{{ [1, 2, 3] | first }}{{ [1, 2, 3] | last }}{{ [1, 2, 3, 4, 5] | batch(2, 0) | list }}{{ [1, 2, 3] | slice(2) | list }}"
    "{{ {'b': 1, 'a': 2} | dictsort }}{{ {'b': 1} | items | list }}{{ 'ab' | list }}{{ [1, 2] | reverse | list }}"
    "{% for g in messages | groupby('role') %}{{ g.grouper }}{{ g.list | length }}{% endfor %}"
    "{% for role, group in messages | groupby('role') %}{{ role }}{% endfor %}{{ ['a', 'b'] | map('upper') | list }}"
    "{{ [{'a': {'b': 1}}] | map(attribute='a.b') | sum }}{{ [{'a': 1}, {}] | map(attribute='a', default=0) | list }}",
    "truth": "{% if messages | selectattr('role', 'equalto', 'nobody') %}generators are true{% endif %}"
    "{{ missing | default('d') }}{{ '' | default('d', true) }}{{ none | d('x') }}",
    "tests": "{{ 1 is number }}{{ 'a' is string }}{{ {} is mapping }}{{ [] is sequence }}{{ missing is defined }}{{ none is none }}"
    "{{ 3 is odd }}{{ 4 is divisibleby 2 }}{{ true is boolean }}{{ 1.0 is float }}{{ 1 is integer }}{{ 'a' is in 'abc' }}"
    "{{ 2 is gt 1 }}{{ 2 is ne 2 }}{{ 'a' is lower }}{{ 'upper' is filter }}{{ 'odd' is test }}{{ 1 is sameas 1 }}"
    "{{ true is true }}{{ 0 is false }}{{ messages[0].items is callable }}{{ 'ab' is iterable }}{{ not 1 is string }}",
    "helpers": "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}{{ c.next() }}{% set j = joiner('|') %}"
    "{{ j() }}x{{ j() }}{{ dict(a=1, **{'b': 2}) }}{{ dict([('x', 1)]) }}{{ range(1, 9, 3) | list }}",
    "arguments": "{% macro f(a, b) %}{{ a }}{{ b }}{% endmacro %}{{ f(*[1, 2]) }}{{ f(**{'a': 3, 'b': 4}) }}{{ f(1) }}",
    "whitespace": "  {% for m in messages %}\n  {{- m.role -}}\n  {% endfor %}\nend {#- c -#} \n  {% raw %}{{ x }}{% endraw %}\n",
    "generation": "{% generation %}{{ messages[0].role }}{% endgeneration %}",
    "shadowing": "{% set messages = messages[1:] %}{{ messages[0].role }}{% set range = 3 %}{{ range }}",
    "thinking": "{% for m in messages %}{% if m.content is string and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') }}|"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% endif %}{% endfor %}",
}


def jinja(template, **values):
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )

    def tojson(value, ensure_ascii=False, **options):
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment.filters["tojson"] = tojson
    template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    return environment.from_string(template).render(values)


def shown(messages):
    """Messages as templates see them: parts are copied by type."""
    parts = [{"type": "text", "text": "Ünïcode 再见"}, {"type": "image", "image": ""}]
    return [*messages[:-1], {**messages[-1], "content": parts}]


@pytest.mark.parametrize("template", SNIPPETS.values(), ids=SNIPPETS)
def test_render_is_jinjas(template):
    expected = jinja(template, messages=shown(MESSAGES), tools=TOOLS, documents=None)
    assert render(template, MESSAGES, TOOLS) == expected


@pytest.mark.parametrize("template", SNIPPETS.values(), ids=SNIPPETS)
def test_marks_change_nothing_but_who_wrote_it(template):
    special = ("<think>", "</think>", "<|user|>", "[gMASK]", "{x}", "-", "'")
    expected = render(template, MESSAGES, TOOLS)
    rendered = render_marked(template, MESSAGES, TOOLS, special=special)
    assert rendered.marks.reveal(rendered.text) == expected


DOUBLED = (
    "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(32) %}{% set n.a = [n.a, n.a] %}"
    "{% set n.b = [n.b, n.b] %}{% endfor %}"
)
FULL_PRIMES = "range(0, 60000 * (2 ** 61 - 1), 2 ** 61 - 1)"
UNSEEN = {
    "strip": "{{ ('a' * 2000000).lstrip(('b' * 2000000) ~ 'a') }}",
    "trim": "{{ ('é' * 2000000) | trim(('b' * 2000000) ~ 'é') }}",
    "rfind": "{{ ('a' * 400000).rfind('ab' ~ ('a' * 200000)) }}",
    "rsplit": "{{ ('a' * 400000).rsplit('ab' ~ ('a' * 200000), 1) }}",
    "startswith": "{% set t = 'a' * 4000000 %}{{ (t ~ 'b').startswith((t ~ 'c',) * 50000) }}",
    "changed": DOUBLED + "{% for x in range(2) %}{{ loop.changed(n.a if x else n.b) }}{% endfor %}",
    "items": DOUBLED + "{{ {'a': n.a}.items() == {'a': n.b}.items() }}",
    "unique": f"{{{{ {FULL_PRIMES} | unique | list }}}}",
    "dict": f"{{{{ dict({FULL_PRIMES} | batch(2)) }}}}",
    "name": "{% set t = 'a' * 9000000 %}{% for i in range(99999) %}{{ messages[0][t] }}{% endfor %}",
    "attribute": "{{ messages | map(attribute='.' * 9000000) | list }}",
    "float": "{% for i in range(99999) %}{{ 0.5 in range(99999) }}{% endfor %}",
}


@pytest.mark.parametrize("template", UNSEEN.values(), ids=UNSEEN)
def test_work_inside_one_call_is_counted(template):
    start = time.process_time()
    with pytest.raises(DataError, match=r"TemplateLimitError: .*(steps|bytes)"):
        render(template, MESSAGES)
    # Not a measurement: uncounted, these take minutes.
    assert time.process_time() - start < 20.0


def test_flags_and_widths_of_a_format_are_read_once():
    start = time.process_time()
    with pytest.raises(DataError, match="unsupported format"):
        render("{{ ('%' ~ '0' * 1000000) % 1 }}", MESSAGES)
    assert time.process_time() - start < 20.0


def test_counted_work_answers_as_jinja_does():
    template = (
        "{{ 3.0 in range(5) }}{{ 0.5 in range(5) }}{{ true in range(5) }}{{ 'a' in range(5) }}"
        "{{ 'xyax'.strip('yxx') }}{{ 'abcab'.rfind('ab') }}{{ 'a--b--c'.rsplit('--', 1) }}"
        "{{ {'a': [1]}.items() == {'a': [1]}.items() }}{{ {1: 2}.keys() == {1.0: 3}.keys() }}"
        "{{ [2 ** 60, (1, 2), (1, 2), 2.0 ** 60] | unique | list }}{{ {2 ** 60: 1}[2 ** 60] }}"
        "{% for x in [[1], [1], [2]] %}{{ loop.changed(x, 'a') }}{% endfor %}"
        "{{ '%-+5d|%05.1f' % (3, 2.5) }}{{ 'a'.startswith(('b', 'a')) }}{{ 3 is filter }}"
    )
    expected = jinja(template.replace("{{ 3 is filter }}", "False"), messages=[])
    assert render(template, MESSAGES) == expected
