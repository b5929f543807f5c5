"""Grammars of strangers take effect as they are written, or are refused, and stay cheap."""

import collections
import contextlib
import json
import time

import numpy as np
import pytest

from glm_edge.errors import DataError
from glm_edge.generate import Grammar
from tests.constrained import accepts, nano_constraints, nano_tokenizer, tokens_of

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def tokenizer():
    return nano_tokenizer()


@pytest.fixture(scope="module")
def constraints():
    return nano_constraints()


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "integer", "minimun": 3}, "schema: the keyword 'minimun' is not supported"),
        ({"properties": {"a": {"nullable": True}}}, "schema.properties.a: the keyword 'nullable'"),
        ({"x-guidance": {"lenient": True}}, "x-guidance"),
        ({"not": {}}, "'not'"),
        ({"items": {"if": {}}}, "schema.items: the keyword 'if'"),
        ({"uniqueItems": True}, "uniqueItems"),
        ({"anyOf": [{"dependencies": {}}]}, r"schema.anyOf\[0\]: the keyword 'dependencies'"),
        ({"properties": {"a": {"$id": "x"}}}, r"'\$id'"),
        ({"format": "unknown"}, "schema.format: must be one of"),
        ({"prefixItems": [{}], "additionalItems": False}, "schema.additionalItems"),
        ({"prefixItems": [{}], "items": [{}]}, "schema.items"),
        ({"type": "object", "minProperties": 2}, "schema.minProperties: must be 0 or 1"),
        ({"const": 2**53 + 1}, "schema.const: integers must be within"),
        ({"const": float("inf")}, "finite"),
        ({"const": b"x"}, "must be a JSON value, found bytes"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"$ref": "http://localhost/x.json"}, "must be '#' or the plain path of a schema"),
        ({"$ref": "#/$defs/a"}, "must be '#' or the plain path"),
        ({"$ref": "#/title", "title": "x"}, "must be '#' or the plain path"),
        ({"$ref": "#"}, "json_schema: "),
        ({"allOf": [{"pattern": f"{i}"} for i in range(9)]}, "9 patterns and formats"),
        ({"patternProperties": {f"{i}": {} for i in range(101)}}, "the limit is 100"),
        ({"type": "frob"}, "frob"),
        ({"enum": []}, "json_schema: Unsatisfiable"),
        ({"type": "string", "pattern": "a(?=b)"}, "look"),
        ({"type": "string", "pattern": "["}, "json_schema: "),
        ([], "schema: must be an object"),
        ("[]", "schema: must be an object"),
        ("{", "schema: not JSON"),
        ('{"type": "string", "type": "integer"}', "type"),
        ("[" * 100_000, "schema: "),
    ],
)
def test_schemas_without_support_are_refused(constraints, schema, message):
    with pytest.raises(DataError, match=message) as caught:
        constraints.start(Grammar.json_schema(schema))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "texts", "others"),
    [
        ({"type": "object", "properties": {"a": {"type": "null"}}}, ['{"a":null}'], ['{"a":1}']),
        # A second spelling of the name would have any value.
        ({"properties": {"a": {"type": "null"}}}, ['{"b":1}'], ['{"\\u0061":1}', '{"a":1}']),
        ({"items": [{"type": "null"}], "additionalItems": False}, ["[null]"], ["[1]", "[null,1]"]),
        ({"$ref": "#/definitions/a", "maximum": 3, "definitions": {"a": {"type": "integer"}}},
         ["3"], ["4"]),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": [{"const": 1}]},
         ["[1]"], ["[2]"]),
        ({"type": "string", "pattern": "^[0-9]$", "title": "digit"}, ['"1"'], ['"11"']),
        ({"type": "object"}, ['{}', '{ "a" :\n  [1, {}]}'], ['{' + " " * 17 + '}', "[]"]),
        ({"type": "string"}, [r'"\n\""'], [r'"\u0041"', '"\n"']),
        ({"const": {"title": [1, "x"]}}, ['{"title":[1,"x"]}'], ['{"title":[1]}']),
    ],
)  # fmt: skip
def test_schemas_take_effect(constraints, tokenizer, schema, texts, others):
    grammar = Grammar.json_schema(schema)
    assert grammar == Grammar.json_schema(json.dumps(schema))
    assert all(accepts(constraints, tokenizer, grammar, text) for text in texts)
    assert not any(accepts(constraints, tokenizer, grammar, text) for text in others)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.regex("x("), "regex: .*unclosed group"),
        (lambda: Grammar.regex(r"(a)\1"), "backreferences are not supported"),
        (lambda: Grammar.regex("a^b"), "regex: "),
        (lambda: Grammar.regex("[^\\s\\S]"), "regex: "),
        (lambda: Grammar.regex("a" * 8193), "regex: has 8193 characters; the limit is 8192"),
        (lambda: Grammar.regex("\ud800"), "regex: .*surrogates"),
        (lambda: Grammar.regex(3), "regex: must be a text, found int"),
        (lambda: Grammar.lark("start: b"), "lark: .*unknown name"),
        (lambda: Grammar.lark("start: start"), "lark: "),
        (lambda: Grammar.lark("%%"), "lark: "),
        (lambda: Grammar.lark('start: "a" <|user|>'), "special tokens are not supported"),
        (lambda: Grammar.lark("start: <[0]>"), "special tokens are not supported"),
        (lambda: Grammar.lark("start: %json {}"), "'%json'"),
        (lambda: Grammar.lark('%llguidance {}\nstart: "a"'), "'%llguidance'"),
        (lambda: Grammar.lark("start: @x"), "references to other grammars"),
        (lambda: Grammar.lark("start[max_tokens=3]: /.*/"), "options of a rule"),
        (lambda: Grammar.lark("start: A\nA: " + "~" * 9 + "/a/"), "9 operators & and ~"),
        (lambda: Grammar("gbnf"), "kind must be one of"),
    ],
)
def test_wrong_grammars_are_refused(constraints, make, message):
    with pytest.raises(DataError, match=message) as caught:
        constraints.start(make())
    assert "\n" not in str(caught.value)


