"""Rotary positions against a float64 loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge.kernels import rotary


def rotate_loop(x, angle, pairs):
    out = x.copy()
    for b, t, n in np.ndindex(x.shape[:3]):
        for i, (first, second) in enumerate(pairs):
            c, s = np.cos(angle[b, t, i]), np.sin(angle[b, t, i])
            u, v = x[b, t, n, first], x[b, t, n, second]
            out[b, t, n, first] = u * c - v * s
            out[b, t, n, second] = v * c + u * s
    return out


@pytest.mark.parametrize("rotary_dim", [4, 8])
@pytest.mark.parametrize("style", ["interleaved", "half"])
def test_rotation_matches_a_loop_and_passes_the_rest_through(style, rotary_dim):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8))
    angle = rng.uniform(-4, 4, size=(2, 5, rotary_dim // 2))
    half = rotary_dim // 2
    pairs = [(2 * i, 2 * i + 1) if style == "interleaved" else (i, i + half) for i in range(half)]
    turn = rotary.rotate_interleaved if style == "interleaved" else rotary.rotate_half
    result = np.asarray(jax.jit(turn)(np.float32(x), np.float32(angle)))
    np.testing.assert_allclose(result, rotate_loop(x, angle, pairs), atol=2e-6)
    np.testing.assert_array_equal(result[..., rotary_dim:], np.float32(x[..., rotary_dim:]))


def test_scores_depend_only_on_relative_positions():
    rng = np.random.default_rng(1)
    query, key = np.float32(rng.normal(size=(2, 1, 1, 1, 16)))
    frequencies = rotary.inverse_frequencies(16, 10000.0)

    @jax.jit
    def score(at_query, at_key):
        turned = [
            rotary.rotate_interleaved(x, rotary.angles(t[None, None], frequencies))
            for x, t in ((query, at_query), (key, at_key))
        ]
        return jnp.sum(turned[0] * turned[1])

    near, far = score(*np.array([9, 4])), score(*np.array([105, 100]))
    assert float(near) == pytest.approx(float(far), abs=1e-4)


def test_frequencies_match_the_formula():
    actual = rotary.inverse_frequencies(8, 10000.0)
    expected = [10000.0 ** (-2 * i / 8) for i in range(4)]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_three_dimensional_positions_feed_their_own_frequencies():
    frequencies = rotary.inverse_frequencies(12, 10000.0)
    sections = (1, 2, 3)
    positions = np.array([[[3, 4]], [[10, 11]], [[20, 21]]])
    actual = jax.jit(rotary.angles, static_argnums=2)(positions, frequencies, sections)
    expected = np.zeros((1, 2, 6))
    row = [0, 1, 1, 2, 2, 2]
    for t in range(2):
        for i in range(6):
            expected[0, t, i] = positions[row[i], 0, t] * np.float64(frequencies[i])
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_one_row_of_positions_serves_all_three_dimensions():
    frequencies = rotary.inverse_frequencies(12, 10000.0)
    angles = jax.jit(rotary.angles, static_argnums=2)
    positions = np.arange(5)[None]
    np.testing.assert_array_equal(
        angles(positions, frequencies, (1, 2, 3)), angles(positions, frequencies, None)
    )
