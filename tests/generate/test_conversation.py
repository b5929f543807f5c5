"""Conversations answered in text: what reaches the model and what comes back."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest

import glm_edge as ge
from glm_edge.errors import DataError
from glm_edge.generate import conversation, generate

NANO = ge.shipped("nano")
QUESTION = [{"role": "user", "content": "tap the star icon"}]


@pytest.fixture(scope="module")
def processor():
    return ge.Processor.from_checkpoint(NANO)


@pytest.fixture
def answering(processor, monkeypatch):
    """A model that gives the texts it is told to, and notes what it was given."""

    def tell(*texts, max_new_tokens=64):
        noted = {}
        rows = [processor.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        stop = processor.stop_token_ids[0]

        def give(model, params, tokens, max_new_tokens, **options):
            noted.update(options, tokens=tokens)
            filled = [(row + [stop] * max_new_tokens)[:max_new_tokens] for row in rows]
            lengths = [min(len(row), max_new_tokens) for row in rows]
            return SimpleNamespace(tokens=np.array(filled), lengths=np.array(lengths))

        monkeypatch.setattr(conversation, "generate", give)
        model = SimpleNamespace(config=SimpleNamespace(eos_token_ids=(7, stop)))
        return noted, lambda *arguments, **options: ge.chat(
            model, {}, processor, *arguments, max_new_tokens=max_new_tokens, **options
        )

    return tell


def test_a_question_is_a_conversation_of_one_message(answering, processor):
    noted, chat = answering(" Done. ")
    assert chat("tap the star icon") == chat(QUESTION) == "Done."
    np.testing.assert_array_equal(noted["tokens"], processor(QUESTION).tokens)
    assert noted["stop_tokens"] == (*processor.stop_token_ids, 7)
    sampling = ge.generate.Sampling(temperature=0.7)
    chat(QUESTION, sampling=sampling, cache_dtype="int8")
    assert (noted["sampling"], noted["cache_dtype"]) == (sampling, "int8")


def test_images_and_recordings_come_before_the_question(answering, processor):
    screen = np.zeros((192, 96, 3), np.float32)
    sound = np.zeros(4000, np.float32)
    noted, chat = answering("ok")
    chat("tap the star icon", images=[screen], audio=[sound])
    parts = [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": "tap the star icon"}]
    expected = processor([{"role": "user", "content": parts}], images=[screen], audio=[sound])
    np.testing.assert_array_equal(noted["tokens"], expected.tokens)
    assert len(noted["images"]) == len(noted["audio"]) == 1


def test_several_conversations_give_a_list(answering):
    _, chat = answering("yes", "no")
    assert chat([QUESTION, QUESTION]) == ["yes", "no"]


def test_thinking_is_split_and_stop_strings_cut(answering):
    _, chat = answering("<think>\nwhy</think><answer>because</answer>")
    assert chat("?") == "<think>\nwhy</think><answer>because</answer>"
    assert chat("?", split_thinking=True) == ("why", "because")
    assert chat("?", stop_strings=["</think>", "ause"]) == "<think>\nwhy"


def test_an_answer_that_was_cut_is_told(answering):
    _, chat = answering("one two three four five six seven", "yes", max_new_tokens=5)
    with pytest.warns(UserWarning, match="1 of 2 answers reached max_new_tokens=5"):
        chat([QUESTION, QUESTION])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chat([QUESTION, QUESTION], stop_strings=["on"])


def test_wrong_arguments_are_refused(answering, processor):
    _, chat = answering("ok")
    with pytest.raises(DataError, match=r"must be a glm_edge\.Processor, not a Tokenizer"):
        ge.chat(None, None, processor.tokenizer, "?")
    with pytest.raises(DataError, match="stop_strings"):
        chat("?", stop_strings="stop")
    with pytest.raises(DataError, match="there is no conversation"):
        chat([])


def test_chat_says_what_generate_gives(processor):
    model, params = ge.load(NANO)
    with pytest.warns(UserWarning, match="max_new_tokens=4"):
        told = ge.chat(model, params, processor, QUESTION, max_new_tokens=4)
    tokens = generate(model, params, **processor(QUESTION), max_new_tokens=4).tokens
    assert told == processor.decode(np.asarray(tokens)[0]).strip() != ""
