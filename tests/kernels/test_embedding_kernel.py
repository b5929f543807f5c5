"""Embedding look-up and its two ways of taking a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge.kernels import embedding


@pytest.mark.parametrize("entries", [0, 1 << 26])
def test_rows_and_gradient_match_a_loop(entries, monkeypatch):
    monkeypatch.setattr(embedding, "ONE_HOT_ENTRIES", entries)
    rng = np.random.default_rng(0)
    weight, upstream = rng.normal(size=(7, 3)), rng.normal(size=(2, 4, 3))
    tokens = np.array([[0, 6, 2, 2], [2, 0, 5, 6]])
    expected = np.zeros(weight.shape)
    for position in np.ndindex(tokens.shape):
        expected[tokens[position]] += upstream[position]

    def loss(weight):
        rows = embedding.take_rows(weight, jnp.asarray(tokens))
        return jnp.sum(rows * upstream), rows

    weight = np.float32(weight)
    gradient, rows = jax.jit(jax.grad(loss, has_aux=True))(weight)
    np.testing.assert_array_equal(rows, weight[tokens])
    np.testing.assert_allclose(gradient, expected, atol=2e-6)
