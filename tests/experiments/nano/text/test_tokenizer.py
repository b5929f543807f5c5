import hashlib
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.nano.text import tokenizer as nano_tokenizer
from glm_edge.cli import corpora
from glm_edge.configs import preset
from glm_edge.errors import DataError

SHIPPED = nano_tokenizer.load(str(resources.files("glm_edge") / "assets/nano/tokenizer.json"))
SIZES = corpora.token_bytes(SHIPPED)

pieces = st.sampled_from(
    [
        *nano_tokenizer.SPECIALS,
        *nano_tokenizer.ACTION_LITERALS,
        *nano_tokenizer.X_TOKENS[::30],
        *nano_tokenizer.Y_TOKENS[::30],
        "\n",
        " ",
        "\r\n",
        "1",
        "[",
    ]
)
texts = st.one_of(st.text(), st.lists(st.one_of(st.text(max_size=4), pieces)).map("".join))


@given(texts)
def test_text_survives_encoding(text):
    ids = corpora.encode_text(SHIPPED, text)
    assert SHIPPED.decode(ids.tolist(), skip_special_tokens=False) == text
    assert SIZES[ids].sum() == len(text.encode())
    assert not (ids < len(nano_tokenizer.SPECIALS)).any()


@given(texts)
def test_prompts_survive_encoding(text):
    ids = SHIPPED.encode(text).ids
    assert SHIPPED.decode(ids, skip_special_tokens=False) == text
    assert SIZES[ids].sum() == len(text.encode())


def test_ids_are_those_of_the_nano_preset():
    config = preset("nano")
    assert SHIPPED.get_vocab_size() == config.decoder.vocab_size == nano_tokenizer.VOCAB_SIZE
    token = SHIPPED.token_to_id
    assert [token(name) for name in nano_tokenizer.SPECIALS] == list(range(11))
    assert token("<|image|>") == config.image_token_id
    assert token("<|audio|>") == config.audio_token_id
    assert (token("<|endoftext|>"),) == config.eos_token_ids
    assert token("<|pad|>") == config.pad_token_id
    first_x = token("[5,")
    coordinates = (*nano_tokenizer.X_TOKENS, *nano_tokenizer.Y_TOKENS)
    assert [token(name) for name in coordinates] == list(range(first_x, first_x + 200))


@pytest.mark.parametrize(
    ("action", "tokens"),
    [
        ('do(action="Tap", element=[5,995])', ['do(action="Tap", element=', "[5,", "995]", ")"]),
        (
            'do(action="Swipe", start=[505,705], end=[505,295])',
            ['do(action="Swipe", start=', "[505,", "705]", ", end=", "[505,", "295]", ")"],
        ),
        ('do(action="Back")', ['do(action="Back")']),
        ('do(action="Type", text="seven")', ['do(action="Type", text="', "seven", '")']),
        ('finish(message="done")', ['finish(message="', "done", '")']),
    ],
)
def test_actions_are_few_tokens(action, tokens):
    assert SHIPPED.encode(action).tokens == tokens


def test_every_tap_is_four_tokens():
    taps = [
        f'do(action="Tap", element=[{x},{y}])'
        for x in nano_tokenizer.COORDINATES
        for y in nano_tokenizer.COORDINATES
    ]
    assert {len(encoding.ids) for encoding in SHIPPED.encode_batch(taps)} == {4}


def test_instruction_words_are_single_tokens():
    words = (*nano_tokenizer.NAMES, *nano_tokenizer.OTHER_WORDS, *nano_tokenizer.VERBS)
    assert not [word for word in words if len(SHIPPED.encode(f" {word}").ids) > 1]


def test_coordinates_hardly_ever_appear_in_ordinary_text():
    ids = corpora.encode_text(SHIPPED, corpora.pydoc_topics("evaluation"))
    assert np.mean(ids >= SHIPPED.token_to_id("[5,")) < 1e-3
    assert max(SHIPPED.encode("in 1915] and x5]").ids) < SHIPPED.token_to_id("[5,")


def test_building_twice_gives_the_same_bytes(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(corpora.pydoc_topics("calibration"), encoding="utf-8")
    digests = []
    for name in ("a", "b"):
        command = [sys.executable, "-m", "experiments.nano.make_tokenizer"]
        command += [f"--text={text}", f"--out_dir={tmp_path / name}"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        content = (tmp_path / name / "tokenizer.json").read_bytes()
        digests.append(hashlib.sha256(content).hexdigest())
        assert digests[-1] in printed
    assert digests[0] == digests[1]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert "already exists" in again.stderr


def test_build_needs_enough_text():
    with pytest.raises(DataError, match="longer text"):
        nano_tokenizer.build(["too short\n"])


def test_load_of_what_is_no_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    for content in (None, "{}", "not json"):
        if content is not None:
            path.write_text(content)
        with pytest.raises(DataError) as caught:
            nano_tokenizer.load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
