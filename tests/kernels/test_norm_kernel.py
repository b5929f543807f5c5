"""Norms against a float64 loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge.kernels import norm

rms_norm = jax.jit(norm.rms_norm)


@pytest.mark.parametrize("shape", [(3, 8), (2, 4, 17), (1, 1)])
def test_rms_norm_matches_a_loop(shape):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=shape) * 3, rng.normal(size=shape[-1])
    expected = np.zeros(shape)
    for row in np.ndindex(shape[:-1]):
        mean_square = sum(v * v for v in x[row]) / shape[-1]
        expected[row] = weight * x[row] / np.sqrt(mean_square + 1e-5)
    actual = rms_norm(np.float32(x), np.float32(weight), 1e-5)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 8), (2, 4, 17)])
def test_layer_norm_matches_a_loop(shape):
    rng = np.random.default_rng(1)
    x, weight, bias = rng.normal(size=shape) + 5, *rng.normal(size=(2, shape[-1]))
    expected = np.zeros(shape)
    for row in np.ndindex(shape[:-1]):
        mean = sum(x[row]) / shape[-1]
        variance = sum((v - mean) ** 2 for v in x[row]) / shape[-1]
        expected[row] = weight * (x[row] - mean) / np.sqrt(variance + 1e-5) + bias
    arrays = (np.float32(a) for a in (x, weight, bias))
    actual = jax.jit(norm.layer_norm)(*arrays, 1e-5)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_statistics_are_float32_for_bfloat16_inputs():
    x, weight = np.full((1, 4096), 3.0, jnp.bfloat16), np.ones(4096, jnp.bfloat16)
    result = rms_norm(x, weight, 1e-5)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(result, np.float32), 1.0, atol=1e-2)
