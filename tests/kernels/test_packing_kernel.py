"""Four-bit packing against a loop over bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_edge.kernels import packing


def pack_loop(values):
    rows, columns = values.shape
    out = np.zeros((rows, (columns + 1) // 2), np.uint8)
    for r, c in np.ndindex(rows, columns):
        out[r, c // 2] |= (int(values[r, c]) % 16) << (4 * (c % 2))
    return out


@pytest.mark.parametrize("columns", [1, 2, 7, 32])
def test_bytes_match_a_loop_low_nibble_first(columns):
    values = np.random.default_rng(0).integers(-8, 8, (3, columns)).astype(np.int8)
    np.testing.assert_array_equal(packing.pack_int4(jnp.asarray(values)), pack_loop(values))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**31))
def test_unpacking_undoes_packing(layers, rows, columns, seed):
    values = np.random.default_rng(seed).integers(-8, 8, (layers, rows, columns)).astype(np.int8)
    packed = packing.pack_int4(jnp.asarray(values))
    assert packed.dtype == jnp.uint8
    assert packed.shape == (layers, rows, -(-columns // 2))
    np.testing.assert_array_equal(packing.unpack_int4(packed, columns), values)


def test_packing_works_under_jit_and_vmap():
    values = jnp.arange(-8, 8, dtype=jnp.int8).reshape(2, 8)
    packed = jax.jit(jax.vmap(packing.pack_int4))(values)
    unpacked = jax.vmap(lambda row: packing.unpack_int4(row, 8))(packed)
    np.testing.assert_array_equal(unpacked, values)
