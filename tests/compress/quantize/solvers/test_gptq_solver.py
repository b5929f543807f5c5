"""The column-wise solver beside the published loop in float64, and on awkward matrices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge.compress.quantize.solvers import gptq_solver as gptq
from glm_edge.compress.quantize.solvers import scales as grid
from glm_edge.errors import BoxError
from glm_edge.params import Format


def slow(*cases):
    """Marks formats whose code other cases run too."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


ALIKE = slow("int8-g16", "int3-g16", "int2-g16", "int2-g32-affine", "ternary-channel")
# Options of the published algorithm, and those of the transform.
PUBLISHED = {"scale": "max", "act_order": True}
ALL = {"scale": "mse", "act_order": True, "refit": True, "sweeps": 2}
choose = jax.jit(grid.choose, static_argnums=(1, 2))
encode = jax.jit(grid.encode, static_argnums=2)
decode = jax.jit(grid.decode, static_argnums=2)


def problem(rows=24, columns=64, samples=400, seed=0):
    rng = np.random.default_rng(seed)
    mixing = np.eye(columns) + rng.normal(size=(columns, columns)) * 0.1
    inputs = rng.normal(size=(samples, columns)) * np.exp(rng.normal(size=columns) * 0.5) @ mixing
    weight = rng.normal(size=(rows, columns)).astype(np.float32)
    return weight, (inputs.T @ inputs).astype(np.float32)


def published(weight, gram, format, order=None, damping=0.01):
    """GPTQ through the Cholesky factor of the inverse, one column at a time, in float64."""
    work, gram = np.float64(weight), np.float64(gram)
    columns = work.shape[1]
    order = np.arange(columns) if order is None else np.asarray(order)
    gram = gram + damping * np.mean(np.diag(gram)) * np.eye(columns)
    work, gram = work[:, order].copy(), gram[order][:, order]
    upper = np.linalg.cholesky(np.linalg.inv(gram)).T
    size = columns // format.num_groups(columns)
    one = dataclasses.replace(format, group_size=None)
    codes, loss = np.zeros(work.shape, np.int8), 0.0
    for column in range(columns):
        if column % size == 0:
            part = np.float32(work[:, column : column + size])
            scale = choose(part, one, "max")
        q = encode(np.float32(work[:, column : column + 1]), scale, one)
        lost = work[:, column] - np.float64(decode(q, scale, one))[:, 0]
        codes[:, column] = np.asarray(q)[:, 0]
        loss += np.sum((lost / upper[column, column]) ** 2)
        work[:, column:] -= np.outer(lost / upper[column, column], upper[column, column:])
    return codes[:, np.argsort(order)], loss


def objective(weight, gram, codes, scale, format):
    lost = np.float64(decode(codes, scale, format)) - np.float64(weight)
    return np.sum(lost @ np.float64(gram) * lost)


PLAIN = ("int4-g16", "ternary-g16")
ORDERED = ("int4-channel", "int4-g16-affine", "nf4-g16")


@pytest.mark.parametrize(
    ("name", "act_order"),
    [
        *((name, False) for name in PLAIN),
        *((name, True) for name in ORDERED),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in PLAIN),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in ORDERED),
        *(
            pytest.param(*case.values, act_order, marks=pytest.mark.slow)
            for case in ALIKE
            for act_order in (False, True)
        ),
    ],
)
def test_codes_are_those_of_the_published_loop(name, act_order):
    weight, gram = problem()
    format = Format.parse(name)
    order = gptq.column_order(gram, format.num_groups(64)) if act_order else None
    codes, scale, info = gptq.solve(weight, gram, format, act_order=act_order)
    expected, loss = published(weight, gram, format, order)
    np.testing.assert_array_equal(codes, expected)
    damped = np.float64(gram) + 0.01 * np.mean(np.diag(gram)) * np.eye(64)
    assert objective(weight, damped, codes, scale, format) == pytest.approx(loss, rel=1e-3)
    power = np.sum(np.float64(weight) @ np.float64(gram) * np.float64(weight))
    lost = objective(weight, gram, codes, scale, format)
    assert info.loss == pytest.approx(lost / power, rel=1e-3)
    assert info.damping == 0.01


