"""The only builder of tokenizers, from the untrusted content of tokenizer.json.

The library `tokenizers` is native code: a hostile file can crash it or keep it busy forever. This
module therefore checks all fields of the file first, and refuses unknown values.
"""

import base64
import binascii
import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from glm_edge.errors import CheckpointError, GlmEdgeError
from glm_edge.files import ErrorType, file_inside, parse_json, read_bytes, shown_path
from glm_edge.regex_check import PatternError, check_pattern

TOKENIZER = "tokenizer.json"
# The largest files of published models have 35 MB and 1.6 million values.
MAX_BYTES = 1 << 26
MAX_VALUES = 4_000_000
MAX_ID = 1 << 24
MAX_ADDED = 1 << 17
MAX_SPECIAL = 1 << 14
MAX_TOKEN_NAME = 256
MAX_STEPS = 64
# Limit of the ratio of output to input length, without Unicode normalization.
MAX_GROWTH = 16
MAX_CHARSMAP_TEXT = 64
MAX_TEMPLATE_TOKENS = 64
MAX_WORD = 1000
MODELS = ("BPE", "WordPiece", "WordLevel", "Unigram")
# Characters of many scripts and UTF-8 lengths, to detect gaps of a table when it is read.
PROBE = "".join(map(chr, [*range(32, 127), 9, 10, 13, *range(0xA1, 0x3000, 61), 0x4E2D, 0x1F600]))


@contextlib.contextmanager
def guarded(where: str, error: ErrorType) -> Iterator[None]:
    """Convert exceptions of the library `tokenizers` to one type.

    Args:
      where: file or task, the beginning of the message.
      error: exception type to raise.

    Raises:
      GlmEdgeError: as type `error`, for any exception of the library.
    """
    try:
        yield
    except GlmEdgeError:
        raise
    except Exception as failure:
        raise error(f"{where}: {_line(failure)}") from failure
    except BaseException as failure:
        # A panic of native code is not an Exception, and only its name identifies its class.
        if type(failure).__name__ != "PanicException":
            raise
        raise error(f"{where}: {_line(failure)}") from failure


def _line(failure: BaseException) -> str:
    return " ".join(str(failure).split())


def read_tokenizer(file: str | Path) -> tokenizers.Tokenizer:
    """Read a tokenizer, and disables padding and truncation.

    Args:
      file: path of a tokenizer.json.

    Returns:
      The tokenizer.

    Raises:
      CheckpointError: the file is missing or damaged, or its steps could run without bounds on
        time or memory.
    """
    file = Path(file)
    if not os.path.lexists(file):
        raise CheckpointError(
            f"{shown_path(file)}: is missing; the checkpoint's {TOKENIZER} is needed"
        )
    return parse_tokenizer(read_bytes(file_inside(file.parent, file.name), MAX_BYTES), str(file))


def parse_tokenizer(raw: bytes, source: str) -> tokenizers.Tokenizer:
    """Build a tokenizer from the content of a tokenizer.json; see `read_tokenizer`.

    Args:
      raw: content of a tokenizer.json.
      source: file for messages.

    Returns:
      The tokenizer.

    Raises:
      CheckpointError: the content is damaged, or its steps could run without bounds.
    """
    where = f"{source}: is not a readable tokenizer"
    fields = parse_json(raw, source, max_bytes=MAX_BYTES, max_values=MAX_VALUES)
    try:
        _Checker().check(fields)
    except _RefusedError as error:
        raise CheckpointError(f"{where}: {error}") from error
    with guarded(where, CheckpointError):
        tokenizer = tokenizers.Tokenizer.from_str(raw.decode())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        ids = tokenizer.encode(PROBE, add_special_tokens=False).ids
        tokenizer.decode(ids)
    if not ids:
        raise CheckpointError(f"{where}: it encodes no text at all")
    return tokenizer


class _RefusedError(Exception):
    pass


