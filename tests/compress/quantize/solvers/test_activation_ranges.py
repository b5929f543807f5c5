"""Ranges of activations beside loops in float64."""

import numpy as np
import pytest

from glm_edge.compress.quantize.solvers import activation_ranges as activations


def values(seed=0, count=20000):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(size=count) + 0.5, [9.0, -7.0, 11.0]]).astype(np.float32)


def observed(symmetric, bins=2048):
    rows = values()
    low, high = activations.widened(rows.min(), rows.max(), symmetric)
    counts = activations.histogram(rows, low, high, bins=bins)
    return rows, np.asarray(counts), low, high


@pytest.mark.parametrize("symmetric", [False, True])
def test_counts_are_those_of_numpy(symmetric):
    rows, counts, low, high = observed(symmetric)
    expected = np.histogram(np.float64(rows), 2048, (low, high))[0]
    assert counts.sum() == rows.size
    # A value on an edge may fall to either side of it in float32.
    assert np.abs(np.cumsum(counts) - np.cumsum(expected)).max() <= 2


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentiles_are_those_of_the_values(percentile):
    rows, counts, low, high = observed(False)
    width = (high - low) / 2048
    result = activations.choose_range(counts, low, high, "percentile", percentile)
    share = (100 - percentile) / 2
    np.testing.assert_allclose(result, np.percentile(rows, [share, 100 - share]), atol=2 * width)
    rows, counts, low, high = observed(True)
    result = activations.choose_range(counts, low, high, "percentile", percentile, True)
    assert result[0] == -result[1]
    assert result[1] == pytest.approx(np.percentile(np.abs(rows), percentile), abs=2 * width)


@pytest.mark.parametrize("symmetric", [False, True])
def test_least_squares_is_that_of_the_values(symmetric):
    rows, counts, low, high = observed(symmetric)
    result = activations.choose_range(counts, low, high, "mse", symmetric=symmetric)

    def error(ends):
        if symmetric:
            scale, zero, lowest = ends[1] / 127, 0, -127
        else:
            scale, lowest = (ends[1] - ends[0]) / 255, -128
            zero = round(-128 - ends[0] / scale)
        codes = np.clip(np.round(np.float64(rows) / scale) + zero, lowest, 127)
        return np.sum((scale * (codes - zero) - rows) ** 2)

    fractions = np.arange(1, 33) / 32
    tried = [
        error((low * (b if symmetric else a), high * b))
        for a in (fractions if not symmetric else (1.0,))
        for b in fractions
    ]
    assert error(result) <= 1.02 * min(tried)
    assert error(result) < error((low, high))


def divergence_loop(counts, start, stop):
    """KL of TensorRT's histogram calibration for 256 levels, bin by bin."""
    p = [float(c) for c in counts[start:stop]]
    raw = list(p)
    p[0] += float(sum(counts[:start]))
    p[-1] += float(sum(counts[stop:]))
    q = [0.0] * len(p)
    levels = [[] for _ in range(256)]
    for j in range(len(p)):
        levels[j * 256 // len(p)].append(j)
    for members in levels:
        scale = [j for j in members if p[j] > 0]
        for j in scale:
            q[j] = sum(raw[m] for m in members) / len(scale)
    total = sum(p)
    others = max(sum(q), 1.0)
    terms = [
        a / total * np.log((a / total) / max(b / others, 1e-6))
        for a, b in zip(p, q, strict=True)
        if a > 0
    ]
    return sum(terms)


@pytest.mark.parametrize("symmetric", [False, True])
def test_entropy_is_that_of_the_loop(symmetric):
    _, counts, low, high = observed(symmetric, 512)
    middle = round(-low / (high - low) * 512)
    best = (np.inf,)
    for width in np.linspace(256, 512, 128):
        start = round(middle * (1 - width / 512))
        stop = min(512, start + round(width))
        best = min(best, (divergence_loop(counts, start, stop), start, stop))
    edges = np.linspace(low, high, 513)
    result = activations.choose_range(counts, low, high, "entropy", symmetric=symmetric)
    np.testing.assert_allclose(result, (edges[best[1]], edges[best[2]]), rtol=1e-12)
    assert result[1] < 0.9 * high


@pytest.mark.parametrize("method", activations.METHODS)
@pytest.mark.parametrize("rows", [np.zeros(50), np.full(50, 3.0), -np.arange(50.0), np.ones(1)])
def test_ranges_hold_zero_whatever_comes_in(method, rows):
    low, high = activations.widened(rows.min(), rows.max(), False)
    counts = np.asarray(activations.histogram(np.float32(rows), low, high))
    ends = activations.choose_range(counts, low, high, method)
    assert low <= ends[0] <= 0.0 <= ends[1] <= high
    scale, zero = activations.int8_grid(*ends)
    assert scale > 0
    assert (-128 - int(zero)) * scale <= 0 <= (127 - int(zero)) * scale


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("ends", [(-1.0, 3.0), (0.0, 5.0), (-4.0, 0.0), (0.0, 0.0)])
def test_the_grid_spans_the_range(ends, symmetric):
    low, high = activations.widened(*ends, symmetric)
    scale, zero = activations.int8_grid(low, high, symmetric)
    assert scale.dtype == np.float32
    assert zero.dtype == np.int8
    if ends != (0.0, 0.0):
        lowest = -127 if symmetric else -128
        np.testing.assert_allclose(scale * np.float64(127 - int(zero)), high, atol=scale)
        np.testing.assert_allclose(scale * np.float64(lowest - int(zero)), low, atol=scale)
    assert not symmetric or zero == 0
