"""Rotations: orthogonal, the product of their factors, drawn from a key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from glm_edge.compress.quantize.solvers import hadamard


def matrix(rotation):
    """The rotation in float64, from its factors."""
    odd = np.float64(rotation.odd)
    power = len(rotation.signs) // len(odd)
    sylvester = scipy.linalg.hadamard(power) / np.sqrt(power)
    return np.float64(rotation.signs)[:, None] * np.kron(sylvester, odd)


# Without and with an odd factor, and with one and two Hadamard factors.
SIZES = [1, 3, 20, 384]
MORE = (2, 8, 64, 107, 128, 192, 256, 1000, 1536, 4096)


@pytest.mark.parametrize(
    "size", [*SIZES, *(pytest.param(size, marks=pytest.mark.slow) for size in MORE)]
)
def test_multiplies_with_the_product_of_its_factors(size):
    rotation = hadamard.random_rotation(jax.random.key(size), size)
    x = np.random.default_rng(1).normal(size=(3, size)).astype(np.float32)
    dense = matrix(rotation)
    np.testing.assert_allclose(dense @ dense.T, np.eye(size), atol=2e-6)
    scale = np.abs(x).max() * np.sqrt(size)
    turned = hadamard.rotate(x, rotation)
    np.testing.assert_allclose(turned, np.float64(x) @ dense, atol=1e-6 * scale)
    back = hadamard.rotate(x, rotation, inverse=True)
    np.testing.assert_allclose(back, np.float64(x) @ dense.T, atol=1e-6 * scale)
    np.testing.assert_allclose(
        hadamard.rotate(turned, rotation, inverse=True), x, atol=1e-6 * scale
    )


def test_keys_draw_different_rotations_and_equal_keys_the_same():
    first, again, other = (hadamard.random_rotation(jax.random.key(seed), 24) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.signs, again.signs)
    np.testing.assert_array_equal(first.odd, again.odd)
    assert not np.array_equal(first.odd, other.odd)
    assert set(np.unique(np.asarray(first.signs))) == {-1.0, 1.0}


def test_leading_axes_and_narrow_types():
    rotation = hadamard.random_rotation(jax.random.key(0), 24)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 24)), jnp.bfloat16)
    turned = hadamard.rotate(x, rotation)
    assert turned.shape == x.shape
    assert turned.dtype == jnp.float32
    np.testing.assert_allclose(turned[1], hadamard.rotate(x[1], rotation), atol=1e-6)


def test_spreads_an_outlier():
    x = np.zeros((1, 1024), np.float32)
    x[0, 7] = 32.0
    turned = hadamard.rotate(x, hadamard.random_rotation(jax.random.key(0), 1024))
    np.testing.assert_allclose(np.abs(turned), 1.0, rtol=1e-5)


def test_kurtosis():
    x = np.random.default_rng(0).standard_t(5, (50, 40)).astype(np.float32)
    expected = scipy.stats.kurtosis(np.float64(x), axis=None, fisher=False)
    assert float(hadamard.kurtosis(x)) == pytest.approx(expected, rel=1e-4)
    assert float(hadamard.kurtosis(jnp.ones((4, 4)))) == 0.0
