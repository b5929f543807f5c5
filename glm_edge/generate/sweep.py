"""Sweep over settings of skipped computation: accuracy and tokens per second."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from glm_edge.errors import DataError
from glm_edge.generate import steps
from glm_edge.generate.decoding import GREEDY, generate, stop_ids
from glm_edge.generate.early_exit import EarlyExit
from glm_edge.generate.options import DecodeOptions
from glm_edge.generate.prompts import Prompt, config_of
from glm_edge.generate.token_pruning import VisionTokens
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params

Answers = list[np.ndarray]


@dataclass(frozen=True)
class Setting:
    """A setting of a sweep: parameters and options of generation.

    Attributes:
      name: of the row.
      params: dense, or from `skip_neurons`.
      early_exit: see `DecodeOptions`.
      value: threshold or fraction, for tables and figures.
      vision_tokens: see `DecodeOptions`.
    """

    name: str
    params: Params
    early_exit: EarlyExit | None = None
    value: float | None = None
    vision_tokens: VisionTokens | None = None

    @property
    def options(self) -> DecodeOptions:
        """Options of generation."""
        return DecodeOptions(early_exit=self.early_exit, vision_tokens=self.vision_tokens)


@dataclass(frozen=True)
class SweepRow:
    """Measurements of one setting.

    Attributes:
      name: of the setting.
      value: of the setting.
      accuracy: returned by `score`.
      agreement: fraction of tokens equal to the first setting's, up to its stop tokens.
      layers: mean decoder layers per decoded token, without the first of each answer, which the
        prefill gives.
      tokens_per_second: of decoding one row up to its stop token, without prefill; median of the
        rounds.
      speedup: over the first setting; median over rounds, each of which times both.
      low: lower quartile of the speed-up.
      high: upper quartile.
    """

    name: str
    value: float | None
    accuracy: float
    agreement: float
    layers: float
    tokens_per_second: float
    speedup: float
    low: float
    high: float


def sweep(
    model: MultimodalGLM,
    settings: Sequence[Setting],
    questions: Sequence[Mapping[str, Any]],
    score: Callable[[Answers], float],
    max_new_tokens: int,
    rounds: int = 5,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[SweepRow]:
    """Run every setting on the same questions, then times them in turn.

    Args:
      model: a GLM.
      settings: the first is the baseline.
      questions: batches, mappings or `Inputs` as `generate` takes them.
      score: accuracy of the generated tokens of all questions, one array [B, N] each.
      max_new_tokens: tokens per answer at most.
      rounds: number of timed rounds, after one to warm up. Each round times all settings in turn on
        one row of the first batch, another row per round.
      progress: called as `progress(stage, done, total)`.

    Returns:
      One row per setting, in order.

    Raises:
      DataError: there are no settings or questions, or they do not fit the model; or several rows
        share a list of images or chunks of audio, so that none can be timed alone.
    """
    if not settings or not questions:
        raise DataError("sweep: needs a setting and a question at least")
    shared = isinstance(questions[0].get("images"), list | tuple)
    if len(questions[0]["tokens"]) > 1 and (shared or "audio_frames" in questions[0]):
        raise DataError("sweep: pass images and audio as one array each, with one row per question")
    results = []
    for index, setting in enumerate(settings):
        results.append(_answer(model, setting, questions, max_new_tokens))
        if progress is not None:
            progress("sweep: answers", index + 1, len(settings))
    rates = np.zeros((rounds + 1, len(settings)))
    for turn in range(rounds + 1):
        prompt = _row(questions[0], turn)
        order = range(len(settings)) if turn % 2 else reversed(range(len(settings)))
        for column in order:
            rates[turn, column] = decode_rate(model, settings[column], prompt, max_new_tokens)
        if progress is not None:
            progress("sweep: rounds", turn + 1, rounds + 1)
    rates = rates[1:]
    rows = []
    for column, (setting, (answers, valid, layers)) in enumerate(
        zip(settings, results, strict=True)
    ):
        ratio = rates[:, column] / rates[:, 0]
        low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75])
        first, counted = results[0][0], results[0][1]
        same = [(a == b)[v] for a, b, v in zip(answers, first, counted, strict=True)]
        rows.append(
            SweepRow(
                name=setting.name,
                value=setting.value,
                accuracy=float(score(answers)),
                agreement=float(np.concatenate(same).mean()),
                layers=_mean_layers(layers, valid, model.config.decoder.num_layers),
                tokens_per_second=float(np.median(rates[:, column])),
                speedup=float(middle),
                low=float(low),
                high=float(high),
            )
        )
    return rows


def decode_rate(
    model: MultimodalGLM, setting: Setting, prompt: Mapping[str, Any], max_new_tokens: int
) -> float:
    """Measure tokens per second of one compiled loop that decodes an answer.

    Args:
      model: a GLM.
      setting: parameters and options.
      prompt: one row, as `generate` takes it.
      max_new_tokens: tokens at most; the first one, of the prefill, does not count.

    Returns:
      Tokens per second, without prefill.
    """
    ready = Prompt.of(config_of(model), prompt, max_new_tokens)
    stops = steps.padded_stops(stop_ids(model, None))
    state = steps.start(model, setting.params, ready, GREEDY, None, setting.options)
    state = steps.with_first_token(model, state, GREEDY, stops, setting.early_exit)
    rules = (GREEDY, stops, max_new_tokens, setting.early_exit)
    jax.block_until_ready(state)
    start = time.perf_counter()
    *_, state = jax.block_until_ready(
        steps.decode(model, setting.params, state, *rules, room=ready.room)
    )
    seconds = time.perf_counter() - start
    return max(int(state.index) - 1, 1) / seconds


def _row(question: Mapping[str, Any], turn: int) -> dict[str, Any]:
    """Select one row of a batch, in turn; a single row keeps its lists of images and chunks."""
    rows = len(question["tokens"])
    if rows == 1:
        return dict(question)
    index = turn % rows
    return {
        name: value if value is None else np.asarray(value)[index : index + 1]
        for name, value in question.items()
    }


def _answer(
    model: MultimodalGLM,
    setting: Setting,
    questions: Sequence[Mapping[str, Any]],
    max_new_tokens: int,
) -> tuple[list[np.ndarray], list[np.ndarray], list[Any]]:
    """Generate the tokens of every question, a mask up to the stop token, and their layers."""
    tokens, valid, layers = [], [], []
    for question in questions:
        made = generate(model, setting.params, question, max_new_tokens, options=setting.options)
        tokens.append(np.asarray(made.tokens))
        # The stop token counts too.
        valid.append(np.arange(max_new_tokens) <= np.asarray(made.lengths)[:, None])
        layers.append(None if made.layers is None else np.asarray(made.layers))
    return tokens, valid, layers


def _mean_layers(layers: list[Any], valid: list[np.ndarray], total: int) -> float:
    if layers[0] is None:
        return float(total)
    ran = [x[:, 1:][v[:, 1:]] for x, v in zip(layers, valid, strict=True)]
    counted = np.concatenate(ran)
    return float(counted.mean()) if counted.size else float(total)
