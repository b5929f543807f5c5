"""Table (b): a pruned model healed by fine-tuning alone, and by distillation first.

    python -m experiments.tables.healing --preset=quick
    python -m experiments.tables.healing --preset=full --digits_dir=MNIST

The claim: fine-tuning alone reaches 76.2 +- 0.8 %, distillation followed by fine-tuning 78.9 +- 0.3
%. For each seed, a MobileNetV2 is trained on digits, and the fraction --remove of its blocks'
hidden channels is removed. Two copies are healed for the same number of steps on the same images:
one on labels only, the other on the unpruned model's predictions for the first half, and on labels
for the second. The difference is paired by seed.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments.tables import table, vision
from experiments.tables.learning import Training
from experiments.tables.table import IMAGENET, Row
from glm_edge import params as boxes
from glm_edge.cli.console import launch

FLAGS = flags.FLAGS
NAME = "healing"
CLAIMS = {"fine-tuned": (76.2, 0.8), "distilled, then fine-tuned": (78.9, 0.3)}
STEPS = {"quick": (200, 100), "full": (1200, 600)}
SEEDS = {"quick": 5, "full": 7}


def define_flags() -> None:
    """Define this script's flags."""
    table.define_flags(NAME)
    vision.define_flags()
    flags.DEFINE_float("remove", 0.85, "Fraction of hidden channels to remove, in 0..1.", 0.0, 0.99)
    flags.DEFINE_integer(
        "dense_steps", None, "Training steps before pruning; default: the preset's.", 1
    )
    flags.DEFINE_integer("heal_steps", None, "Healing steps; default: the preset's.", 2)
    flags.DEFINE_integer("seeds", None, "Number of repetitions; default: 5, or 7 in full.", 2)


def main(argv: Sequence[str]) -> None:
    directory = table.prepare(argv)
    dense_steps, heal_steps = STEPS[FLAGS.preset]
    steps = FLAGS.dense_steps or dense_steps, FLAGS.heal_steps or heal_steps
    data = vision.load(FLAGS.digits_dir)
    accuracies = table.by_seed(
        SEEDS, lambda seed: repeat(directory, data, seed, *steps, FLAGS.remove)
    )
    table.publish(
        NAME,
        "Healing a pruned model: labels alone, or distillation first",
        rows_of(accuracies, data.name),
        ("digits_dir", "remove", "dense_steps", "heal_steps", "seeds"),
        {**accuracies, "data": data.name, "test_images": len(data.test_labels)},
    )


def repeat(
    directory: Path,
    data: vision.Digits,
    seed: int,
    dense_steps: int,
    heal_steps: int,
    fraction: float,
) -> dict[str, float]:
    """Train, prune and heal with one seed.

    Args:
      directory: directory of finished trainings.
      data: the digits.
      seed: seed of the initial variables and of the order of images.
      dense_steps: training steps before pruning.
      heal_steps: healing steps of either method.
      fraction: fraction of hidden channels to remove.

    Returns:
      Accuracies of the dense, the pruned and both healed models, and the remaining parameters, in
      percent.
    """
    model, dense, targets, small, pruned = vision.pruned(
        directory, data, seed, dense_steps, fraction
    )
    labels = Training(heal_steps, 2e-3)
    first = labels._replace(steps=heal_steps // 2, alpha=0.9)
    last = labels._replace(steps=heal_steps - heal_steps // 2)

    def heal(name: str, training: Training, start: dict, teacher=None) -> dict:
        return vision.trained(
            directory, f"{name}_{seed}", small, data, training, seed, start, teacher
        )

    alone = heal("fine_tuned", labels, pruned)
    taught = heal("distilled", first, pruned, targets)
    both = heal("distilled_fine_tuned", last, taught)
    accuracy = {
        "dense": vision.accuracy(model, dense, data),
        "pruned": vision.accuracy(small, pruned, data),
        "fine-tuned": vision.accuracy(small, alone, data),
        "distilled, then fine-tuned": vision.accuracy(small, both, data),
    }
    kept_fraction = boxes.count(pruned["params"]) / boxes.count(dense["params"])
    return {**accuracy, "parameters left": 100.0 * kept_fraction}


def rows_of(accuracies: dict[str, list[float]], data: str) -> list[Row]:
    """Return the table's rows from the results of every seed."""
    note = f"{data}, {len(accuracies['dense'])} seeds"

    def row(kind: str, claim: float | None, more: str = "") -> Row:
        values = accuracies[kind]
        spread = statistics.stdev(values)
        return Row(f"top-1, {kind}", "%", claim, statistics.fmean(values), spread, note + more)

    rows = [row("dense", None), row("pruned", None, ", before healing")]
    for kind, (claim, spread) in CLAIMS.items():
        rows.append(row(kind, claim, f"; claim on different data, spread {spread}"))
    taught, alone = (accuracies[kind] for kind in ("distilled, then fine-tuned", "fine-tuned"))
    gains = [a - b for a, b in zip(taught, alone, strict=True)]
    rows += [
        Row(
            "gain of distillation",
            "points",
            78.9 - 76.2,
            statistics.fmean(gains),
            statistics.stdev(gains),
            f"paired by seed; better in {sum(g > 0 for g in gains)} of {len(gains)}",
        ),
        Row(
            "spread with over spread without",
            "x",
            0.3 / 0.8,
            statistics.stdev(taught) / statistics.stdev(alone) if statistics.stdev(alone) else None,
            note="standard deviations over seeds",
        ),
        Row("parameters left", "% of dense", None, statistics.fmean(accuracies["parameters left"])),
        Row("top-1, distilled, then fine-tuned, ImageNet", "%", 78.9, None, note=IMAGENET),
    ]
    return rows


if __name__ == "__main__":
    define_flags()
    launch(main)
