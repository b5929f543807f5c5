"""Table (b): a pruned model healed by fine-tuning alone, and by distillation first.

    python -m experiments.tables.healing --preset=quick
    python -m experiments.tables.healing --preset=full --digits_dir=MNIST

The claim: fine-tuning alone reaches 76.2 +- 0.8 %, distillation followed by fine-tuning 78.9 +- 0.3
%. For each seed, a MobileNetV2 is trained on digits, and the fraction --remove of its blocks'
hidden channels is removed. Copies are healed in two halves, each with its own schedule and a fresh
optimizer, on the same images in the same order. One copy learns from labels only in both halves.
One learns from the unpruned model's predictions in the first half (alpha 0.9, temperature 2) and
from labels in the second; one learns from these predictions in both. Each arm uses the learning
rate and steps of the grid that are best on the last fifth of the training part, with models and
seeds of the tuning only. Differences are paired by seed.
"""

import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

from experiments.tables import arms, learning, table, vision
from experiments.tables.arms import Arm, Result, Setting
from experiments.tables.learning import Training
from experiments.tables.table import IMAGENET, Row
from glm_edge import params as boxes
from glm_edge.cli.console import launch

FLAGS = flags.FLAGS
NAME = "healing"
ALPHA, TEMPERATURE = 0.9, 2.0
ALONE, FIRST, BOTH = "fine-tuned", "distilled, then fine-tuned", "distilled twice"
# Weight of the teacher in each half.
HALVES = {ALONE: (0.0, 0.0), FIRST: (ALPHA, 0.0), BOTH: (ALPHA, ALPHA)}
CLAIMS = {ALONE: (76.2, 0.8), FIRST: (78.9, 0.3)}
DENSE_STEPS = {"quick": 200, "full": 1200}
STEPS = {"quick": (100,), "full": (300, 600)}
RATES = {"quick": (2e-3, 8e-3), "full": (1e-3, 2e-3, 4e-3, 8e-3)}
SEEDS = {"quick": 5, "full": 7}


class Healer(NamedTuple):
    """Everything that an arm needs besides its setting and seed.

    Attributes:
      directory: directory of finished trainings.
      dense_steps: training steps before pruning.
      fraction: fraction of hidden channels to remove.
    """

    directory: Path
    dense_steps: int
    fraction: float

    def pruned(self, data: vision.Digits, seed: int) -> vision.Pruned:
        """Train and prune the model of a seed."""
        return vision.pruned(self.directory, data, seed, self.dense_steps, self.fraction)

    def accuracy(self, data: vision.Digits, kind: str, setting: Setting, seed: int) -> float:
        """Heal the pruned model of a seed, and return its accuracy in percent.

        Args:
          data: the digits, or those for tuning.
          kind: kind of healing, a key of `HALVES`.
          setting: steps of both halves together, and learning rate of each.
          seed: seed of the initial variables and of the order of images.
        """
        model, dense, small, variables = self.pruned(data, seed)
        steps = setting.steps // 2, setting.steps - setting.steps // 2
        for count, alpha in zip(steps, HALVES[kind], strict=True):
            training = Training(count, setting.learning_rate, alpha=alpha, temperature=TEMPERATURE)
            variables = learning.trained(
                self.directory,
                "healed",
                small,
                data.train,
                training,
                seed,
                start=variables,
                teacher=(model, dense) if alpha else None,
            )
        return learning.accuracy(small, variables, data.test)


def define_flags() -> None:
    """Define this script's flags."""
    table.define_flags(NAME)
    vision.define_flags()
    flags.DEFINE_float("remove", 0.85, "Fraction of hidden channels to remove, in 0..1.", 0.0, 0.99)
    flags.DEFINE_integer(
        "dense_steps", None, "Training steps before pruning; default: the preset's.", 1
    )
    arms.define_flags()
    flags.DEFINE_integer("seeds", None, "Number of repetitions; default: 5, or 7 in full.", 2)


def main(argv: Sequence[str]) -> None:
    directory = table.prepare(argv)
    data = vision.load(FLAGS.digits_dir)
    healer = Healer(directory, FLAGS.dense_steps or DENSE_STEPS[FLAGS.preset], FLAGS.remove)
    compared = {
        kind: Arm(
            functools.partial(healer.accuracy, data.for_tuning(), kind),
            functools.partial(healer.accuracy, data, kind),
        )
        for kind in HALVES
    }
    results = arms.compare(compared, arms.grid_from_flags(STEPS, RATES), table.seeds(SEEDS))
    before = before_healing(healer, data, table.seeds(SEEDS))
    table.publish(
        NAME,
        "Healing a pruned model: labels alone, or distillation",
        rows_of(before, results, data.name),
        ("digits_dir", "remove", "dense_steps", "steps", "rates", "seeds"),
        {
            **before,
            "arms": {kind: result.to_json() for kind, result in results.items()},
            "alpha": ALPHA,
            "temperature": TEMPERATURE,
            "data": data.name,
            "test_images": len(data.test_labels),
        },
    )


def before_healing(
    healer: Healer, data: vision.Digits, seeds: Sequence[int]
) -> dict[str, list[float]]:
    """Return accuracies of dense and pruned models, and the remaining parameters, in percent."""
    values: dict[str, list[float]] = {"dense": [], "pruned": [], "parameters left": []}
    for seed in seeds:
        model, dense, small, variables = healer.pruned(data, seed)
        values["dense"].append(learning.accuracy(model, dense, data.test))
        values["pruned"].append(learning.accuracy(small, variables, data.test))
        share = boxes.count(variables["params"]) / boxes.count(dense["params"])
        values["parameters left"].append(100.0 * share)
    return values


def rows_of(
    before: Mapping[str, list[float]], results: Mapping[str, Result], data: str
) -> list[Row]:
    """Return the table's rows.

    Args:
      before: result of `before_healing`.
      results: results by kind of healing.
      data: name of the data set.
    """
    rows = [
        Row(
            f"top-1, {kind}",
            "%",
            None,
            statistics.fmean(before[kind]),
            statistics.stdev(before[kind]),
            f"{data}, {len(before[kind])} seeds" + more,
        )
        for kind, more in (("dense", ""), ("pruned", ", before healing"))
    ]
    for kind, result in results.items():
        claim, spread = CLAIMS.get(kind, (None, None))
        note = f"claim on different data, spread {spread}" if claim else ""
        rows.append(arms.accuracy_row(kind, result, claim, note))
    alone, first, both = (results[kind].accuracies for kind in HALVES)
    rows += [
        arms.gain_row(f"gain of {FIRST}", alone, first, CLAIMS[FIRST][0] - CLAIMS[ALONE][0]),
        arms.gain_row(f"gain of {BOTH}", alone, both),
        Row(
            "spread with over spread without",
            "x",
            0.3 / 0.8,
            statistics.stdev(first) / statistics.stdev(alone) if statistics.stdev(alone) else None,
            note="standard deviations over seeds",
        ),
        Row("parameters left", "% of dense", None, statistics.fmean(before["parameters left"])),
        Row(f"top-1, {FIRST}, ImageNet", "%", 78.9, None, note=IMAGENET),
    ]
    return rows


if __name__ == "__main__":
    define_flags()
    launch(main)
