"""Factors and solutions in fixed blocks, beside float64."""

import jax
import numpy as np
import pytest

from glm_edge.compress.quantize.solvers import triangular

SIZES = [5, 200, *(pytest.param(size, marks=pytest.mark.slow) for size in (64, 65))]


def problem(size):
    rng = np.random.default_rng(size)
    mixing = rng.normal(size=(2 * size, size))
    gram = (mixing.T @ mixing / size + np.eye(size)).astype(np.float32)
    return gram, rng.normal(size=(size, 7)).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
def test_cholesky_is_that_of_float64(size):
    gram, _ = problem(size)
    result = np.float64(jax.jit(triangular.cholesky)(gram))
    np.testing.assert_allclose(result, np.linalg.cholesky(np.float64(gram)), rtol=0, atol=2e-6)
    assert not np.triu(result, 1).any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_solutions_are_those_of_float64(size, transposed):
    gram, right = problem(size)
    lower = np.linalg.cholesky(np.float64(gram)).astype(np.float32)
    for solve, factor in ((triangular.solve_lower, lower), (triangular.solve_upper, lower.T)):
        actual = jax.jit(solve, static_argnums=2)(factor, right, transposed)
        wanted = np.linalg.solve(np.float64(factor.T if transposed else factor), right)
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=3e-6 * np.abs(wanted).max())


def test_a_matrix_without_a_factor_gives_nan():
    assert np.isnan(jax.jit(triangular.cholesky)(-np.eye(70, dtype=np.float32))).any()


def test_sums_are_those_of_numpy():
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.testing.assert_array_equal(triangular.column_sums(values), values.sum(axis=1))
    np.testing.assert_array_equal(triangular.across(values[0], values[1]), values[0].T @ values[1])
    assert triangular.total(values.reshape(-1)) == values.sum()
