"""Constrained texts parse, whatever the scores; grammars of strangers are refused or cheap."""

import concurrent.futures
import json
import re
import sys

import jax
import numpy as np
import pytest
from tokenizers import AddedToken

import glm_edge as ge
from glm_edge.errors import DataError, MissingExtraError
from glm_edge.generate import Constraints, Grammar, Sampling, mask_logits, stream
from glm_edge.generate.constraint import MAX_GRAMMARS
from glm_edge.preprocess.chat import split_thinking
from tests.constrained import (
    STOP,
    VOCABULARY,
    accepts,
    nano_constraints,
    nano_tokenizer,
    parse_action,
    split_by_markers,
    split_by_tags,
    tokens_of,
)

pytest.importorskip("llguidance")

USER = 2
SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "level": {"type": "integer", "minimum": 2, "maximum": 40},
        "kind": {"enum": ["tap", "swipe", None]},
        "inner": {"$ref": "#/$defs/node"},
    },
    "required": ["title", "level", "inner"],
    "additionalProperties": False,
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["tags"],
            "additionalProperties": False,
        }
    },
}
PATTERN = r"[a-f]{2,9}(-[0-9]+)?|(é|漢){1,3} \([^)\n]*\)"
# Actions as Open-AutoGLM documents them.
ACTIONS = (
    'do(action="Launch", app="Settings")',
    'do(action="Tap", element=[435,715])',
    'do(action="Tap", element=[0,999], message="重要操作")',
    'do(action="Type", text="你好 hello")',
    'do(action="Type", text="")',
    'do(action="Type_Name", text="Ann")',
    'do(action="Swipe", start=[505,705], end=[505,295])',
    'do(action="Long Press", element=[15,25])',
    'do(action="Double Tap", element=[15,25])',
    'do(action="Back")',
    'do(action="Home")',
    'do(action="Wait", duration="3 seconds")',
    'do(action="Take_over", message="log in")',
    'do(action="Interact")',
    'do(action="Note", message="True")',
    'do(action="Call_API", instruction="sum up")',
    'finish(message="done")',
)
FIELDS = {
    re.search('"(.*?)"', text)[1]: set(re.findall(r"(\w+)=", text)) - {"action"}
    for text in ACTIONS[:-1]
    if "重要" not in text
}


@pytest.fixture(scope="module")
def tokenizer():
    return nano_tokenizer()


@pytest.fixture(scope="module")
def constraints():
    return nano_constraints()


def draw(matcher, rng, closing, length=24):
    """Tokens drawn at temperature 2; `closing` ones are much more likely after `length` tokens."""
    tokens = []
    while True:
        allowed = tokens_of(matcher.allowed())
        scores = rng.normal(size=len(allowed)) / 2 + rng.gumbel(size=len(allowed))
        if len(tokens) > length:
            scores += 50 * np.isin(allowed, closing)
        token = int(allowed[scores.argmax()])
        matcher.accept(token)
        if token in (STOP, USER):
            return tokens
        tokens.append(token)
        assert len(tokens) < 400, "the text does not end"


def check_schema(text):
    value = json.loads(text)
    assert list(value) == [name for name in SCHEMA["properties"] if name in value]
    assert {"title", "level", "inner"} <= set(value)
    assert isinstance(value["title"], str)
    assert type(value["level"]) is int
    assert 2 <= value["level"] <= 40
    assert value.get("kind") in ("tap", "swipe", None)
    node = value["inner"]
    while node is not None:
        assert set(node) <= {"tags", "next"}
        assert len(node["tags"]) <= 2
        assert all(isinstance(tag, str) for tag in node["tags"])
        node = node.get("next")


def check_pattern(text):
    assert re.fullmatch(PATTERN, text)