@pytest.mark.parametrize("block", [7, 64])
def test_blocks_change_no_code(block):
    weight, gram = problem()
    format = Format.parse("int4-channel")
    complete = gptq.solve(weight, gram, format)[0]
    np.testing.assert_array_equal(gptq.solve(weight, gram, format, block=block)[0], complete)


@pytest.mark.parametrize(
    "name",
    [
        "int4-g16-affine",
        "int4-tensor",
        *ALIKE,
        *slow(
            "int4-g16",
            "int4-channel",
            "nf4-g16",
            "ternary-g16",
            "ternary34-g16",
            "ternary34-channel",
        ),
        *slow("ternary-tensor"),
    ],
)
def test_every_quality_option_lowers_the_error_at_the_output(name):
    weight, gram = problem()
    format = Format.parse(name)
    codes, scales = grid.nearest(weight, format, "mse")
    nearest = objective(weight, gram, codes, scales, format)
    scale = "mse"
    plain, searched, refit, swept = (
        objective(weight, gram, *gptq.solve(weight, gram, format, **options)[:2], format)
        for options in (
            {"scale": "max"},
            {"scale": scale},
            {"scale": scale, "refit": True},
            {"scale": scale, "refit": True, "sweeps": 3},
        )
    )
    assert searched < nearest
    assert searched <= plain * (1.02 if "channel" in name or "tensor" in name else 1.0)
    assert refit <= searched
    assert swept <= refit


def test_descent_ends_at_a_coordinate_minimum():
    """Descent alone never raises the error and ends where no single code is better."""
    weight, gram = problem(rows=4, columns=16)
    format = Format.parse("int3-channel")
    first = gptq.solve(weight, gram, format, damping=0.0)
    codes, scale, _ = gptq.solve(weight, gram, format, damping=0.0, sweeps=30)
    before = objective(weight, gram, *first[:2], format)
    after = objective(weight, gram, codes, scale, format)
    assert after <= before
    for row in range(4):
        for column in range(16):
            for step in (-1, 1):
                moved = np.asarray(codes).copy()
                moved[row, column] += step
                if -4 <= moved[row, column] <= 3:
                    other = objective(weight, gram, jnp.asarray(moved), scale, format)
                    assert other >= after * (1 - 1e-5)


def test_both_signs_of_a_scale_lose_less():
    weight, gram = problem()
    format = Format.parse("int2-g16")
    one, both = (
        objective(weight, gram, *gptq.solve(weight, gram, format, scale=scale)[:2], format)
        for scale in ("mse", "extreme")
    )
    assert both < 0.95 * one
    grids = gptq.solve(weight, gram, format, scale="extreme")[1]
    assert np.any(np.float32(grids.scale) < 0)


@pytest.mark.parametrize(
    ("name", "act_order"),
    [
        ("ternary34-g16", True),
        pytest.param("ternary34-g16", False, marks=pytest.mark.slow),
        pytest.param("ternary34-channel", False, marks=pytest.mark.slow),
        pytest.param("ternary34-channel", True, marks=pytest.mark.slow),
    ],
)
def test_fours_hold_one_zero_and_beat_nearest(name, act_order):
    weight, gram = problem()
    format = Format.parse(name)
    options = {"scale": "mse", "act_order": act_order, "refit": True, "sweeps": 2}
    codes, scale, _ = gptq.solve(weight, gram, format, **options)
    np.testing.assert_array_equal(np.sum(np.asarray(codes).reshape(24, 16, 4) == 0, -1), 1)
    nearest = grid.nearest(weight, format, "mse")
    result = objective(weight, gram, codes, scale, format)
    assert result < 0.9 * objective(weight, gram, *nearest, format)


