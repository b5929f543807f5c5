"""Compares pruning methods, glm_edge's and published ones, on one model, text and calibration.

    python -m experiments.bench.pruning --text=encyclopedia.txt,books.txt \\
        --calibration_text=train.txt --digits_dir=DIR --speech_dir=DIR --out_dir=out

Prunes the decoder of --checkpoint (default: the shipped model) by every method of
`bench/pruning/rows.py` and scores it like `experiments.bench.quality`. Scores are, per domain of
text, the mean KL divergence from float32 (nats) and the increase of perplexity with their
intervals, and taps on phone screens for written and spoken instructions. Two rows without pruning
show the noise.

At unstructured 50 % and at 2:4, glm_edge is compared with magnitude, Wanda, SparseGPT and
JaxPruner's magnitude, reimplemented in float64 numpy (`bench/peers/sparsity.py`; JaxPruner cannot
be imported with current jax). At 30 % of the decoder's parameters, heads and neurons are removed
from the arrays, and the rest is healed by distillation. All methods calibrate on the same
--calibration_windows of text, see `experiments.bench.quality`, and --calibration_screens. Healing
uses --training_windows of the texts, and screens with half of the questions spoken: a fifth of the
batches under a mask, two fifths after a removal. Screens, digits, speakers and text differ from
those of the measurement. Labels are a tenth of the healing loss. Beside each distilled row, a row
of labels alone has the same batches, steps and schedule. The rows `nothing removed, trained
likewise` show the effect of more training alone.

Bytes are those of the stored decoder including masks; a mask alone saves none. With --speed_shape,
the same heads and neurons are removed from that shape with random weights. Both models are written
as int8 .tflite files, and their decoding alternates in LiteRT in one run; use an otherwise idle
machine.

Results are in --out_dir, one JSON file per row. An interrupted run resumes: finished rows are not
repeated, and training continues from its last state. --methods='30 %' selects rows by name.
`table.md`, `report.json` and `pruning.png` show all results in the directory, with the goals.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

import jax
from absl import flags

from experiments.bench import gathered
from experiments.bench import quality as bench_quality
from experiments.bench.peers.comparison import with_intervals, without_windows
from experiments.bench.peers.methods import Method
from experiments.bench.peers.scoring import Scorer
from experiments.bench.peers.table import PERCENT_INTERVAL, cells, titles
from experiments.bench.pruning import rows, show, speed, work
from experiments.common.child import ChildError
from glm_edge.cli import corpora
from glm_edge.cli.console import launch, refuse_arguments
from glm_edge.errors import OutputError
from glm_edge.tables import text_table

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define this script's flags."""
    gathered.define_flags()
    flags.adopt_module_key_flags(gathered)
    FLAGS.set_default("screens", 320)
    flags.DEFINE_integer("steps", 1500, "Steps of distillation after a removal.", 1)
    flags.DEFINE_integer("sparse_steps", 800, "Steps of distillation under a mask.", 1)
    flags.DEFINE_string("speed_shape", None, "Preset whose decoding is timed, such as mobile.")
    flags.DEFINE_integer("speed_rounds", 12, "Number of bursts per model.", 1)
    flags.DEFINE_integer("threads", 2, "Number of LiteRT threads.", 1)


def main(argv: Sequence[str]) -> None:
    refuse_arguments(argv)
    methods = rows.methods(FLAGS.steps, FLAGS.sparse_steps)
    chosen = bench_quality.chosen_methods(FLAGS.methods, methods)
    directory = Path(FLAGS.out_dir).resolve()
    results = directory / "results"
    settings = {**gathered.run_settings(), "training_windows": FLAGS.training_windows}
    waiting = [m for m in chosen if not bench_quality.finished(results, m, settings)]
    if waiting:
        bench = Bench(directory, settings)
        columns = show.columns_of(list(bench.data.windows))
        bench_quality.measure(bench.run, waiting, results, columns)
    if FLAGS.speed_shape:
        time_shape(directory)
    conclude(directory, results, methods)