def check_action(text):
    """Both versions of the client read the text, with the tags or without, as it is written."""
    untagged = re.sub("</?(think|answer)>", "", text)
    for content in (text, untagged):
        for split in (split_by_markers, split_by_tags):
            thinking, response = split(content)
            assert "do(action=" not in thinking
            action = parse_action(response)
            written = re.search(r'\w+\((.*=)?"(.*)"\)$|\]\)$', response, re.DOTALL)
            assert written, response
            if response.startswith("finish"):
                assert response == f'finish(message="{action["message"]}")'
                continue
            kind = re.match(r'do\(action="([^"]*)"', response)[1]
            assert kind in FIELDS
            assert set(action) - {"action", "message"} == FIELDS[kind] - {"message"}
            assert action.keys() >= FIELDS[kind]
            for name in ("text", "message", "app", "instruction", "duration"):
                assert name not in action or f'{name}="{action[name]}"' in response
            assert action.get("app", "x")
            for name in ("element", "start", "end"):
                assert all(type(x) is int and 0 <= x <= 999 for x in action.get(name, [0]))
    assert split_thinking(text)[1].endswith(split_by_tags(text)[1])


CASES = {
    "schema": (Grammar.json_schema(SCHEMA), check_schema, ['"', "}", "]", '"}', ","]),
    "object": (Grammar.json_object(), json.loads, ['"', "}", "]", ":", "1", ","]),
    "regex": (Grammar.regex(PATTERN), check_pattern, [")"]),
    "phone": (Grammar.phone_actions(), check_action, ['"', ")", '")']),
    "thinking": (
        Grammar.phone_actions(thinking=True),
        check_action,
        ['"', ")", '")', 'do(action="Back")'],
    ),
}


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_random_texts_parse(constraints, tokenizer, name, count):
    grammar, check, closing = CASES[name]
    closing = [STOP, *map(tokenizer.token_to_id, closing)]
    rng, texts = np.random.default_rng(count), set()
    for _ in range(count):
        tokens = draw(constraints.start(grammar), rng, closing)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert text == tokenizer.decode(tokens, skip_special_tokens=False)
        check(text)
        texts.add(text)
    assert len(texts) > count / 2


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("text", ACTIONS)
def test_actions_are_unchanged(constraints, tokenizer, text, thinking):
    grammar = Grammar.phone_actions(thinking)
    assert accepts(constraints, tokenizer, grammar, text)
    check_action(text)
    assert not accepts(constraints, tokenizer, grammar, text[:-1])


@pytest.mark.parametrize(
    "text",
    [
        'do(action="Launch", app="")',
        'do(action="Tap", element=[1000,5])',
        'do(action="Tap", element=[05,5])',
        'do(action="Tap",element=[5,5])',
        'do(action="Fly")',
        'do(action="Type", text="a\\"b")',
        'do(action="Type", text="a\nb")',
        'do(action="Type", text="finish(message=")',
        'finish(message="<answer>")',
        'do(action="Back")</answer>',
        'do(action="Back") ',
    ],
)
def test_texts_that_the_client_misreads_are_refused(constraints, tokenizer, text):
    for thinking in (False, True):
        assert not accepts(constraints, tokenizer, Grammar.phone_actions(thinking), text)


@pytest.mark.parametrize(
    ("thought", "allowed"),
    [
        ("I see a <b> button.\n", True),
        ("<think>x</think><answer>", True),
        ("<think>x</think>\n<answer>", True),
        ("x</think>", True),
        ("finish(message) or do(action)", True),
        ("<think>x", False),
        ("<think><think>x</think>", False),
        ('do(action="Home")', False),
    ],
)
def test_thoughts_before_an_action(constraints, tokenizer, thought, allowed):
    text = thought + 'do(action="Back")'
    assert accepts(constraints, tokenizer, Grammar.phone_actions(thinking=True), text) == allowed
    assert not accepts(constraints, tokenizer, Grammar.phone_actions(), text)


