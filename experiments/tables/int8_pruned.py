"""Table (e): int8 and pruning together on a MobileNetV2.

    python -m experiments.tables.int8_pruned --preset=quick
    python -m experiments.tables.int8_pruned --preset=full --digits_dir=MNIST

The claim: 2.1 -> 0.6 GOPs and 8.7 -> 3.2 MB for less than 1 % of accuracy. Accuracy is measured on
digits. A small MobileNetV2 is trained, the fraction --remove of its blocks' hidden channels is
removed, and the rest is healed with the complete model as the teacher. Then norms are folded,
LiteRT's converter rounds weights and activations to int8 with training images for calibration, and
the file runs on the test images. Operations, bytes and latency are measured at the published shape,
MobileNetV2 1.0 on 224x224, with random weights. Products and sums count as operations, so int8 does
not reduce their number.
"""

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.tables import learning, measure, table, vision
from experiments.tables.learning import Training
from experiments.tables.table import IMAGENET, Row
from glm_edge.cli.console import launch
from glm_edge.compress import prune
from glm_edge.compress.reparameterize import reparameterize
from glm_edge.models.cnn import CNN, preset

FLAGS = flags.FLAGS
NAME = "int8_pruned"
GOPS, MEGABYTES, LOSS = (2.1, 0.6), (8.7, 3.2), 1.0
STEPS = {"quick": (250, 250), "full": (1500, 1500)}
SEEDS = {"quick": 2, "full": 5}
ROUNDS = {"quick": 15, "full": 50}
EXAMPLES = 64


def define_flags() -> None:
    """Define this script's flags."""
    table.define_flags(NAME)
    vision.define_flags()
    flags.DEFINE_float("remove", 0.8, "Fraction of hidden channels to remove, in 0..1.", 0.0, 0.99)
    flags.DEFINE_string("shape", "mobilenet_v2_1", "Preset whose size and time are measured.")
    flags.DEFINE_integer(
        "dense_steps", None, "Training steps before pruning; default: the preset's.", 1
    )
    flags.DEFINE_integer(
        "heal_steps", None, "Healing steps after pruning; default: the preset's.", 1
    )
    flags.DEFINE_integer("seeds", None, "Number of repetitions; default: 2, or 5 in full.", 1)
    flags.DEFINE_integer("threads", 2, "Number of LiteRT threads.", 1)


def main(argv: Sequence[str]) -> None:
    directory = table.prepare(argv)
    dense_steps, heal_steps = STEPS[FLAGS.preset]
    steps = FLAGS.dense_steps or dense_steps, FLAGS.heal_steps or heal_steps
    data = vision.load(FLAGS.digits_dir)
    measurements = table.by_seed(
        SEEDS, lambda seed: accuracies(directory, data, seed, *steps, FLAGS.remove)
    )
    costs = published(FLAGS.shape, FLAGS.remove, ROUNDS[FLAGS.preset], FLAGS.threads, FLAGS.seed)
    table.publish(
        NAME,
        "int8 and pruning together: claimed 2.1 -> 0.6 GOPs, 8.7 -> 3.2 MB, under 1 % loss",
        rows_of(measurements, costs, data.name),
        ("digits_dir", "remove", "shape", "dense_steps", "heal_steps", "seeds", "threads"),
        {"accuracy": measurements, "published_shape": costs, "test_images": len(data.test_labels)},
    )


