"""Prunes, heals, quantizes and exports a model, and measures it after each stage.

    python -m experiments.quickstart --out_dir=out

Compresses the shipped model, and writes `report.json`, `table.md`, `pareto.png` and `model.tflite`
to --out_dir. The run takes about 11 minutes on two slow cores; --smoke takes fewer steps and
screens. Use --checkpoint for a different model (a native or Hugging Face directory), --text for a
different text, and --recipe for a different recipe (a name or a JSON file). Values that do not
apply to a checkpoint, such as taps of a text-only model, are null in the report.
"""

import dataclasses
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

import jax
from absl import flags

import glm_edge as ge
from experiments.common import eval_data, exported_eval, stage_eval
from experiments.common.figures import pareto
from experiments.common.outputs import prepare_directory
from experiments.common.provenance import provenance_of, without_paths
from glm_edge.cli.checkpoints import CHECKPOINT_HELP
from glm_edge.cli.console import launch, progress
from glm_edge.cli.corpora import write_text
from glm_edge.compress.transform import Context, Transform
from glm_edge.tables import text_table

FLAGS = flags.FLAGS
COLUMNS = {
    "stage": "stage",
    "parameters": "parameters",
    "bytes": "bytes",
    "bits_per_weight": "bits/weight",
    "perplexity": "perplexity",
    "bits_per_byte": "bits/byte",
    "kl": "KL (nats)",
    "flips": "top-1 flips",
    "tap_in_box_text": "taps, written",
    "tap_in_box_speech": "taps, spoken",
    "ms_per_token": "ms/token",
}
STAGES = {"prune": "pruned", "distill": "healed", "quantize": "quantized"}


def define_flags() -> None:
    """Define this script's flags."""
    flags.DEFINE_string(
        "out_dir", "out", "Output directory; must not contain results without --overwrite."
    )
    flags.DEFINE_string("checkpoint", None, CHECKPOINT_HELP)
    flags.DEFINE_string(
        "text", None, "UTF-8 file: a third for healing, the rest for the measurement."
    )
    flags.DEFINE_bool(
        "calibration_help", True, "Heal --text also on half of CPython's help topics."
    )
    flags.DEFINE_string("recipe", "quickstart", "Name of a recipe, or a JSON file.")
    flags.DEFINE_string(
        "digits_dir",
        None,
        "Folder of MNIST files for the keys of screens; default: scikit-learn's digits.",
    )
    flags.DEFINE_string(
        "speech_dir",
        None,
        "Folder of spoken digits for the measurement; default: synthetic voices.",
    )
    flags.DEFINE_list("speakers", [], "Speakers of --speech_dir to use; default: all.")
    flags.DEFINE_integer("screens", 200, "Questions of each kind (written, spoken).", 1)
    flags.DEFINE_integer("text_tokens", 8192, "Maximum number of tokens to score.", 512)
    flags.DEFINE_integer("seed", 0, "Seed of screens, calibration and training.")
    flags.DEFINE_bool("overwrite", False, "Replace existing results in --out_dir.")
    flags.DEFINE_bool("smoke", False, "Run with few screens and steps, as a quick check.")


def main(argv: Sequence[str]) -> None:
    del argv
    started = time.monotonic()
    directory = prepare_directory(Path(FLAGS.out_dir), FLAGS.overwrite)
    recipe = ge.recipes.find(FLAGS.recipe)
    checkpoint, model, params = stage_eval.opened(FLAGS.checkpoint)
    data = eval_data.gather(
        model.config,
        checkpoint,
        text=FLAGS.text,
        digits_dir=FLAGS.digits_dir,
        speech_dir=FLAGS.speech_dir,
        speakers=FLAGS.speakers,
        screens=8 if FLAGS.smoke else FLAGS.screens,
        text_tokens=1024 if FLAGS.smoke else FLAGS.text_tokens,
        seed=FLAGS.seed,
        calibration_batches=4 if FLAGS.smoke else 96,
        help_topics=FLAGS.calibration_help,
    )
    for note in data.notes:
        print(f"note: {note}", file=sys.stderr)

    evaluation = stage_eval.StageEval(data)
    rows = [evaluation.measure("dense", model, params)]
    show(rows[-1:])
    dense = (model, params)
    stages = compressed(
        recipe, dense, data.calibration, FLAGS.seed, distill_steps=4 if FLAGS.smoke else None
    )
    for stage, model, params in stages:
        rows.append(evaluation.measure(stage, model, params, reference=dense))
        show(rows[-1:])
    context = model.config.decoder.max_position_embeddings
    exported = ge.export.tflite(
        model,
        params,
        directory / "model.tflite",
        prefill_lengths=exported_eval.prefill_lengths(context),
        cache_slots=exported_eval.cache_slots(context),
        prefill_logits=True,
        overwrite=True,
    )
    row, verification = evaluation.measure_exported(exported, reference=dense)
    rows.append(row)

    report = {
        "rows": rows,
        "export": verification,
        "run": {
            **provenance_of("quickstart", placeholders=without_paths(sys.argv[1:])),
            "recipe": json.loads(ge.to_json(recipe)),
            "screens": len(data.written) or None,
            "tap_loss": evaluation.tap_loss(),
            "seconds": round(time.monotonic() - started, 1),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        },
    }
    table = text_table(list(COLUMNS.values()), [cells(row) for row in rows])
    write_text(directory / "report.json", json.dumps(report, indent=2) + "\n", overwrite=True)
    write_text(directory / "table.md", table + "\n", overwrite=True)
    pareto(rows, directory / "pareto.png")
    print(f"\n{table}\n")
    print(summary(report))


