"""Conversations answered in text: what reaches the model and what comes back."""

import warnings
from types import SimpleNamespace

import flax.linen as nn
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

        def give(model, params, inputs, max_new_tokens, **options):
            noted.update(options, **inputs)
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
    cached = ge.generate.DecodeOptions(cache_dtype="int8")
    chat(QUESTION, sampling=sampling, options=cached)
    assert (noted["sampling"], noted["options"]) == (sampling, cached)


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
    assert ge.preprocess.split_thinking(chat("?")) == ("why", "because")
    assert chat("?", stop_strings=["</think>", "ause"]) == "<think>\nwhy"


def test_an_answer_that_was_cut_is_told(answering):
    _, chat = answering("one two three four five six seven", "yes", max_new_tokens=5)
    with pytest.warns(UserWarning, match="1 of 2 answers reached max_new_tokens=5"):
        chat([QUESTION, QUESTION])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chat([QUESTION, QUESTION], stop_strings=["on"])


def test_chat_passes_variables_to_the_template(answering):
    _, chat = answering("ok")
    assert chat(QUESTION, variables={"enable_thinking": False}) == "ok"
    with pytest.raises(DataError, match="tools and documents are unknown here"):
        chat(QUESTION, variables={"tools": [{"type": "function", "function": {"name": "tap"}}]})


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
    tokens = generate(model, params, processor(QUESTION), max_new_tokens=4).tokens
    assert told == processor.decode(np.asarray(tokens)[0]).strip() != ""


@pytest.mark.parametrize("form", ["array", "float_stack", "path", "text", "pillow"])
def test_a_single_image_is_a_list_of_one(answering, form, tmp_path):
    screen = np.zeros((192, 96, 3), np.uint8)
    if form in ("path", "text", "pillow"):
        pillow = pytest.importorskip("PIL.Image").fromarray(screen)
        pillow.save(tmp_path / "x.png")
        path = tmp_path / "x.png"
        single = {"path": path, "text": str(path), "pillow": pillow}[form]
    else:
        single = screen if form == "array" else np.zeros((1, *screen.shape), np.float32)
    noted, chat = answering("ok")
    assert chat("tap the star icon", images=single) == "ok"
    (result,) = noted["images"]
    chat("tap the star icon", images=[screen])
    np.testing.assert_array_equal(result, noted["images"][0])


def test_a_single_recording_is_a_list_of_one(answering):
    sound = np.zeros(4000, np.float32)
    noted, chat = answering("ok")
    for single in (sound, (sound, 16000)):
        chat("tap", audio=single)
        assert len(noted["audio"]) == 1


def test_a_single_message_is_a_conversation(answering, processor):
    noted, chat = answering("ok")
    assert chat(QUESTION[0]) == "ok"
    np.testing.assert_array_equal(noted["tokens"], processor(QUESTION).tokens)
    np.testing.assert_array_equal(processor(QUESTION[0]).tokens, noted["tokens"])


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ({"role": "user"}, {}, "message of 'user' must have a 'content'"),
        ([{"role": "user", "content": None}], {}, r"messages\[0\].*must have a 'content'"),
        ([{"role": "assistant"}], {}, "must have a 'content'"),
        (7, {}, "messages: pass a list of .*not a int"),
        ([], {}, "no conversation"),
        (["tap"], {}, r"messages\[0\]: must be a list of"),
        ("tap", {"images": 3}, "image: pass a list of paths or arrays, not a int"),
        ("tap", {"audio": {"a": 1}}, "audio: pass a list of paths or arrays, not a dict"),
    ],
)
def test_other_messages_and_media_are_named(answering, messages, options, message):
    _, chat = answering("ok")
    with pytest.raises(DataError, match=message):
        chat(messages, **options)


@pytest.mark.parametrize("prompt", ["tap", QUESTION, QUESTION[0], [QUESTION]])
def test_generate_text_names_chat_for_messages(processor, prompt):
    with pytest.raises(DataError, match=r"token ids.*glm_edge\.chat"):
        ge.generate.generate_text(None, {}, processor.tokenizer, prompt)


def test_generate_text_names_chat_for_a_processor(processor):
    with pytest.raises(DataError, match=r"tokenizer is a Processor.*glm_edge\.chat"):
        ge.generate.generate_text(None, {}, processor, [1, 2])


@pytest.mark.parametrize("model", [nn.Dense(3), nn.Dense, None])
def test_what_is_no_glm_does_not_generate(processor, model):
    for run in (ge.generate.generate, lambda *a: list(ge.generate.stream(*a))):
        with pytest.raises(DataError, match=r"model must be a glm_edge\.MultimodalGLM"):
            run(model, {}, [[1, 2]])
    with pytest.raises(DataError, match=r"model must be a glm_edge\.MultimodalGLM"):
        ge.chat(model, {}, processor, "tap")
