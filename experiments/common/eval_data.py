"""Evaluation data of the quickstart: screens, recordings, text, and calibration batches."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

import glm_edge as ge
from experiments.common import calibration_data, tap_items, text_domains
from experiments.nano.phone_screens import speech
from glm_edge.checkpoint.companions import has_tokenizer
from glm_edge.cli import corpora
from glm_edge.cli.loss import WINDOW
from glm_edge.configs import GLMConfig
from glm_edge.errors import DataError, MissingExtraError


@dataclasses.dataclass(frozen=True)
class EvalData:
    """Data for the measurement of all rows of the quickstart's table.

    Attributes:
      tokenizer: tokenizer of the model, or None.
      windows: windows of held-out text.
      written: written questions; empty for a model without vision.
      spoken: spoken questions; empty for a model without speech.
      calibration: batches for pruning and healing.
      notes: notes on the choice of data.
    """

    tokenizer: Tokenizer | None
    windows: corpora.Windows
    written: list[tap_items.Item]
    spoken: list[tap_items.Item]
    calibration: list[dict[str, Any]]
    notes: list[str]


def gather(
    config: GLMConfig,
    checkpoint: Path,
    text: str | None,
    digits_dir: str | None,
    speech_dir: str | None,
    speakers: Sequence[str],
    screens: int,
    text_tokens: int,
    seed: int,
    calibration_batches: int,
    help_topics: bool = True,
) -> EvalData:
    """Draw screens, read text and recordings, and make calibration batches.

    Args:
      config: configuration of the model.
      checkpoint: directory with tokenizer.json.
      text: UTF-8 file; see `split_text`.
      digits_dir: folder of MNIST files; None uses scikit-learn's digits.
      speech_dir: folder of spoken digits for the measurement; None synthesises them if the extra
        `speech` is installed.
      speakers: speakers of that folder for the measurement; empty selects all.
      screens: number of questions of each kind.
      text_tokens: maximum number of tokens to score.
      seed: seed of all random values.
      calibration_batches: number of calibration batches.
      help_topics: also calibrates on the calibration half of CPython's help topics.

    Returns:
      The evaluation data.
    """
    notes = []
    texts, held_out = split_text(text, help_topics)
    tokenizer = None
    if has_tokenizer(checkpoint):
        tokenizer = ge.load_tokenizer(checkpoint)
    if tokenizer is None:
        notes.append(f"{checkpoint} has no tokenizer: bytes of text are used as token ids")
        if config.decoder.vocab_size < 256:
            raise DataError(
                f"{checkpoint}: has no tokenizer, and fewer than 256 tokens, too few for bytes"
            )
        encode: Callable[[str], np.ndarray] = _bytes_as_ids
        bytes_of_token = np.ones(config.decoder.vocab_size, np.int32)
    else:
        encode = functools.partial(corpora.encode_text, tokenizer)
        bytes_of_token = corpora.token_bytes(tokenizer)
    windows = corpora.windows(encode(held_out)[:text_tokens], bytes_of_token, WINDOW)
    ids = {domain: encode(learned) for domain, learned in texts.items()}
    from_text = calibration_data.token_batches(ids, calibration_batches)
    written, spoken, from_screens = [], [], []
    if config.vision is not None and tokenizer is not None:
        written = tap_items.draw_items(screens, seed, digits_dir)
        heard, learned_from = [], []
        if config.speech is not None:
            heard, learned_from, note = recordings(speech_dir, speakers, seed)
            notes.extend(note)
        if heard:
            spoken = tap_items.draw_items(screens, seed, digits_dir, heard)
        from_screens = calibration_data.screen_batches(
            config, tokenizer, learned_from, digits_dir, seed, calibration_batches
        )
    mixed = [batch for pair in _alternate(from_text, from_screens) for batch in pair]
    # A transform that uses every n-th batch must receive all kinds.
    order = np.random.default_rng(seed).permutation(len(mixed))
    mixed = [mixed[index] for index in order]
    return EvalData(tokenizer, windows, written, spoken, mixed, notes)


def split_text(path: str | None, help_topics: bool = True) -> tuple[dict[str, str], str]:
    """Return the texts for calibration by domain, and the text for evaluation.

    Args:
      path: UTF-8 file, whose first third is for calibration and whose rest is for evaluation. None
        uses the two halves of CPython's help topics.
      help_topics: adds the calibration half of CPython's help topics to that of a file.

    Returns:
      `(calibration, evaluation)`.
    """
    if path is None:
        return text_domains.read_texts([], "calibration"), corpora.pydoc_topics("evaluation")
    content = corpora.read_text(path)
    cut = content.find("\n", len(content) // 3) + 1 or len(content) // 3
    further = text_domains.read_texts([], "calibration", help_topics)
    return {Path(path).stem: content[:cut], **further}, content[cut:]


def recordings(
    folder: str | None, speakers: Sequence[str], seed: int
) -> tuple[list[speech.Utterance], list[speech.Utterance], list[str]]:
    """Return recordings for evaluation and calibration, with disjoint speakers, and notes.

    Calibration uses the other speakers of a folder, and synthetic voices.
    """
    measured, others = split_folder(folder, speakers) if folder else ([], [])
    try:
        synthetic = {
            split: list(speech.synthesize_digits(seed, speech.VOICES[split]))
            for split in ("eval", "calibration")
        }
    except MissingExtraError as error:
        if folder:
            return measured, others, [f"no synthetic voices: {error}"]
        return [], [], [f"spoken questions are skipped: {error}"]
    return measured or synthetic["eval"], others + synthetic["calibration"], []


def split_folder(
    folder: str, speakers: Sequence[str]
) -> tuple[list[speech.Utterance], list[speech.Utterance]]:
    """Return a folder's recordings by some speakers, or by all, and those by the others."""
    recorded = speech.fsdd_folder(folder)
    if not speakers or set(speakers) == {u.speaker for u in recorded}:
        return recorded, []
    others, measured = speech.split_speakers(recorded, speakers)
    return measured, others


def _bytes_as_ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)


def _alternate(first: Sequence[Any], second: Sequence[Any]) -> list[tuple[Any, ...]]:
    if not second:
        return [(item,) for item in first]
    return [(first[i % len(first)], item) for i, item in enumerate(second)]
