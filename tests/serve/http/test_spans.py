"""Thoughts, tags and calls in a text that arrives in pieces of any size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_edge.serve.http.spans import CallReader, TagReader


def split(text, cuts):
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def kinds(pieces, thinking=False):
    reader = TagReader(thinking)
    spans = [span for piece in pieces for span in reader.push(piece)] + reader.finish()
    joined = {"content": "", "reasoning": ""}
    for span in spans:
        joined[span.kind] += span.text
    return joined["content"], joined["reasoning"], spans


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("plain < text", "plain < text", ""),
        ("<think>why</think><answer>do()</answer>", "do()", "why"),
        ("why</think>do()", "whydo()", ""),
        ("<think>why<answer>do()", "do()", "why"),
        ("a<|begin_of_box|>b<|end_of_box|>c", "abc", ""),
        ("a <thin", "a <thin", ""),
        ("<think>never ends", "", "never ends"),
    ],
)
@given(cuts=st.lists(st.integers(1, 60), max_size=20))
def test_tags_never_reach_the_client(text, content, reasoning, cuts):
    pieces = split(text, cuts)
    got_content, got_reasoning, spans = kinds(pieces)
    assert (got_content, got_reasoning) == (content, reasoning)
    assert all(text[span.start : span.start + len(span.text)] == span.text for span in spans)


def test_a_thought_that_the_prompt_opened():
    assert kinds(["why</think>do()"], thinking=True)[:2] == ("do()", "why")


def calls(pieces, names=("tap", "tap_twice")):
    tags, reader = TagReader(tags=()), CallReader(names)
    spans = []
    for piece in pieces:
        for span in tags.push(piece):
            spans += reader.push(span)
    spans += reader.finish()
    content = "".join(span.text for span in spans if span.kind == "content")
    named = [span.text for span in spans if span.kind == "call"]
    return content, named, "".join(span.text for span in spans if span.kind == "arguments")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('tap\n{"x": 1}', ("", ["tap"], '{"x": 1}')),
        ('tap \n {"x": 1}\n', ("", ["tap"], '{"x": 1}\n')),
        ('tap_twice\n{"x": {}}', ("", ["tap_twice"], '{"x": {}}')),
        ("tap\nthe screen", ("tap\nthe screen", [], "")),
        ("tap", ("tap", [], "")),
        ("tape\n{}", ("tape\n{}", [], "")),
        ("\ntap\n{}", ("\ntap\n{}", [], "")),
        ("I say:\ntap\n{}", ("I say:\ntap\n{}", [], "")),
    ],
)
@given(cuts=st.lists(st.integers(1, 20), max_size=10))
def test_calls_are_found_at_any_split(text, expected, cuts):
    assert calls(split(text, cuts)) == expected


def test_each_turn_may_call():
    reader = CallReader(["a", "b"])
    tags = TagReader(tags=())
    spans = [out for span in tags.push("a\n{}") for out in reader.push(span)]
    spans += reader.next_turn()
    spans += [out for span in tags.push('b\n{"x":1}') for out in reader.push(span)]
    assert [(span.kind, span.text) for span in spans] == [
        ("call", "a"),
        ("arguments", "{}"),
        ("call", "b"),
        ("arguments", '{"x":1}'),
    ]
    assert reader.calls == 2
