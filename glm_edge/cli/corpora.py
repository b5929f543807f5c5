"""Text for training and evaluation: UTF-8 files, CPython's help topics, evaluation windows."""

import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from glm_edge.errors import DataError, OutputError
from glm_edge.files import read_bytes, shown_path
from glm_edge.preprocess.tokens import plain_tokenizer
from glm_edge.writers import check_writable_name, refuse_link, write_whole

MAX_TEXT_BYTES = 1 << 30


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file without changing line ends.

    Args:
      path: path of the file.

    Returns:
      The text.

    Raises:
      DataError: the file is missing, not a regular file, larger than `MAX_TEXT_BYTES`, empty, or
        not UTF-8.
    """
    data = read_bytes(path, MAX_TEXT_BYTES, DataError)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8: {error.reason} 0x{data[error.start]:02x} at byte offset "
            f"{error.start}; convert it to UTF-8 first"
        ) from error
    if not text.strip():
        raise DataError(
            f"{path}: empty ({len(data)} bytes, no text); use a file that contains text"
        )
    return text


def check_absent(path: str | Path | None, overwrite: bool = False) -> None:
    """Reject an existing output file before the work starts.

    Args:
      path: path of the output file, or None without an output.
      overwrite: whether an existing file may be replaced.

    Raises:
      OutputError: the file already exists, is a link, or has an invalid name.
    """
    if not path:
        return
    check_writable_name(path)
    refuse_link(Path(path))
    if os.path.exists(path) and not overwrite:
        raise OutputError(f"{path}: already exists; use a different path or pass --overwrite")


def write_text(path: str | Path, text: str, overwrite: bool = False) -> None:
    """Write a UTF-8 file atomically.

    Args:
      path: path of the file; a missing directory is created.
      text: content of the file.
      overwrite: whether an existing file may be replaced.

    Raises:
      OutputError: the file already exists, is a link, or cannot be written.
    """
    path = Path(path)
    check_absent(path, overwrite and not os.path.isdir(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{shown_path(path)}: cannot be written: {error.strerror or error}"
        ) from error
    content = text.encode()
    write_whole(path, lambda file: file.write_bytes(content))


def pydoc_topics(split: Literal["calibration", "evaluation"]) -> str:
    """Return half of the English help topics of CPython's `help()`.

    The name of a topic determines its half, which is therefore the same in every version of Python.
    Many topics repeat paragraphs of others; only the first occurrence of a paragraph is kept, so
    the halves have no paragraph in common.

    Args:
      split: name of the half.

    Returns:
      The topics in order of name, with an empty line between paragraphs.

    Raises:
      DataError: `split` is not the name of a half, or this Python installation lacks the topics.
    """
    halves = ("calibration", "evaluation")
    if split not in halves:
        raise DataError(f"pydoc topics: unknown split {split!r}; known: {', '.join(halves)}")
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            f"pydoc_data.topics: missing from this Python ({error}); use a text file instead"
        ) from error
    known: set[str] = set()
    paragraphs: tuple[list[str], list[str]] = ([], [])
    for name in sorted(topics):
        half = zlib.crc32(name.encode()) % 2
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            words = " ".join(paragraph.split())
            if words and words not in known:
                known.add(words)
                paragraphs[half].append(paragraph.strip("\n"))
    return "\n\n".join(paragraphs[halves.index(split)]) + "\n"


@dataclass(frozen=True)
class Windows:
    """Non-overlapping evaluation windows over one token stream.

    The model starts each window without context and scores every token except the window's first.
    `num_bytes` therefore counts the bytes of scored tokens only.

    Attributes:
      tokens: int32 [N, length]; the last row is padded with its last token.
      scored: bool [N, length - 1], True if the entry of `tokens[:, 1:]` is scored.
      num_bytes: exact number of UTF-8 bytes of the scored tokens.
    """

    tokens: np.ndarray
    scored: np.ndarray
    num_bytes: int

    @property
    def num_scored(self) -> int:
        """Counts the scored tokens."""
        return int(self.scored.sum())


def windows(tokens: np.ndarray, token_bytes: np.ndarray, length: int) -> Windows:
    """Cut a token stream into evaluation windows.

    Args:
      tokens: token ids, int [T].
      token_bytes: bytes per token id, int [V], from `token_bytes`.
      length: tokens per window, at least 2; a last window of one token is omitted.

    Returns:
      The windows.

    Raises:
      DataError: `tokens` has fewer than two tokens, or `length` is below 2.
    """
    tokens = np.asarray(tokens)
    if length < 2 or len(tokens) < 2:
        raise DataError(
            f"text: {len(tokens)} tokens in windows of {length}; both must be at least 2"
        )
    if len(tokens) % length == 1:
        tokens = tokens[:-1]
    count = -(-len(tokens) // length)
    padded = np.pad(tokens, (0, count * length - len(tokens)), mode="edge").reshape(count, length)
    present = (np.arange(count * length) < len(tokens)).reshape(count, length)
    scored = present[:, 1:]
    num_bytes = int(np.asarray(token_bytes)[padded[:, 1:]][scored].sum())
    return Windows(padded.astype(np.int32), scored, num_bytes)


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
    """Compute bits per UTF-8 byte of a text whose tokens have a total loss of `total_nats`."""
    return float(total_nats / np.log(2.0) / num_bytes)


def encode_text(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Encode text by paragraph; names of special tokens such as `<|user|>` stay plain text.

    Args:
      tokenizer: tokenizer of the model.
      text: any text; a paragraph ends after each line feed.

    Returns:
      Token ids, int32 [T], which decode to `text`.
    """
    plain = plain_tokenizer(tokenizer)
    paragraphs = re.findall(r"[^\n]*\n|[^\n]+", text)
    encodings = plain.encode_batch_fast(paragraphs, add_special_tokens=False)
    return np.array([i for encoding in encodings for i in encoding.ids], np.int32)


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Count the UTF-8 bytes of each token.

    Args:
      tokenizer: tokenizer of the model.

    Returns:
      Bytes per token id, int32 [V]; their sum over the ids of a text is the text's size.
    """
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab()
    # Ids may have gaps, so the largest id determines the size of the table.
    sizes = np.zeros(max(vocabulary.values()) + 1, np.int32)
    for token, index in vocabulary.items():
        # A byte-level token has one character per byte.
        sizes[index] = len(token.encode()) if index in added else len(token)
    return sizes
