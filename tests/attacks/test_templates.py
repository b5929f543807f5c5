# ruff: noqa: E501
"""Hostile chat templates, drawn at random, end within limits of time and memory."""

import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest

# A child with little memory renders one after another and says how each ended.
CHILD = """
import json, resource, sys, time
from glm_edge.errors import DataError
from glm_edge.preprocess import render
limit = 2 << 30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
messages = [{"role": "user", "content": "hi <|user|> " * 20, "items": list(range(40))}] * 3
for template in json.load(sys.stdin):
    started = time.process_time()
    try:
        ended = f"text of {len(render(template, messages))}"
    except DataError as error:
        ended = str(error)
    except BaseException as error:
        ended = f"RAW {type(error).__name__} {error}"
    print(json.dumps([time.process_time() - started, ended]), flush=True)
"""
SECONDS = 12
GROWING = (
    "{{% set ns = namespace(v={seed}) %}}{{% for i in range({n}) %}}{{% set ns.v = {step} %}}"
    "{{% endfor %}}{{{{ ns.v | {end} }}}}"
)
STEPS = (
    "ns.v + ns.v",
    "ns.v ~ ns.v",
    "[ns.v, ns.v]",
    "{'a': ns.v, 'b': ns.v}",
    "(ns.v, ns.v, ns.v)",
    "ns.v * 3",
    "ns.v | string | replace('a', 'aaaa')",
    "ns.v | list + ns.v | list",
    "[ns.v] | map('string') | join(ns.v | string)",
    "ns.v | string | indent(60)",
    "ns.v | tojson(indent=60)",
    "dict(a=ns.v, b=ns.v) | items | list",
    "(ns.v | string).center(ns.v | string | length * 9)",
    "('%s' * 99) % ((ns.v | string,) * 99)",
    "'{0}{0}{0}'.format(ns.v)",
)
ENDS = ("length", "string", "tojson", "list | sort | length", "unique | list", "string | upper")
SEEDS = ("'a'", "'a\\n'", "[1]", "['a', 'b']", "('a',)")
FIXED = (
    "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else 'x' }}{% endmacro %}{{ f(%d) }}",
    "{% macro f() %}{% call f() %}{{ caller() }}{% endcall %}{% endmacro %}{{ f() }}",
    "{% for x in [1, [2, 3]] * %d recursive %}{{ loop([[1, 2], [3]]) }}{% endfor %}",
    "{% for x in range(99999) %}{% for y in range(99999) %}{{ loop.cycle('a', 'b') }}{% endfor %}{% endfor %}",
    "{% set c = cycler(*range(99999)) %}{% for x in range(99999) %}{{ c.next() }}{% endfor %}",
    "{% set j = joiner('x' * 99999) %}{% for x in range(99999) %}{{ j() }}{% endfor %}",
    "{{ range(99999) | groupby('real') | list }}{{ range(99999) | map('string') | sort | groupby(0) | length }}",
    "{% for x in range(999) %}{{ range(99999) | sort(reverse=true) | first }}{% endfor %}",
    "{{ range(99999) | select('in', range(99999) | list) | list | length }}",
    "{{ range(99999) | reject('odd') | select('divisibleby', 3) | map('string') | batch(7, 'x' * 99999) | list | string | length }}",
    "{{ ('a' * 999999) | wordwrap(1) }}",
    "{{ {'a': 'x' * 999999} | xmlattr }}",
    "{{ ('a ' * 9999999) | title | truncate(9) }}",
    "{{ ('a' * 9999999)[::-1] ~ ('b' * 9999999)[::3] }}",
    "{{ (range(99999) | list)[:] * %d }}",
    "{{ '%%(a)s' * 99999 %% {'a': 'x' * 99999} }}",
    "{{ '%%*d' %% (999999999, 1) }}{{ '%%.999999999f' %% 1.5 }}",
    "{{ '{:>{w}}'.format(1, w=999999999) }}",
    "{{ '{:>999999999}'.format(1) }}{{ '{:.999999999f}'.format(1.0) }}",
    "{{ ('a' * 999999).split('') }}{{ ('a' * 9999999).split('a') | length }}",
    "{{ ('\\t' * 999999).expandtabs(999999) }}{{ 'a'.zfill(999999999) }}",
    "{{ 3 ** 3 ** 3 ** 3 }}{{ (10 ** 4000) ** 99 }}{{ 1.5 ** 99999 }}",
    "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
    "{{ 5 | round(-999999999) }}{{ 5 | round(999999999, 'ceil') }}",
    "{{ range(3) | slice(999999999) | list }}{{ range(3) | sum(start='a') }}",
    "{{ ('9' * 999999) | int }}{{ ('f' * 99999) | int(0, 16) }}{{ ('1e' ~ '9' * 9999) | float }}",
    "{{ strftime_now('%%999999999d') }}{{ strftime_now('%%c' * 9999) }}",
    "{{ messages | map(attribute='items') | map('join', 'x' * 99999) | list | length }}",
    "{% filter replace('a', 'b' * 99999) %}{{ 'a' * 99999 }}{% endfilter %}",
    "{% set x %}{% for i in range(99999) %}{{ 'y' * 999 }}{% endfor %}{% endset %}{{ x | length }}",
    "{{ " + "(" * 900 + "1" + ")" * 900 + " }}",
    "{{ " + "-" * 9999 + "1 }}",
    "{{ " + " + ".join(["1"] * 20000) + " }}",
    "{{ [" * 300 + "1" + "] }}" * 300,
    "{% if 1 %}" * 400 + "x" + "{% endif %}" * 400,
    "{{ " + "1_1" * 90000 + " }}",
    "{# " * 90000,
    "{{ '" + "\\\\" * 90000 + " }}",
    "{% raw %}" * 9000,
    "{{ 1 }}" * 40000,
)

