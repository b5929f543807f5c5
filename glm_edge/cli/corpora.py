"""Text to train and evaluate on: UTF-8 files, CPython's help topics, evaluation windows."""

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
    """Reads a UTF-8 text file, byte for byte (line ends are kept).

    Args:
      path: the file.

    Returns:
      Its text.

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
        raise DataError(f"{path}: empty ({len(data)} bytes, no text); give a file with text in it")
    return text


def check_absent(path: str | Path | None, overwrite: bool = False) -> None:
    """Refuses a file that exists, before the work that it is to hold.

    Args:
      path: the file, or None where none is asked for.
      overwrite: whether an existing file may be replaced.

    Raises:
      OutputError: the file exists already, is a link, or has a name that none can have.
    """
    if not path:
        return
    check_writable_name(path)
    refuse_link(Path(path))
    if os.path.exists(path) and not overwrite:
        raise OutputError(f"{path}: exists already; name another place or pass --overwrite")


def write_text(path: str | Path, text: str, overwrite: bool = False) -> None:
    """Writes a UTF-8 file that is there whole or not at all.

    Args:
      path: the file; its directory is made if absent.
      text: what it will hold.
      overwrite: whether an existing file may be replaced.

    Raises:
      OutputError: the file exists already, is a link, or cannot be written.
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
    """Returns half of the topics that CPython's `help()` explains, in plain English.

    The name of a topic decides its half, so that it is the same in every version of Python. Many
    topics repeat others' paragraphs; only a paragraph's first appearance is kept, so that the
    halves share none.

    Args:
      split: which half.

    Returns:
      The topics in order of name, an empty line between paragraphs.

    Raises:
      DataError: `split` names no half, or this Python was installed without the topics.
    """
    halves = ("calibration", "evaluation")
    if split not in halves:
        raise DataError(f"pydoc topics: no split {split!r}; known: {', '.join(halves)}")
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            f"pydoc_data.topics: missing from this Python ({error}); give a text file instead"
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

    The model starts afresh in each window and every token but the window's first is scored, hence
    `num_bytes` counts the bytes of scored tokens only.

    Attributes:
      tokens: int32 [N, length]; the last row is padded with its own last token.
      scored: bool [N, length - 1], true where `tokens[:, 1:]` is scored.
      num_bytes: UTF-8 bytes that the scored tokens stand for, exactly.
    """

    tokens: np.ndarray
    scored: np.ndarray
    num_bytes: int

    @property
    def num_scored(self) -> int:
        """Counts the tokens that are scored."""
        return int(self.scored.sum())


def windows(tokens: np.ndarray, token_bytes: np.ndarray, length: int) -> Windows:
    """Cuts a token stream into evaluation windows.

    Args:
      tokens: int [T] ids.
      token_bytes: int [V] bytes that each id stands for, as from `token_bytes`.
      length: tokens of a window, at least 2; a last window of one token is left out.

    Returns:
      The windows.

    Raises:
      DataError: there are fewer than two tokens, or `length` is below 2.
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
    """Bits per UTF-8 byte of a text whose tokens cost `total_nats` together."""
    return float(total_nats / np.log(2.0) / num_bytes)


def encode_text(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Encodes ordinary text paragraph by paragraph; `<|user|>` and its like stay plain text.

    Args:
      tokenizer: of the model.
      text: anything; a paragraph ends after each line feed.

    Returns:
      int32 [T] ids whose decoding is `text`.
    """
    plain = plain_tokenizer(tokenizer)
    paragraphs = re.findall(r"[^\n]*\n|[^\n]+", text)
    encodings = plain.encode_batch_fast(paragraphs, add_special_tokens=False)
    return np.array([i for encoding in encodings for i in encoding.ids], np.int32)


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Counts the UTF-8 bytes that each id stands for.

    Args:
      tokenizer: of the model.

    Returns:
      int32 [V]; over the ids of a text they sum to the text's bytes.
    """
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab()
    # Ids may have gaps, so the largest one sizes the table.
    sizes = np.zeros(max(vocabulary.values()) + 1, np.int32)
    for token, index in vocabulary.items():
        # A byte-level token has one character per byte.
        sizes[index] = len(token.encode()) if index in added else len(token)
    return sizes
