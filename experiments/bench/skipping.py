"""Measures run-time pruning: early exit, skipped neurons, and dropped vision tokens.

    python -m experiments.bench.skipping --out_dir=out/skipping
    python -m experiments.bench.skipping --preset=full --out_dir=out/skipping --exits=2,3 \\
        --thresholds=0.5,0.8,0.9,0.95,0.99 --keep=0.8,0.5,0.25 --neuron_thresholds=0.02,0.05,0.1

Early exit: the head runs after each layer of --exits. If its largest probability reaches the
threshold, the remaining layers are skipped. An exit applies the head to the hidden state (`exit`),
or first maps it to an estimate of the last layer's, by a matrix fitted on calibration screens and
text (`exit+map`). Neurons: each token uses the --keep fraction of neurons with the largest gates
(`keep`), or those above a fraction of the largest gate (`gate`). Vision tokens: after two layers,
the --vision_keep fraction of a screen's tokens with the most attention from the text are kept
(`vision`). No method is trained.

Accuracy is the rate of taps in the box on unseen screens, or, for a checkpoint without vision, the
agreement with its own tokens. `tokens/s` times the answer to one question in one compiled loop,
without the prompt. In each round all settings alternate on the same question, and `speed-up`
compares within rounds (quartiles in brackets). `layers` is the mean number of layers per decoded
token; `agreement` the fraction of tokens that equal the first row's.

A small model gains little: in nano a layer costs about as much as the head. --shape=mobile also
times the decoder of that preset with random weights (1.4 GB) and exits at half the depth (`exit`);
its rows show the possible speed-up, not accuracy.

Writes report.json, table.md, table.csv and skipping_eval.png to --out_dir.
"""

import csv
import dataclasses
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

import jax
from absl import flags

from experiments.common import skipping_eval
from experiments.common.figures import skipping_figure
from experiments.common.outputs import prepare_directory
from experiments.common.provenance import provenance_of, without_paths
from experiments.common.skipping_eval import floats
from glm_edge.cli.console import launch
from glm_edge.cli.corpora import write_text
from glm_edge.generate import Setting, SweepRow
from glm_edge.tables import text_table

# Published claims: speed-up, and points of accuracy lost.
PUBLISHED = {
    ("exit+map", 0.95): "1.58 x at -0.4 points",
    ("keep", 0.8): "1.15 x under 1 %",
    ("keep", 0.5): "1.42 x at 3 %",
}
FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define this script's flags."""
    flags.DEFINE_enum("preset", "quick", list(skipping_eval.PRESETS), "Size of the measurement.")
    skipping_eval.define_flags()
    flags.DEFINE_list("exits", ["3"], "Layers after which a token may exit.")
    flags.DEFINE_list(
        "thresholds", ["0.5", "0.8", "0.95"], "Thresholds of the largest probability, 0 to 1."
    )
    flags.DEFINE_list("keep", ["0.8", "0.5"], "Fractions of neurons that a token uses.")
    flags.DEFINE_list(
        "neuron_thresholds",
        ["0.05"],
        "Thresholds of |silu(gate)| relative to its largest value, 0 to 1.",
    )
    flags.DEFINE_list("vision_keep", [], "Fractions of vision tokens to keep.")
    flags.DEFINE_bool("maps", True, "Also measure exits with fitted maps.")
    flags.DEFINE_string("shape", "", "Preset to time with random weights, such as mobile.")
    flags.DEFINE_integer("seed", 0, "Seed of screens and calibration.")
    flags.DEFINE_string(
        "out_dir", "out", "Output directory; must not contain results without --overwrite."
    )
    flags.DEFINE_bool("overwrite", False, "Replace existing results in --out_dir.")


def main(argv: Sequence[str]) -> None:
    del argv
    started = time.monotonic()
    thresholds, keep, gates = map(floats, ("thresholds", "keep", "neuron_thresholds"))
    exits = [int(value) for value in floats("exits")]
    directory = prepare_directory(Path(FLAGS.out_dir), FLAGS.overwrite)
    amount = skipping_eval.size()
    model, params, tokenizer = skipping_eval.opened()
    settings = [Setting("all", params)]
    settings += skipping_eval.exit_settings(model, params, exits, thresholds)
    if FLAGS.maps and exits:
        maps = skipping_eval.fitted_maps(model, params, tokenizer, exits)
        settings += skipping_eval.exit_settings(model, params, exits, thresholds, maps)
    settings += skipping_eval.neuron_settings(model, params, keep, gates)
    settings += skipping_eval.vision_settings(model, params, floats("vision_keep"))
    rows = skipping_eval.run(model, tokenizer, settings)
    timed = []
    if FLAGS.shape:
        timed = skipping_eval.time_shape(
            FLAGS.shape,
            amount["rounds"],
            FLAGS.seed,
            lambda model, params: [
                *skipping_eval.half_depth(model, params),
                *skipping_eval.neuron_settings(model, params, keep),
            ],
        )
    report = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "shape": [dataclasses.asdict(row) for row in timed],
        "run": {
            **provenance_of("bench.skipping", placeholders=without_paths(sys.argv[1:])),
            "device": jax.devices()[0].device_kind,
            "checkpoint": str(FLAGS.checkpoint or "nano"),
            "exits": exits,
            **amount,
            "seconds": round(time.monotonic() - started, 1),
        },
    }
    table = text_table(HEADER, [cells(row, rows[0]) for row in rows])
    if timed:
        shown = [[row.name, *cells(row, timed[0])[4:7]] for row in timed]
        table += f"\n\n{text_table([f'{FLAGS.shape}, random weights', *HEADER[4:7]], shown)}"
    write_text(directory / "report.json", json.dumps(report, indent=1) + "\n", overwrite=True)
    write_text(directory / "table.md", table + "\n", overwrite=True)
    write_text(directory / "table.csv", as_csv(rows), overwrite=True)
    skipping_figure(report["rows"], directory / "skipping.png")
    print(f"{table}\n\n{report['run']['seconds']:.0f} s; {report['run']['command']}")


HEADER = [
    "setting",
    "accuracy",
    "lost (points)",
    "agreement",
    "layers",
    "tokens/s",
    "speed-up",
    "published",
]


def cells(row: SweepRow, first: SweepRow) -> list[str]:
    """Return a row as text, in the order of HEADER."""
    return [
        row.name,
        f"{row.accuracy:.1%}",
        f"{100 * (first.accuracy - row.accuracy):.1f}",
        f"{row.agreement:.1%}",
        f"{row.layers:.2f}",
        f"{row.tokens_per_second:.0f}",
        f"{row.speedup:.2f} ({row.low:.2f}-{row.high:.2f})",
        PUBLISHED.get((row.name.split()[0], row.value), ""),
    ]


def as_csv(rows: Sequence[SweepRow]) -> str:
    """Return all values as CSV, unrounded."""
    text = io.StringIO()
    names = [field.name for field in dataclasses.fields(SweepRow)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    return text.getvalue()


if __name__ == "__main__":
    define_flags()
    launch(main)