# Work inside one call, of which Python says nothing.
UNSEEN = (
    "{{ ('a' * 2000000).lstrip(('b' * 2000000) ~ 'a') | length }}",
    "{{ ('é' * 2000000).rstrip(('b' * 2000000) ~ 'é') | length }}",
    "{{ ('a' * 2000000) | trim(('b' * 2000000) ~ 'a') | length }}",
    "{{ ('a' * 1000000).strip('bcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789' ~ 'a') | length }}",
    "{% set t = 'é' * 20000 %}{% for i in range(99999) %}{% set x = t.lstrip('cdfghijklmné') %}{% endfor %}",
    "{{ ('a' * 400000).rfind('ab' ~ ('a' * 200000)) }}",
    "{{ ('a' * 400000).rindex('ab' ~ ('a' * 200000)) }}",
    "{{ ('a' * 400000).rpartition('ab' ~ ('a' * 200000)) | length }}",
    "{{ ('a' * 400000).rsplit('ab' ~ ('a' * 200000)) | length }}",
    "{{ ('a' * 400000).rsplit('ab' ~ ('a' * 200000), 1) | length }}",
    "{% set t = 'a' * 2400 %}{% set u = 'a' * 600 ~ 'b' ~ 'a' * 600 %}{% for i in range(99999) %}{{ u in t }}{{ t.find(u) }}{% endfor %}",
    "{% set t = 'a' * 29000 %}{% set u = 'a' * 49 ~ 'b' ~ 'a' * 49 %}{% for i in range(99999) %}{{ t.count(u) }}{{ t.replace(u, '') | length }}{{ t.split(u) | length }}{% endfor %}",
    "{% set t = 'a' * 400000 %}{% set u = 'a' * 100000 ~ 'b' ~ 'a' * 100000 %}{% for i in range(99999) %}{{ u in t }}{{ t.find(u) }}{{ t.partition(u) | length }}{% endfor %}",
    "{% set t = 'é' * 400000 %}{% set u = ('é' * 400000,) * 99999 %}{{ ('b' ~ t).startswith(u) }}{{ (t ~ 'b').endswith((t ~ 'c',) * 9999) }}",
    "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(32) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}{% for x in range(2) %}{{ loop.changed(n.a if x else n.b) }}{% endfor %}",
    "{% set a = 'x' * 10000000 %}{% set b = 'x' * 10000000 %}{% for i in range(99999) %}{{ loop.changed(a if loop.first else b) }}{% endfor %}",
    "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(32) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}{{ {'a': n.a}.items() == {'a': n.b}.items() }}",
    "{% set n = namespace(a=(1,), b=(1,)) %}{% for i in range(32) %}{% set n.a = (n.a, n.a) %}{% set n.b = (n.b, n.b) %}{% endfor %}{{ {'a': n.a}.items() > {'a': n.b}.items() }}",
    "{% for i in range(99999) %}{{ 0.5 in range(99999) }}{% endfor %}",
    "{% for i in range(99999) %}{{ 99998.0 in range(99999) }}{% endfor %}",
    "{{ range(0, 60000 * (2 ** 61 - 1), 2 ** 61 - 1) | unique | list | length }}",
    "{{ ((range(0, 2000 * (2 ** 61 - 1), 2 ** 61 - 1) | list) + [0] * 60000) | unique | list | length }}",
    "{{ dict(range(0, 60000 * (2 ** 61 - 1), 2 ** 61 - 1) | batch(2)) | length }}",
    "{% set d = dict(range(0, 5000 * (2 ** 61 - 1), 2 ** 61 - 1) | batch(2)) %}{% for i in range(99999) %}{{ d[0] }}{% endfor %}",
    "{% set t = ('a' * 10000000) %}{% for i in range(99999) %}{{ messages[0][t] is defined }}{% endfor %}",
    "{% set t = ('é' * 5000000) %}{% for i in range(99999) %}{{ t in messages[0] }}{{ messages[0].get(t) }}{{ messages[0] | attr(t) }}{% endfor %}",
    "{% set t = ('a' * 10000000) %}{% for i in range(99999) %}{{ t is filter }}{{ t is test }}{% endfor %}",
    "{% set n = namespace(a=()) %}{% for i in range(40) %}{% set n.a = (n.a, n.a) %}{% endfor %}{{ n.a is filter }}{{ n.a is test }}",
    "{% set n = namespace(a=()) %}{% for i in range(40) %}{% set n.a = (n.a, n.a) %}{% endfor %}{{ [1] | select(n.a) | list }}",
    "{{ messages | map(attribute='.' * 9000000) | list }}",
    "{{ ([messages] * 999) | sort(attribute='0,' * 100000) | list }}",
    "{{ ('%' ~ '0' * 1000000) % 1 }}",
    "{{ ('%' ~ '5' * 1000000) % 1 }}",
    "{{ ('%0.' ~ '5' * 1000000) % 1 }}",
    "{{ ['é' ~ '\n' * 20000000] | string | length }}",
    "{{ (['é' * 1000000] * 9999) | sort | length }}",
    "{{ (['A' * 1000000] * 9999) | unique | list | length }}",
    "{{ ('a\r' * 9000000).splitlines() | length }}",
    "{{ ('ab' * 1000000).replace('ab', 'c') | length }}{{ ('abababab' * 1000000).replace('ababab', 'c') | length }}",
    "{{ ('a' * 99999) | truncate(99000) | length }}",
    "{{ ([messages] * 99) | map(attribute='0.' * 100000) | list }}",
)


