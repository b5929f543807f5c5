"""Table (d): run-time pruning of 20 % and 50 % of the FFN neurons, chosen per token.

    python -m experiments.tables.dynamic --preset=quick
    python -m experiments.tables.dynamic --preset=full --digits_dir=MNIST

The claim: skipping 20 % is 1.15 x as fast at a loss under 1 %, skipping 50 % is 1.42 x at 3 %; it
does not name the measure. Nothing is trained. In every layer of the shipped model (or
--checkpoint), a token uses the neurons with the largest gates, and the weights of the others are
not read. `tokens per second` times the decoding of answers in one compiled loop, without the
prompt; all settings alternate on the same question. Two losses are compared with the claim, both
relative to the complete model: taps in the box (for a checkpoint without vision, agreement with its
own tokens) and perplexity of held-out text.

All gates are computed, so half of the neurons still read two thirds of the weights, and a small
model's step consists mostly of other operations. The decoder of --shape has random weights; its
rows show the possible speed-up, not quality.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

from absl import flags

from experiments.common import skipping_eval
from experiments.tables import table
from experiments.tables.table import Row
from glm_edge.cli.console import launch
from glm_edge.cli.evaluate import text_windows
from glm_edge.cli.loss import text_loss
from glm_edge.errors import RecipeError
from glm_edge.generate import Setting, SweepRow

FLAGS = flags.FLAGS
NAME = "dynamic"
# Claims by percentage of skipped neurons: speed-up, and loss in percent.
CLAIMS = {20: (1.15, 1.0), 50: (1.42, 3.0)}
UNDER = {20: "claimed: under 1 %; "}
SHAPES = {"quick": "", "full": "mobile"}
TEXT_TOKENS = {"quick": 4_000, "full": 60_000}


def define_flags() -> None:
    """Define this script's flags."""
    table.define_flags(NAME)
    skipping_eval.define_flags()
    flags.DEFINE_list("skip", ["20", "50"], "Percentages of neurons that a token skips.")
    flags.DEFINE_string(
        "text", None, "UTF-8 file for the measurement; default: CPython's help topics."
    )
    flags.DEFINE_integer(
        "text_tokens", None, "Maximum number of tokens to score; default: the preset's.", 2
    )
    flags.DEFINE_string(
        "shape", None, "Preset to time with random weights; default: none, or mobile for full."
    )


def main(argv: Sequence[str]) -> None:
    table.prepare(argv)
    keep = [1.0 - percent / 100.0 for percent in skipping_eval.floats("skip")]
    if not keep:
        raise RecipeError("--skip: must not be empty; use percentages such as 20,50")
    model, params, tokenizer = skipping_eval.opened()
    settings = [Setting("all", params), *skipping_eval.neuron_settings(model, params, keep)]
    windows = text_windows(tokenizer, FLAGS.text, FLAGS.text_tokens or TEXT_TOKENS[FLAGS.preset])
    perplexity = {
        setting.name: text_loss(model, setting.params, windows, (model, params))["perplexity"]
        for setting in settings
    }
    rows = skipping_eval.run(model, tokenizer, settings)
    shape = SHAPES[FLAGS.preset] if FLAGS.shape is None else FLAGS.shape
    timed = []
    if shape:
        timed = skipping_eval.time_shape(
            shape,
            skipping_eval.size()["rounds"],
            FLAGS.seed,
            lambda model, params: skipping_eval.neuron_settings(model, params, keep),
        )
    quality = "taps in the box" if model.config.vision is not None else "tokens as without skipping"
    table.publish(
        NAME,
        "FFN neurons skipped by input: claimed 1.15 x under 1 % (20 %), 1.42 x at 3 % (50 %)",
        [
            *rows_of(rows, perplexity, quality, skipping_eval.size()["screens"]),
            *shape_rows(timed, shape),
        ],
        ("checkpoint", "skip", "screens", "rounds", "digits_dir", "text", "text_tokens", "shape"),
        {
            "rows": [dataclasses.asdict(row) for row in rows],
            "shape": [dataclasses.asdict(row) for row in timed],
            "perplexity": perplexity,
        },
    )


def rows_of(
    swept: Sequence[SweepRow], perplexity: Mapping[str, float], quality: str, questions: int
) -> list[Row]:
    """Return the table's rows of the trained model.

    Args:
      swept: rows of the sweep; the first is without skipping.
      perplexity: perplexity by name of the setting.
      quality: name of the sweep's accuracy.
      questions: number of questions.

    Returns:
      The rows.
    """
    dense, note = swept[0], f"{questions} questions"
    rows = [
        Row(quality, "%", None, 100.0 * dense.accuracy, note=note),
        Row("perplexity", "perplexity", None, perplexity[dense.name]),
        Row("decoding", "tokens/s", None, dense.tokens_per_second, note="one row"),
    ]
    for row in swept[1:]:
        percent = skipped(row)
        gain, loss = CLAIMS.get(percent, (None, None))
        under = f"{UNDER.get(percent, '')}claim {skipping_eval.ELSEWHERE}" if loss else ""
        lost = 100.0 * (1.0 - row.accuracy / dense.accuracy) if dense.accuracy else None
        growth = 100.0 * (perplexity[row.name] / perplexity[dense.name] - 1.0)
        label = f"{percent} % skipped"
        rows += [
            Row(f"{label}: decoding", "tokens/s", None, row.tokens_per_second),
            _speedup(row, label, gain),
            Row(f"{label}: {quality}", "% lost", loss, lost, note=under),
            Row(f"{label}: perplexity grows", "% lost", loss, growth, note=under),
            Row(f"{label}: FFN weights read", "%", None, 100.0 * (1.0 + 2.0 * row.value) / 3.0),
        ]
    return rows


def shape_rows(swept: Sequence[SweepRow], shape: str) -> list[Row]:
    """Return the table's rows of a shape with random weights."""
    return [
        _speedup(row, f"{skipped(row)} % skipped, {shape}", CLAIMS.get(skipped(row), (None,))[0])
        for row in swept[1:]
    ]


def skipped(row: SweepRow) -> int:
    """Return the percentage of neurons that a setting skips."""
    return round(100.0 * (1.0 - row.value))


def _speedup(row: SweepRow, label: str, claim: float | None) -> Row:
    note = f"quartiles {row.low:.2f} - {row.high:.2f}" + (
        f"; claim {skipping_eval.ELSEWHERE}" if claim else ""
    )
    return Row(f"{label}: speed-up", "x", claim, row.speedup, note=note)


if __name__ == "__main__":
    define_flags()
    launch(main)
