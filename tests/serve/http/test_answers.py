"""Tokens of the engine as what a client receives."""

import json

import pytest
import tokenizers

from glm_edge.preprocess.tokenizer_files import read_tokenizer
from glm_edge.serve import Finished, Token, Usage
from glm_edge.serve.http.answers import Answer, AnswerForm, Piece
from glm_edge.serve.http.errors import ApiError
from glm_edge.serve.http.formats import Gathered
from tests.serve.http.fakes import NANO

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(NANO / "tokenizer.json")


@pytest.fixture(scope="module")
def tagged():
    """A tokenizer whose tags are special tokens, as in GLM-4.1V."""
    made = read_tokenizer(NANO / "tokenizer.json")
    made.add_special_tokens([tokenizers.AddedToken(tag, special=True) for tag in TAGS])
    return made


def run(tokenizer, text, reason="stop", **form):
    """Feed a text token by token; return the parts, the answer and the count of cancellations."""
    cancelled = []
    answer = Answer(AnswerForm(tokenizer=tokenizer, **form), lambda: cancelled.append(1))
    parts, pieces = Gathered(), []
    for token in tokenizer.encode(text, add_special_tokens=False).ids:
        pieces.append(answer.push(Token(token, logprob=-0.5, top=((token, -0.5), (7, -1.5)))))
    if cancelled:
        reason = "cancelled"
    pieces.append(answer.finish(Finished(reason, Usage(prompt_tokens=3))))
    for piece in pieces:
        parts.add(piece)
    return parts, answer, len(cancelled)


@pytest.mark.parametrize("name", ["tokenizer", "tagged"])
def test_thoughts_are_inline_without_tags(name, request):
    tokenizer = request.getfixturevalue(name)
    text = '<think>the key is left</think><answer>do(action="Back")</answer>'
    parts, answer, _ = run(tokenizer, text)
    assert parts.content == 'the key is leftdo(action="Back")'
    assert parts.reasoning == ""
    assert answer.finish_reason == "stop"
    assert answer.reasoning_tokens > 3


@pytest.mark.parametrize("name", ["tokenizer", "tagged"])
def test_thoughts_apart(name, request):
    tokenizer = request.getfixturevalue(name)
    text = "<think>why</think><answer>because</answer>"
    parts, *_ = run(tokenizer, text, thinking="separate")
    assert (parts.content, parts.reasoning) == ("because", "why")
    parts, *_ = run(tokenizer, text, thinking="omit")
    assert (parts.content, parts.reasoning) == ("because", "")
    parts, *_ = run(tokenizer, "why</think>because", thinking="separate", opened=True)
    assert (parts.content, parts.reasoning) == ("because", "why")


@pytest.mark.parametrize("name", ["tokenizer", "tagged"])
def test_a_stop_string_may_be_a_tag(name, request):
    tokenizer = request.getfixturevalue(name)
    parts, answer, cancelled = run(tokenizer, "<answer>go</answer>more", stop=["</answer>"])
    assert (parts.content, answer.finish_reason, cancelled) == ("go", "stop", 1)


def test_a_stop_string_ends_the_answer(tokenizer):
    text = "the quick brown fox jumps over"
    full = len(tokenizer.encode(text).ids)
    parts, answer, cancelled = run(tokenizer, text, stop=["own f", "zzz"])
    assert parts.content == "the quick br"
    assert (answer.finish_reason, cancelled) == ("stop", 1)
    assert answer.tokens < full


def test_a_beginning_of_a_stop_string_is_shown_at_the_end(tokenizer):
    parts, answer, _ = run(tokenizer, "the quick", reason="length", stop=["quick brown"])
    assert (parts.content, answer.finish_reason) == ("the quick", "length")


@pytest.mark.parametrize(
    ("text", "form", "shown"),
    [
        ("plain words", {}, "plain words"),
        ("你好, ümlaut 🎉!", {}, "你好, ümlaut 🎉!"),
        ("<think>why</think><answer>do</answer>", {}, "whydo"),
        ("<think>why</think>do", {"thinking": "separate"}, "do"),
        ("the quick brown fox", {"stop": ["ick br"]}, "the qu"),
        ("a < b <thin", {}, "a < b <thin"),
    ],
)
def test_tokens_with_logprobs_spell_the_content(tokenizer, text, form, shown):
    parts, *_ = run(tokenizer, text, logprobs=True, top_logprobs=1, **form)
    assert parts.content == shown
    assert "".join(entry.text for entry in parts.entries) == shown
    entries = [entry.chat() for entry in parts.entries]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == shown
    assert all(entry["logprob"] == -0.5 and len(entry["top_logprobs"]) == 1 for entry in entries)


def test_pieces_of_a_stream_carry_their_own_tokens(tokenizer):
    answer = Answer(AnswerForm(tokenizer=tokenizer, logprobs=True), lambda: None)
    for token in tokenizer.encode("one two three").ids:
        piece = answer.push(Token(token, logprob=-1.0))
        assert "".join(entry.text for entry in piece.entries) == piece.content


def test_calls_of_tools(tokenizer):
    separator = tokenizer.token_to_id("<|assistant|>")
    form = {"names": ["tap", "say"], "next_call": separator}
    text = 'tap\n{"x": 1}<|assistant|>say\n{"text": "hi"}'
    parts, answer, _ = run(tokenizer, text, **form)
    assert [(name, json.loads(arguments)) for _, name, arguments in parts.calls] == [
        ("tap", {"x": 1}),
        ("say", {"text": "hi"}),
    ]
    assert len({call for call, *_ in parts.calls}) == 2
    assert (parts.content, answer.finish_reason) == ("", "tool_calls")


def test_one_call_only(tokenizer):
    separator = tokenizer.token_to_id("<|assistant|>")
    form = {"names": ["tap"], "next_call": separator, "parallel": False}
    parts, answer, cancelled = run(tokenizer, "tap\n{}<|assistant|>tap\n{}", **form)
    assert [arguments for *_, arguments in parts.calls] == ["{}"]
    assert (answer.finish_reason, cancelled) == ("tool_calls", 1)


def test_a_call_that_the_context_cuts_is_no_complete_call(tokenizer):
    parts, answer, _ = run(tokenizer, 'tap\n{"x": ', reason="length", names=["tap"])
    assert parts.calls[0][2] == '{"x": '
    assert answer.finish_reason == "length"


@pytest.mark.parametrize(("reason", "status"), [("error", 500), ("cancelled", 503)])
def test_an_end_before_the_end_is_an_error(tokenizer, reason, status):
    answer = Answer(AnswerForm(tokenizer=tokenizer), lambda: None)
    answer.push(Token(20))
    with pytest.raises(ApiError) as ended:
        answer.finish(Finished(reason, Usage(), "the scores are NaN"))
    assert ended.value.status == status


def test_nothing_is_an_empty_piece():
    assert not Piece()
    assert Piece(reasoning="x")
