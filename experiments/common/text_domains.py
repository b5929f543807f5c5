"""Text of several domains: one per file, and CPython's help topics."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer

from glm_edge.cli import corpora
from glm_edge.cli.loss import WINDOW
from glm_edge.errors import DataError

HELP = "help"


def read_texts(
    paths: Sequence[str], half: Literal["calibration", "evaluation"], help_topics: bool = True
) -> dict[str, str]:
    """Read text by domain.

    Args:
      paths: UTF-8 files; the name of a file without its suffix is its domain.
      half: half of CPython's help topics that is the domain `help`.
      help_topics: whether to add that domain.

    Returns:
      Texts by domain.

    Raises:
      DataError: a file cannot be read, or two domains have the same name.
    """
    texts: dict[str, str] = {}
    for path in paths:
        domain = Path(path).stem
        if domain in texts or (help_topics and domain == HELP):
            raise DataError(f"{path}: two texts are named {domain}; rename one")
        texts[domain] = corpora.read_text(path)
    return {**texts, HELP: corpora.pydoc_topics(half)} if help_topics else texts


def refuse_shared(learned: Mapping[str, str], held_out: Mapping[str, str]) -> None:
    """Raise DataError if a text for evaluation is also one for calibration."""
    for domain, text in held_out.items():
        if text in learned.values():
            raise DataError(f"{domain}: is a text for calibration too; evaluate on another one")


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