class _Checker:
    """A checker of a tokenizer's fields; `_steps` counts its normalizers and other steps."""

    def __init__(self) -> None:
        self._steps = 0

    def check(self, fields: Any) -> None:
        if not isinstance(fields, dict):
            raise _RefusedError("it is not a JSON object")
        self._model(fields.get("model"))
        self._added(fields.get("added_tokens"))
        growth = self._tree(fields.get("normalizer"), "normalizer", "normalizers", self._normalizer)
        self._bounded("normalizer", growth)
        self._tree(fields.get("pre_tokenizer"), "pre_tokenizer", "pretokenizers", self._splitter)
        self._tree(fields.get("post_processor"), "post_processor", "processors", self._processor)
        growth = self._tree(fields.get("decoder"), "decoder", "decoders", self._decoder)
        self._bounded("decoder", growth)

    def _bounded(self, name: str, growth: float) -> None:
        if growth > MAX_GROWTH:
            raise _RefusedError(
                f"its {name} makes texts {growth:.4g} times longer; the limit is {MAX_GROWTH}"
            )

    def _tree(
        self, node: Any, name: str, children: str, check: Callable[[str, Any], float]
    ) -> float:
        """Check a step or a sequence of steps; return the largest growth of a text's length."""
        if node is None:
            return 1.0
        kind = node.get("type") if isinstance(node, dict) else None
        if not isinstance(kind, str):
            raise _RefusedError(f"its {name} has no type")
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise _RefusedError(f"it has more than {MAX_STEPS} steps")
        if kind == "Sequence":
            inner = node.get(children)
            if not isinstance(inner, list):
                raise _RefusedError(f"its {name} is a sequence without {children!r}")
            return math.prod(self._tree(x, name, children, check) for x in inner)
        return check(kind, node)

    def _unknown(self, name: str, kind: str) -> float:
        raise _RefusedError(f"a {name} of type {kind[:80]!r} is unknown")

    def _model(self, model: Any) -> None:
        if not isinstance(model, dict):
            raise _RefusedError("field 'model' must be an object")
        vocab, kind = model.get("vocab"), model.get("type")
        if kind is None:
            # Older files have no type.
            kind = "Unigram" if isinstance(vocab, list) else "BPE" if "merges" in model else None
            kind = kind or ("WordPiece" if "max_input_chars_per_word" in model else "WordLevel")
        if not isinstance(kind, str) or kind not in MODELS:
            raise _RefusedError(f"a model of type {str(kind)[:80]!r} is unknown")
        if kind == "Unigram":
            self._unigram(model, vocab)
            return
        if not isinstance(vocab, dict):
            raise _RefusedError("field 'model.vocab' must be an object of ids")
        for token, index in vocab.items():
            if type(index) is not int or not 0 <= index < MAX_ID:
                raise _RefusedError(
                    f"token {token[:80]!r} has the id {index!r}; ids are integers below {MAX_ID}"
                )
        unknown = model.get("unk_token")
        default = {"WordPiece": "[UNK]", "WordLevel": "<unk>"}.get(kind)
        unknown = default if unknown is None else unknown
        if unknown is not None and not (isinstance(unknown, str) and unknown in vocab):
            raise _RefusedError(
                f"its unknown token {str(unknown)[:80]!r} is not in the vocabulary of its {kind}"
            )
        if model.get("dropout"):
            raise _RefusedError(
                f"its dropout is {model['dropout']!r}, which draws tokens at random; set it to null"
            )
        width = model.get("max_input_chars_per_word")
        if width is not None and (type(width) is not int or not 0 <= width <= MAX_WORD):
            raise _RefusedError(f"max_input_chars_per_word is {width!r}; the limit is {MAX_WORD}")

    def _unigram(self, model: dict[str, Any], vocab: Any) -> None:
        pairs = isinstance(vocab, list) and all(
            isinstance(x, list)
            and len(x) == 2
            and isinstance(x[0], str)
            and type(x[1]) in (int, float)
            and math.isfinite(x[1])
            for x in vocab
        )
        if not pairs or not vocab:
            raise _RefusedError("field 'model.vocab' must be pairs of a string and a finite score")
        unknown = model.get("unk_id")
        if type(unknown) is not int or not 0 <= unknown < len(vocab):
            raise _RefusedError(f"unk_id is {unknown!r}; it must be one of {len(vocab)} ids")

    def _added(self, tokens: Any) -> None:
        if tokens is None:
            return
        if not isinstance(tokens, list) or len(tokens) > MAX_ADDED:
            raise _RefusedError(f"field 'added_tokens' must list at most {MAX_ADDED} tokens")
        for token in tokens:
            content = token.get("content") if isinstance(token, dict) else None
            if not isinstance(content, str) or not 0 < len(content) <= MAX_TOKEN_NAME:
                raise _RefusedError(
                    f"an added token needs a content of 1 to {MAX_TOKEN_NAME} characters"
                )
            if type(token.get("id")) is not int or not 0 <= token["id"] < MAX_ID:
                raise _RefusedError(
                    f"added token {content!r} has the id {token.get('id')!r}; ids are integers "
                    f"below {MAX_ID}"
                )
        special = sum(1 for token in tokens if token.get("special"))
        if special > MAX_SPECIAL:
            raise _RefusedError(f"it has {special} special tokens; the limit is {MAX_SPECIAL}")

    def _normalizer(self, kind: str, node: Mapping[str, Any]) -> float:
        if kind == "Replace":
            return self._replace(node)
        if kind == "Prepend":
            self._short(node, "prepend")
        elif kind == "Precompiled":
            _check_charsmap(node.get("precompiled_charsmap"))
        elif kind not in (
            *("BertNormalizer", "Strip", "StripAccents", "NFC", "NFD", "NFKC", "NFKD"),
            *("Lowercase", "Nmt", "ByteLevel"),
        ):
            return self._unknown("normalizer", kind)
        return 1.0

    def _splitter(self, kind: str, node: Mapping[str, Any]) -> float:
        if kind == "Split":
            self._pattern(node)
        elif kind == "FixedLength":
            if type(node.get("length")) is not int or node["length"] < 1:
                raise _RefusedError(f"a FixedLength has the length {node.get('length')!r}")
        elif kind not in (
            *("BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Metaspace", "Whitespace"),
            *("Punctuation", "WhitespaceSplit", "Digits", "UnicodeScripts"),
        ):
            return self._unknown("pre_tokenizer", kind)
        return 1.0

    def _processor(self, kind: str, node: Mapping[str, Any]) -> float:
        if kind == "TemplateProcessing":
            special = node.get("special_tokens")
            special = special if isinstance(special, dict) else {}
            lists = [node.get("single"), node.get("pair"), special]
            lists += [x.get("ids") for x in special.values() if isinstance(x, dict)]
            if any(isinstance(x, list | dict) and len(x) > MAX_TEMPLATE_TOKENS for x in lists):
                raise _RefusedError(
                    f"its post_processor adds more than {MAX_TEMPLATE_TOKENS} tokens at once"
                )
        elif kind not in ("BertProcessing", "RobertaProcessing", "ByteLevel"):
            return self._unknown("post_processor", kind)
        return 1.0

    def _decoder(self, kind: str, node: Mapping[str, Any]) -> float:
        if kind == "Replace":
            return self._replace(node)
        if kind == "Strip":
            for name in ("start", "stop"):
                if type(node.get(name)) is not int or not 0 <= node[name] <= MAX_WORD:
                    raise _RefusedError(f"a decoder strips {node.get(name)!r} characters")
        elif kind not in (
            *("BPEDecoder", "ByteLevel", "WordPiece", "Metaspace", "Fuse", "ByteFallback", "CTC"),
        ):
            return self._unknown("decoder", kind)
        return 1.0

    def _short(self, node: Mapping[str, Any], name: str) -> str:
        text = node.get(name)
        if not isinstance(text, str) or len(text) > MAX_TOKEN_NAME:
            raise _RefusedError(f"{name!r} must be a string of at most {MAX_TOKEN_NAME} characters")
        return text

    def _replace(self, node: Mapping[str, Any]) -> float:
        content = self._short(node, "content")
        literal = self._pattern(node)
        if literal == "":
            # An empty pattern matches before each character.
            return 1.0 + len(content)
        return max(1.0, len(content) / len(literal or "x"))

    def _pattern(self, node: Mapping[str, Any]) -> str | None:
        """Check a pattern; return a literal's text, '' for one that matches '', or None."""
        pattern = node.get("pattern")
        pattern = pattern if isinstance(pattern, dict) else {}
        kinds = list(pattern)
        if kinds not in (["String"], ["Regex"]) or not isinstance(pattern[kinds[0]], str):
            raise _RefusedError("a pattern must be {'String': text} or {'Regex': text}")
        if kinds == ["String"]:
            return self._short(pattern, "String")
        regex = pattern["Regex"]
        try:
            check_pattern(regex, _matches)
        except PatternError as error:
            raise _RefusedError(f"its pattern {regex[:80]!r} {error}") from error
        with guarded(f"its pattern {regex[:80]!r}", CheckpointError):
            step = tokenizers.normalizers.Replace(tokenizers.Regex(regex), "x")
            return "" if step.normalize_str("") else None


def _matches(source: str, character: str) -> bool:
    step = tokenizers.normalizers.Replace(tokenizers.Regex(source), "")
    return not step.normalize_str(character)


def _check_charsmap(text: Any) -> None:
    """Check the table of a SentencePiece normalizer: size and units of a trie, then texts."""
    try:
        table = base64.b64decode(text, validate=True) if isinstance(text, str) else None
    except (binascii.Error, ValueError):
        table = None
    if table is None or len(table) < 4:
        raise _RefusedError("its precompiled_charsmap is not a base64 table")
    size = int.from_bytes(table[:4], "little")
    if size % 4 or 4 + size > len(table):
        raise _RefusedError(
            f"its precompiled_charsmap declares a trie of {size} bytes, but has {len(table)} in all"
        )
    try:
        texts = table[4 + size :].decode().split("\0")
    except UnicodeDecodeError as error:
        raise _RefusedError(f"its precompiled_charsmap is not UTF-8: {error}") from error
    if max(map(len, texts)) > MAX_CHARSMAP_TEXT:
        raise _RefusedError(
            f"its precompiled_charsmap replaces one character by more than {MAX_CHARSMAP_TEXT}"
        )
