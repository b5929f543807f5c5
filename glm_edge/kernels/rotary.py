"""Rotary position embeddings."""

import jax.numpy as jnp
import numpy as np
from jax import Array


def inverse_frequencies(rotary_dim: int, theta: float) -> np.ndarray:
    """Returns the `rotary_dim / 2` angular frequencies, `theta ** (-2i / rotary_dim)`."""
    return (theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim)).astype(np.float32)


def angles(positions: Array, frequencies: Array, mrope_section: tuple[int, ...] = ()) -> Array:
    """Angles by which each pair of dimensions turns.

    Args:
      positions: [B, T] token positions, or [3, B, T] (time, height, width) with `mrope_section`.
      frequencies: [R / 2] angular frequencies.
      mrope_section: numbers of frequencies that follow each row of `positions` in turn.

    Returns:
      [B, T, R / 2] angles in radians.

    References:
      GLM-4.1V-Thinking, https://arxiv.org/abs/2507.01006 (three-dimensional rotary positions).
    """
    if not mrope_section:
        return positions.astype(jnp.float32)[..., None] * frequencies
    if positions.ndim == 2:
        positions = jnp.broadcast_to(positions, (3, *positions.shape))
    row_of_frequency = np.repeat(np.arange(len(mrope_section)) % 3, mrope_section)
    chosen = jnp.moveaxis(positions[row_of_frequency], 0, -1)
    return chosen.astype(jnp.float32) * frequencies


def rotate_interleaved(x: Array, angle: Array) -> Array:
    """Turns pairs (2i, 2i + 1) of the first `R` dimensions of each head; the rest pass through.

    Args:
      x: [B, T, N, H] queries or keys.
      angle: [B, T, R / 2] angles in radians.

    Returns:
      [B, T, N, H].

    References:
      RoFormer, https://arxiv.org/abs/2104.09864.
    """
    rotary_dim = 2 * angle.shape[-1]
    turned, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    pairs = turned.reshape(*turned.shape[:-1], rotary_dim // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return jnp.concatenate([turned.reshape(*x.shape[:-1], rotary_dim), passed], axis=-1)


def rotate_half(x: Array, angle: Array) -> Array:
    """Turns pairs (i, i + R / 2) of the first `R` dimensions of each head.

    Args:
      x: [B, T, N, H] queries or keys.
      angle: [B, T, R / 2] angles in radians.

    Returns:
      [B, T, N, H].
    """
    half = angle.shape[-1]
    first, second, passed = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, passed], -1)
