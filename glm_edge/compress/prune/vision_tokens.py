"""Dropping vision tokens before (or within) the decoder, with static shapes.

A prompt holds a placeholder for each feature of an image. Once features stand there, the least
useful are taken out of the sequence, with the positions of those that stay: the decoder then runs
on fewer tokens. Letters: `B` rows, `T` tokens, `D` hidden size.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.errors import DataError, RecipeError


def norm_scores(x: Array) -> Array:
    """Euclidean norm of each token, [B, T] of [B, T, D]."""
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


def attention_scores(weights: Array, placeholder: Array) -> Array:
    """Mean attention that each token receives from the tokens of the text.

    Args:
      weights: `[B, ..., T, T]` attention weights of a layer, by heads between, queries before keys,
        as the decoder sows them in the collection `attention`.
      placeholder: bool [B, T], True at vision tokens.

    Returns:
      [B, T].

    References:
      An Image is Worth 1/2 Tokens After Layer 2 (FastV), https://arxiv.org/abs/2403.06764.
    """
    asks = (~placeholder).astype(jnp.float32)
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


def kept_tokens(scores: Array, placeholder: Array, drop: int) -> Array:
    """Places of the tokens that stay when the lowest vision tokens of each row go.

    Args:
      scores: [B, T]; only those of vision tokens are read. Of equals the first go.
      placeholder: bool [B, T], True at vision tokens.
      drop: vision tokens that each row loses, a static number.

    Returns:
      int [B, T - drop], ascending: indices for `take`.

    Raises:
      RecipeError: `drop` is no number of tokens.
      DataError: a row has fewer vision tokens (noticed outside of jit only; within, its other
        tokens would go).
    """
    if not isinstance(drop, int) or isinstance(drop, bool) or not 0 <= drop < scores.shape[1]:
        raise RecipeError(
            f"vision tokens: drop must be a whole number below {scores.shape[1]}, not {drop!r}"
        )
    if not isinstance(placeholder, jax.core.Tracer):
        fewest = int(np.asarray(placeholder).sum(axis=1).min(initial=scores.shape[1]))
        if fewest < drop:
            raise DataError(
                f"vision tokens: a row has {fewest}, so {drop} cannot go; drop as many of each row"
            )
    order = jnp.argsort(jnp.where(placeholder, scores, jnp.inf), axis=1, stable=True)
    return jnp.sort(order[:, drop:], axis=1)


def take(array: Array, kept: Array, axis: int = 1) -> Array:
    """Takes the tokens that stay of what has a row for each token.

    Args:
      array: `[B, T, ...]`; positions [3, B, T] with `axis=2`, whose rows are on axis 1.
      kept: int [B, K] from `kept_tokens`.
      axis: of the tokens; the axis before it is that of the rows.

    Returns:
      The array with K tokens.
    """
    shape = [1] * array.ndim
    shape[axis - 1], shape[axis] = kept.shape
    return jnp.take_along_axis(array, kept.reshape(shape), axis=axis)
