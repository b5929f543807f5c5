"""Scales to try for the weights that share one, and the best of them by a loss."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.compress.rounding import grid as grids
from glm_edge.compress.rounding.grid import Grid
from glm_edge.params import Format
from glm_edge.params.formats import PER_TENSOR

# Smallest fraction of the range that "max" spans that is tried; the fewer levels, the smaller.
_LEAST = {"int8": 0.9, "int6": 0.8, "int5": 0.7, "int4": 0.55, "int3": 0.4, "nf4": 0.6}
_LEAST_OF_FEW = 0.2
_COARSE, _FINE = 12, (-0.67, -0.33, 0.33, 0.67)
_COARSE_AFFINE = 6


def per_column(format: Format) -> Format:
    """The format of one group alone."""
    size = PER_TENSOR if format.group_size == PER_TENSOR else None
    return dataclasses.replace(format, group_size=size)


def nearest(weight: Array, grid: Grid, format: Format) -> Array:
    """Weights [columns, out] rounded to the grid [out] of their row."""
    grid = Grid(*(None if x is None else x[:, None] for x in grid))
    return grids.decode(grids.encode(weight.T, grid, format), grid, format).T


def best(weight: Array, format: Format, scale: str, loss: Callable[[Grid], Array]) -> Grid:
    """The scale, of those tried, that loses least.

    Args:
      weight: [columns, out], each row of results a group.
      format: to round to.
      scale: `max`, or `mse` for fractions of it, or `extreme` for both signs too.
      loss: [out] of a grid [out].

    Returns:
      The grid, [out] in the stored types; equal everywhere for one scale a matrix.
    """
    own = per_column(format)
    # Fours, since ternary34 has no fewer; only their extremes are read.
    ends = jnp.stack([weight.min(axis=0), weight.max(axis=0)] * 2, axis=-1)

    def grid_of(ratio: Array) -> Grid:
        """Ratios [2 or 2, out] of the lower and of the upper end; a negative one turns the sign."""
        lower, upper = jnp.broadcast_to(ratio.reshape(2, -1), (2, ends.shape[0]))
        shrunk = ends * jnp.abs(jnp.stack([lower, upper] * 2, axis=-1))
        found = grids.choose(shrunk, own, "max")
        scale, zero = (
            None if x is None else jnp.broadcast_to(x[:, 0], ends.shape[:1]) for x in found
        )
        return Grid(jnp.where(lower < 0, -scale, scale), zero)

    if scale == "max":
        return grid_of(jnp.ones(2))

    def better(held: tuple[Array, Array], ratio: Array):
        found = loss(grid_of(ratio))
        less = found < held[0]
        ratio = jnp.broadcast_to(ratio.reshape(2, -1), held[1].shape)
        return (jnp.where(less, found, held[0]), jnp.where(less, ratio, held[1])), None

    start = (jnp.full(ends.shape[:1], jnp.inf), jnp.ones((2, ends.shape[0])))
    coarse, step = _ratios(format, scale == "extreme")
    held = jax.lax.scan(better, start, jnp.asarray(coarse))[0]
    near = held[1] * (1.0 + step * jnp.asarray(_FINE, jnp.float32)[:, None, None])
    return grid_of(jax.lax.scan(better, held, near)[0][1])


def _ratios(format: Format, both_signs: bool) -> tuple[np.ndarray, float]:
    """Pairs of ratios [K, 2], and the step between two of them, relative."""
    least = _LEAST.get(format.qtype, _LEAST_OF_FEW)
    if format.symmetric:
        ratios = np.geomspace(1.0, least, _COARSE, dtype=np.float32)
        step = 1.0 - float(ratios[1])
        pairs = np.stack([ratios, ratios], axis=-1)
        return (np.concatenate([pairs, -pairs]) if both_signs else pairs), step
    ratios = np.geomspace(1.0, least, _COARSE_AFFINE, dtype=np.float32)
    lower, upper = np.meshgrid(ratios, ratios)
    pairs = np.stack([lower.ravel(), upper.ravel()], axis=-1)
    return pairs, 1.0 - float(ratios[1])
