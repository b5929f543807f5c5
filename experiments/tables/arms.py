"""Arms of a comparison: each has its tuned learning rate and steps, and runs with the same seeds.

A grid is stated before the runs. Per arm, the setting with the highest accuracy on the validation
split is chosen with seeds that the measurement does not use.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from absl import flags
from scipy import stats

from experiments.tables.table import Row
from glm_edge.cli.console import bar
from glm_edge.errors import DataError

FLAGS = flags.FLAGS
# Seeds of tuning begin here, far from those of the measurement.
TUNING_SEED = 1000

flags.disclaim_key_flags()


Key = TypeVar("Key")


class Setting(NamedTuple):
    """A point of the grid: steps and peak learning rate."""

    steps: int
    learning_rate: float


class Arm(NamedTuple):
    """One way of training a student.

    Attributes:
      validated: function of a setting and a seed that trains, and returns the accuracy on the
        validation split in percent.
      tested: the same, on the test split.
    """

    validated: Callable[[Setting, int], float]
    tested: Callable[[Setting, int], float]


class Result(NamedTuple):
    """An arm's tuned setting, and its accuracies.

    Attributes:
      setting: tuned setting.
      tried: mean accuracy on the validation split of each setting, in percent.
      accuracies: accuracy on the test split of each seed, in percent.
    """

    setting: Setting
    tried: dict[Setting, float]
    accuracies: list[float]

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            **self.setting._asdict(),
            "tuning": [
                {**setting._asdict(), "validation": value} for setting, value in self.tried.items()
            ],
            "accuracy": self.accuracies,
        }


class Gain(NamedTuple):
    """The paired difference of two arms over seeds.

    Attributes:
      mean: mean difference.
      low: lower end of the 95 % t interval.
      high: upper end.
      better: number of seeds with a positive difference.
      count: number of seeds.
    """

    mean: float
    low: float
    high: float
    better: int
    count: int


def define_flags() -> None:
    """Define the flags of the grid."""
    flags.DEFINE_list("steps", None, "Training steps to try; default: the preset's.")
    flags.DEFINE_list("rates", None, "Learning rates to try; default: the preset's.")


def grid_from_flags(
    steps: Mapping[str, Sequence[int]], rates: Mapping[str, Sequence[float]]
) -> list[Setting]:
    """Return the grid of --steps and --rates, which default to those of the preset.

    Raises:
      DataError: a flag has a value that is not a positive number.
    """
    counts = numbers("steps", int) or steps[FLAGS.preset]
    peaks = numbers("rates", float) or rates[FLAGS.preset]
    return grid_of(counts, peaks)


def numbers(flag: str, kind: type) -> list[Any]:
    """Read a flag that holds a list of positive numbers, empty by default.

    Args:
      flag: name of the flag.
      kind: `int` or `float`.

    Raises:
      DataError: a value is not a positive number of this kind.
    """
    try:
        values = [kind(value) for value in FLAGS[flag].value or ()]
    except ValueError as error:
        raise DataError(f"--{flag}: {error}") from error
    if not all(value > 0 for value in values):
        raise DataError(f"--{flag} takes positive numbers, not {values}")
    return values


def grid_of(steps: Sequence[int], rates: Sequence[float]) -> list[Setting]:
    """Return all settings, fewer steps and lower rates first."""
    return [Setting(count, rate) for count in sorted(steps) for rate in sorted(rates)]


def compare(
    arms: Mapping[Key, Arm], grid: Sequence[Setting], seeds: Sequence[int], tuning_seeds: int = 1
) -> dict[Key, Result]:
    """Tune and measure arms.

    Args:
      arms: arms by name, or another key.
      grid: settings to try; on ties the first is taken.
      seeds: seeds of the measurement.
      tuning_seeds: number of seeds of the tuning.

    Returns:
      Results by key.
    """
    results = {}
    for key, arm in bar("arms")(arms.items()):
        drawn = range(TUNING_SEED, TUNING_SEED + tuning_seeds)
        tried = {
            setting: statistics.fmean(arm.validated(setting, seed) for seed in drawn)
            for setting in grid
        }
        setting = max(tried, key=lambda setting: tried[setting])
        accuracies = [arm.tested(setting, seed) for seed in seeds]
        results[key] = Result(setting, tried, accuracies)
    return results


def paired_gain(first: Sequence[float], second: Sequence[float]) -> Gain:
    """Compare two arms seed by seed.

    Args:
      first: accuracies of the first arm.
      second: accuracies of the second arm, with the same seeds.

    Returns:
      The mean of `second - first` with Student's 95 % interval.

    Raises:
      DataError: there are fewer than two seeds, or their numbers differ.
    """
    count = len(first)
    if count < 2 or len(second) != count:
        raise DataError(f"a paired difference needs two seeds or more, not {count}, {len(second)}")
    gains = [b - a for a, b in zip(first, second, strict=True)]
    mean, spread = statistics.fmean(gains), statistics.stdev(gains)
    reach = float(stats.t.ppf(0.975, count - 1)) * spread / math.sqrt(count)
    return Gain(mean, mean - reach, mean + reach, sum(gain > 0 for gain in gains), count)


def accuracy_row(name: str, result: Result, claim: float | None = None, note: str = "") -> Row:
    """Return the row of an arm's mean accuracy, with its tuned setting."""
    setting = result.setting
    parts = (f"{setting.steps} steps, rate {setting.learning_rate:g}", note)
    return Row(
        f"top-1, {name}",
        "%",
        claim,
        statistics.fmean(result.accuracies),
        statistics.stdev(result.accuracies) if len(result.accuracies) > 1 else None,
        "; ".join(part for part in parts if part),
    )


def gain_row(
    name: str, first: Sequence[float], second: Sequence[float], claim: float | None = None
) -> Row:
    """Return the row of a paired difference of accuracies."""
    gain = paired_gain(first, second)
    spread = statistics.stdev(b - a for a, b in zip(first, second, strict=True))
    note = (
        f"paired by seed, 95 % interval {gain.low:+.2f} to {gain.high:+.2f}; better in "
        f"{gain.better} of {gain.count}"
    )
    return Row(name, "points", claim, gain.mean, spread, note)