def compressed(
    recipe: Transform,
    dense: tuple[Any, Any],
    calibration: Sequence[Any],
    seed: int,
    distill_steps: int | None = None,
) -> Iterator[tuple[str, Any, Any]]:
    """Run a recipe and yield the model after each stage.

    Args:
      recipe: a transform or a chain of them.
      dense: `(model, params)` of the teacher.
      calibration: calibration batches.
      seed: seed of random values.
      distill_steps: see `stages_of`.

    Yields:
      `(stage, model, params)`.
    """
    (model, params), step = dense, itertools.count()
    for stage, transforms in stages_of(recipe, distill_steps):
        for transform in transforms:
            # The key of this step in a chain, so that both produce the same bytes.
            rng = jax.random.fold_in(jax.random.key(seed), next(step))
            context = Context(calibration, rng, dense, progress())
            model, params, _ = transform.apply(model, params, context)
        yield stage, model, params


def stages_of(
    recipe: Transform, distill_steps: int | None = None
) -> list[tuple[str, list[Transform]]]:
    """Group adjacent transforms of a kind; the model is measured after each group.

    Args:
      recipe: a transform or a chain of them.
      distill_steps: number of distillation steps for a trial run, instead of the recipe's.

    Returns:
      `(stage, transforms)` in order.
    """
    steps = recipe.steps_in_order
    if distill_steps is not None:
        steps = [
            dataclasses.replace(step, train=dataclasses.replace(step.train, steps=distill_steps))
            if step.name == "distill"
            else step
            for step in steps
        ]
    grouped = itertools.groupby(steps, key=lambda step: step.name.partition(".")[0])
    return [(STAGES.get(kind, kind), list(group)) for kind, group in grouped]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows when they are measured."""
    for row in rows:
        values = [f"{COLUMNS[k]} {v}" for k, v in zip(COLUMNS, cells(row), strict=True) if v != "-"]
        print("; ".join(values[1:]).join([f"{row['stage']}: ", ""]), flush=True)


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row as text, in the order of COLUMNS."""
    shapes = {
        "parameters": "{:,}",
        "bytes": "{:,}",
        "bits_per_weight": "{:.2f}",
        "perplexity": "{:.2f}",
        "bits_per_byte": "{:.3f}",
        "kl": "{:.4f}",
        "flips": "{:.1%}",
        "tap_in_box_text": "{:.1%}",
        "tap_in_box_speech": "{:.1%}",
        "ms_per_token": "{:.2f}",
    }
    return [
        "-" if row[name] is None else shapes.get(name, "{}").format(row[name]) for name in COLUMNS
    ]


def summary(report: dict[str, Any]) -> str:
    """Summarize the table in a few lines."""
    rows, export, run = report["rows"], report["export"], report["run"]
    lines = [
        f"size: {rows[-2]['bytes'] / rows[0]['bytes']:.1%} of the dense model's bytes; "
        f"file {export['file_bytes']:,} bytes",
        f"file compared with JAX on the same codes: {export['agreement']:.2%} of top-1 tokens "
        f"over {export['tokens']} positions, largest error {export['max_abs_error']:.3g}; "
        f"free-running {export['free_running_agreement']:.2%}",
    ]
    for kind, loss in (run["tap_loss"] or {}).items():
        lines.append(
            f"taps lost, {kind}: {100 * loss['value']:.1f} points "
            f"({100 * loss['low']:.1f} to {100 * loss['high']:.1f}, {loss['count']} screens)"
        )
    lines.append(f"{run['seconds']:.0f} s, peak {run['peak_rss_bytes'] / 1e9:.2f} GB")
    return "\n".join(lines)


if __name__ == "__main__":
    define_flags()
    launch(main)
