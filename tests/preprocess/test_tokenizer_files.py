"""The door that opens tokenizers: what is read, and what is refused before native code sees it."""

import base64
import json
import os

import pytest
import tokenizers

import glm_edge as ge
from glm_edge.errors import CheckpointError, DataError
from glm_edge.preprocess import tokens
from glm_edge.preprocess.tokenizer_files import read_tokenizer

REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
WORDS = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}


def charsmap(size=None, texts=b"ab\0"):
    trie = bytes(4 * 256)
    table = (len(trie) if size is None else size).to_bytes(4, "little") + trie + texts
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


@pytest.fixture
def write(tmp_path, tokenizer):
    """Writes the byte tokenizer with changed fields; returns the file."""

    def changed(**changes):
        file = tmp_path / "tokenizer.json"
        file.write_text(json.dumps({**json.loads(tokenizer.to_str()), **changes}))
        return file

    return changed


@pytest.mark.parametrize(
    "changes",
    [
        {"model": WORDS, "pre_tokenizer": {"type": "Whitespace"}, "decoder": None},
        {
            "model": {
                **WORDS,
                "type": "WordPiece",
                "max_input_chars_per_word": 100,
                "continuing_subword_prefix": "##",
            }
        },
        {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.5]]}},
        {"normalizer": {"type": "Sequence", "normalizers": [charsmap(), {"type": "NFKC"}]}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}},
        {"normalizer": {"type": "Prepend", "prepend": "▁"}},
        {"pre_tokenizer": {**SPLIT, "pattern": {"Regex": r"\p{N}{1,3}|\s+(?!\S)|\s+"}}},
    ],
    ids=["words", "pieces", "unigram", "charsmap", "regex", "prepend", "split"],
)
def test_read_tokenizer_opens_all_kinds(write, changes):
    assert tokens.encode(read_tokenizer(write(**changes)), "a a")


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 4}}, "times longer"),
        ({"decoder": {"type": "Sequence", "decoders": [REPLACE] * 4}}, "times longer"),
        ({"normalizer": {**REPLACE, "pattern": {"String": ""}}}, "times longer"),
        ({"normalizer": {**REPLACE, "pattern": {"Regex": "b*"}}}, "times longer"),
        ({"normalizer": {**REPLACE, "pattern": {"Regex": "(a|b)+c"}}}, r"'\(a\|b\)\+c' repeats"),
        ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": r"(\w+)*$"}}}, "in several ways"),
        ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(["}}}, "is not closed"),
        ({"pre_tokenizer": {"type": "Sorcery"}}, "type 'Sorcery' is unknown"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "has the length 0"),
        ({"normalizer": charsmap(size=0xFFFFFFFF)}, "declares a trie of 4294967295 bytes"),
        ({"normalizer": charsmap(texts=b"\xff")}, "is not UTF-8"),
        ({"normalizer": charsmap(texts=b"x" * 99)}, "replaces one character by more than 64"),
        ({"model": {**WORDS, "unk_token": "[nope]"}}, r"unknown token '\[nope\]' is not in"),
        ({"model": {**WORDS, "unk_token": ["[UNK]"]}}, "its unknown token .* is not in"),
        ({"model": {**WORDS, "type": ["WordLevel"]}}, "a model of type .* is unknown"),
        ({"model": {**WORDS, "vocab": {"[UNK]": 2**31}}}, "has the id 2147483648"),
        (
            {"model": {**WORDS, "type": "WordPiece", "max_input_chars_per_word": 10**9}},
            "the limit is 1000",
        ),
        ({"model": {"type": "Unigram", "unk_id": 3, "vocab": [["a", 0.0]]}}, "unk_id is 3"),
        ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", "b"]]}}, "a finite score"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 0.5}}, "at random"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}}, "Token `x`"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "encodes no text"),
        ({"decoder": {"type": "Strip", "content": "a", "start": 2**60, "stop": 0}}, "strips"),
        ({"added_tokens": [{"id": 10**9, "content": "<far>", "special": True}]}, "<far>"),
        ({"added_tokens": [{"id": 9, "content": "", "special": True}]}, "1 to 256 characters"),
    ],
    ids=range(25),
)
def test_read_tokenizer_refuses_in_one_line(write, changes, pattern):
    with pytest.raises(CheckpointError, match=pattern) as caught:
        read_tokenizer(write(**changes))
    assert str(caught.value).startswith(str(write()))


def test_padding_and_truncation_are_left_out(write, tokenizer):
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    file = write()
    for read in (ge.load_tokenizer(file.parent), read_tokenizer(file)):
        assert len(read.encode("a" * 9, add_special_tokens=False).ids) == 9


@pytest.mark.parametrize("kind", ["pipe", "device", "hole", "link", "directory", "nested"])
def test_files_that_are_none_are_refused_at_once(tmp_path, kind):
    file, outside = tmp_path / "in" / "tokenizer.json", tmp_path / "outside.json"
    file.parent.mkdir()
    outside.write_text("{}")
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "hole":
        with open(file, "wb") as hole:
            hole.truncate(3 << 30)
    elif kind == "directory":
        file.mkdir()
    elif kind == "nested":
        file.write_text('{"model": ' + "[" * 10_000)
    else:
        file.symlink_to("/dev/zero" if kind == "device" else outside)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        read_tokenizer(file)


def test_a_panic_is_an_error(tokenizer, monkeypatch):
    class PanicException(BaseException):
        """As native code raises it."""

    class Panicking:
        truncation = padding = None

        def encode(self, text, add_special_tokens):
            raise PanicException("index\nout of bounds")

    with pytest.raises(DataError, match="text cannot be encoded: index out of bounds"):
        tokens.encode(Panicking(), "a")
    with pytest.raises(DataError, match="tokens cannot be decoded"):
        tokens.decode(tokenizer, [-1])
    with pytest.raises(DataError, match="text cannot be encoded"):
        tokens.encode(tokenizer, "\ud800")


def test_a_tokenizer_that_cuts_texts_is_refused(tokenizer):
    for change in (lambda: tokenizer.enable_truncation(4), tokenizer.enable_padding):
        change()
        with pytest.raises(DataError, match="the tokenizer truncates or pads texts"):
            tokens.encode(tokenizer, "abcdefg")
        tokenizer.no_truncation()


def test_plain_tokenizer_follows_added_tokens(tokenizer):
    assert len(tokens.text_ids(tokenizer, "<|user|>")) == 8
    tokenizer.add_special_tokens(["<new>"])
    assert len(tokens.text_ids(tokenizer, "<new><|user|>")) == 13
    assert not tokenizer.encode_special_tokens
    assert isinstance(tokenizer, tokenizers.Tokenizer)
