"""Fronts against exhaustive search, and NSGA-II against the exact front."""

import itertools

import numpy as np
import pytest

from glm_edge.device import search
from glm_edge.errors import DataError

LAYERS = 28
BITS, SHARES = np.array([2, 3, 4, 8]), np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])


def problem():
    """Losses and nanoseconds of 24 options of each layer of a decoder of 3e9 weights."""
    rng = np.random.default_rng(0)
    bits, shares = (x.ravel() for x in np.meshgrid(BITS, SHARES, indexing="ij"))
    rounding = np.exp(rng.normal(0, 0.8, LAYERS))[:, None] * 12 * 4.0**-bits
    pruning = np.exp(rng.normal(0, 0.6, LAYERS))[:, None] * 0.15 * (1 - shares) ** 1.5
    loss = rounding + pruning
    stored = (2.45e7 + 7.5e7 * shares) * (bits + 0.5) / 8
    costs = np.broadcast_to(1e9 * (stored / 43e9 + 1e-4), loss.shape).astype(int)
    return loss, costs


def test_an_exact_front_is_that_of_all_combinations():
    rng = np.random.default_rng(1)
    losses, costs = rng.random((4, 3)), rng.integers(1, 50, (4, 3))
    everything = np.array(
        [
            (sum(losses[range(4), choice]), 7 + sum(costs[range(4), choice]))
            for choice in map(list, itertools.product(range(3), repeat=4))
        ]
    )
    expected = everything[search.pareto_front(everything)]
    choices, objectives = search.exact_front(losses, costs, fixed_cost=7)
    np.testing.assert_allclose(objectives[np.argsort(objectives[:, 0])], expected)
    recomputed = [losses[range(4), choice].sum() for choice in choices]
    np.testing.assert_allclose(recomputed, objectives[:, 0])


def test_nsga2_comes_near_the_exact_front_and_never_beats_it():
    losses, costs = problem()
    layers = np.arange(LAYERS)

    def evaluate(candidates):
        # Bits and widths are separate variables, so that one mutation changes one of them.
        options = candidates[:, :LAYERS] * len(SHARES) + candidates[:, LAYERS:]
        return np.stack([losses[layers, options].sum(1), costs[layers, options].sum(1)], axis=1)

    uniform = [[b] * LAYERS + [s] * LAYERS for b in range(4) for s in range(6)]
    start = np.array(uniform * 4)
    sizes = [len(BITS)] * LAYERS + [len(SHARES)] * LAYERS
    _, objectives = search.nsga2(evaluate, sizes, start, 2000, seed=1)
    _, exact = search.exact_front(losses, costs)
    reference = evaluate(np.array(uniform)).max(axis=0) * 1.01
    share = search.hypervolume(objectives, reference) / search.hypervolume(exact, reference)
    alone = search.hypervolume(evaluate(np.array(uniform)), reference)
    assert alone < search.hypervolume(objectives, reference)
    assert 0.95 <= share <= 1.0
    # Every candidate is equal to or dominated by a point of the exact front, up to merged states.
    for loss, cost in objectives:
        assert exact[exact[:, 1] <= cost * 1.001, 0].min() <= loss * (1 + 1e-6)
    again = search.nsga2(evaluate, sizes, start, 2000, seed=1)[1]
    np.testing.assert_array_equal(objectives, again)


def test_fronts_and_areas_by_hand():
    points = np.array([[1.0, 3.0], [2.0, 2.0], [2.0, 3.0], [3.0, 1.0], [5.0, 0.5]])
    assert search.pareto_front(points).tolist() == [0, 1, 3, 4]
    assert search.ranks(points).tolist() == [0, 0, 1, 0, 0]
    # Columns of widths 1, 1 and 1 below (4, 4): heights 1, 2 and 3.
    assert search.hypervolume(points, (4.0, 4.0)) == pytest.approx(1 + 2 + 3)
    assert search.hypervolume(points, (1.0, 1.0)) == 0.0
    distances = search.crowding(points, search.ranks(points))
    assert np.isinf(distances[[0, 2, 4]]).all()
    assert distances[1] == pytest.approx(2 / 4 + 2 / 2.5)


def test_wrong_input_is_refused():
    with pytest.raises(DataError, match="same groups and options"):
        search.exact_front([[1.0, 2.0]], [[1]])
    start = np.zeros((4, 2), int)
    with pytest.raises(DataError, match=r"start has shape \[4, 2\]; it must be \[at least 4, 3\]"):
        search.nsga2(lambda x: x, [2, 2, 2], start, 8, 0)
    with pytest.raises(DataError, match="outside of sizes"):
        search.nsga2(lambda x: x, [2, 2], start + 2, 8, 0)
    with pytest.raises(DataError, match="finite values"):
        search.nsga2(lambda x: x * np.nan, [2, 2], start, 8, 0)
