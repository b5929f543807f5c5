"""Grids of rows of zeros, of tiny, constant and huge weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress.quantize.parameter import quantize_leaf, row
from glm_edge.compress.quantize.solvers import gptq_solver as gptq
from glm_edge.compress.quantize.solvers import scales as grids
from glm_edge.compress.quantize.solvers.activation_ranges import int8_grid
from glm_edge.errors import BoxError, RecipeError
from glm_edge.kernels.packing import QTYPES
from glm_edge.kernels.quantization import round_scale, smallest_scale
from glm_edge.params import Format

ZERO, TINY, CONSTANT, DENORMAL, HUGE, PLAIN = range(6)


def rows(columns=16):
    weight = np.random.default_rng(3).normal(size=(6, columns)).astype(np.float32)
    weight[ZERO] = 0
    weight[TINY] *= 1e-6
    weight[CONSTANT] = -0.3
    weight[DENORMAL] = 1e-42
    weight[HUGE] *= 1e20
    return weight


# Relative error that the type leaves of a plain row.
REACH = {"int8": 0.02, "int6": 0.08, "int5": 0.15, "int4": 0.3, "nf4": 0.3}


@pytest.mark.parametrize("qtype", QTYPES)
def test_nearest_on_rows_at_the_edge(qtype):
    weight = rows()
    format = Format(qtype)
    codes, grid = grids.nearest(weight, format)
    dense = np.float64(grids.decode(codes, grid, format))
    assert np.isfinite(dense).all()
    assert not dense[ZERO].any()
    assert np.abs(dense[DENORMAL]).max() < 1e-37
    error = np.linalg.norm(dense - weight, axis=1) / np.linalg.norm(np.float64(weight), axis=1)
    bound = REACH.get(qtype, 2.0)
    assert max(error[[TINY, HUGE, PLAIN]]) < bound
    assert error[CONSTANT] < (bound if qtype != "ternary34" else 0.51)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_held_scale_never_makes_zero(scale_dtype):
    sizes = np.float32([0, 1e-37, 1e-12, 3e-8, 1e-7, 6e-5, 1e-3, 2.5, 6e4])
    result = np.float64(round_scale(jnp.asarray(sizes), scale_dtype))
    assert (result[1:] >= smallest_scale(scale_dtype)).all()
    assert result[0] == 0
    np.testing.assert_array_equal(-result, np.float64(round_scale(-sizes, scale_dtype)))
    if scale_dtype == "float16":
        np.testing.assert_array_equal(result[4], 2 * 2.0**-24)
        assert (result[sizes > 1e-7] >= sizes[sizes > 1e-7] * (1 - 2.0**-11)).all()


def test_rtn_says_which_scales_were_raised():
    weight = jnp.asarray(np.stack([rows()[PLAIN], rows()[TINY], rows()[PLAIN] * 1e-12]))
    box, error = quantize_leaf("a/weight", weight, Format("int8", scale_dtype="float16"))
    dense = np.asarray(box.unbox())
    assert np.linalg.norm(dense[1] - weight[1]) < 0.1 * np.linalg.norm(weight[1])
    message = row("quantize.rtn", "a/weight", weight, box, error).action
    assert "2 of 3 scales are the smallest of float16, 1 of 3 rows became zero" in message
    np.testing.assert_allclose(
        error, np.linalg.norm(dense - weight) / np.linalg.norm(weight), rtol=1e-5
    )


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_cast_says_which_weights_became_zero(stock, masked):
    weight = jnp.asarray([[1e-8, 0.0, 1.0, 2.0]])
    leaf = boxes.mask(weight, jnp.asarray([[True, True, True, False]])) if masked else weight
    scale, error = quantize_leaf("a/weight", leaf, Format("float16"), stock=stock)
    assert "1 of 4 weights became zero" in row("quantize.rtn", "a", leaf, scale, error).action


def test_row_says_where_the_result_is_farther_than_zero():
    weight = jnp.full((2, 4), 1e-8)
    assert "error larger than that of zeros" in row("t", "a", weight, weight * 4, 3.0).action


def test_rtn_rounds_weights_whose_squares_overflow():
    weight = jnp.asarray(rows()[[PLAIN]] * 1e30)
    _, error = quantize_leaf("a/weight", weight, Format("int8"), "mse")
    _, same = quantize_leaf("a/weight", weight * 1e-30, Format("int8"), "mse")
    np.testing.assert_allclose(error, same, rtol=1e-4)
    with pytest.raises(RecipeError, match="NaN or infinity"):
        quantize_leaf("a/weight", weight * 1e30, Format("int8"))


def test_symmetric_is_true_or_false():
    with pytest.raises(BoxError, match="symmetric must be True or False"):
        Format("int8", symmetric="no")


def test_a_range_below_float32_has_a_scale():
    assert int8_grid(-1e-43, 1e-43)[0] == np.finfo(np.float32).tiny


def test_solve_is_the_same_for_a_gram_matrix_of_any_size():
    rng = np.random.default_rng(0)
    inputs, weight = rng.normal(size=(64, 64)), rng.normal(size=(24, 64)).astype(np.float32)
    gram, format = np.float32(inputs.T @ inputs), Format("int4", 16)
    codes, _, info = gptq.solve(weight, gram, format, refit=True, sweeps=1)
    # The mean of this diagonal is beyond float32.
    for factor in np.float32([2.0**121, 2.0**-100]):
        again, _, scaled = gptq.solve(weight, gram * factor, format, refit=True, sweeps=1)
        np.testing.assert_array_equal(codes, again)
        assert scaled.damping == info.damping
        np.testing.assert_allclose(scaled.loss, info.loss, rtol=1e-5)


def test_damped_factor_ends_for_what_is_no_gram_matrix():
    factor, _, _ = gptq.damped_factor(np.float32(-1e38) * np.eye(64, dtype=np.float32), 0.01)
    assert np.isfinite(factor).all()
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        gptq.damped_factor(np.full((64, 64), np.inf, np.float32), 0.01)