class Bench:
    """The model, its scorer and its pruning worker.

    Args:
      directory: directory for training states.
      settings: settings that every row records.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]):
        self.settings, self.data = settings, gathered.gather()
        data, model, params = self.data, self.data.model, self.data.params
        calibration = gathered.alternate(
            data.texts(FLAGS.calibration_windows // 8), data.screens(FLAGS.calibration_screens // 4)
        )
        self.worker = work.Worker(
            data,
            calibration,
            lambda: gathered.training_batches(data),
            directory / "states",
            FLAGS.seed,
        )
        self.scorer = Scorer(model, params, data.tokenizer, data.windows, data.questions)
        self.dense = self.scorer.score(model, params)

    def run(self, method: Method) -> dict[str, Any]:
        """Run a row and score it."""
        pruned, seconds = work.timed(self.worker, method, bench_quality.slug(method))
        measured = self.scorer.score(pruned.model, work.dense_of(pruned.params))
        row = {
            "method": method.name,
            "peer": method.peer,
            "kind": method.kind,
            "calibration": method.calibration,
            "options": method.options,
            **work.sizes(self.data.params, pruned.params),
            **measured,
            "text": with_intervals(measured["text"], self.dense["text"]),
            **show.taps_lost(measured, self.dense),
            "seconds": seconds,
            "curve": pruned.curve,
            "notes": pruned.notes,
            "settings": self.settings,
            **bench_quality.run_of("bench.pruning", further=("steps", "sparse_steps")),
        }
        if pruned.model is not self.data.model:
            # Programs compiled for other widths are not reused.
            jax.clear_caches()
        return row


def time_shape(directory: Path) -> None:
    """Time --speed_shape, unless a result with the same settings exists.

    Raises:
      OutputError: a result with different settings exists, or LiteRT fails.
    """
    path = directory / "speed.json"
    asked = {"rounds": FLAGS.speed_rounds, "steps": 10, "context": 128, "slots": 512}
    asked |= {"shape": FLAGS.speed_shape, "threads": FLAGS.threads}
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))["asked"]
        if stored != asked:
            raise OutputError(f"{path}: measured with {stored}, requested {asked}; delete it first")
        return
    try:
        results_rows = speed.measure(work=directory / "speed", **asked)
    except ChildError as error:
        raise OutputError(f"--speed_shape: {error}") from error
    text = json.dumps({"asked": asked, **results_rows}, indent=1) + "\n"
    corpora.write_text(path, text, overwrite=True)


def conclude(directory: Path, results: Path, methods: Sequence[Method]) -> None:
    """Write table, report and figure of all results, in the order of the rows."""
    results_rows = bench_quality.rows_found(results, methods)
    timed = directory / "speed.json"
    times = json.loads(timed.read_text(encoding="utf-8")) if timed.exists() else None
    goals = show.goals(results_rows, times)
    columns = show.columns_of(list(results_rows[0]["text"]))
    table = text_table(titles(columns), [cells(row, columns) for row in results_rows])
    reached = text_table(
        ["goal", "row", "wanted", "found", "reached"],
        [
            [g["goal"], g["row"], f"{g['wanted']:.4g}", f"{g['found']:.4g}", g["reached"]]
            for g in goals
        ],
    )
    gains = show.gains(results_rows)
    changes = text_table(
        ["perplexity, distilled over labels alone", "domain", "change"],
        [[g["row"], g["domain"], PERCENT_INTERVAL.format(g["change"])] for g in gains],
    )
    text = f"{table}\n\n{show.FOOTNOTE}\n\n{changes}\n\n{reached}\n"
    report = {
        "goals": goals,
        "gains": gains,
        "speed": times,
        "rows": [without_windows(row) for row in results_rows],
    }
    corpora.write_text(directory / "report.json", json.dumps(report, indent=1) + "\n", True)
    corpora.write_text(directory / "table.md", text, True)
    print(f"\n{text}")
    show.figure(results_rows, directory / "pruning.png")


if __name__ == "__main__":
    define_flags()
    launch(main)
