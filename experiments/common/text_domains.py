"""Held-out text of several domains: one per file, and CPython's help topics."""

import zlib
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from glm_edge.cli import corpora
from glm_edge.cli.loss import WINDOW
from glm_edge.errors import DataError

HELP = "help"


def held_out(paths: Sequence[str], with_help: bool) -> dict[str, str]:
    """Read text by domain.

    Args:
      paths: UTF-8 files, each a domain with the file's name.
      with_help: whether the evaluation half of CPython's help topics is a further domain.

    Returns:
      Text by name of the domain.

    Raises:
      DataError: a file is not text, or two domains have the same name.
    """
    texts: dict[str, str] = {}
    for path in paths:
        name = Path(path).stem
        if name in (*texts, HELP):
            raise DataError(f"{path}: a second domain {name!r}; rename the file")
        texts[name] = corpora.read_text(path)
    if with_help:
        texts[HELP] = corpora.pydoc_topics("evaluation")
    return texts


def complete_windows(
    texts: dict[str, str], tokenizer: Tokenizer, most_tokens: int
) -> dict[str, corpora.Windows]:
    """Cut the beginning of each text into windows, without a shorter one at the end.

    Args:
      texts: text by domain.
      tokenizer: tokenizer of the model.
      most_tokens: maximum number of tokens per domain.

    Returns:
      Windows by domain.

    Raises:
      DataError: a text is shorter than a window.
    """
    sizes = corpora.token_bytes(tokenizer)
    windows = {}
    for domain, text in texts.items():
        tokens = corpora.encode_text(tokenizer, text)[:most_tokens]
        count = len(tokens) // WINDOW * WINDOW
        if not count:
            raise DataError(f"{domain}: {len(tokens)} tokens, fewer than a window of {WINDOW}")
        windows[domain] = corpora.windows(tokens[:count], sizes, WINDOW)
    return windows


def checksums(texts: dict[str, str]) -> dict[str, str]:
    """Return a checksum of each text by domain."""
    return {domain: f"{zlib.crc32(text.encode()):08x}" for domain, text in texts.items()}