def test_the_scale_of_a_refit_solves_the_normal_equations():
    weight, gram = problem(rows=3, columns=8)
    format = Format("int3", 4, scale_dtype="float32")
    codes, scale, _ = gptq.solve(weight, gram, format, scale="max", damping=0.0, refit=True)
    for row in range(3):
        basis = np.zeros((8, 2))
        basis[:4, 0], basis[4:, 1] = np.split(np.asarray(codes[row]), 2)
        h = np.float64(gram)
        expected = np.linalg.solve(basis.T @ h @ basis, basis.T @ h @ np.float64(weight[row]))
        np.testing.assert_allclose(scale.scale[row], expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("int4-g16-affine", PUBLISHED),
        ("nf4-channel", PUBLISHED),
        *(
            pytest.param(name, ALL, marks=pytest.mark.slow)
            for name in ("int4-g16", "int4-g16-affine", "ternary-g16", "nf4-channel")
        ),
    ],
)
def test_masked_weights_stay_zero(name, options):
    weight, gram = problem()
    format = Format.parse(name)
    keep = np.random.default_rng(3).random(weight.shape) < 0.5
    codes, scale, _ = gptq.solve(weight * keep, gram, format, mask=keep, **options)
    dense = np.asarray(decode(codes, scale, format))
    assert not np.any(np.where(keep, 0.0, dense) != 0)
    assert np.mean(dense[keep] != 0) > 0.4


def test_masked_fours_keep_their_zero():
    weight, gram = problem()
    keep = np.ones(weight.shape, bool)
    keep[:, 2::4] = False
    codes = gptq.solve(weight * keep, gram, Format.parse("ternary34-g16"), mask=keep)
    assert not np.asarray(codes[0])[:, 2::4].any()


def test_dead_columns_go_to_the_nearest_level():
    weight, gram = problem()
    dead = np.arange(64) % 5 == 0
    gram = np.where(dead | dead[:, None], np.float32(0.0), gram)
    format = Format.parse("int4-channel")
    codes, scale, info = gptq.solve(weight, gram, format)
    assert np.isfinite(info.loss)
    codes, nearest = np.asarray(codes), np.asarray(encode(weight, scale, format))
    np.testing.assert_array_equal(codes[:, dead], nearest[:, dead])
    assert np.any(codes[:, ~dead] != nearest[:, ~dead])


def test_without_any_input_all_goes_to_the_nearest_level():
    weight, gram = problem()
    format = Format.parse("int4-g16")
    codes, _, info = gptq.solve(weight, 0 * gram, format, act_order=True, sweeps=1)
    np.testing.assert_array_equal(codes, grid.nearest(weight, format)[0])
    assert info.loss == 0.0


@pytest.mark.parametrize("kind", ["rank", "duplicates", "indefinite", "negative"])
def test_damping_grows_until_there_is_a_factor(kind):
    weight, gram = problem()
    if kind == "rank":
        row = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
        gram = row.T @ row
    elif kind == "duplicates":
        gram = np.tile(gram[:32, :32], (2, 2))
    elif kind == "indefinite":
        gram = gram - np.float32(2.0 * np.mean(np.diag(gram))) * np.eye(64, dtype=np.float32)
    else:
        gram = -gram
    format = Format.parse("int4-g16")
    codes, scale, info = gptq.solve(weight, gram, format, "mse", damping=0.0, refit=True, sweeps=1)
    assert info.damping > 0
    assert np.isfinite(np.float32(scale.scale)).all()
    assert np.abs(np.asarray(codes)).max() <= 8


def test_what_has_no_answer_is_refused():
    weight, gram = problem()
    with pytest.raises(BoxError, match="do not divide into groups of 24"):
        gptq.solve(weight, gram, Format.parse("int4-g24"))
    with pytest.raises(BoxError, match="gram must be"):
        gptq.solve(weight, gram[:32, :32], Format.parse("int4-g16"))
    with pytest.raises(FloatingPointError, match="NaN"):
        gptq.solve(weight, gram * np.float32(np.nan), Format.parse("int4-g16"))
