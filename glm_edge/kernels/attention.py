"""Grouped-query attention."""

import jax
import jax.numpy as jnp
from jax import Array

MASKED_SCORE = -1e9
MAX_SCORES = 1 << 26


def attention_weights(query: Array, key: Array, mask: Array | None = None) -> Array:
    """Computes the softmax of scaled scores, in float32.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], where query head `n` reads key head `n // (N / K)`.
      mask: bool, broadcastable to [B, 1, T, S]; False hides a key from a query.

    Returns:
      [B, K, N / K, T, S] weights that sum to one over `S`.
    """
    batch, length, heads, width = query.shape
    # N / K query heads share a key head; the scale 1 / sqrt(H) is on the smaller operand.
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], width)
    scores = jnp.einsum(
        "btkgh,bskh->bkgts", grouped * width**-0.5, key, preferred_element_type=jnp.float32
    )
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, MASKED_SCORE)
    return jax.nn.softmax(scores, axis=-1)


def attend(weights: Array, value: Array) -> Array:
    """Computes the weighted sum of values.

    Args:
      weights: [B, K, N / K, T, S] from `attention_weights`.
      value: [B, S, K, H].

    Returns:
      [B, T, N, H].
    """
    mixed = jnp.einsum("bkgts,bskh->btkgh", weights.astype(value.dtype), value)
    return mixed.reshape(*mixed.shape[:2], -1, mixed.shape[-1])


def attention(query: Array, key: Array, value: Array, mask: Array | None = None) -> Array:
    """Computes grouped-query attention; shapes as in `attention_weights` and `attend`.

    Where all scores would be more than `MAX_SCORES`, queries run in blocks, so that memory grows
    with the length of a prompt or image and not with its square.

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

    # A mask that varies with the query is cut into the same blocks. Checkpoints keep no scores for
    # the gradient.
    if mask is None or mask.shape[2] == 1:
        run = jax.checkpoint(lambda part: attend(attention_weights(part, key, mask), value))
        mixed = jax.lax.map(run, blocks(query, 1))
    else:
        run = jax.checkpoint(lambda part: attend(attention_weights(part[0], key, part[1]), value))
        mixed = jax.lax.map(run, (blocks(query, 1), blocks(mask, 2)))
    return jnp.moveaxis(mixed, 0, 1).reshape(batch, count * size, heads, width)[:, :length]


def attention_by_head(query: Array, key: Array, value: Array, mask: Array) -> Array:
    """Computes grouped-query attention on a cache in the layout of on-device runtimes.

    Args:
      query: [B, T, N, H].
      key: [B, K, S, H].
      value: [B, K, H, S].
      mask: added to the scores, [B, 1, T, S].

    Returns:
      [B, T, N, H].
    """
    batch, length, heads, width = query.shape
    groups, slots = key.shape[1], key.shape[2]
    # The queries of a key head become rows of one product, so that no head is repeated.
    grouped = (query * width**-0.5).reshape(batch, length, groups, -1, width)
    rows = jnp.transpose(grouped, (0, 2, 3, 1, 4)).reshape(batch, groups, -1, width)
    scores = jnp.einsum("bkrh,bksh->bkrs", rows, key)
    scores = scores.reshape(batch, -1, length, slots) + mask
    weights = jax.nn.softmax(scores, axis=-1).reshape(batch, groups, -1, slots)
    mixed = jnp.einsum("bkrs,bkhs->bkrh", weights, value)
    mixed = mixed.reshape(batch, heads, length, width)
    return jnp.swapaxes(mixed, 1, 2)


def causal_mask(query_slots: Array, num_slots: int) -> Array:
    """Lets a query at slot `t` see the slots `0..t`.

    Args:
      query_slots: [T] slot of each query in the key sequence.
      num_slots: number of key slots `S`.

    Returns:
      bool [1, 1, T, S].
    """
    return (jnp.arange(num_slots) <= query_slots[:, None])[None, None]