def accuracies(
    directory: Path,
    data: vision.Digits,
    seed: int,
    dense_steps: int,
    heal_steps: int,
    fraction: float,
) -> dict[str, float]:
    """Measure accuracy on digits in percent: dense, int8, pruned, and both.

    Args:
      directory: directory of finished trainings.
      data: the digits.
      seed: seed of the initial variables and of the order of images.
      dense_steps: training steps before pruning.
      heal_steps: healing steps after pruning.
      fraction: fraction of hidden channels to remove.

    Returns:
      Accuracy in percent by kind; int8 models run as files in LiteRT.
    """
    model, dense, small, pruned = vision.pruned(directory, data, seed, dense_steps, fraction)
    healing = Training(heal_steps, 2e-3, alpha=0.9)
    pruned = learning.trained(
        directory,
        f"pruned_{seed}",
        small,
        data.train,
        healing,
        seed,
        start=pruned,
        teacher=(model, dense),
    )
    measurements = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind, side in (("dense", (model, dense)), ("pruned", (small, pruned))):
            measurements[kind] = learning.accuracy(*side, data.test)
            path = Path(scratch) / f"{kind}.tflite"
            deployed = reparameterize()(*side)[:2]
            measure.export(
                *deployed, path, data.train_images[:: len(data.train_images) // EXAMPLES]
            )
            file = measure.LiteRT(path)
            measurements[f"{kind} int8"] = vision.percent_right(
                file.classify(data.test_images), data
            )
    return measurements


def published(name: str, fraction: float, rounds: int, threads: int, seed: int) -> dict[str, Any]:
    """Measure operations, parameters, bytes and milliseconds of a shape, dense and pruned.

    Args:
      name: name of the preset.
      fraction: fraction of hidden channels to remove.
      rounds: number of measurements of each file.
      threads: number of LiteRT threads.
      seed: seed of the random weights.

    Returns:
      `operations`, `bytes` of the file and `seconds` by kind.
    """
    config = preset(name)
    dense = measure.random_variables(CNN(config), seed)
    small, small_variables, _ = prune.channels(fraction)(CNN(config), dense)
    sides = {"dense": (CNN(config), dense), "pruned": (small, small_variables)}
    images = np.random.default_rng(seed).random((4, *config.image_size), np.float32)
    measurements: dict[str, Any] = {}
    calls = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind, side in sides.items():
            deployed, folded, _ = reparameterize()(*side)
            macs = measure.multiply_accumulates(
                lambda v, m=deployed: m.apply(v, jnp.asarray(images[:1]))[0], folded
            )
            for form, examples in (("", None), (" int8", images)):
                path = Path(scratch) / f"{kind}{form}.tflite"
                size = measure.export(deployed, folded, path, examples)
                measurements[f"{kind}{form}"] = {"operations": 2 * macs, "bytes": size}
                file = measure.LiteRT(path, threads)
                calls[f"{kind}{form}"] = lambda file=file: file(images[:1])
        for kind, seconds in measure.alternate(calls, rounds).items():
            measurements[kind]["seconds"] = seconds
    return measurements


def rows_of(
    measurements: dict[str, list[float]], costs: dict[str, dict[str, Any]], data: str
) -> list[Row]:
    """Return the table's rows from accuracies of every seed and costs at the published shape."""
    before, after = costs["dense"], costs["pruned int8"]
    shape = "MobileNetV2 1.0, 224x224; the claim does not name its model"
    rows = []
    for quantity, unit, scale, claim in (
        ("operations", "GOPs", 1e9, GOPS),
        ("bytes", "MB", 1e6, MEGABYTES),
    ):
        sizes = before[quantity] / scale, after[quantity] / scale
        name = "operations" if quantity == "operations" else "file"
        rows += [
            Row(f"{name}, dense float32", unit, claim[0], sizes[0], note=shape),
            Row(f"{name}, pruned int8", unit, claim[1], sizes[1], note=shape),
            Row(f"{name}, reduction factor", "x", claim[0] / claim[1], sizes[0] / sizes[1]),
        ]
    for kind in ("dense int8", "pruned"):
        rows.append(Row(f"file, {kind}", "MB", None, costs[kind]["bytes"] / 1e6))
    for kind, numbers in costs.items():
        millis = measure.median_ms(numbers["seconds"])
        rows.append(Row(f"latency in LiteRT, {kind}", "ms", None, millis))
    note = f"{data}, {len(measurements['dense'])} seed(s)"
    for kind, values in measurements.items():
        spread = statistics.stdev(values) if len(values) > 1 else None
        rows.append(Row(f"top-1, {kind}", "%", None, statistics.fmean(values), spread, note))
    for kind, claim in (("dense int8", None), ("pruned", None), ("pruned int8", LOSS)):
        losses = [a - b for a, b in zip(measurements["dense"], measurements[kind], strict=True)]
        spread = statistics.stdev(losses) if len(losses) > 1 else None
        more = "claim: at most, on different data" if claim else ""
        rows.append(
            Row(f"top-1 lost, {kind}", "points", claim, statistics.fmean(losses), spread, more)
        )
    rows.append(Row("top-1 lost on ImageNet", "points", LOSS, None, note=IMAGENET))
    return rows


if __name__ == "__main__":
    define_flags()
    launch(main)
