"""Vision token pruning with static shapes: scores of tokens, and gathering of the kept tokens.

Letters: `B` rows, `T` tokens, `D` hidden size, `K` the static capacity of a pruned row.
"""

import jax.numpy as jnp
from jax import Array


def norm_scores(x: Array) -> Array:
    """Compute the Euclidean norm of each token.

    Args:
      x: [B, T, D] hidden states.

    Returns:
      float32 [B, T].
    """
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


def attention_scores(weights: Array, query_mask: Array) -> Array:
    """Compute the mean attention that each token receives from the masked queries.

    Args:
      weights: `[B, ..., T, T]` attention weights of a layer, with head axes in the middle and
        queries before keys. The decoder sows them in the collection `attention`.
      query_mask: bool [B, T], True at the queries to average over (text tokens).

    Returns:
      float32 [B, T].

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
    """Compute one minus the largest cosine similarity to an earlier vision token.

    Among near-duplicates the first scores highest. Non-vision tokens are ignored.

    Args:
      x: [B, T, D] hidden states.
      vision_mask: bool [B, T], True at vision tokens.

    Returns:
      float32 [B, T], in 0..2; 2 for tokens without an earlier vision token.
    """
    unit = x.astype(jnp.float32)
    unit = unit / jnp.maximum(jnp.linalg.norm(unit, axis=-1, keepdims=True), 1e-12)
    similarity = jnp.einsum("btd,bsd->bts", unit, unit, precision="highest")
    # Only earlier tokens are compared, so that one of two equal tokens remains.
    earlier = jnp.tril(jnp.ones(similarity.shape[1:], bool), -1)
    compared = earlier & vision_mask[:, None, :] & vision_mask[:, :, None]
    return 1.0 - jnp.max(jnp.where(compared, similarity, -1.0), axis=-1)


def top_scores(scores: Array, vision_mask: Array, counts: Array) -> Array:
    """Select the vision tokens of each row with the highest scores.

    Args:
      scores: [B, T]; values at other tokens are ignored. Ties keep the earliest token.
      vision_mask: bool [B, T], True at vision tokens.
      counts: int [B], vision tokens to keep per row; rows with fewer keep all.

    Returns:
      bool [B, T], True at the kept vision tokens.
    """
    order = jnp.argsort(jnp.where(vision_mask, -scores, jnp.inf), axis=1, stable=True)
    # The inverse permutation is the rank.
    rank = jnp.argsort(order, axis=1)
    return vision_mask & (rank < counts[:, None])


def kept_indices(keep_mask: Array, capacity: int) -> Array:
    """List the indices of kept tokens in order, padded with indices of dropped tokens.

    Args:
      keep_mask: bool [B, T], True at no more than `capacity` tokens per row.
      capacity: static count `K` of indices per row, at most `T`.

    Returns:
      int [B, K], indices for `gather_tokens`.
    """
    return jnp.argsort(~keep_mask, axis=1, stable=True)[:, :capacity]


def gather_tokens(array: Array, indices: Array, axis: int = 1) -> Array:
    """Gather tokens of an array by row.

    Args:
      array: `[B, T, ...]`, or positions [3, B, T] with `axis=2`.
      indices: int [B, K] from `kept_indices`.
      axis: axis of the tokens. The axis before it is the row axis.

    Returns:
      The array with `K` tokens per row.
    """
    shape = [1] * array.ndim
    shape[axis - 1], shape[axis] = indices.shape
    return jnp.take_along_axis(array, indices.reshape(shape), axis=axis)
