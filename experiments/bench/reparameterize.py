"""Times convolutional networks before and after reparameterization, in JAX and in LiteRT.

    python -m experiments.bench.reparameterize --models=repvgg_b1,resnet_50 --out=FILE.json

Each model has random float32 weights and statistics, and runs on one image at a time. `before` has
batch norms (and RepVGG three branches); `after` is the result of `reparameterize`. The two
alternate; `speed-up` is the median of their ratios, with quartiles in the JSON file. The largest
difference of the logits is reported as a fraction of the largest logit. LiteRT's converter folds
batch norms of constant weights itself, but does not merge branches.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.common.provenance import provenance_of
from experiments.tables import measure
from glm_edge import params as boxes
from glm_edge.cli.console import bar, launch, print_table, refuse_arguments
from glm_edge.cli.corpora import write_text
from glm_edge.compress.reparameterize import reparameterize
from glm_edge.models.cnn import CNN, preset

FLAGS = flags.FLAGS
MODELS = ("repvgg_a2", "repvgg_b1", "resnet_50", "mobilenet_v1", "mobilenet_v2_1")


def define_flags() -> None:
    """Define this script's flags."""
    flags.DEFINE_list("models", list(MODELS), "Presets of glm_edge.models.cnn to time.")
    flags.DEFINE_integer("rounds", 15, "Number of measurements of each side.", 1)
    flags.DEFINE_integer("threads", 2, "Number of LiteRT threads; JAX uses all available cores.", 1)
    flags.DEFINE_integer("seed", 0, "Seed of weights and image.")
    flags.DEFINE_string("out", None, "JSON file for the results.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing --out file.")


def main(argv: Sequence[str]) -> None:
    refuse_arguments(argv)
    configs = [preset(name) for name in FLAGS.models]
    results = [
        run(config, FLAGS.rounds, FLAGS.threads, FLAGS.seed) for config in bar("models")(configs)
    ]
    print_table(list(COLUMNS), [[form(row) for form in COLUMNS.values()] for row in results])
    print(f"load average {os.getloadavg()[0]:.1f}")
    if FLAGS.out:
        log = {
            **provenance_of("bench.reparameterize", ("models", "rounds", "threads", "seed")),
            "results": results,
        }
        write_text(FLAGS.out, json.dumps(log, indent=1) + "\n", FLAGS.overwrite)


def run(config: Any, rounds: int, threads: int, seed: int) -> dict[str, Any]:
    """Measure one model before and after.

    Args:
      config: configuration of `glm_edge.models.cnn`.
      rounds: number of measurements of each side.
      threads: number of LiteRT threads.
      seed: seed of weights and image.

    Returns:
      Parameters, bytes of the files, milliseconds, speed-ups with quartiles, and differences.
    """
    trained = CNN(config)
    variables = measure.random_variables(trained, seed)
    deployed, folded, _ = reparameterize()(trained, variables)
    sides = {"before": (trained, variables), "after": (deployed, folded)}
    images = np.random.default_rng(seed).standard_normal((1, *config.image_size), np.float32)
    row: dict[str, Any] = {
        "model": config.name,
        "parameters": {n: boxes.count(v["params"]) for n, (_, v) in sides.items()},
        "file_bytes": {},
    }
    calls = {f"jax {name}": measure.in_jax(*side, images) for name, side in sides.items()}
    with tempfile.TemporaryDirectory() as directory:
        for name, side in sides.items():
            path = Path(directory) / f"{name}.tflite"
            row["file_bytes"][name] = measure.export(*side, path)
            file = measure.LiteRT(path, threads)
            calls[f"litert {name}"] = lambda file=file: file(images)
        logits = {name: call() for name, call in calls.items()}
        seconds = measure.alternate(calls, rounds)
    largest = float(np.abs(logits["jax before"]).max())
    for engine in ("jax", "litert"):
        before, after = seconds[f"{engine} before"], seconds[f"{engine} after"]
        row[engine] = {
            "before_ms": measure.median_ms(before),
            "after_ms": measure.median_ms(after),
            "speed_up_quartiles": measure.ratio_quartiles(before, after),
            "relative_difference": float(
                np.abs(logits[f"{engine} after"] - logits["jax before"]).max()
            )
            / largest,
        }
    jax.clear_caches()
    return row


COLUMNS = {
    "model": lambda row: row["model"],
    "parameters": lambda row: " -> ".join(f"{n:,}" for n in row["parameters"].values()),
    "JAX ms": lambda row: _arrow(row["jax"]),
    "speed-up": lambda row: f"{row['jax']['speed_up_quartiles'][1]:.2f}",
    "LiteRT ms": lambda row: _arrow(row["litert"]),
    "speed-up ": lambda row: f"{row['litert']['speed_up_quartiles'][1]:.2f}",
    "difference": lambda row: f"{row['jax']['relative_difference']:.1e}",
    "file MB": lambda row: " -> ".join(f"{n / 1e6:.1f}" for n in row["file_bytes"].values()),
}


def _arrow(times: dict[str, Any]) -> str:
    return f"{times['before_ms']:.1f} -> {times['after_ms']:.1f}"


if __name__ == "__main__":
    define_flags()
    launch(main)
