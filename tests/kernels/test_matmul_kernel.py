"""Products, dense and low-bit, against float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge.kernels import matmul


def product_loop(x, weight):
    out = np.zeros((x.shape[0], weight.shape[0]))
    for r, o in np.ndindex(out.shape):
        out[r, o] = sum(x[r, i] * weight[o, i] for i in range(x.shape[1]))
    return out


def dequantize_loop(integers, scale, zero):
    size = integers.shape[1] // scale.shape[1]
    out = np.zeros(integers.shape)
    for o, i in np.ndindex(integers.shape):
        g = i // size
        offset = 0 if zero is None else int(zero[o, g])
        out[o, i] = float(scale[o, g]) * (int(integers[o, i]) - offset)
    return out


def low_bit_case(groups, affine, seed=0):
    rng = np.random.default_rng(seed)
    integers = rng.integers(-8, 8, (6, 12)).astype(np.int8)
    scale = rng.uniform(0.01, 0.2, (6, groups)).astype(np.float32)
    zero = rng.integers(-8, 8, (6, groups)).astype(np.int8) if affine else None
    return integers, scale, zero


def test_dense_matches_a_loop():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(3, 9)), rng.normal(size=(5, 9))
    found = matmul.dense(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32))
    np.testing.assert_allclose(found, product_loop(x, weight), atol=2e-6)


def test_bfloat16_product_and_gradients_are_within_their_rounding():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(4, 64)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(8, 64)), jnp.float32)
    # Each of 64 products carries at most 2 roundings of 2^-9 of its magnitude.
    bound = 64 * 2 * 2.0**-9 * float(jnp.abs(x).max() * jnp.abs(weight).max())
    np.testing.assert_allclose(matmul.dense_bf16(x, weight), matmul.dense(x, weight), atol=bound)
    assert matmul.dense_bf16(x, weight).dtype == jnp.float32

    def loss(product):
        return lambda x, weight: jnp.sum(product(x, weight) ** 2)

    found = jax.grad(loss(matmul.dense_bf16), (0, 1))(x, weight)
    expected = jax.grad(loss(matmul.dense), (0, 1))(x, weight)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.float32
        assert float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other)) < 0.02


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("rows", [1, matmul.FEW_ROWS, matmul.FEW_ROWS + 1, 9])
def test_low_bit_product_matches_a_loop(rows, groups, affine):
    integers, scale, zero = low_bit_case(groups, affine)
    x = np.random.default_rng(2).normal(size=(rows, 12))
    expected = product_loop(x, dequantize_loop(integers, scale, zero))
    zero = None if zero is None else jnp.asarray(zero)
    found = matmul.low_bit(jnp.asarray(x, jnp.float32), integers, jnp.asarray(scale), zero)
    np.testing.assert_allclose(found, expected, atol=5e-6)


def test_low_bit_keeps_leading_axes():
    integers, scale, zero = low_bit_case(3, False)
    x = jnp.ones((2, 3, 12))
    assert matmul.low_bit(x, jnp.asarray(integers), jnp.asarray(scale), zero).shape == (2, 3, 6)


@pytest.mark.parametrize("affine", [False, True])
def test_dequantize_matches_a_loop(affine):
    integers, scale, zero = low_bit_case(4, affine)
    found = matmul.dequantize(
        jnp.asarray(integers), jnp.asarray(scale), None if zero is None else jnp.asarray(zero)
    )
    np.testing.assert_allclose(found, dequantize_loop(integers, scale, zero), rtol=1e-6)


@pytest.mark.parametrize(("bits", "affine"), [(4, False), (4, True), (8, False), (8, True)])
def test_quantize_matches_the_published_formula(bits, affine):
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(5, 12)).astype(np.float32)
    scale = rng.uniform(0.02, 0.2, (5, 3)).astype(np.float32)
    zero = rng.integers(-3, 4, (5, 3)).astype(np.int8) if affine else None
    expected = np.zeros(weight.shape, int)
    for o, i in np.ndindex(weight.shape):
        steps = weight[o, i] / scale[o, i // 4] + (0 if zero is None else zero[o, i // 4])
        expected[o, i] = np.clip(np.round(steps), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    found = matmul.quantize(
        jnp.asarray(weight), jnp.asarray(scale), None if zero is None else jnp.asarray(zero), bits
    )
    assert found.dtype == jnp.int8
    np.testing.assert_array_equal(found, expected)


def test_rows_are_rounded_to_int8_as_a_loop_does():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(6, 16)).astype(np.float32) + np.float32(0.3)
    x[0], x[1] = 0.0, np.abs(x[1])
    expected = np.zeros(x.shape)
    for r in range(len(x)):
        low, high = min(float(x[r].min()), 0.0), max(float(x[r].max()), 0.0)
        step = (high - low) / 255 if high > low else 1.0
        zero = np.clip(np.round(-128 - low / step), -128, 127)
        for c in range(x.shape[1]):
            q = np.clip(np.round(float(x[r, c]) / step + zero), -128, 127)
            expected[r, c] = (q - zero) * step
    found = np.asarray(matmul.round_rows_to_int8(jnp.asarray(x)))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert all(len(np.unique(row)) <= 256 for row in found)


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_split_in_three_are_as_accurate_as_a_float32_product(rows):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(rows, 300)) * 10.0 ** rng.integers(-3, 4, (rows, 300))
    x = x.astype(np.float32)
    weight = jnp.asarray(rng.normal(size=(40, 300)), jnp.bfloat16)
    exact = x.astype(np.float64) @ np.asarray(weight, np.float64).T
    scale = np.abs(x).astype(np.float64) @ np.abs(np.asarray(weight, np.float64)).T
    found = jax.jit(matmul.dense_split)(x, weight)
    assert np.max(np.abs(found - exact) / scale) < 2e-7
    plain = jax.grad(lambda x: jnp.sum(matmul.dense(x, weight.astype(jnp.float32)) ** 2))(x)
    split = jax.grad(lambda x: jnp.sum(matmul.dense_split(x, weight) ** 2))(x)
    np.testing.assert_allclose(split, plain, rtol=1e-4, atol=1e-6 * np.abs(plain).max())