def test_tags_may_be_special_tokens():
    tokenizer = ge.load_tokenizer(ge.shipped("nano"))
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    tokenizer.add_special_tokens([AddedToken(tag, special=True) for tag in tags])
    constraints = Constraints(tokenizer, [STOP, USER], VOCABULARY + 32)
    grammar = Grammar.phone_actions(thinking=True)
    for text in ("<think>x</think>\n<answer>", "<answer>", "x</think>", "<think></think>", "x", ""):
        assert accepts(constraints, tokenizer, grammar, f'{text}do(action="Back")')
    assert not accepts(constraints, tokenizer, grammar, '<think>x<answer>do(action="Back")')
    closing = [STOP, USER, *map(tokenizer.token_to_id, ['"', '")', ")", 'do(action="Back")'])]
    rng = np.random.default_rng(0)
    tagged = 0
    for _ in range(30):
        tokens = draw(constraints.start(grammar), rng, [*closing, VOCABULARY + 1])
        check_action(tokenizer.decode(tokens, skip_special_tokens=False))
        check_action(tokenizer.decode(tokens, skip_special_tokens=True))
        tagged += bool(set(tokens) & set(range(VOCABULARY, VOCABULARY + 4)))
    assert tagged
    for token in range(VOCABULARY, VOCABULARY + 32):
        assert token not in tokens_of(constraints.start(Grammar.regex("(?s:.*)")).allowed())


@pytest.mark.parametrize("name", CASES)
def test_forced_tokens_spell_the_only_continuation(constraints, tokenizer, name):
    grammar, _, closing = CASES[name]
    closing = [STOP, *map(tokenizer.token_to_id, closing)]
    rng, count = np.random.default_rng(1), 0
    for _ in range(10):
        matcher = constraints.start(grammar)
        tokens = [*draw(matcher.copy(), rng, closing), STOP]
        for token in tokens:
            forced = matcher.forced()
            if forced:
                allowed = tokens_of(matcher.allowed())
                assert STOP not in allowed
                text = tokenizer.decode(forced)
                continuations = tokenizer.decode_batch([[x] for x in allowed])
                assert all(x.startswith(text) or text.startswith(x) for x in continuations)
                jumped = matcher.copy()
                for x in forced:
                    jumped.accept(x)
                count += len(forced)
            matcher.accept(token)
        assert matcher.forced() == []
    assert count or name in ("regex", "thinking")


def test_forced_tokens_are_those_of_the_tokenizer(constraints, tokenizer):
    text = '{"title": "settings", "level": 3}'
    matcher = constraints.start(Grammar.regex(re.escape(text)))
    assert matcher.forced() == tokenizer.encode(text).ids
    for token in matcher.forced():
        matcher.accept(token)
    assert matcher.finished
    # The text may end before "bcd".
    optional = constraints.start(Grammar.regex("a(bcd)?"))
    optional.accept(tokenizer.token_to_id("a"))
    assert optional.forced() == []
    assert not optional.finished


def test_copies_and_rollback(constraints, tokenizer):
    matcher = constraints.start(Grammar.regex("ab?"))
    a, b = map(tokenizer.token_to_id, "ab")
    start = matcher.allowed()
    assert tokens_of(start).tolist() != [a]
    with pytest.raises(ValueError, match=f"token {b} is not allowed"):
        matcher.accept(b)
    matcher.accept(a)
    assert tokens_of(matcher.allowed()).tolist() == [STOP, b]
    twin = matcher.copy()
    matcher.accept(b)
    assert matcher.finished
    matcher.accept(STOP)
    matcher.accept(STOP)
    assert tokens_of(matcher.allowed()).tolist() == [STOP]
    assert tokens_of(twin.allowed()).tolist() == [STOP, b]
    with pytest.raises(ValueError, match="cannot remove 5 of 4"):
        matcher.rollback(5)
    matcher.rollback(3)
    assert tokens_of(matcher.allowed()).tolist() == [STOP, b]
    matcher.rollback(1)
    assert np.array_equal(matcher.allowed(), start)
    twin.rollback(1)
    assert np.array_equal(twin.allowed(), start)
    with pytest.raises(ValueError, match="cannot remove 1 of 0"):
        twin.rollback(1)


