"""The choice of a shrinkage beside GPTQ's published loop in numpy, and its special cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge.compress.prune.masks.sparse_columns import PlainPruning
from glm_edge.compress.quantize.solvers import gptq_solver, shrinkage
from glm_edge.compress.quantize.solvers.shrinkage import CROSS_VALIDATE, Choice, PlainRounding
from glm_edge.params import Format

COLUMNS = 32
FORMAT = Format("int4", None, scale_dtype="float32")
TRIAL = PlainRounding(FORMAT, "max", False)


def weight_of(rows=96):
    return np.random.default_rng(0).normal(size=(rows, COLUMNS)).astype(np.float32)


def gram_of(seed, correlation=0.9, samples=4000):
    """The Gram matrix of rows whose neighbouring columns have this correlation."""
    inputs = np.random.default_rng(seed).normal(size=(samples, COLUMNS))
    for column in range(1, COLUMNS):
        fresh = np.sqrt(1.0 - correlation**2) * inputs[:, column]
        inputs[:, column] = correlation * inputs[:, column - 1] + fresh
    return (inputs.T @ inputs).astype(np.float32)


def shrunk(gram, gamma):
    return (1.0 - gamma) * np.float64(gram) + gamma * np.diag(np.diag(np.float64(gram)))


def published_errors(weight, gram, gamma, damping=0.01):
    """Errors of GPTQ per channel by the inverse of the shrunk Hessian, in float64."""
    work, gram = np.float64(weight), shrunk(gram, gamma)
    gram = gram + damping * np.mean(np.diag(gram)) * np.eye(COLUMNS)
    upper = np.linalg.cholesky(np.linalg.inv(gram)).T
    scale = np.abs(np.float32(work)).max(axis=1) / np.float32(7)
    result = np.zeros_like(work)
    for column in range(COLUMNS):
        result[:, column] = np.clip(np.round(work[:, column] / scale), -8, 7) * scale
        lost = (work[:, column] - result[:, column]) / upper[column, column]
        work[:, column:] -= np.outer(lost, upper[column, column:])
    return weight - result


def relative(errors, weight, gram):
    return np.sum(errors @ gram * errors) / np.sum(weight @ gram * weight)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_solve_with_shrinkage_equals_numpy(gamma):
    weight, gram = weight_of(), gram_of(1)
    codes, grid, info = gptq_solver.solve(weight, gram, FORMAT, shrinkage=gamma)
    expected = published_errors(weight, gram, gamma)
    actual = weight - np.float32(grid.scale) * np.asarray(codes)
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    # The report shows the error on the inputs, not that of the shrunk Hessian.
    assert info.loss == pytest.approx(relative(expected, weight, gram), rel=1e-3)


def test_choose_has_the_least_mean_error_of_numpy():
    weight = weight_of()
    for other in (0.9, 0.5, -0.9):
        grams = {"a": gram_of(1), "b": gram_of(2, other), "c": gram_of(3)}
        means = []
        for gamma in shrinkage.GRID:
            lost = []
            for omitted, gram in grams.items():
                train = sum(np.float64(g) for name, g in grams.items() if name != omitted)
                errors = published_errors(weight, train, gamma)
                lost.append(relative(errors, weight, gram))
            means.append(np.mean(lost))
        chosen = shrinkage.choose(CROSS_VALIDATE, weight, None, grams, 0.01, TRIAL)
        assert chosen == Choice(shrinkage.GRID[int(np.argmin(means))], 3)


def test_choose_with_equal_domains_is_zero():
    grams = {name: gram_of(seed) for seed, name in enumerate("abc")}
    chosen = shrinkage.choose(CROSS_VALIDATE, weight_of(), None, grams, 0.01, TRIAL)
    assert chosen == Choice(0.0, 3)
    assert chosen.note == ", shrinkage 0 by 3 domains"


@pytest.mark.parametrize(
    "trial",
    [TRIAL, PlainRounding(FORMAT, "max", True), PlainPruning(0.5, None, 128, None)],
    ids=["rounding", "ordered", "pruning"],
)
def test_choose_with_conflicting_domains_is_positive(trial):
    grams = {"a": gram_of(1), "b": gram_of(2, correlation=-0.9)}
    chosen = shrinkage.choose(CROSS_VALIDATE, weight_of(), None, grams, 0.01, trial)
    assert chosen.gamma >= 0.3


def test_choose_below_two_domains_is_zero():
    gram, weight = gram_of(1), weight_of()
    for grams in ({None: gram}, {"a": gram}, {None: gram, "a": gram_of(2, correlation=-0.9)}):
        assert shrinkage.choose(CROSS_VALIDATE, weight, None, grams, 0.01, TRIAL) == Choice(0.0)
    assert shrinkage.choose(0.2, weight, None, {None: gram}, 0.01, TRIAL) == Choice(0.2)
    assert (Choice(0.0).note, Choice(0.2).note) == ("", ", shrinkage 0.2")


def test_choose_never_omits_batches_without_domain():
    """Two equal domains, and more batches without one, which agree or conflict with both."""
    for correlation, gamma in ((0.9, 0.0), (-0.9, 0.6)):
        unnamed = 100.0 * gram_of(4, correlation)
        grams = {"a": gram_of(1), "b": gram_of(2), None: unnamed}
        chosen = shrinkage.choose(CROSS_VALIDATE, weight_of(), None, grams, 0.01, TRIAL)
        assert chosen == Choice(gamma, 2)


def test_choose_without_a_factor_is_zero():
    indefinite = gram_of(1) - 1e5 * np.eye(COLUMNS, dtype=np.float32)
    grams = {"a": indefinite, "b": indefinite}
    assert shrinkage.choose(CROSS_VALIDATE, weight_of(), None, grams, 0.01, TRIAL).gamma == 0.0


def test_choose_reads_at_most_128_rows(monkeypatch):
    weight, grams = weight_of(300), {"a": gram_of(1), "b": gram_of(2, correlation=0.5)}
    sizes = []

    def losses(weight, *arguments):
        sizes.append(weight.shape)
        return jnp.asarray([4.0, 3.0, jnp.nan, 2.0, 2.0])

    monkeypatch.setattr(shrinkage, "_losses", losses)
    mask = weight > 0
    chosen = shrinkage.choose(CROSS_VALIDATE, weight, mask, grams, 0.01, TRIAL)
    assert chosen == Choice(0.3, 2)
    assert sizes == [(COLUMNS, 128)] * 2


def test_trials_keep_masked_weights_at_zero():
    weight, mask = weight_of().T, np.random.default_rng(1).random((COLUMNS, 96)) < 0.5
    weight = np.where(mask, weight, 0.0).astype(np.float32)
    gram = gptq_solver.scaled(gram_of(1))
    for trial in (
        PlainRounding(FORMAT, "max", True),
        PlainPruning(0.75, None, 128, None),
        PlainPruning(0.75, None, 128, TRIAL),
    ):
        errors = np.asarray(jax.jit(trial)(weight, gram, 0.01, mask))
        assert not np.any(errors[~mask])
        assert np.any(errors[mask])
