"""Evaluation data of the quickstart: screens, recordings, text, and calibration batches."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

import glm_edge as ge
from experiments.common import calibration_data, exported_eval, tap_eval
from experiments.nano.phone_screens import metrics, speech
from glm_edge import params as params_lib
from glm_edge.cli import corpora
from glm_edge.cli.checkpoints import checkpoint_of
from glm_edge.cli.console import bar
from glm_edge.cli.loss import WINDOW, text_loss
from glm_edge.configs import GLMConfig
from glm_edge.errors import DataError, MissingExtraError
from glm_edge.models.glm import init_cache

LATENCY_STEPS = 40
LATENCY_CONTEXT = 128
KINDS = {"written": "tap_in_box_text", "spoken": "tap_in_box_speech"}


@dataclasses.dataclass
class EvalData:
    """Data for the measurement of all rows of the quickstart's table.

    Attributes:
      tokenizer: tokenizer of the model, or None.
      windows: windows of held-out text.
      written: written questions; empty for a model without vision.
      spoken: spoken questions; empty for a model without speech.
      calibration: batches for pruning and healing.
      notes: notes on the choice of data.
      hits: by stage and kind, 0 or 1 per question, in the measured order.
    """

    tokenizer: Tokenizer | None
    windows: corpora.Windows
    written: list[tap_eval.Item]
    spoken: list[tap_eval.Item]
    calibration: list[dict[str, Any]]
    notes: list[str]
    hits: dict[str, dict[str, list[float]]] = dataclasses.field(default_factory=dict)

    def measure(
        self,
        stage: str,
        model: Any,
        params: Any,
        reference: tuple[Any, Any] | None = None,
    ) -> dict[str, Any]:
        """Measures one stage, which is one row of the table."""
        taps = {
            kind: tap_eval.answers(model, params, self.tokenizer, items, bar(f"{stage}, {kind}"))
            for kind, items in (("written", self.written), ("spoken", self.spoken))
            if items
        }
        text = text_loss(model, params, self.windows, reference)
        return self._row(stage, params, text, taps, decode_latency_ms(model, params))

    def measure_exported(
        self, exported: Any, reference: tuple[Any, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Measures an exported file by running it; returns its row, and the comparison with JAX."""
        phone = ge.export.LiteRTModel(exported.path)
        taps = {
            kind: exported_eval.answers(phone, self.tokenizer, items, f"exported, {kind}")
            for kind, items in (("written", self.written), ("spoken", self.spoken))
            if items
        }
        text = exported_eval.text_loss(phone, self.windows, reference)
        latency_ms = exported_eval.decode_latency_ms(phone)
        row = self._row("exported", exported.params, text, taps, latency_ms)
        items, texts = [], []
        for kind, answered in taps.items():
            items += getattr(self, kind)[: exported_eval.VERIFY_ITEMS // 2]
            texts += answered[: exported_eval.VERIFY_ITEMS // 2]
        windows = exported_eval.verification_windows(
            phone.config, self.tokenizer, self.windows, items, texts
        )
        result = exported.verify(windows, check=False)
        agreement = {
            "agreement": result.agreement,
            "tokens": result.tokens,
            "max_abs_error": result.max_abs_error,
            "mean_kl": result.mean_kl,
            "free_running_agreement": result.free_running_agreement,
            "free_running_tokens": result.free_running_tokens,
            "file_bytes": exported.file_bytes,
            "stored_bytes": exported.stored_bytes,
            "conversions": [str(conversion) for conversion in exported.conversions],
        }
        return row, agreement

    def _row(self, stage, params, text, taps, latency_ms) -> dict[str, Any]:
        count, stored = params_lib.count(params), params_lib.stored_bytes(params)
        rates: dict[str, float | None] = dict.fromkeys(KINDS.values())
        self.hits[stage] = {}
        for kind, texts in taps.items():
            hits = tap_eval.hits(getattr(self, kind), texts)
            self.hits[stage][kind] = hits
            rates[KINDS[kind]] = float(np.mean(hits)) if hits else None
        return {
            "stage": stage,
            "parameters": count,
            "bytes": stored,
            "bits_per_weight": 8 * stored / count,
            **text,
            **rates,
            "ms_per_token": latency_ms,
        }

    def tap_loss(self, first: str = "dense", last: str = "quantized") -> dict[str, Any] | None:
        """Computes the taps lost by compression on the same screens, with their interval."""
        if not self.hits.get(first) or last not in self.hits:
            return None
        return {
            kind: vars(metrics.paired_difference(self.hits[last][kind], hits))
            for kind, hits in self.hits[first].items()
        }


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

    Returns:
      The evaluation data.
    """
    notes = []
    learned, held_out = split_text(text)
    tokenizer = None
    if os.path.lexists(checkpoint / "tokenizer.json"):
        tokenizer = ge.load_tokenizer(checkpoint)
    if tokenizer is None:
        notes.append(f"{checkpoint} has no tokenizer.json: bytes of text are used as token ids")
        if config.decoder.vocab_size < 256:
            raise DataError(
                f"{checkpoint}: has no tokenizer.json, and fewer than 256 tokens, too few for bytes"
            )
        encode: Callable[[str], np.ndarray] = _bytes_as_ids
        bytes_of_token = np.ones(config.decoder.vocab_size, np.int32)
    else:
        encode = functools.partial(corpora.encode_text, tokenizer)
        bytes_of_token = corpora.token_bytes(tokenizer)
    windows = corpora.windows(encode(held_out)[:text_tokens], bytes_of_token, WINDOW)
    from_text = calibration_data.token_batches(encode(learned), calibration_batches)
    written, spoken, from_screens = [], [], []
    if config.vision is not None and tokenizer is not None:
        written = tap_eval.draw_items(screens, seed, digits_dir)
        heard, learned_from = [], []
        if config.speech is not None:
            heard, learned_from, note = recordings(speech_dir, speakers, seed)
            notes.extend(note)
        if heard:
            spoken = tap_eval.draw_items(screens, seed, digits_dir, heard)
        from_screens = calibration_data.screen_batches(
            config, tokenizer, learned_from, digits_dir, seed, calibration_batches
        )
    mixed = [batch for pair in _alternate(from_text, from_screens) for batch in pair]
    # A transform that uses every n-th batch must receive all kinds.
    order = np.random.default_rng(seed).permutation(len(mixed))
    mixed = [mixed[index] for index in order]
    return EvalData(tokenizer, windows, written, spoken, mixed, notes)


def split_text(path: str | None) -> tuple[str, str]:
    """Returns the text for calibration and the text for evaluation.

    Args:
      path: UTF-8 file, whose first third is for calibration and whose rest is for evaluation. None
        uses the two halves of CPython's help topics.

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
    """Returns recordings for evaluation and calibration, with disjoint speakers, and notes.

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
    """Returns a folder's recordings by some speakers, or by all, and those by the others."""
    recorded = speech.fsdd_folder(folder)
    if not speakers or set(speakers) == {u.speaker for u in recorded}:
        return recorded, []
    others, measured = speech.split_speakers(recorded, speakers)
    return measured, others


def decode_latency_ms(model: Any, params: Any) -> float:
    """Measures the median milliseconds of one greedy step of one row at `LATENCY_CONTEXT`."""
    cache = init_cache(model.config.decoder, 1, 2 * LATENCY_CONTEXT)
    cache["length"] = jnp.int32(LATENCY_CONTEXT)

    @functools.partial(jax.jit, donate_argnums=2)
    def step(params, token, cache):
        logits, aux = model.apply({"params": params}, token, cache=cache)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), aux["cache"]

    token = jnp.zeros((1, 1), jnp.int32)
    seconds = []
    for _ in range(LATENCY_STEPS):
        start = time.perf_counter()
        token, cache = step(params, token, cache)
        token.block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 1000 * float(np.median(seconds[5:]))


def opened(directory: str | None) -> tuple[Path, Any, Any]:
    """Returns the directory of `checkpoint_of`, its model in float32, and the parameters."""
    checkpoint = checkpoint_of(directory)
    return checkpoint, *ge.load(checkpoint, dtype="float32")


def _bytes_as_ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)


def _alternate(first: Sequence[Any], second: Sequence[Any]) -> list[tuple[Any, ...]]:
    if not second:
        return [(item,) for item in first]
    return [(first[i % len(first)], item) for i, item in enumerate(second)]
