"""Compares ways of pruning: ours and published ones, on one model, one text and one calibration.

    python -m experiments.bench.pruning --text=wt103_valid.txt \\
        --calibration_text=wt103_train_head.txt --digits_dir=DIR --speech_dir=DIR --out_dir=out

prunes the decoder of the shipped model in every way of `bench/pruning/rows.py` and scores
each as `experiments.bench.quality` does: perplexity of --text with the interval of its increase,
taps on phone screens asked in writing and in speech, and the mean KL divergence (nats) and share of
changed top-1 tokens against float32, for each modality. Two rows without pruning show the
noise.

50 % of the weights without structure and 2 of 4 neighbours: magnitude, Wanda, SparseGPT and
JaxPruner's magnitude as published, restated in float64 numpy (`bench/peers/sparsity.py`;
JaxPruner itself no longer imports with current jax), beside ours. 30 % of the decoder's parameters:
heads and neurons leave the arrays, and what stays is healed by distillation. Everybody calibrates
on the same --calibration_windows of --calibration_text and --calibration_screens; healing reads
--training_windows of it and screens, half of which are asked in speech: a fifth of the batches
under a mask, two fifths after a removal. Screens, digits, speakers and text are not those measured
on. Labels are a tenth of the healing loss, so `nothing removed, trained likewise` says what more
training alone gives.

Bytes are those of the decoder as stored, masks included: no mask saves any by itself. With
--speed_shape the same heads and neurons are removed from that shape with random weights, both are
written as int8 .tflite files, and their decoding takes turns in LiteRT in one run; measure it on an
otherwise idle machine.

Results are in --out_dir, one JSON per row; a row that has one is not run again, and a training that
was killed goes on from its last state, so an interrupted run continues where it was.
--methods='30 %' picks rows by name; `table.md`, `report.json` and `pruning.png` are made of all
results found, beside the goals.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

import jax
from absl import flags

from experiments.bench import quality as bench_quality
from experiments.bench.peers.methods import Method
from experiments.bench.peers.scoring import Scorer
from experiments.bench.peers.table import cells, titles
from experiments.bench.pruning import rows, show, speed, work
from experiments.common.child import ChildError
from glm_edge.cli import corpora
from glm_edge.cli.console import launch, refuse_arguments
from glm_edge.errors import OutputError
from glm_edge.tables import text_table

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines this script's flags."""
    bench_quality.define_shared_flags()
    flags.adopt_module_key_flags(bench_quality)
    FLAGS.set_default("screens", 320)
    flags.DEFINE_integer("steps", 1500, "Steps of distillation after arrays shrink.", 1)
    flags.DEFINE_integer("sparse_steps", 800, "Steps of distillation under a mask.", 1)
    flags.DEFINE_string("speed_shape", None, "Preset whose decoding is timed, such as mobile.")
    flags.DEFINE_integer("speed_rounds", 12, "Bursts of each model.", 1)
    flags.DEFINE_integer("threads", 2, "Threads of LiteRT.", 1)


def main(argv: Sequence[str]) -> None:
    refuse_arguments(argv)
    methods = rows.methods(FLAGS.steps, FLAGS.sparse_steps)
    chosen = bench_quality.chosen_methods(FLAGS.methods, methods)
    directory = Path(FLAGS.out_dir).resolve()
    results = directory / "results"
    settings = {**bench_quality.run_settings(), "training_windows": FLAGS.training_windows}
    waiting = [m for m in chosen if not bench_quality.finished(results, m, settings)]
    if waiting:
        bench = Bench(directory, settings)
        bench_quality.measure(bench.run, waiting, results, show.COLUMNS)
    if FLAGS.speed_shape:
        time_shape(directory)
    conclude(directory, results, methods)


class Bench:
    """The model, its scores and what prunes it.

    Args:
      directory: for the states of trainings.
      settings: noted with every row.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]):
        self.settings, self.data = settings, bench_quality.gather()
        data, model, params = self.data, self.data.model, self.data.params
        calibration = bench_quality.alternate(
            data.texts(FLAGS.calibration_windows // 8), data.screens(FLAGS.calibration_screens // 4)
        )
        self.worker = work.Worker(
            data,
            calibration,
            lambda: bench_quality.training_batches(data),
            directory / "states",
            FLAGS.seed,
        )
        self.scorer = Scorer(model, params, data.tokenizer, data.windows, data.questions)
        self.dense = self.scorer.score(model, params)

    def run(self, method: Method) -> dict[str, Any]:
        """Carries out a row and scores it."""
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
            **show.beside_dense(measured, self.dense),
            "seconds": seconds,
            "curve": pruned.curve,
            "notes": pruned.notes,
            "versions": None,
            "settings": self.settings,
        }
        if pruned.model is not self.data.model:
            # Programs compiled for other widths are not used again.
            jax.clear_caches()
        return row


def time_shape(directory: Path) -> None:
    """Times --speed_shape, unless that was done with the same settings.

    Raises:
      OutputError: it was done with other settings, or LiteRT refuses.
    """
    path = directory / "speed.json"
    asked = {"rounds": FLAGS.speed_rounds, "steps": 10, "context": 128, "slots": 512}
    asked |= {"shape": FLAGS.speed_shape, "threads": FLAGS.threads}
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))["asked"]
        if stored != asked:
            raise OutputError(f"{path}: measured with {stored}, asked for {asked}; delete it first")
        return
    try:
        results_rows = speed.measure(work=directory / "speed", **asked)
    except ChildError as error:
        raise OutputError(f"--speed_shape: {error}") from error
    text = json.dumps({"asked": asked, **results_rows}, indent=1) + "\n"
    corpora.write_text(path, text, overwrite=True)


def conclude(directory: Path, results: Path, methods: Sequence[Method]) -> None:
    """Writes table, report and figure of all results, in the order of the rows."""
    results_rows = bench_quality.rows_found(results, methods)
    timed = directory / "speed.json"
    times = json.loads(timed.read_text(encoding="utf-8")) if timed.exists() else None
    goals = show.goals(results_rows, times)
    table = text_table(titles(show.COLUMNS), [cells(row, show.COLUMNS) for row in results_rows])
    reached = text_table(
        ["goal", "row", "wanted", "found", "reached"],
        [
            [g["goal"], g["row"], f"{g['wanted']:.4g}", f"{g['found']:.4g}", g["reached"]]
            for g in goals
        ],
    )
    text = f"{table}\n\n{show.FOOTNOTE}\n\n{reached}\n"
    report = {
        "run": bench_quality.circumstances(results_rows),
        "goals": goals,
        "speed": times,
        "rows": results_rows,
    }
    corpora.write_text(directory / "report.json", json.dumps(report, indent=1) + "\n", True)
    corpora.write_text(directory / "table.md", text, True)
    print(f"\n{text}")
    show.figure(results_rows, directory / "pruning.png")


if __name__ == "__main__":
    define_flags()
    launch(main)
