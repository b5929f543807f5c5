"""Learned rounding on plain arrays, against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge.compress.quantize.solvers import adaround_solver as learned
from glm_edge.compress.quantize.solvers import scales
from glm_edge.compress.quantize.solvers.adaround_solver import Layer, learn_rounding
from glm_edge.compress.quantize.solvers.scales import Grid, choose
from glm_edge.params import Format

FORMATS = ["int4-g8", "int2-g8-affine", "int4-tensor", "nf4-g8"]
SIMILAR = ["int3-channel", "ternary-channel"]
encode, decode = (
    jax.jit(function, static_argnums=2) for function in (scales.encode, scales.decode)
)
neighbours = jax.jit(learned.neighbours, static_argnums=2)


def layer_of(drifted=False, seed=0):
    """A layer whose inputs are correlated, with the rows that it and its original see."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(5, 16))
    mixing = rng.normal(size=(16, 16)) * np.linspace(0.2, 2.0, 16)
    rows = rng.normal(size=(200, 16)) @ mixing
    before = rows + 0.3 * rng.normal(size=rows.shape) if drifted else rows
    gram = rows.T @ rows / len(rows)
    drift = (rows @ weight.T - before @ weight.T).T @ rows / len(rows)
    layer = Layer(*(jnp.asarray(x, jnp.float32) for x in (weight, gram, drift)))
    return layer, rows, before


def error_loop(dense, weight, rows, before):
    """Mean squared error of each output less that of the weight before rounding."""
    dense, weight = np.asarray(dense, np.float64), np.asarray(weight, np.float64)
    wanted = before @ weight.T
    after, unrounded = (np.mean((rows @ w.T - wanted) ** 2, axis=0) for w in (dense, weight))
    return after - unrounded


