"""Fitted scales and zero points beside exhaustive searches and normal equations in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge.compress.quantize.solvers import alignment
from glm_edge.compress.quantize.solvers import gptq_solver as gptq
from glm_edge.compress.quantize.solvers import scales as grids
from glm_edge.compress.quantize.solvers.columns import ColumnBlock, rounded
from glm_edge.params import Format

WIDE = Format("ternary", 8, False, "float32", "float32")
nearest = jax.jit(grids.nearest, static_argnums=(1, 2))
decode = jax.jit(grids.decode, static_argnums=2)


def problem(rows=4, columns=16, seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(200, columns)) @ (np.eye(columns) + rng.normal(size=columns) * 0.2)
    weight = rng.normal(size=(rows, columns)) + 0.5
    return weight.astype(np.float32), (inputs.T @ inputs).astype(np.float32)


def least_error(group, affine):
    """Smallest error of three levels: every monotone assignment, each with its least squares."""
    values, best = np.sort(np.float64(group)), np.inf
    for low, high in itertools.combinations_with_replacement(range(len(values) + 1), 2):
        levels = np.r_[-np.ones(low), np.zeros(high - low), np.ones(len(values) - high)]
        basis = np.stack([levels, np.ones(len(values))][: 1 + affine], axis=1)
        solution = np.linalg.lstsq(basis, values, rcond=None)[0]
        if solution[0] >= 0:
            best = min(best, np.sum(np.square(basis @ solution - values)))
    return best


@pytest.mark.parametrize("affine", [True, False])
def test_fit_is_near_the_best_grid_of_each_group(affine):
    weight, _ = problem(rows=8)
    format = Format("ternary", 8, not affine, "float32", "float32")
    lost = np.square(decode(*nearest(weight, format, "fit"), format) - weight)
    lost = np.asarray(lost).reshape(-1, 8).sum(axis=1)
    least = np.array([least_error(group, affine) for group in weight.reshape(-1, 8)])
    assert (lost >= least * (1 - 1e-5)).all()
    assert lost.sum() < 1.1 * least.sum()
    searched = np.square(decode(*nearest(weight, format, "mse"), format) - weight)
    searched = np.asarray(searched).reshape(-1, 8).sum(axis=1)
    assert (lost <= searched * (1 + 1e-6)).all()


@pytest.mark.parametrize("equal", [True, False])
def test_fit_pair_solves_the_normal_equations(equal):
    weight, gram = problem(rows=1, columns=8)
    levels = np.ones(8) if equal else np.clip(np.round(weight[0] - 0.5), -1, 1)
    basis, gram = np.stack([levels, np.ones(8)], axis=1), np.float64(gram)
    normal, right = basis.T @ gram @ basis, basis.T @ gram @ weight[0]
    sums = [jnp.float32(normal[i, j]) for i, j in ((0, 0), (0, 1), (1, 1))]
    scale, zero = grids.fit_pair(sums, jnp.float32(right), jnp.float32(0.5), WIDE)
    # Levels that are all equal leave one unknown, so that the scale stays.
    expected = np.linalg.lstsq(normal, right, rcond=None)[0] if not equal else [0.5, None]
    np.testing.assert_allclose(scale, expected[0], rtol=1e-4)
    error = scale * (levels - zero) - weight[0]
    np.testing.assert_allclose(basis.T @ gram @ error, 0.0, atol=1e-3 * np.abs(right).max())


def test_refit_ends_where_no_grid_of_a_group_is_better():
    weight, gram = problem()
    codes, grid = nearest(weight, WIDE, "mse")
    codes, grid = codes.T, grid.map(jnp.transpose)
    dense = jax.jit(lambda grid: decode(codes.T, grid.map(jnp.transpose), WIDE))

    def error(grid):
        lost = np.float64(dense(grid)) - weight
        return np.sum(lost @ np.float64(gram) * lost)

    first = error(grid)
    for _ in range(60):
        grid = alignment.refit(weight.T, gram, codes, grid, WIDE)
    assert error(grid) < first
    for row in range(4):
        # The joint optimum of all scales and offsets of a row, [T 0 1 0] and [0 T 0 1].
        basis = np.zeros((16, 4))
        for group in range(2):
            part = slice(8 * group, 8 * group + 8)
            basis[part, group], basis[part, 2 + group] = np.asarray(codes)[part, row], 1.0
        h = np.float64(gram)
        expected = np.linalg.solve(basis.T @ h @ basis, basis.T @ h @ np.float64(weight[row]))
        scale, zero = (np.float64(x)[:, row] for x in grid)
        np.testing.assert_allclose(scale, expected[:2], rtol=1e-2)
        np.testing.assert_allclose(-scale * zero, expected[2:], rtol=1e-2, atol=1e-2)


def test_align_lowers_the_loss_of_a_group():
    weight, gram = problem(rows=16, columns=8)
    factor, _, _ = gptq.damped_factor(gram, 0.01)
    scales = jnp.diagonal(factor)
    block = ColumnBlock(weight.T, weight.T, jnp.triu(factor, 1) / scales, jnp.square(scales))
    format = Format("ternary", None, False, "float32", "float32")
    start = grids.choose(weight, format, "max").map(lambda x: x[:, 0])
    aligned = alignment.align(block, factor, weight.T, start, format, 8)
    loss = jax.jit(lambda grid: rounded(block, grid, format, 8)[2])
    before, after = np.asarray(loss(start)), np.asarray(loss(aligned))
    assert (after <= before).all()
    assert after.sum() < 0.8 * before.sum()


def test_solve_fits_scale_and_zero_point_together():
    weight, gram = problem(columns=8)
    codes, grid, _ = gptq.solve(weight, gram, WIDE, "mse", damping=0.0, refit=True)
    lost = np.float64(weight) - np.float64(decode(codes, grid, WIDE))
    slope = lost @ np.float64(gram)
    size = np.abs(np.float64(weight) @ np.float64(gram)).max()
    np.testing.assert_allclose(np.sum(slope, axis=1) / size, 0.0, atol=1e-3)
    np.testing.assert_allclose(np.sum(slope * np.asarray(codes), axis=1) / size, 0.0, atol=1e-3)


def test_solve_loses_less_with_offsets():
    weight, gram = problem(rows=8, columns=32)
    symmetric, affine = (
        gptq.solve(weight, gram, Format.parse(name), "mse", refit=True)[2].loss
        for name in ("ternary-g8", "ternary-g8-affine")
    )
    assert affine < 0.8 * symmetric
