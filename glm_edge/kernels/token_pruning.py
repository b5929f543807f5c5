"""Vision token pruning: scores of tokens, and gathering of those that remain, with static shapes.

Letters: `B` rows, `T` tokens, `D` hidden size, `K` the static capacity of a pruned row.
"""

import jax.numpy as jnp
from jax import Array


def norm_scores(x: Array) -> Array:
    """Computes the Euclidean norm of each token, [B, T] of [B, T, D]."""
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


def attention_scores(weights: Array, query_mask: Array) -> Array:
    """Computes the mean attention that each token receives from the masked queries.

    Args:
      weights: `[B, ..., T, T]` attention weights of a layer, by heads between, queries before keys,
        as the decoder sows them in the collection `attention`.
      query_mask: bool [B, T], True at queries that count: tokens of the text.

    Returns:
      [B, T].

    References:
      An Image is Worth 1/2 Tokens After Layer 2 (FastV), https://arxiv.org/abs/2403.06764.
    """
    query_mask = query_mask.astype(jnp.float32)
    # FastV's attention map is the mean over heads.
    batch, (length, _) = len(query_mask), weights.shape[-2:]
    heads = jnp.mean(weights.astype(jnp.float32).reshape(batch, -1, length, length), axis=1)
    # A row without text divides by one: its scores are zero, not NaN.
    received = jnp.einsum("bt,bts->bs", query_mask, heads)
    return received / jnp.maximum(query_mask.sum(axis=1, keepdims=True), 1.0)


def novelty_scores(x: Array, vision_mask: Array) -> Array:
    """Computes one minus the greatest cosine similarity to an earlier vision token, [B, T].

    Among near-duplicates the first scores highest. Non-vision tokens are ignored.

    Args:
      x: [B, T, D].
      vision_mask: bool [B, T], True at vision tokens.
    """
    unit = x.astype(jnp.float32)
    unit = unit / jnp.maximum(jnp.linalg.norm(unit, axis=-1, keepdims=True), 1e-12)
    similarity = jnp.einsum("btd,bsd->bts", unit, unit, precision="highest")
    # Only earlier tokens compete, so that one of two equal tokens remains.
    earlier = jnp.tril(jnp.ones(similarity.shape[1:], bool), -1)
    compared = earlier & vision_mask[:, None, :] & vision_mask[:, :, None]
    return 1.0 - jnp.max(jnp.where(compared, similarity, -1.0), axis=-1)


def top_scores(scores: Array, vision_mask: Array, counts: Array) -> Array:
    """Masks the vision tokens of each row with the highest scores, bool [B, T].

    Args:
      scores: [B, T]; only those of vision tokens are read. Ties keep the earliest token.
      vision_mask: bool [B, T], True at vision tokens.
      counts: int [B], vision tokens per row that remain; rows with fewer keep all.
    """
    order = jnp.argsort(jnp.where(vision_mask, -scores, jnp.inf), axis=1, stable=True)
    # The inverse permutation is the rank.
    rank = jnp.argsort(order, axis=1)
    return vision_mask & (rank < counts[:, None])


def kept_indices(keep_mask: Array, capacity: int) -> Array:
    """Lists the indices of the tokens that remain, in their order, then indices of others.

    Args:
      keep_mask: bool [B, T], True at no more than `capacity` tokens per row.
      capacity: `K`, a static number, at most `T`.

    Returns:
      int [B, K], indices for `gather_tokens`.
    """
    return jnp.argsort(~keep_mask, axis=1, stable=True)[:, :capacity]


def gather_tokens(array: Array, indices: Array, axis: int = 1) -> Array:
    """Gathers tokens of an array by row.

    Args:
      array: `[B, T, ...]`; positions [3, B, T] with `axis=2`, whose rows are on axis 1.
      indices: int [B, K] from `kept_indices`.
      axis: of the tokens; the axis before it is that of the rows.

    Returns:
      The array with K tokens.
    """
    shape = [1] * array.ndim
    shape[axis - 1], shape[axis] = indices.shape
    return jnp.take_along_axis(array, indices.reshape(shape), axis=axis)
