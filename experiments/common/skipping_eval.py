"""Evaluation of run-time pruning: questions, settings, and a sweep over both."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from tokenizers import Tokenizer

import glm_edge as ge
from experiments.bench.decode import text_only
from experiments.common import calibration_data, eval_data, stage_eval, tap_eval, tap_items
from glm_edge import configs
from glm_edge.cli import corpora
from glm_edge.cli.checkpoints import CHECKPOINT_HELP
from glm_edge.cli.console import progress
from glm_edge.errors import DataError
from glm_edge.generate import (
    Setting,
    SweepRow,
    drop_vision_tokens,
    early_exit,
    fit_exits,
    skip_neurons,
    sweep,
)
from glm_edge.models.multimodal import MultimodalGLM

FLAGS = flags.FLAGS
PRESETS = {
    "quick": {"screens": 96, "rounds": 8, "batches": 4},
    "full": {"screens": 512, "rounds": 64, "batches": 32},
}
PROMPT_TOKENS, TIMED_TOKENS = 64, 32
ELSEWHERE = "on another model and device"

flags.disclaim_key_flags()


def define_flags() -> None:
    """Define the flags of the model and of the size of the measurement."""
    flags.DEFINE_string("checkpoint", None, CHECKPOINT_HELP)
    flags.DEFINE_integer("screens", None, "Number of questions; default: the preset's.", 1)
    flags.DEFINE_integer(
        "rounds", None, "Number of rounds in which settings alternate; default: the preset's.", 1
    )
    flags.DEFINE_string(
        "digits_dir",
        None,
        "Folder of MNIST files for the keys of screens; default: scikit-learn's digits.",
    )


def size() -> dict[str, int]:
    """Return the numbers of questions, rounds and batches, from preset or flags."""
    preset = dict(PRESETS[FLAGS.preset])
    return preset | {n: v for n in ("screens", "rounds") if (v := FLAGS[n].value) is not None}


def floats(name: str) -> list[float]:
    """Parse a flag with a list of numbers.

    Raises:
      DataError: an item is not a number.
    """
    try:
        return [float(value) for value in FLAGS[name].value or () if value]
    except ValueError as error:
        raise DataError(f"--{name}: must list numbers ({error})") from error


def opened() -> tuple[MultimodalGLM, Any, Tokenizer]:
    """Return the model of --checkpoint in float32, its parameters and its tokenizer."""
    checkpoint, model, params = stage_eval.opened(FLAGS.checkpoint)
    return model, params, ge.load_tokenizer(checkpoint)


def run(model: Any, tokenizer: Tokenizer, settings: Sequence[Setting]) -> list[SweepRow]:
    """Run the same questions in every setting, and time the settings alternately."""
    amount = size()
    questions, score = questions_of(
        model, tokenizer, amount["screens"], FLAGS.seed, FLAGS.digits_dir
    )
    return sweep(
        model,
        settings,
        questions,
        score,
        max_new_tokens=tap_eval.ANSWER_TOKENS,
        rounds=amount["rounds"],
        progress=progress(),
    )


def exit_settings(
    model: Any, params: Any, after: Sequence[int], thresholds: Sequence[float], maps: Any = None
) -> list[Setting]:
    """Make settings of early exit at several thresholds.

    Args:
      model: the model.
      params: its parameters.
      after: layers after which a token may exit; without layers there is no setting.
      thresholds: thresholds of the largest probability.
      maps: maps from `fit_exits`; settings with maps are named `exit+map`.

    Returns:
      The settings.
    """
    kind = "exit" if maps is None else "exit+map"
    return [
        Setting(f"{kind} {value:g}", params, early_exit(model, after, value, maps), value)
        for value in (thresholds if after else ())
    ]


def neuron_settings(
    model: Any, params: Any, keep: Sequence[float], thresholds: Sequence[float] = ()
) -> list[Setting]:
    """Make settings of neuron skipping by kept fraction (`keep`) and gate threshold (`gate`)."""
    shares = [
        Setting(f"keep {value:g}", skip_neurons(model, params, value), None, value)
        for value in keep
    ]
    return shares + [
        Setting(f"gate {value:g}", skip_neurons(model, params, threshold=value), None, value)
        for value in thresholds
    ]


def vision_settings(model: Any, params: Any, keep: Sequence[float]) -> list[Setting]:
    """Make settings that keep fractions of an image's tokens, by the text's attention."""
    return [
        Setting(f"vision {value:g}", params, None, value, drop_vision_tokens(model, value))
        for value in keep
    ]


def fitted_maps(
    model: Any, params: Any, tokenizer: Tokenizer, after: Sequence[int]
) -> dict[str, dict[str, jax.Array]]:
    """Fit maps for exits on text and, for a model with vision, on screens."""
    count = size()["batches"]
    data = calibration_data.text_batches(tokenizer, eval_data.split_text(None)[0], count)
    if model.config.vision is not None:
        options = (model.config, tokenizer, [], FLAGS.digits_dir, FLAGS.seed)
        data += calibration_data.screen_batches(*options, count)
    return fit_exits(model, params, data, after)


def questions_of(
    model: Any, tokenizer: Tokenizer, count: int, seed: int, digits_dir: str | None
) -> tuple[list[dict[str, Any]], Any]:
    """Return questions in batches, and the function that scores the answers to them.

    The score is taps in the box, or, for a model without vision, the fraction of tokens that equal
    those of the first setting.
    """
    if model.config.vision is not None:
        items = tap_items.draw_items(count, seed, digits_dir)
        batches = list(tap_items.prompt_batches(items, model.config, tokenizer))
        # All questions are written: a row must not have a recording without a placeholder in its
        # prompt.
        batches = [{**batch, "audio": None} for batch in batches]

        def taps(answers: Sequence[np.ndarray]) -> float:
            tokens = np.concatenate(answers)[: len(items)]
            texts = [tap_eval.answer_text(tokenizer, row, model.config) for row in tokens]
            return float(np.mean(tap_eval.hits(items, texts)))

        return batches, taps
    ids = corpora.encode_text(tokenizer, eval_data.split_text(None)[1])
    windows = ids[: len(ids) // PROMPT_TOKENS * PROMPT_TOKENS].reshape(-1, PROMPT_TOKENS)
    batches = [{"tokens": windows[:count]}]
    first: list[np.ndarray] = []

    def agreement(answers: Sequence[np.ndarray]) -> float:
        first.extend(answers[: len(answers) - len(first)])
        return float(np.mean(np.concatenate(answers) == np.concatenate(first)))

    return batches, agreement


def half_depth(model: Any, params: Any) -> list[Setting]:
    """Make a setting in which every token exits at half the depth."""
    exits = early_exit(model, [model.config.decoder.num_layers // 2], 0.0)
    return [Setting("exit at half", params, exits)]


def time_shape(
    name: str, rounds: int, seed: int, settings: Callable[[Any, Any], list[Setting]]
) -> list[SweepRow]:
    """Time the decoder of a preset with random weights, complete and in other settings.

    Args:
      name: name of the preset.
      rounds: number of rounds in which settings alternate.
      seed: seed of the weights.
      settings: function from a model and its parameters to the other settings.

    Returns:
      Rows, whose accuracy has no meaning.
    """
    model = MultimodalGLM(text_only(configs.preset(name)))
    tokens = np.arange(PROMPT_TOKENS, dtype=np.int32)[None]
    params = jax.jit(model.init)(jax.random.key(seed), tokens[:, :2])["params"]
    compared = [Setting("all", params), *settings(model, params)]
    options = {"max_new_tokens": TIMED_TOKENS, "rounds": rounds}
    return sweep(model, compared, [{"tokens": tokens}], lambda answers: 0.0, **options)
