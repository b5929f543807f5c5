"""Rotary position embeddings."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array


def inverse_frequencies(rotary_dim: int, theta: float) -> np.ndarray:
    """Compute the angular frequencies `theta ** (-2i / rotary_dim)`.

    Args:
      rotary_dim: rotated dimensions of a head, `R`.
      theta: base of the frequencies.

    Returns:
      float32 [R / 2] in radians per position.
    """
    return (theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim)).astype(np.float32)


def angles(
    positions: Array, frequencies: Array | np.ndarray, mrope_section: tuple[int, ...] = ()
) -> Array:
    """Compute the angles by which pairs of dimensions rotate.

    Args:
      positions: [B, T] token positions, or [3, B, T] (time, height, width) with `mrope_section`.
      frequencies: [R / 2] angular frequencies.
      mrope_section: counts of frequencies per section; sections use time, height and width in
        turn.

    Returns:
      [B, T, R / 2] angles in radians.

    References:
      GLM-4.1V-Thinking, https://arxiv.org/abs/2507.01006 (three-dimensional rotary positions).
    """
    if not mrope_section:
        return positions.astype(jnp.float32)[..., None] * frequencies
    if positions.ndim == 2:
        positions = jnp.broadcast_to(positions, (3, *positions.shape))
    # Sections of frequencies use time, height and width in turn.
    row_of_frequency = np.repeat(np.arange(len(mrope_section)) % 3, mrope_section)
    chosen = jnp.moveaxis(positions[row_of_frequency], 0, -1)
    return chosen.astype(jnp.float32) * frequencies


def block_positions(
    rank: Array, placeholder: Array, valid: Array, grids: Sequence[tuple[int, int]]
) -> tuple[Array, Array]:
    """Compute positions (time, row, column) of a prompt with grids of image features.

    A text token advances all three by one. The features of an `r x c` grid share one time; their
    rows and columns count from that position. The next token continues `max(r, c)` later.

    Args:
      rank: int [B, T]; at a placeholder, the index of its feature in the order of `grids`.
      placeholder: bool [B, T], True at image features.
      valid: bool [B, T], False at padding. Padding has position 0 and does not advance.
      grids: (rows, columns) of the features of each image or temporal patch of a video.

    Returns:
      `(positions, following)`: int [3, B, T], and int [B], the position of the next token.

    References:
      GLM-4.1V-Thinking, https://arxiv.org/abs/2507.01006.
    """
    # Row and column of each feature in its grid. The last feature advances past the grid.
    row = np.concatenate([np.repeat(np.arange(r), c) for r, c in grids])
    column = np.concatenate([np.tile(np.arange(c), r) for r, c in grids])
    advance = np.concatenate([[0] * (r * c - 1) + [max(r, c)] for r, c in grids])
    inside = placeholder & valid
    index = jnp.clip(rank, 0, len(row) - 1)
    # Start of each token: the steps of all tokens before it.
    step = jnp.where(inside, jnp.asarray(advance)[index], 1) * valid
    start = jnp.cumsum(step, axis=1) - step
    offset = jnp.stack([jnp.zeros_like(index), jnp.asarray(row)[index], jnp.asarray(column)[index]])
    positions = jnp.where(valid, start + jnp.where(inside, offset, 0), 0)
    return positions, step.sum(axis=1)


def rotate_interleaved(x: Array, angle: Array) -> Array:
    """Rotate pairs (2i, 2i + 1) of the first `R` dimensions of each head.

    The other dimensions pass through unchanged.

    Args:
      x: [B, T, N, H] queries or keys.
      angle: [B, T, R / 2] angles in radians.

    Returns:
      [B, T, N, H].

    References:
      RoFormer, https://arxiv.org/abs/2104.09864.
    """
    # (a, b) -> (a cos - b sin, b cos + a sin)
    rotary_dim = 2 * angle.shape[-1]
    rotated, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    pairs = rotated.reshape(*rotated.shape[:-1], rotary_dim // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return jnp.concatenate([rotated.reshape(*x.shape[:-1], rotary_dim), passed], axis=-1)


def rotate_half(x: Array, angle: Array) -> Array:
    """Rotate pairs (i, i + R / 2) of the first `R` dimensions of each head.

    The other dimensions pass through unchanged.

    Args:
      x: [B, T, N, H] queries or keys.
      angle: [B, T, R / 2] angles in radians.

    Returns:
      [B, T, N, H].
    """
    # As in `rotate_interleaved`, with pairs formed from the two halves of the rotary dimensions.
    half = angle.shape[-1]
    first, second, passed = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, passed], -1)
