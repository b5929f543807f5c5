"""The metrics count what they say, and their intervals cover what they should."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.nano.phone_screens import metrics
from experiments.nano.phone_screens.actions import Action, format_action, tap_at
from experiments.nano.phone_screens.generator import Element
from experiments.nano.phone_screens.instructions import Question
from glm_edge.errors import DataError

STAR = Element("icon", "star", (40.0, 100.0, 60.0, 120.0))
TAP = Question("tap the star", None, tap_at(50, 110, 96, 192), STAR)
TYPE = Question("type hello", None, Action("Type", text="hello"), None)


def test_judging():
    assert metrics.judge(TAP, format_action(TAP.answer_action)) == metrics.Outcome(
        True, True, True, True
    )
    miss = format_action(tap_at(70, 110, 96, 192))
    assert metrics.judge(TAP, miss) == metrics.Outcome(True, True, False, False)
    assert metrics.judge(TAP, 'do(action="Back")') == metrics.Outcome(True, False, False, False)
    assert metrics.judge(TAP, "tap it") == metrics.Outcome(False, False, False, False)
    assert metrics.judge(TYPE, 'do(action="Type", text="hello")').answer
    assert metrics.judge(TYPE, 'do(action="Type", text="hallo")') == metrics.Outcome(
        True, True, False, None
    )
    assert metrics.judge(TYPE, "").in_box is None


def test_scores():
    result = metrics.score([(TAP, format_action(TAP.answer_action)), (TAP, "x"), (TYPE, "y")])
    assert result["parse_rate"].value == pytest.approx(1 / 3)
    assert result["tap_in_box"].value == 0.5
    assert result["tap_in_box"].count == 2
    assert metrics.score([(TYPE, "y")])["tap_in_box"] is None


@given(st.integers(1, 5000), st.data())
def test_wilson_brackets_the_share(count, data):
    successes = data.draw(st.integers(0, count))
    rate = metrics.wilson(successes, count)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert rate.high - rate.low > 0


def test_wilson_against_its_equation():
    # The ends p solve |share - p| = z sqrt(p (1 - p) / n).
    rate, z = metrics.wilson(81, 263), 1.959963984540054
    for end in (rate.low, rate.high):
        assert abs(81 / 263 - end) == pytest.approx(z * (end * (1 - end) / 263) ** 0.5, rel=1e-9)


@pytest.mark.parametrize(("successes", "count"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_impossible_numbers(successes, count):
    with pytest.raises(DataError):
        metrics.wilson(successes, count)


def test_bootstrap_covers_the_truth_and_widens_with_groups():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(60):
        rate = metrics.bootstrap(rng.random(200) < 0.3, resamples=400, seed=seed)
        covered += rate.low <= 0.3 <= rate.high
    assert covered >= 50
    screens = np.repeat(rng.random(50) < 0.5, 8)
    alone = metrics.bootstrap(screens, resamples=500)
    grouped = metrics.bootstrap(screens, np.repeat(np.arange(50), 8), resamples=500)
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)
    assert grouped.value == alone.value == screens.mean()


def test_pairing_narrows_the_difference():
    rng = np.random.default_rng(1)
    first = rng.random(1000) < 0.8
    second = np.where(rng.random(1000) < 0.02, False, first)
    rate = metrics.paired_difference(first, second)
    assert rate.value == pytest.approx(second.mean() - first.mean())
    assert rate.low <= rate.value <= rate.high <= 0
    assert rate.high - rate.low < 0.03
    assert rate == metrics.paired_difference(first, second)


def test_unequal_or_empty_results_are_refused():
    with pytest.raises(DataError, match="3 and 2 results"):
        metrics.paired_difference([1, 0, 1], [1, 0])
    with pytest.raises(DataError, match="no interval"):
        metrics.bootstrap([])
    with pytest.raises(DataError, match="no interval"):
        metrics.bootstrap([1, 0], [1])


def test_the_interval_over_people_is_students():
    rates = [0.7, 0.8, 0.9, 0.8]
    rate = metrics.over_people(rates)
    low, high = stats.t.interval(0.95, 3, np.mean(rates), stats.sem(rates))
    assert (rate.value, rate.low, rate.high) == pytest.approx((0.8, low, high))
    assert rate.count == 4
    assert metrics.over_people([0.9]) == metrics.Rate(0.9, 0.0, 1.0, 1)
    assert metrics.over_people([1.0, 0.98]).high == 1.0
    with pytest.raises(DataError, match="at least one person"):
        metrics.over_people([])
