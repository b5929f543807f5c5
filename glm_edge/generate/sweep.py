"""Comparison of settings of skipping by accuracy and tokens per second."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_edge.errors import DataError
from glm_edge.generate import decoding
from glm_edge.generate.early_exit import EarlyExit
from glm_edge.generate.prompts import Prompt, config_of
from glm_edge.generate.token_pruning import VisionTokens
from glm_edge.models.multimodal import MultimodalGLM

Answers = list[np.ndarray]


@dataclass(frozen=True)
class Setting:
    """A setting of a sweep: parameters and options of generation.

    Attributes:
      name: of the row.
      params: dense, or from `skip_neurons`.
      early_exit: or None.
      value: threshold or fraction, for tables and figures.
      vision_tokens: or None.
    """

    name: str
    params: Any
    early_exit: EarlyExit | None = None
    value: float | None = None
    vision_tokens: VisionTokens | None = None


@dataclass(frozen=True)
class SweepRow:
    """Measurements of one setting.

    Attributes:
      name: of the setting.
      value: of the setting.
      accuracy: what `score` returned.
      agreement: fraction of tokens equal to the first setting's, up to its stop tokens.
      layers: mean decoder layers of a decoded token, the first of each answer left out, since the
        prompt gives it.
      tokens_per_second: decoding one row up to its stop token, the prompt not counted; median of
        the rounds.
      speedup: over the first setting; median over rounds, both timed in each.
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
    """Runs every setting on the same questions, then times them in turn.

    Args:
      model: a GLM.
      settings: the first is what the others are compared with.
      questions: batches as `generate` takes them: `tokens`, and maybe `valid`, `images`, `audio`.
      score: accuracy of the generated tokens of all questions, one array [B, N] each.
      max_new_tokens: of each answer.
      rounds: in which all settings take turns at one row of the first batch of questions, another
        in each round; one more is not counted.
      progress: called as `progress(stage, done, total)`.

    Returns:
      A row for each setting, in order.

    Raises:
      DataError: there are no settings or questions, or they do not fit the model; or several rows
        share a list of images or chunks of audio, of which none can be timed alone.
    """
    if not settings or not questions:
        raise DataError("sweep: there must be a setting and a question at least")
    shared = isinstance(questions[0].get("images"), list | tuple)
    if len(questions[0]["tokens"]) > 1 and (shared or "audio_frames" in questions[0]):
        raise DataError("sweep: give images and audio as one array, one row each")
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
    """Measures tokens per second of one compiled loop that decodes an answer.

    Args:
      model: a GLM.
      setting: how it runs.
      prompt: of one row, as `generate` takes it.
      max_new_tokens: at most; the first is the prompt's and does not count.

    Returns:
      Tokens per second, the prompt not counted.
    """
    fields = dict(prompt)
    ready = Prompt.of(config_of(model), fields["tokens"], fields.get("valid"), max_new_tokens)
    inputs = (fields.get(name) for name in ("images", "audio", "audio_frames"))
    stops, greedy = decoding.stops_of(model, None), decoding.GREEDY
    options = (greedy, None, jnp.float32, setting.vision_tokens)
    state = decoding.start(model, setting.params, ready, *inputs, *options)
    state = decoding.with_first_token(model, state, greedy, stops, setting.early_exit)
    rules = (greedy, stops, max_new_tokens, ready.room, False, setting.early_exit)
    jax.block_until_ready(state)
    start = time.perf_counter()
    *_, state = jax.block_until_ready(decoding.decode(model, setting.params, state, *rules))
    seconds = time.perf_counter() - start
    return max(int(state.index) - 1, 1) / seconds


def _row(question: Mapping[str, Any], turn: int) -> dict[str, Any]:
    """Selects one row of a batch, in turn; lists of images and chunks of audio go with one row."""
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
    """Generates the tokens of every question, a mask of those that count, and their layers."""
    tokens, valid, layers = [], [], []
    for question in questions:
        made = decoding.generate(
            model,
            setting.params,
            **question,
            max_new_tokens=max_new_tokens,
            early_exit=setting.early_exit,
            vision_tokens=setting.vision_tokens,
        )
        tokens.append(np.asarray(made.tokens))
        # The stop token counts too.
        valid.append(np.arange(max_new_tokens) <= np.asarray(made.lengths)[:, None])
        layers.append(None if made.layers is None else np.asarray(made.layers))
    return tokens, valid, layers


def _mean_layers(layers: list[Any], valid: list[np.ndarray], total: int) -> float:
    if layers[0] is None:
        return float(total)
    ran = [x[:, 1:][v[:, 1:]] for x, v in zip(layers, valid, strict=True)]
    ran = np.concatenate(ran)
    return float(ran.mean()) if ran.size else float(total)