def test_stop_tokens_end_complete_texts_only(tokenizer):
    z = tokenizer.token_to_id("z")
    constraints = Constraints(tokenizer, [STOP, USER, z], VOCABULARY)
    matcher = constraints.start(Grammar.regex("[a-z]{2}"))
    allowed = tokens_of(matcher.allowed())
    assert not {STOP, USER, z} & set(allowed)
    matcher.accept(tokenizer.token_to_id("a"))
    matcher.accept(tokenizer.token_to_id("b"))
    assert tokens_of(matcher.allowed()).tolist() == [STOP, USER, z]
    assert matcher.finished
    matcher.accept(z)
    assert matcher.forced() == []


@pytest.mark.parametrize("size", [2200, VOCABULARY, 2400, 4000])
def test_special_and_padding_tokens_are_never_allowed(tokenizer, size):
    matcher = Constraints(tokenizer, [STOP], size).start(Grammar.regex("(?s:.*)"))
    words = matcher.allowed()
    assert words.shape == (-(-size // 32),)
    assert words.dtype == np.uint32
    allowed = tokens_of(words)
    assert allowed.max() < min(size, VOCABULARY)
    assert not set(range(1, 11)) & set(allowed)
    assert {STOP, *range(11, 12)} <= set(allowed)


def test_stop_tokens_outside_the_vocabulary_are_refused(tokenizer):
    for token in (-1, VOCABULARY):
        with pytest.raises(DataError, match=f"stop_tokens: {token} is not in 0..2303"):
            Constraints(tokenizer, [token], VOCABULARY)


def test_grammars_are_compiled_once_and_a_bounded_number_is_stored(constraints):
    grammar = Grammar.regex("[a-z]{3}")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        masks = list(pool.map(lambda _: constraints.start(grammar).allowed(), range(8)))
    assert all(np.array_equal(mask, masks[0]) for mask in masks)
    for i in range(MAX_GRAMMARS + 5):
        constraints.start(Grammar.regex(f"a{{{i}}}b"))
    assert len(constraints._compiled) == MAX_GRAMMARS
    assert grammar not in constraints._compiled


@pytest.mark.parametrize("size", [33, 64, 70])
def test_mask_logits_reads_one_bit_per_token(size):
    rng = np.random.default_rng(size)
    logits = rng.normal(size=(3, size)).astype(np.float32)
    words = rng.integers(0, 2**32, (3, -(-size // 32)), np.uint32)
    expected = [
        [x if int(words[b, i // 32]) >> (i % 32) & 1 else -np.inf for i, x in enumerate(row)]
        for b, row in enumerate(logits)
    ]
    masked = jax.jit(mask_logits)
    assert np.array_equal(masked(logits, words), np.float32(expected))
    assert np.array_equal(masked(logits, words.view(np.int32)), np.float32(expected))


def test_the_extra_is_named_when_missing(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"glm_edge\[constrain\]"):
        Constraints(tokenizer, [STOP], VOCABULARY)


def test_stream_under_constraints(make_model, tokenizer):
    model, params = make_model(vocab_size=VOCABULARY)
    constraints = Constraints(tokenizer, [STOP], VOCABULARY)
    prompts = np.array([[11, 12, 13], [14, 15, 16]])

    def texts(patterns, **options):
        matchers = [constraints.start(Grammar.regex(pattern)) for pattern in patterns]
        steps = stream(model, params, prompts, 12, matchers=matchers, **options)
        rows = np.stack(list(steps), axis=1)
        ended = [tokens_of(matcher.allowed()).tolist() == [STOP] for matcher in matchers]
        return [tokenizer.decode(row.tolist()) for row in rows], ended

    warm = {"sampling": Sampling(temperature=2.0), "rng": jax.random.key(3)}
    (first, second), ended = texts(["[a-z]{8}", "[0-9]{2}"], **warm)
    assert re.fullmatch("[a-z]{8}", first)
    assert re.fullmatch("[0-9]{2}", second)
    assert ended == [True, True]
    greedy, _ = texts(["[a-z]{8}", "[0-9]{2}"])
    assert texts(greedy)[0] == greedy
    with pytest.raises(DataError, match="matchers: 1 for 2 rows"):
        texts(["a"])
