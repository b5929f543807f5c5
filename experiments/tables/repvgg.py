"""Table (f): latency of reparameterized RepVGG, compared with ResNet-50.

    python -m experiments.tables.repvgg --preset=quick

The claim: 8.7 ms for ResNet, 6.2 ms for RepVGG. Both published shapes have random weights, which do
not affect the time, and run alternately on one image of 224x224 in float32. RepVGG-B1 has 2.9 times
the operations of ResNet-50, RepVGG-A2 1.25 times. Plain 3x3 convolutions help an accelerator that
is idle for half of a ResNet's time, but not a CPU that is always busy. The rows show the results of
each runtime.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.tables import measure, table
from experiments.tables.table import PHONE, Row
from glm_edge.cli.console import bar, launch
from glm_edge.compress.reparameterize import reparameterize
from glm_edge.models.cnn import CNN, CNNConfig, preset

FLAGS = flags.FLAGS
NAME = "repvgg"
RESNET_MS, REPVGG_MS = 8.7, 6.2
ROUNDS = {"quick": 7, "full": 25}


def define_flags() -> None:
    """Define this script's flags."""
    table.define_flags(NAME)
    flags.DEFINE_list(
        "repvgg", None, "Presets to measure; default: repvgg_a2, and also repvgg_b1 for full."
    )
    flags.DEFINE_string("resnet", "resnet_50", "Preset to compare with.")
    flags.DEFINE_integer(
        "rounds", None, "Number of measurements of each; default: 7, or 25 for full.", 1
    )
    flags.DEFINE_integer("threads", 2, "Number of LiteRT threads; JAX uses all available cores.", 1)


def main(argv: Sequence[str]) -> None:
    table.prepare(argv)
    names = FLAGS.repvgg or ["repvgg_a2", "repvgg_b1"][: 1 + (FLAGS.preset == "full")]
    configs = {name: preset(name) for name in (FLAGS.resnet, *names)}
    rounds = FLAGS.rounds or ROUNDS[FLAGS.preset]
    seconds = times(configs, rounds, FLAGS.threads, FLAGS.seed)
    macs = {name: operations(config) for name, config in configs.items()}
    table.publish(
        NAME,
        "RepVGG compared with ResNet: claimed 8.7 -> 6.2 ms",
        rows_of(seconds, macs, FLAGS.resnet, names),
        ("repvgg", "resnet", "rounds", "threads"),
        {"seconds": seconds, "multiply_accumulates": macs},
    )


def operations(config: CNNConfig) -> int:
    """Count multiply-accumulates of one image in the deployed model."""
    model = CNN(config, deploy=True)
    images = jnp.zeros((1, *config.image_size))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return measure.multiply_accumulates(lambda v: model.apply(v, images)[0], variables)


def times(
    configs: dict[str, CNNConfig], rounds: int, threads: int, seed: int
) -> dict[str, list[float]]:
    """Measure seconds by `<engine> <name>`, also of RepVGG before reparameterization."""
    calls: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, config in bar("models")(configs.items()):
            trained = CNN(config)
            variables = measure.random_variables(trained, seed)
            sides = {name: reparameterize()(trained, variables)[:2]}
            if name.startswith("repvgg"):
                sides[f"{name} in three branches"] = trained, variables
            shape = (1, *config.image_size)
            images = np.random.default_rng(seed).standard_normal(shape, np.float32)
            for label, side in sides.items():
                path = Path(directory) / f"{len(calls)}.tflite"
                measure.export(*side, path)
                file = measure.LiteRT(path, threads)
                calls[f"litert {label}"] = lambda file=file, images=images: file(images)
                calls[f"jax {label}"] = measure.in_jax(*side, images)
        return measure.alternate(calls, rounds)


def rows_of(
    seconds: dict[str, list[float]], macs: dict[str, int], resnet: str, names: Sequence[str]
) -> list[Row]:
    """Return the table's rows: milliseconds, and RepVGG's time as a fraction of ResNet's."""
    rows = []
    for engine, title in measure.ENGINES.items():
        base = seconds[f"{engine} {resnet}"]
        note = f"{2 * macs[resnet] / 1e9:.1f} GOPs; claim on a different device"
        rows.append(Row(f"{resnet}, {title}", "ms", RESNET_MS, measure.median_ms(base), note=note))
        for name in names:
            timed = seconds[f"{engine} {name}"]
            note = f"{2 * macs[name] / 1e9:.1f} GOPs; claim on a different device"
            millis = measure.median_ms(timed)
            rows.append(Row(f"{name}, {title}", "ms", REPVGG_MS, millis, note=note))
            low, middle, high = measure.ratio_quartiles(timed, base)
            note = f"quartiles {low:.2f} - {high:.2f}"
            claim = REPVGG_MS / RESNET_MS
            rows.append(Row(f"{name} over {resnet}, {title}", "x", claim, middle, note=note))
            work = (macs[name] / found_median(timed)) / (macs[resnet] / found_median(base))
            rows.append(Row(f"{name} over {resnet}, {title}", "x operations a second", None, work))
            branches = seconds.get(f"{engine} {name} in three branches")
            if branches is not None:
                low, middle, high = measure.ratio_quartiles(branches, timed)
                note = f"reparameterization; quartiles {low:.2f} - {high:.2f}"
                rows.append(
                    Row(f"{name}, three branches over one, {title}", "x", None, middle, note=note)
                )
    rows.append(Row("RepVGG on the claim's accelerator", "ms", REPVGG_MS, None, note=PHONE))
    return rows


def found_median(seconds: Sequence[float]) -> float:
    """Return the median of seconds."""
    return float(np.median(seconds))


if __name__ == "__main__":
    define_flags()
    launch(main)
