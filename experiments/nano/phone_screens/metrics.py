"""Scores of answers on the phone screens, with intervals."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import stats

from experiments.nano.phone_screens.actions import parse_action, to_pixels
from experiments.nano.phone_screens.generator import HEIGHT, WIDTH
from experiments.nano.phone_screens.instructions import Question
from glm_edge.errors import DataError


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one answer.

    Args:
      parsed: it follows the grammar.
      action: it is the right kind of action.
      answer: the right kind, and what it needs is right too: the tap hits, the text is the same.
      in_box: the tap hits its target; None when nothing had to be tapped.
    """

    parsed: bool
    action: bool
    answer: bool
    in_box: bool | None


@dataclasses.dataclass(frozen=True)
class Rate:
    """A share of successes with its confidence interval.

    Args:
      value: successes / count.
      low: lower end of the interval.
      high: upper end.
      count: how many were tried.
    """

    value: float
    low: float
    high: float
    count: int


def judge(question: Question, text: str, width: int = WIDTH, height: int = HEIGHT) -> Outcome:
    """Judges one generated answer.

    Args:
      question: what was asked.
      text: the answer generated.
      width: of the screen in pixels.
      height: of the screen in pixels.

    Returns:
      What became of it.
    """
    target, expected = question.target, question.answer_action
    miss = None if target is None else False
    try:
        action = parse_action(text)
    except DataError:
        return Outcome(False, False, False, miss)
    if action.kind != expected.kind:
        return Outcome(True, False, False, miss)
    if target is None:
        return Outcome(True, True, action == expected, None)
    # The middle of the pixel: the phone executes whole pixels.
    x, y = to_pixels(action.element, width, height)
    hit = target.contains(x + 0.5, y + 0.5)
    return Outcome(True, True, hit, hit)


def score(
    answers: Iterable[tuple[Question, str]], width: int = WIDTH, height: int = HEIGHT
) -> dict[str, Rate | None]:
    """Computes the benchmark's metrics.

    Args:
      answers: pairs of a question and the text generated for it.
      width: of the screens in pixels.
      height: of the screens in pixels.

    Returns:
      "parse_rate", "action_accuracy", "answer_accuracy" over all questions and "tap_in_box" over
      those with a target, with Wilson intervals; None where there was no question.
    """
    outcomes = [judge(question, text, width, height) for question, text in answers]
    results = {
        "parse_rate": [o.parsed for o in outcomes],
        "action_accuracy": [o.action for o in outcomes],
        "answer_accuracy": [o.answer for o in outcomes],
        "tap_in_box": [o.in_box for o in outcomes if o.in_box is not None],
    }
    return {
        name: wilson(sum(values), len(values)) if values else None
        for name, values in results.items()
    }


def wilson(successes: int, count: int, level: float = 0.95) -> Rate:
    """Computes Wilson's score interval of a share.

    Args:
      successes: how many succeeded.
      count: how many were tried, at least one.
      level: the confidence, such as 0.95.

    Returns:
      The share and its interval.

    Raises:
      DataError: nothing was tried, or the numbers contradict each other.

    References:
      Wilson, Probable inference, the law of succession, and statistical inference, 1927
    """
    if not 0 <= successes <= count or count < 1 or not 0 < level < 1:
        raise DataError(f"{successes} successes of {count} at level {level} have no interval")
    share = successes / count
    ends = stats.binomtest(successes, count).proportion_ci(level, method="wilson")
    # Rounding may put an end on the wrong side of a share of 0 or 1.
    return Rate(share, min(share, float(ends.low)), max(share, float(ends.high)), count)


def bootstrap(
    values: Sequence[float],
    groups: Sequence[int] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Rate:
    """Computes the bootstrap's percentile interval of a mean, drawing whole groups.

    Args:
      values: one number per question, `[N]`.
      groups: the screen of each question `[N]`; questions of one screen are not independent. By
        default each stands alone.
      level: the confidence, such as 0.95.
      resamples: how many times to draw.
      seed: of the draws.

    Returns:
      The mean and its interval.

    Raises:
      DataError: there are no values, or another number of groups.

    References:
      Efron and Tibshirani, An Introduction to the Bootstrap, 1993
    """
    values = np.asarray(values, float)
    groups = np.arange(len(values)) if groups is None else np.asarray(groups)
    if values.ndim != 1 or not len(values) or groups.shape != values.shape:
        raise DataError(f"{values.shape} values in {groups.shape} groups have no interval")
    _, index = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    mean = float(values.mean())
    # One group, or groups of equal means, have an interval of one point.
    if len(sums) == 1 or np.ptp(sums / counts) == 0:
        return Rate(mean, mean, mean, len(values))
    ends = stats.bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        n_resamples=resamples,
        batch=256,
        vectorized=True,
        paired=True,
        confidence_level=level,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return Rate(mean, float(ends.low), float(ends.high), len(values))


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    groups: Sequence[int] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Rate:
    """Compares two models on the same questions.

    Args:
      first: the first model's result per question, `[N]`, such as 1 for a hit.
      second: the second model's.
      groups: the screen of each question `[N]`.
      level: the confidence, such as 0.95.
      resamples: how many times the bootstrap draws.
      seed: of the draws.

    Returns:
      mean(second - first) and its interval. When no question differs the bootstrap's interval is
      a point, which says less than it seems.

    Raises:
      DataError: the two are not as long as each other.
    """
    if len(first) != len(second):
        raise DataError(f"{len(first)} and {len(second)} results are not of the same questions")
    difference = np.asarray(second, float) - np.asarray(first, float)
    return bootstrap(difference, groups, level, resamples, seed)
