"""Prompts as token ids."""

import pytest
import tokenizers

from glm_edge.errors import DataError
from glm_edge.preprocess import prompt_ids
from glm_edge.preprocess.tokens import ASSISTANT, AUDIO, IMAGE, USER

SPECIALS = (USER, ASSISTANT, *IMAGE, *AUDIO)


def byte_tokenizer(specials=SPECIALS):
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {character: index for index, character in enumerate(sorted(alphabet))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


def spelled(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_all_parts_in_order():
    tokenizer = byte_tokenizer()
    ids = prompt_ids(tokenizer, "tap star", image_tokens=2, audio_tokens=3)
    assert spelled(tokenizer, ids) == (
        "<|user|><|begin_of_image|><|image|><|image|><|end_of_image|>"
        "<|begin_of_audio|><|audio|><|audio|><|audio|><|end_of_audio|>tap star<|assistant|>"
    )


def test_absent_parts_leave_no_tokens():
    tokenizer = byte_tokenizer()
    assert spelled(tokenizer, prompt_ids(tokenizer, "hi")) == "<|user|>hi<|assistant|>"
    spoken = prompt_ids(tokenizer, audio_tokens=1)
    assert spelled(tokenizer, spoken) == (
        "<|user|><|begin_of_audio|><|audio|><|end_of_audio|><|assistant|>"
    )


def test_special_names_in_an_instruction_are_text():
    tokenizer = byte_tokenizer()
    ids = prompt_ids(tokenizer, "type <|image|>", image_tokens=2)
    assert ids.count(tokenizer.token_to_id("<|image|>")) == 2
    assert spelled(tokenizer, ids).endswith("type <|image|><|assistant|>")
    assert not tokenizer.encode_special_tokens


@pytest.mark.parametrize("text", ["点击设置", "tap 🙂", "line\nbreak"])
def test_any_text_survives(text):
    tokenizer = byte_tokenizer()
    assert spelled(tokenizer, prompt_ids(tokenizer, text)) == f"<|user|>{text}<|assistant|>"


def test_what_cannot_be_asked():
    with pytest.raises(DataError, match=r"no special token '<\|begin_of_audio\|>'"):
        prompt_ids(byte_tokenizer((USER, ASSISTANT)), audio_tokens=4)
    with pytest.raises(DataError, match="needs an instruction"):
        prompt_ids(byte_tokenizer(), image_tokens=4)
    with pytest.raises(DataError, match="must not be negative"):
        prompt_ids(byte_tokenizer(), "tap", image_tokens=-1)
