"""Evaluation data of the main job: screens, recordings, text, and calibration batches."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

import glm_edge as ge
from experiments.common import calibration_data, tap_items
from experiments.nano.phone_screens import speech
from glm_edge.cli import corpora
from glm_edge.cli.loss import WINDOW
from glm_edge.configs import GLMConfig
from glm_edge.errors import DataError, MissingExtraError


@dataclasses.dataclass(frozen=True)
class EvalData:
    """Everything that rows of the main job's table are measured with.

    Attributes:
      tokenizer: of the model, or None.
      windows: of held-out text.
      written: questions in writing; empty for a model without vision.
      spoken: questions in speech; empty for a model without speech.
      calibration: batches that pruning and healing learn from.
      notes: what a reader should know of the choice.
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
) -> EvalData:
    """Draws screens, reads text and recordings, and makes calibration batches.

    Args:
      config: of the model.
      checkpoint: directory whose tokenizer.json is read.
      text: UTF-8 file, see `split_text`.
      digits_dir: folder of MNIST files; None takes scikit-learn's digits.
      speech_dir: folder of spoken digits to measure on; None synthesises them, where the extra
        `speech` is installed.
      speakers: of that folder to measure on; empty takes all.
      screens: questions of each kind.
      text_tokens: tokens to score at most.
      seed: of everything drawn.
      calibration_batches: how many.

    Returns:
      The evaluation.
    """
    notes = []
    learned, held_out = split_text(text)
    tokenizer = None
    if os.path.lexists(checkpoint / "tokenizer.json"):
        tokenizer = ge.load_tokenizer(checkpoint)
    if tokenizer is None:
        notes.append(f"{checkpoint} has no tokenizer.json: bytes of text are taken as token ids")
        if config.decoder.vocab_size < 256:
            raise DataError(f"{checkpoint}: no tokenizer.json, and fewer than 256 tokens for bytes")
        encode: Callable[[str], np.ndarray] = _bytes_as_ids
        bytes_of_token = np.ones(config.decoder.vocab_size, np.int32)
    else:
        encode = functools.partial(corpora.encode_text, tokenizer)
        bytes_of_token = corpora.token_bytes(tokenizer)
    windows = corpora.windows(encode(held_out)[:text_tokens], bytes_of_token, WINDOW)
    from_text = calibration_data.token_batches(encode(learned), calibration_batches)
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
    # A transform that takes every n-th batch must meet all kinds.
    order = np.random.default_rng(seed).permutation(len(mixed))
    mixed = [mixed[index] for index in order]
    return EvalData(tokenizer, windows, written, spoken, mixed, notes)


def split_text(path: str | None) -> tuple[str, str]:
    """Returns text to calibrate on, and text to measure on.

    Args:
      path: UTF-8 file whose first third is calibrated on and whose rest is measured; None takes
        the two halves of CPython's help topics.

    Returns:
      `(calibration, evaluation)`.
    """
    if path is None:
        return corpora.pydoc_topics("calibration"), corpora.pydoc_topics("evaluation")
    content = corpora.read_text(path)
    cut = content.find("\n", len(content) // 3) + 1 or len(content) // 3
    return content[:cut], content[cut:]


def recordings(
    folder: str | None, speakers: Sequence[str], seed: int
) -> tuple[list[speech.Utterance], list[speech.Utterance], list[str]]:
    """Recordings to measure on, recordings to calibrate on, and notes; speakers are disjoint.

    Of a folder, the speakers who are not measured are calibrated on, beside synthetic voices.
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
    """Recordings of a folder by the speakers named, or by all, and those of the others."""
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