@pytest.mark.parametrize("drifted", [False, True])
def test_the_error_of_an_output_matches_its_rows(drifted):
    layer, rows, before = layer_of(drifted)
    grid = Grid(np.full((5, 1), 0.5, np.float32))
    dense = decode(encode(layer.weight, grid, Format("int4")), grid, Format("int4"))
    expected = error_loop(dense, layer.weight, rows, before)
    np.testing.assert_allclose(jax.jit(learned.output_error)(dense, layer), expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("descent", "int4-tensor"),
        ("descent", "nf4-g8"),
        ("adaround", "int2-g8-affine"),
        *(
            pytest.param(method, text, marks=pytest.mark.slow)
            for method, texts in (
                ("descent", FORMATS[:2] + SIMILAR),
                ("adaround", [FORMATS[0], *FORMATS[2:], *SIMILAR]),
            )
            for text in texts
        ),
    ],
)
def test_learned_rounding_beats_nearest(method, text):
    format = Format.parse(text)
    layer, rows, before = layer_of(drifted=True)
    grid = choose(layer.weight, format, "mse")
    done = learn_rounding(layer, grid, format, method)
    nearest = decode(encode(layer.weight, grid, format), grid, format)
    result = error_loop(decode(done.codes, grid, format), layer.weight, rows, before)
    first = error_loop(nearest, layer.weight, rows, before)
    np.testing.assert_allclose(done.error, result, rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(done.nearest, first, rtol=1e-2, atol=1e-4)
    assert np.all(result <= first + 1e-4)
    assert result.sum() < 0.9 * first.sum()


@pytest.mark.parametrize(
    "text",
    [
        *FORMATS[1:],
        *(pytest.param(text, marks=pytest.mark.slow) for text in [FORMATS[0], *SIMILAR]),
    ],
)
def test_a_weight_lies_between_its_neighbours(text):
    format = Format.parse(text)
    layer, *_ = layer_of()
    grid = choose(layer.weight, format, "mse")
    below, low, share = (np.asarray(x) for x in neighbours(layer, grid, format))
    high = decode(np.int8(below + 1), grid, format)
    weight = np.asarray(layer.weight)
    inside = (weight >= low) & (weight <= high)
    assert inside.mean() > 0.5
    np.testing.assert_allclose((low + share * (high - low))[inside], weight[inside], atol=1e-5)
    nearest = np.where(np.asarray(share) > 0.5, high, low)
    np.testing.assert_allclose(
        nearest, decode(encode(layer.weight, grid, format), grid, format), atol=1e-5
    )


def soft(variable):
    return np.clip(1.2 / (1.0 + np.exp(-variable)) - 0.1, 0.0, 1.0)


def loss_loop(variable, weight, rows, before, low, high, unit, beta, regularization):
    dense = low + soft(variable) * (high - low)
    pull = sum(1.0 - abs(2.0 * h - 1.0) ** beta for h in soft(variable).ravel())
    return error_loop(dense, weight, rows, before).sum() / unit + regularization * pull


def test_adarounds_loss_and_step_match_numpy():
    format = Format("int3")
    layer, rows, before = layer_of(drifted=True)
    grid = choose(layer.weight, format, "max")
    below, low, _ = (np.asarray(x) for x in neighbours(layer, grid, format))
    high = decode(np.int8(below + 1), grid, format)
    variable = np.random.default_rng(5).normal(size=low.shape)
    ends = tuple(np.asarray(x, np.float64) for x in (low, high))
    arguments = (np.asarray(layer.weight, np.float64), rows, before, *ends, 0.37, 5.0, 0.02)

    def ours(v):
        return learned.adaround_loss(v, layer, (low, high), 0.37, 5.0, 0.02)

    value, gradient = jax.jit(jax.value_and_grad(ours))(np.float32(variable))
    assert float(value) == pytest.approx(loss_loop(variable, *arguments), rel=1e-3)
    numeric = np.zeros_like(variable)
    for index in np.ndindex(variable.shape):
        nudge = np.zeros_like(variable)
        nudge[index] = 1e-6
        ahead, behind = (loss_loop(variable + s * nudge, *arguments) for s in (1, -1))
        numeric[index] = (ahead - behind) / 2e-6
    np.testing.assert_allclose(gradient, numeric, rtol=2e-3, atol=2e-3 * np.abs(numeric).max())


def test_a_sweep_of_descent_matches_a_loop():
    format = Format("int3")
    layer, *_ = layer_of(drifted=True)
    grid = choose(layer.weight, format, "max")
    codes = encode(layer.weight, grid, format)
    descend = jax.jit(learned.descend, static_argnums=(3, 4))
    actual = descend(layer, codes, grid, format, 1)
    weight, gram, drift, scale = (
        np.asarray(x, np.float64) for x in (layer.weight, layer.gram, layer.drift, grid.scale)
    )
    expected = np.asarray(codes, np.float64)
    for column in range(weight.shape[1]):
        for row in range(weight.shape[0]):
            error = expected[row] * scale[row] - weight[row]
            slope = error @ gram[:, column] + drift[row, column]
            wanted = expected[row, column] - slope / gram[column, column] / scale[row, 0]
            expected[row, column] = np.clip(np.round(wanted), -4, 3)
    np.testing.assert_array_equal(actual, expected)


def test_the_soft_choice_comes_closer_than_descent_alone():
    format = Format("int3")
    layer, *_ = layer_of(drifted=True)
    grid = choose(layer.weight, format, "mse")
    both, alone = (
        float(learn_rounding(layer, grid, format, method).error.sum()) for method in learned.METHODS
    )
    assert both < alone


@pytest.mark.parametrize("method", learned.METHODS)
def test_inputs_that_are_never_there_leave_nearest_rounding(method):
    format = Format("int3")
    layer, *_ = layer_of()
    silent = Layer(layer.weight, *(np.zeros(x.shape, np.float32) for x in layer[1:]))
    grid = choose(layer.weight, format, "max")
    done = learn_rounding(silent, grid, format, method)
    np.testing.assert_array_equal(done.codes, encode(layer.weight, grid, format))
