"""Attention against a float64 loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge.kernels import attention

attend = jax.jit(attention.attention)


def attention_loop(query, key, value, mask):
    batch, length, heads, width = query.shape
    per_group = heads // key.shape[2]
    out = np.zeros((batch, length, heads, value.shape[-1]))
    for b, t, n in np.ndindex(batch, length, heads):
        k = n // per_group
        scores = np.array(
            [query[b, t, n] @ key[b, s, k] / np.sqrt(width) for s in range(key.shape[1])]
        )
        scores = np.where(mask[b, 0, t], scores, -np.inf)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out[b, t, n] = sum(weights[s] * value[b, s, k] for s in range(key.shape[1]))
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_grouped_query_attention_matches_a_loop(heads, kv_heads):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 5, heads, 8))
    key, value = rng.normal(size=(2, 2, 7, kv_heads, 8))
    mask = rng.random((2, 1, 5, 7)) < 0.6
    mask[..., 0] = True
    result = attend(*(np.float32(x) for x in (query, key, value)), mask)
    np.testing.assert_allclose(result, attention_loop(query, key, value, mask), atol=2e-6)


def test_weights_sum_to_one_and_hide_what_is_masked():
    rng = np.random.default_rng(1)
    query = np.float32(rng.normal(size=(1, 3, 4, 8)))
    key = np.float32(rng.normal(size=(1, 3, 2, 8)))

    @jax.jit
    def causal(query, key):
        return attention.attention_weights(query, key, attention.causal_mask(jnp.arange(3), 3))

    weights = np.asarray(causal(query, key))
    assert weights.shape == (1, 2, 2, 3, 3)
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)
    assert np.all(weights[..., np.triu(np.ones((3, 3), bool), 1)] == 0.0)


def test_causal_mask_counts_slots_of_a_cache():
    mask = np.asarray(jax.jit(attention.causal_mask, static_argnums=1)(np.array([2, 3]), 5))
    assert mask.shape == (1, 1, 2, 5)
    np.testing.assert_array_equal(mask[0, 0], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


@pytest.mark.parametrize("mask_shape", [None, (2, 1, 1, 7), (1, 1, 5, 7), (2, 1, 5, 7)])
def test_blocks_of_queries_give_what_all_at_once_give(monkeypatch, mask_shape):
    rng = np.random.default_rng(2)
    query = np.float32(rng.normal(size=(2, 5, 4, 8)))
    key, value = np.float32(rng.normal(size=(2, 2, 7, 2, 8)))
    mask = None
    if mask_shape is not None:
        mask = rng.random(mask_shape) < 0.6
        mask[..., 0] = True

    def output_and_gradient(query):
        def loss(query):
            out = attention.attention(query, key, value, mask)
            return jnp.sum(out**2), out

        (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(query)
        return out, gradient

    complete, gradient = jax.jit(output_and_gradient)(query)
    monkeypatch.setattr(attention, "MAX_SCORES", 2 * 2 * 4 * 7)
    # A function of its own: jit keeps what it traced of the first one.
    out, by_blocks = jax.jit(lambda query: output_and_gradient(query))(query)
    np.testing.assert_allclose(out, complete, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(by_blocks, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(4, 2, 1), (6, 2, 5), (3, 3, 4)])
def test_a_cache_by_head_gives_the_same(heads, kv_heads, length):
    rng = np.random.default_rng(3)
    query = np.float32(rng.normal(size=(2, length, heads, 8)))
    key, value = np.float32(rng.normal(size=(2, 2, 7, kv_heads, 8)))

    @jax.jit
    def both(query, key, value):
        mask = attention.causal_mask(2 + jnp.arange(length), 7)
        by_head = attention.attention_by_head(
            query,
            jnp.swapaxes(key, 1, 2),
            jnp.transpose(value, (0, 2, 3, 1)),
            jnp.where(mask, 0.0, attention.MASKED_SCORE),
        )
        return by_head, attention.attention(query, key, value, mask)

    actual, expected = both(query, key, value)
    np.testing.assert_allclose(actual, expected, atol=1e-6)