def templates(seed, count):
    rng = random.Random(seed)
    for _ in range(count):
        body = GROWING.format(
            seed=rng.choice(SEEDS),
            n=rng.choice((25, 300, 99999)),
            step=rng.choice(STEPS),
            end=rng.choice(ENDS),
        )
        if rng.random() < 0.3:
            body = f"{{% for outer in range({rng.choice((40, 9999))}) %}}{body}{{% endfor %}}"
        yield body
    for template in FIXED:
        yield template.replace("%d", str(rng.randrange(50, 5000))).replace("%%", "%")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [71, 72])
def test_templates_end_within_limits(seed):
    assert_end(list(templates(seed, 60)), SECONDS)


@pytest.mark.slow
def test_work_inside_one_call_is_counted():
    assert_end(list(UNSEEN), 4)


def assert_end(drawn, seconds):
    run = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(drawn),
        capture_output=True,
        text=True,
        timeout=900,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    ends = list(map(json.loads, run.stdout.splitlines()))
    assert run.returncode == 0, (drawn[len(ends)][:300], run.stderr[-500:])
    raw = [(t[:300], end) for t, (_, end) in zip(drawn, ends, strict=True) if end.startswith("RAW")]
    assert not raw
    late = [(t[:300], end) for t, end in zip(drawn, ends, strict=True) if end[0] > seconds]
    assert not late
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 3 << 20
