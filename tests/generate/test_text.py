"""Tokens as text: characters stay whole, stop strings never show, pieces join to the whole."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from glm_edge.errors import ConfigError, DataError
from glm_edge.generate import TextStream, generate, generate_text, stream_text
from glm_edge.preprocess import Inputs

END = "<|end|>"


def byte_tokenizer(merges=()) -> Tokenizer:
    """A byte-level BPE of single bytes, a special token, and what `merges` joins."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [END, *alphabet, *("".join(pair) for pair in merges)]
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer


def symbols(text: str) -> str:
    """Byte-level BPE's character for each byte of a text."""
    complete = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return complete.pre_tokenize_str(text)[0][0]


# Merges across a character's edge, as real vocabularies have: " \xe4", "\xb8\xad\xe6".
SPACE_E4 = symbols(" 中")[:2]
MIDDLE = symbols("中文")
MERGES = [tuple(SPACE_E4), (MIDDLE[1], MIDDLE[2]), (MIDDLE[1] + MIDDLE[2], MIDDLE[3])]
BYTES, MERGED = byte_tokenizer(), byte_tokenizer(MERGES)
EVERY_BYTE = "".join(
    map(chr, [*range(0x800), *range(0x800, 0xD800, 64), *range(0xE000, 0x110000, 64)])
)
SYMBOL_OF_BYTE = dict(zip(EVERY_BYTE.encode(), symbols(EVERY_BYTE), strict=True))
texts = st.text(st.sampled_from(list("ab \n<|>中文é🙂👩‍👩‍👧\ufffd")), max_size=24)


def pieces_of(tokenizer, ids, stop_strings=(), **options):
    text = TextStream(tokenizer, stop_strings, **options)
    return [*(text.push(token) for token in ids), text.finish()]


@pytest.mark.parametrize("tokenizer", [BYTES, MERGED], ids=["bytes", "merged"])
@given(text=texts)
def test_pieces_join_to_the_text_and_hold_whole_characters(tokenizer, text):
    pieces = pieces_of(tokenizer, tokenizer.encode(text).ids)
    assert "".join(pieces) == text
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


@given(data=st.lists(st.sampled_from(sorted(SYMBOL_OF_BYTE)), max_size=16))
def test_bytes_that_are_no_text_decode_as_the_tokenizer_does(data):
    ids = [BYTES.token_to_id(SYMBOL_OF_BYTE[byte]) for byte in data]
    assert "".join(pieces_of(BYTES, ids)) == BYTES.decode(ids)


def test_a_character_shows_with_its_last_byte():
    ids = BYTES.encode("中🙂a").ids
    assert pieces_of(BYTES, ids) == ["", "", "中", "", "", "", "🙂", "a", ""]
    assert pieces_of(BYTES, ids[:-2]) == ["", "", "中", "", "", "", "\ufffd"]


@given(text=texts, stops=st.lists(st.text(st.sampled_from(list("ab<|中")), min_size=1), max_size=3))
def test_the_text_ends_before_the_first_complete_stop_string(text, stops):
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
    expected = text
    if ends:
        longest = max(len(stop) for stop in stops if text[: ends[0]].endswith(stop))
        expected = text[: ends[0] - longest]
    for tokenizer in (BYTES, MERGED):
        pieces = pieces_of(tokenizer, tokenizer.encode(text).ids, stops)
        assert "".join(pieces) == expected


def test_stream_holds_back_the_start_of_a_stop_string():
    """What may begin a stop string is held back and then released."""
    text = TextStream(BYTES, ["</s>", "STOP"])
    shown = [text.push(token) for token in BYTES.encode("a</b ST</s>tail").ids]
    assert shown == ["a", "", "", "</b", " ", "", "", "ST", *[""] * 7]
    assert text.stopped
    assert text.finish() == ""


def test_held_text_comes_out_at_the_end():
    assert pieces_of(BYTES, BYTES.encode("a</").ids, ["</s>"]) == ["a", "", "", "</"]


def test_only_the_newest_tokens_are_decoded_again():
    class Recorder:
        def decode(self, ids, skip_special_tokens):
            lengths.append(len(ids))
            return BYTES.decode(ids, skip_special_tokens)

    lengths = []
    pieces_of(Recorder(), BYTES.encode("中🙂 text " * 20).ids)
    assert max(lengths) <= 8


def test_special_tokens_are_left_out_unless_wanted():
    ids = BYTES.encode(f"a{END}b").ids
    assert "".join(pieces_of(BYTES, ids)) == "ab"
    assert "".join(pieces_of(BYTES, ids, skip_special_tokens=False)) == f"a{END}b"


@pytest.mark.parametrize("stops", ["END", ["a", ""]])
def test_unfit_stop_strings_are_refused(stops):
    with pytest.raises(ConfigError, match="stop_strings"):
        TextStream(BYTES, stops)


def test_streamed_text_is_the_decoded_generation(make_model):
    model, params = make_model(vocab_size=len(BYTES.get_vocab()), num_layers=1)
    prompt = BYTES.encode("中 text").ids
    options = {"max_new_tokens": 24, "stop_tokens": ()}
    tokens = generate(model, params, np.array([prompt]), **options).tokens[0]
    complete = BYTES.decode(tokens.tolist())
    assert generate_text(model, params, BYTES, prompt, **options) == complete
    assert generate_text(model, params, BYTES, Inputs([prompt]), **options) == complete
    with pytest.raises(DataError, match="prompt must be one row, got 2"):
        generate_text(model, params, BYTES, Inputs([prompt] * 2), **options)
    pieces = list(stream_text(model, params, BYTES, prompt, **options))
    assert "".join(pieces) == complete
    assert all(pieces)
    stop = complete[len(complete) // 2]
    cut = generate_text(model, params, BYTES, prompt, stop_strings=[stop], **options)
    assert cut == complete[: complete.index(stop)]


def test_text_ends_before_a_stop_token(make_model):
    model, params = make_model(vocab_size=len(BYTES.get_vocab()), num_layers=1)
    prompt = BYTES.encode("text").ids
    tokens = generate(model, params, np.array([prompt]), max_new_tokens=24, stop_tokens=()).tokens
    tokens = tokens[0].tolist()
    stop = tokens[5]
    retained = list(itertools.takewhile(lambda token: token != stop, tokens))
    result = generate_text(model, params, BYTES, prompt, max_new_tokens=24, stop_tokens=[stop])
    assert result == BYTES.decode(retained)