def test_lark_grammars(constraints, tokenizer):
    # Refused syntax inside strings, expressions and comments is text.
    source = 'start: "<a>" item* // %json <b>\nitem: /@[0-9]/ | "%json"\n'
    grammar = Grammar.lark(source)
    assert accepts(constraints, tokenizer, grammar, "<a>@1%json@2")
    assert not accepts(constraints, tokenizer, grammar, "<a>@")


def nested(depth, key="items"):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {key: schema}
    return schema


def chain(count, step):
    """References from each definition to the next one."""
    names = {f"d{i}": step({"$ref": f"#/$defs/d{i + 1}"}) for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": {**names, f"d{count}": {"type": "string"}}}


def rules(name, step, count):
    lines = (f"{name}{i}: {step.format(f'{name}{i + 1}')}" for i in range(count))
    return "\n".join([f"start: {name}0", *lines, f'{name}{count}: "a"'])


properties = {f"p{i}": {"type": "string"} for i in range(3000)}
HOSTILE = {
    "repeat": lambda: Grammar.regex("a{1,1000000}"),
    "repeats of repeats": lambda: Grammar.regex("((a{1,100}){1,100}){1,100}"),
    "nested quantifiers": lambda: Grammar.regex("((((a+)+)+)+)+$"),
    "alternatives": lambda: Grammar.regex("(" + "|".join("a" * i for i in range(1, 120)) + ")*b"),
    "exponential automaton": lambda: Grammar.regex("(a|b)*a(a|b){200}c"),
    "classes": lambda: Grammar.regex(r"(\p{L}|\w|\d){1,5000}"),
    "groups": lambda: Grammar.regex("(" * 4000 + ")" * 4000),
    "long": lambda: Grammar.regex("ab" * 4096),
    "depth": lambda: Grammar.json_schema(nested(5000)),
    "allowed depth": lambda: Grammar.json_schema(nested(60)),
    "deep value": lambda: Grammar.json_schema({"const": nested(5000)}),
    "chain": lambda: Grammar.json_schema(chain(900, lambda ref: ref)),
    "allowed chain": lambda: Grammar.json_schema(chain(350, lambda ref: ref)),
    "nested chain": lambda: Grammar.json_schema(
        chain(90, lambda ref: {"items": {"items": {"anyOf": [ref, {"type": "null"}]}}})
    ),
    "doubling": lambda: Grammar.json_schema(chain(60, lambda ref: {"allOf": [ref, ref]})),
    "products": lambda: Grammar.json_schema(
        {"allOf": [{"anyOf": [{"properties": {f"{i},{j}": {}}} for j in range(9)]}
                   for i in range(9)]}
    ),
    "optional": lambda: Grammar.json_schema({"properties": properties}),
    "required": lambda: Grammar.json_schema(
        {"type": "object", "properties": properties, "required": list(properties)[:-390]}
    ),
    "size": lambda: Grammar.json_schema({"enum": [f"value {i}" for i in range(20_000)]}),
    "values": lambda: Grammar.json_schema({"enum": [f"v{i}" for i in range(5000)]}),
    "recursion": lambda: Grammar.json_schema({"properties": {"a": {"$ref": "#"}}}),
    "endless": lambda: Grammar.json_schema({"allOf": [{"$ref": "#"}]}),
    "length": lambda: Grammar.json_schema({"type": "string", "minLength": 10**9}),
    "items": lambda: Grammar.json_schema({"type": "array", "minItems": 10**6, "maxItems": 10**9}),
    "divisor": lambda: Grammar.json_schema({"type": "integer", "multipleOf": 1_000_003}),
    "divisors": lambda: Grammar.json_schema(
        {"allOf": [{"type": "integer", "multipleOf": n} for n in (997, 991, 983)]}
    ),
    "range": lambda: Grammar.json_schema({"type": "integer", "maximum": 1e300}),
    "patterns": lambda: Grammar.json_schema(
        {"patternProperties": {f"^(a|b)*a(a|b){{{i}}}$": {} for i in range(10, 20)}}
    ),
    "name patterns": lambda: Grammar.json_schema(
        {"patternProperties": {f"^x{i}$": {} for i in range(1500)}}
    ),
    "intersection": lambda: Grammar.json_schema(
        {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(16)]}
    ),
    "allowed intersection": lambda: Grammar.json_schema(
        {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(8)]}
    ),
    "separate patterns": lambda: Grammar.json_schema(
        {"prefixItems": [{"pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(99)]}
    ),
    "intersected terminals": lambda: Grammar.lark(
        "start: A\nA: " + " & ".join(f"/(?s:.*)(a|b)*a(a|b){{{i}}}(?s:.*)/" for i in range(16))
    ),
    "rules": lambda: Grammar.lark(rules("r", "{}", 5000)),
    "terminals": lambda: Grammar.lark(rules("R", "{0} {0}", 3000)),
    "doubling terminals": lambda: Grammar.lark(rules("R", "{0} {0}", 30)),
    "parentheses": lambda: Grammar.lark("start: " + "(" * 9000 + '"a"' + ")" * 9000),
    "ambiguous": lambda: Grammar.lark('start: start start | "a" |'),
    "repeated rules": lambda: Grammar.lark('start: (("a" "b"){1,1000} "c"){1,1000}'),
    "complement": lambda: Grammar.lark("start: A\nA: ~/(a|b)*a(a|b){30}/ & /(?s:.*)/"),
    "blank lines": lambda: Grammar.lark("\n" * 32_000 + '"' * 700),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_or_cheap(constraints, name):
    rng, started, slowest = np.random.default_rng(0), time.thread_time(), 0
    with contextlib.suppress(DataError):
        matcher = constraints.start(HOSTILE[name]())
        for _ in range(60):
            before = time.thread_time()
            allowed = tokens_of(matcher.allowed())
            matcher.accept(int(rng.choice(allowed)))
            slowest = max(slowest, time.thread_time() - before)
    assert slowest < 0.5
    assert time.thread_time() - started < 3


def test_a_limit_inside_a_text_raises_and_does_not_end_it(constraints, tokenizer):
    # llguidance itself would allow the end of the text.
    matcher, a = constraints.start(HOSTILE["repeats of repeats"]()), tokenizer.token_to_id("a")
    with pytest.raises(DataError, match="regex: lexer error: too many expressions"):
        collections.deque(matcher.accept(a) for _ in range(1000))
