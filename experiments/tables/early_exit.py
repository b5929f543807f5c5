"""Table (g): early exit at the first layer with a confident prediction.

    python -m experiments.tables.early_exit --preset=quick
    python -m experiments.tables.early_exit --preset=full --digits_dir=MNIST

The claim, at a threshold of 0.95: 120 ms and 98.2 % become 76 ms and 97.8 %. The shipped model (or
--checkpoint) runs its head after each layer of --exits. If the largest probability reaches the
threshold, the remaining layers are skipped. An exit applies the head to the hidden state (`exit`),
or first maps it to an estimate of the last layer's, by a matrix fitted on text and screens
(`exit+map`). The claim does not name the method, so both are compared with it. Quality is taps in
the box (for a checkpoint without vision, agreement with its own tokens); `layers` is the mean
number of layers per decoded token. Time is per token in one compiled loop, without the prompt. All
settings alternate on the same question, and times are compared within rounds.

In nano a layer costs about as much as the head. The decoder of --shape has random weights and exits
at half its depth; its rows show the possible speed-up, not quality.
"""

import dataclasses
import os
from collections.abc import Sequence

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

from absl import flags

from experiments.common import skipping_eval
from experiments.tables import table
from experiments.tables.table import PHONE, Row
from glm_edge.cli.console import launch
from glm_edge.generate import Setting, SweepRow

FLAGS = flags.FLAGS
NAME = "early_exit"
THRESHOLD = 0.95
CLAIMED_MS, CLAIMED_QUALITY = (120.0, 76.0), (98.2, 97.8)
THRESHOLDS = {"quick": (0.5, 0.8, 0.95), "full": (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)}
SHAPES = {"quick": "", "full": "mobile"}


def define_flags() -> None:
    """Define this script's flags."""
    table.define_flags(NAME)
    skipping_eval.define_flags()
    flags.DEFINE_list("exits", ["3"], "Layers after which a token may exit.")
    flags.DEFINE_list(
        "thresholds", None, "Thresholds of the largest probability; default: the preset's."
    )
    flags.DEFINE_string(
        "shape", None, "Preset to time with random weights; default: none, or mobile in full."
    )


def main(argv: Sequence[str]) -> None:
    table.prepare(argv)
    exits = [int(value) for value in skipping_eval.floats("exits")]
    thresholds = skipping_eval.floats("thresholds") or THRESHOLDS[FLAGS.preset]
    model, params, tokenizer = skipping_eval.opened()
    settings = [Setting("all", params)]
    settings += skipping_eval.exit_settings(model, params, exits, thresholds)
    maps = skipping_eval.fitted_maps(model, params, tokenizer, exits)
    settings += skipping_eval.exit_settings(model, params, exits, thresholds, maps)
    rows = skipping_eval.run(model, tokenizer, settings)
    shape = SHAPES[FLAGS.preset] if FLAGS.shape is None else FLAGS.shape
    timed = []
    if shape:
        rounds = skipping_eval.size()["rounds"]
        timed = skipping_eval.time_shape(shape, rounds, FLAGS.seed, skipping_eval.half_depth)
    quality = "taps in the box" if model.config.vision is not None else "tokens as without exits"
    table.publish(
        NAME,
        "Early exit at 0.95: claimed 120 -> 76 ms, 98.2 -> 97.8 %",
        [*rows_of(rows, quality, skipping_eval.size()["screens"]), *shape_rows(timed, shape)],
        ("checkpoint", "exits", "thresholds", "screens", "rounds", "digits_dir", "shape"),
        {
            "rows": [dataclasses.asdict(row) for row in rows],
            "shape": [dataclasses.asdict(row) for row in timed],
        },
    )


def rows_of(swept: Sequence[SweepRow], quality: str, questions: int) -> list[Row]:
    """Return the table's rows of the model that has been trained.

    Args:
      swept: rows of the sweep; the first runs all layers.
      quality: name of the sweep's accuracy.
      questions: number of questions.

    Returns:
      The rows.
    """
    dense = swept[0]
    rows = []
    for row in swept:
        first, claimed = row is dense, row.value == THRESHOLD
        index = 0 if first else 1
        ms, percent = (
            (CLAIMED_MS[index], CLAIMED_QUALITY[index]) if first or claimed else (None, None)
        )
        label = "all layers" if first else row.name
        tail = f"; claim {skipping_eval.ELSEWHERE}" if percent else ""
        note = f"{questions} questions; {row.agreement:.1%} of the tokens of all layers{tail}"
        rows += [
            Row(f"{label}: {quality}", "%", percent, 100.0 * row.accuracy, note=note),
            Row(f"{label}: layers", "layers", None, row.layers),
            Row(f"{label}: time per token", "ms", None, 1e3 / row.tokens_per_second),
        ]
        if not first:
            lost = 100.0 * (dense.accuracy - row.accuracy)
            claim = CLAIMED_QUALITY[0] - CLAIMED_QUALITY[1] if claimed else None
            rows += [
                Row(f"{label}: lost", "points", claim, lost),
                _relative_time(row, label, claimed),
            ]
        if ms is not None:
            rows.append(Row(f"{label}: time", "ms", ms, None, note=PHONE))
    return rows


def shape_rows(swept: Sequence[SweepRow], shape: str) -> list[Row]:
    """Return the table's rows of a shape with random weights."""
    return [_relative_time(row, f"{row.name}, {shape}", False) for row in swept[1:]]


def _relative_time(row: SweepRow, label: str, claimed: bool) -> Row:
    note = f"quartiles {1 / row.high:.2f} - {1 / row.low:.2f}"
    claim = None
    if claimed:
        note, claim = f"{note}; claim {skipping_eval.ELSEWHERE}", CLAIMED_MS[1] / CLAIMED_MS[0]
    return Row(f"{label}: time over all layers", "x", claim, 1 / row.speedup, note=note)


if __name__ == "__main__":
    define_flags()
    launch(main)
