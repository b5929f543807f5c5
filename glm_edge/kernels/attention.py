"""Grouped-query attention."""

import jax
import jax.numpy as jnp
from jax import Array

MASKED_SCORE = -1e9
MAX_SCORES = 1 << 26


def attention_weights(query: Array, key: Array, mask: Array | None = None) -> Array:
    """Compute the softmax of scaled scores, in float32.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H]; query head `n` attends to key head `n // (N / K)`.
      mask: bool, broadcastable to [B, 1, T, S]; False hides a key from a query.

    Returns:
      float32 [B, K, N / K, T, S] weights that sum to one over `S`.
    """
    batch, length, heads, _ = query.shape
    groups, slots = key.shape[2], key.shape[1]
    # Heads before tokens, so that the products are matrices without further transposes.
    scores = jnp.einsum(
        "bkrh,bksh->bkrs",
        _rows_by_head(query, groups),
        jnp.swapaxes(key, 1, 2),
        preferred_element_type=jnp.float32,
    )
    scores = scores.reshape(batch, groups, heads // groups, length, slots)
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, MASKED_SCORE)
    return jax.nn.softmax(scores, axis=-1)


def attend(weights: Array, value: Array) -> Array:
    """Compute the weighted sum of values.

    Args:
      weights: [B, K, N / K, T, S] from `attention_weights`.
      value: [B, S, K, H].

    Returns:
      [B, T, N, H].
    """
    batch, groups, _, length, slots = weights.shape
    rows = weights.astype(value.dtype).reshape(batch, groups, -1, slots)
    mixed = jnp.einsum("bkrs,bksh->bkrh", rows, jnp.swapaxes(value, 1, 2))
    return jnp.swapaxes(mixed.reshape(batch, -1, length, value.shape[-1]), 1, 2)


def attention(query: Array, key: Array, value: Array, mask: Array | None = None) -> Array:
    """Compute grouped-query attention.

    Above `MAX_SCORES` scores, queries run in blocks, so that memory is linear in the length of a
    prompt or image, not quadratic.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H]; query head `n` attends to key head `n // (N / K)`.
      value: [B, S, K, H].
      mask: bool, broadcastable to [B, 1, T, S]; False hides a key from a query.

    Returns:
      [B, T, N, H].

    References:
      GQA, https://arxiv.org/abs/2305.13245.
    """
    batch, length, heads, width = query.shape
    # Queries per block.
    size = max(1, MAX_SCORES // (batch * heads * key.shape[1]))
    if size >= length:
        return attend(attention_weights(query, key, mask), value)
    count = -(-length // size)
    padded = count * size - length

    def blocks(x: Array, axis: int) -> Array:
        padding = [(0, padded if i == axis else 0) for i in range(x.ndim)]
        split = jnp.pad(x, padding).reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(split, axis, 0)

    # A mask that varies with the query is split into the same blocks. `jax.checkpoint` recomputes
    # the scores for the gradient, so that they are not stored.
    if mask is None or mask.shape[2] == 1:
        run = jax.checkpoint(lambda part: attend(attention_weights(part, key, mask), value))
        mixed = jax.lax.map(run, blocks(query, 1))
    else:
        run = jax.checkpoint(lambda part: attend(attention_weights(part[0], key, part[1]), value))
        mixed = jax.lax.map(run, (blocks(query, 1), blocks(mask, 2)))
    return jnp.moveaxis(mixed, 0, 1).reshape(batch, count * size, heads, width)[:, :length]


def attention_by_head(query: Array, key: Array, value: Array, mask: Array) -> Array:
    """Compute grouped-query attention on a cache in the layout of on-device runtimes.

    Args:
      query: [B, T, N, H].
      key: [B, K, S, H].
      value: [B, K, H, S].
      mask: float [B, 1, T, S], added to the scores.

    Returns:
      [B, T, N, H].
    """
    batch, length, heads, width = query.shape
    groups, slots = key.shape[1], key.shape[2]
    scores = jnp.einsum("bkrh,bksh->bkrs", _rows_by_head(query, groups), key)
    scores = scores.reshape(batch, -1, length, slots) + mask
    weights = jax.nn.softmax(scores, axis=-1).reshape(batch, groups, -1, slots)
    mixed = jnp.einsum("bkrs,bkhs->bkrh", weights, value)
    mixed = mixed.reshape(batch, heads, length, width)
    return jnp.swapaxes(mixed, 1, 2)


def _rows_by_head(query: Array, groups: int) -> Array:
    """Scale queries [B, T, N, H], and order them as [B, K, N / K * T, H].

    The queries that share a key head become rows of one product, so that keys are not repeated.
    Scaling by 1 / sqrt(H) is cheaper on the query than on the scores.
    """
    batch, length, _, width = query.shape
    grouped = (query * width**-0.5).reshape(batch, length, groups, -1, width)
    return jnp.transpose(grouped, (0, 2, 3, 1, 4)).reshape(batch, groups, -1, width)


def causal_mask(query_slots: Array, num_slots: int) -> Array:
    """Build a mask in which a query at slot `t` attends to the slots `0..t`.

    Args:
      query_slots: [T] slot of each query in the key sequence.
      num_slots: count of key slots, `S`.

    Returns:
      bool [1, 1, T, S].
    """
    return (jnp.arange(num_slots) <= query_slots[:, None])[None, None]
