"""Rows of integers for keys and values, against float64 arithmetic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_edge.kernels import cache


@functools.partial(jax.jit, static_argnums=1)
def round_trip(rows, qtype):
    """Rounded rows, their scales, and what they say."""
    data, scale = cache.quantize_rows(rows, qtype)
    return data, scale, cache.dequantize_rows(data, scale, rows.shape[-1])


@pytest.mark.parametrize("qtype", ["int8", "int4"])
@settings(max_examples=20, deadline=None)
@given(
    width=st.sampled_from([1, 7, 8]),
    power=st.integers(-3, 4),
    seed=st.integers(0, 2**31),
)
def test_rows_come_back_within_half_a_step(qtype, width, power, seed):
    rng = np.random.default_rng(seed)
    rows = (rng.normal(size=(2, 5, 3, width)) * 10.0**power).astype(np.float32)
    data, scale, result = round_trip(rows, qtype)
    assert data.shape == (2, 5, 3, width if qtype == "int8" else -(-width // 2))
    assert scale.shape == (2, 5, 3, 1)
    assert data.dtype == (jnp.int8 if qtype == "int8" else jnp.uint8)
    assert scale.dtype == jnp.float16
    result = np.asarray(result, np.float64)
    step = np.abs(rows.astype(np.float64)).max(-1, keepdims=True) / cache.LARGEST[qtype]
    # Half a step, or what the ends lose where float16 rounds the step down: 2^-11 of it each.
    bound = np.maximum(0.5 * step * (1 + 2.0**-11), cache.LARGEST[qtype] * step * 2.0**-11)
    # Steps below the normal numbers of float16 are rounded to a multiple of 2^-24.
    bound += cache.LARGEST[qtype] * 2.0**-25
    assert np.all(np.abs(result - rows) <= bound)


@pytest.mark.parametrize("qtype", ["int8", "int4"])
def test_each_head_of_each_token_has_its_own_grid(qtype):
    rows = np.float32(np.random.default_rng(0).normal(size=(1, 2, 2, 8)))
    loud = rows.copy()
    loud[0, 1, 0] *= 1000.0
    one, other = (np.asarray(round_trip(r, qtype)[2]) for r in (rows, loud))
    retained = np.ones((1, 2, 2), bool)
    retained[0, 1, 0] = False
    np.testing.assert_array_equal(one[retained], other[retained])


@pytest.mark.parametrize("qtype", ["int8", "int4"])
def test_zeros_and_numbers_beyond_float16_stay_finite(qtype):
    rows = np.float32([[0.0] * 4, [1e30] * 4, [-1e-12] * 4])
    data, _, back = (np.asarray(values) for values in round_trip(rows, qtype))
    if qtype == "int4":
        np.testing.assert_array_equal(cache.quantize_rows(rows, qtype)[0], data)
    assert np.all(np.isfinite(back))
    np.testing.assert_array_equal(back[[0, 2]], 0.0)
    assert np.all(back[1] > 4e5)
