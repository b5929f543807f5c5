"""Scores of answers on phone screens, with confidence intervals."""

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
      parsed: True if it follows the grammar.
      action: True for the right kind of action.
      answer: True for the right kind with the right arguments: a tap inside the box, equal text.
      in_box: True if the tap hits its target; None for questions without a tap.
    """

    parsed: bool
    action: bool
    answer: bool
    in_box: bool | None


@dataclasses.dataclass(frozen=True)
class Rate:
    """A success rate with its confidence interval.

    Args:
      value: successes / count.
      low: lower end of the interval.
      high: upper end of the interval.
      count: number of trials.
    """

    value: float
    low: float
    high: float
    count: int


def judge(question: Question, text: str, width: int = WIDTH, height: int = HEIGHT) -> Outcome:
    """Judge one generated answer.

    Args:
      question: the question.
      text: the generated answer.
      width: width of the screen in pixels.
      height: height of the screen in pixels.

    Returns:
      The outcome.
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
    # The centre of the pixel, as the phone executes integer pixels.
    x, y = to_pixels(action.element, width, height)
    hit = target.contains(x + 0.5, y + 0.5)
    return Outcome(True, True, hit, hit)


def score(
    answers: Iterable[tuple[Question, str]], width: int = WIDTH, height: int = HEIGHT
) -> dict[str, Rate | None]:
    """Compute the benchmark's metrics.

    Args:
      answers: pairs of a question and its generated text.
      width: width of the screens in pixels.
      height: height of the screens in pixels.

    Returns:
      "parse_rate", "action_accuracy", "answer_accuracy" over all questions and "tap_in_box" over
      those with a target, with Wilson intervals; None without questions.
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
    """Compute Wilson's score interval of a rate.

    Args:
      successes: number of successes.
      count: number of trials, at least one.
      level: confidence level, such as 0.95.

    Returns:
      The rate and its interval.

    Raises:
      DataError: there are no trials, or the values contradict each other.

    References:
      Wilson, Probable inference, the law of succession, and statistical inference, 1927
    """
    if not 0 <= successes <= count or count < 1 or not 0 < level < 1:
        raise DataError(f"{successes} successes of {count} at level {level} have no interval")
    share = successes / count
    ends = stats.binomtest(successes, count).proportion_ci(level, method="wilson")
    # Rounding may put an end on the wrong side of a rate of 0 or 1.
    return Rate(share, min(share, float(ends.low)), max(share, float(ends.high)), count)


def over_people(rates: Sequence[float], level: float = 0.95) -> Rate:
    """Compute Student's t interval of a mean over people.

    Questions of one person are not independent, so the number of people decides the width.

    Args:
      rates: one rate per person.
      level: confidence level, such as 0.95.

    Returns:
      The mean and its interval within 0..1; from 0 to 1 for a single person.

    Raises:
      DataError: there is no person.

    References:
      Student, The probable error of a mean, 1908
    """
    if not len(rates):
        raise DataError("a mean over people needs at least one person")
    mean, count = float(np.mean(rates)), len(rates)
    if count == 1:
        return Rate(mean, 0.0, 1.0, 1)
    reach = stats.t.ppf((1 + level) / 2, count - 1) * np.std(rates, ddof=1) / np.sqrt(count)
    return Rate(mean, max(0.0, mean - float(reach)), min(1.0, mean + float(reach)), count)


def bootstrap(
    values: Sequence[float],
    groups: Sequence[int] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Rate:
    """Compute the percentile bootstrap interval of a mean, resampling complete groups.

    Args:
      values: one value per question, `[N]`.
      groups: screen of each question `[N]`, as questions of one screen are not independent. By
        default each question is its own group.
      level: confidence level, such as 0.95.
      resamples: number of resamples.
      seed: seed of the resamples.

    Returns:
      The mean and its interval.

    Raises:
      DataError: there are no values, or the number of groups differs.

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
    # One group, or groups of equal means, have an interval of zero width.
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
    """Compare two models on the same questions.

    Args:
      first: results of the first model per question, `[N]`, such as 1 for a hit.
      second: results of the second model per question, `[N]`.
      groups: screen of each question `[N]`.
      level: confidence level, such as 0.95.
      resamples: number of bootstrap resamples.
      seed: seed of the resamples.

    Returns:
      mean(second - first) and its interval. If no question differs, the bootstrap interval has zero
      width, which understates the uncertainty.

    Raises:
      DataError: the two have different lengths.
    """
    if len(first) != len(second):
        raise DataError(f"{len(first)} and {len(second)} results are not of the same questions")
    difference = np.asarray(second, float) - np.asarray(first, float)
    return bootstrap(difference, groups, level, resamples, seed)
