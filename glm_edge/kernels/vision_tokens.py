"""Choosing which vision tokens stay in a sequence, with static shapes.

Letters: `B` rows, `T` tokens, `D` hidden size, `K` tokens that are left room for.
"""

import jax.numpy as jnp
from jax import Array


def norm_scores(x: Array) -> Array:
    """Euclidean norm of each token, [B, T] of [B, T, D]."""
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


def attention_scores(weights: Array, asks: Array) -> Array:
    """Mean attention that each token receives from those that ask.

    Args:
      weights: `[B, ..., T, T]` attention weights of a layer, by heads between, queries before keys,
        as the decoder sows them in the collection `attention`.
      asks: bool [B, T], True at queries that count: tokens of the text.

    Returns:
      [B, T].

    References:
      An Image is Worth 1/2 Tokens After Layer 2 (FastV), https://arxiv.org/abs/2403.06764.
    """
    asks = asks.astype(jnp.float32)
    heads = jnp.mean(weights.astype(jnp.float32).reshape(len(asks), -1, *weights.shape[-2:]), 1)
    received = jnp.einsum("bt,bts->bs", asks, heads)
    return received / jnp.maximum(asks.sum(axis=1, keepdims=True), 1.0)


def novelty_scores(x: Array, placeholder: Array) -> Array:
    """One less the greatest cosine similarity to an earlier vision token, [B, T].

    Of tokens that are alike the first stays; other tokens neither count nor are counted.

    Args:
      x: [B, T, D].
      placeholder: bool [B, T], True at vision tokens.
    """
    unit = x.astype(jnp.float32)
    unit = unit / jnp.maximum(jnp.linalg.norm(unit, axis=-1, keepdims=True), 1e-12)
    alike = jnp.einsum("btd,bsd->bts", unit, unit, precision="highest")
    earlier = jnp.tril(jnp.ones(alike.shape[1:], bool), -1)
    seen = earlier & placeholder[:, None, :] & placeholder[:, :, None]
    return 1.0 - jnp.max(jnp.where(seen, alike, -1.0), axis=-1)


def highest(scores: Array, placeholder: Array, keep: Array) -> Array:
    """The vision tokens of each row that score highest, bool [B, T].

    Args:
      scores: [B, T]; only those of vision tokens are read. Of equals the first stay.
      placeholder: bool [B, T], True at vision tokens.
      keep: int [B], vision tokens of each row that stay; of fewer all do.
    """
    order = jnp.argsort(jnp.where(placeholder, -scores, jnp.inf), axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)
    return placeholder & (rank < keep[:, None])


def places(stays: Array, room: int) -> Array:
    """Places of the tokens that stay, in their order, and after them of some that do not.

    Args:
      stays: bool [B, T], True at no more than `room` tokens of a row.
      room: `K`, a static number, at most `T`.

    Returns:
      int [B, K], indices for `take`.
    """
    return jnp.argsort(~stays, axis=1, stable=True)[:, :room]


def take(array: Array, kept: Array, axis: int = 1) -> Array:
    """Takes tokens of what has a row for each token.

    Args:
      array: `[B, T, ...]`; positions [3, B, T] with `axis=2`, whose rows are on axis 1.
      kept: int [B, K] from `places`.
      axis: of the tokens; the axis before it is that of the rows.

    Returns:
      The array with K tokens.
    """
    shape = [1] * array.ndim
    shape[axis - 1], shape[axis] = kept.shape
    return jnp.take_along_axis(array, kept.reshape(shape), axis=axis)
