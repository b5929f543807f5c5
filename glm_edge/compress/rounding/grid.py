"""The grid that a weight is rounded to, and rounding to the nearest level."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.kernels import grid as kernels
from glm_edge.params import Format
from glm_edge.params.formats import PER_TENSOR

SCALES = ("max", "extreme", "mse")
# Fractions of the largest magnitude that "mse" tries; 0.875 is 7/8, the whole range of int4.
_RATIOS = {8: np.linspace(1.0, 0.7, 13), 6: np.linspace(1.0, 0.6, 25), 4: np.linspace(1.0, 0.5, 41)}
_FEW_LEVELS = np.linspace(1.0, 0.2, 65)


class Grid(NamedTuple):
    """Scales and zero points, `f' = scale * (level - zero)`.

    Attributes:
      scale: as `Format.scale_shape` says, in the stored type.
      zero: None, or zero points like `scale` in their stored type.
    """

    scale: Array
    zero: Array | None = None


@functools.partial(jax.jit, static_argnames=("format", "scale"), inline=True)
def choose(weight: Array, format: Format, scale: str = "max") -> Grid:
    """Chooses the grid of a weight by its extremes or by the squared error it leaves.

    Args:
      weight: [..., out, in].
      format: type, grouping, symmetry, types of scales and zero points.
      scale: `max`, the largest magnitude lands on the largest level; `mse`, the fraction of it
        that gives the least squared error; `extreme`, the signed extreme lands on the lowest
        integer (symmetric only; scales may be negative).

    Returns:
      The grid. A group of zeros gets scale one, or zero where no code is level zero (`ternary34`).
      A scale below what its type holds becomes the smallest that the type holds.
    """
    groups = _grouped(weight.astype(jnp.float32), format)
    low, high = _extremes(groups, format.symmetric)
    if scale == "mse":
        ratio = _best_ratio(groups, low, high, format)
        low, high = low * ratio, high * ratio
    elif scale == "extreme":
        return Grid(_extreme(groups, format))
    return _spanning(low, high, format)


def encode(weight: Array, grid: Grid, format: Format) -> Array:
    """Codes of the nearest levels, int8 [..., out, in]."""
    return kernels.encode(weight, grid.scale, grid.zero, format.qtype)


def decode(codes: Array, grid: Grid, format: Format) -> Array:
    """Weights that codes stand for, float32 [..., out, in]."""
    return kernels.decode(codes, grid.scale, grid.zero, format.qtype)


@functools.partial(jax.jit, static_argnames=("format", "scale"))
def nearest(weight: Array, format: Format, scale: str = "max") -> tuple[Array, Grid]:
    """Rounds a weight to the nearest level of the grid that `choose` finds.

    Args:
      weight: [..., out, in].
      format: to round to.
      scale: see `choose`.

    Returns:
      `(codes, grid)`: int8 [..., out, in], and its grid.
    """
    weight = weight.astype(jnp.float32)
    grid = choose(weight, format, scale)
    return encode(weight, grid, format), grid


def _grouped(weight: Array, format: Format) -> Array:
    """[..., rows of scales, groups, weights that share a scale]."""
    scales = format.scale_shape(weight.shape)
    if format.group_size == PER_TENSOR:
        return weight.reshape(*scales, -1)
    return weight.reshape(*weight.shape[:-1], scales[-1], -1)


def _extremes(groups: Array, symmetric: bool) -> tuple[Array, Array]:
    if symmetric:
        high = jnp.max(jnp.abs(groups), axis=-1)
        return -high, high
    return jnp.minimum(groups.min(axis=-1), 0.0), jnp.maximum(groups.max(axis=-1), 0.0)


def _spanning(low: Array, high: Array, format: Format) -> Grid:
    """The grid whose lowest and highest levels lie at `low` and `high`."""
    lowest, highest = (-1, 1) if format.qtype == "nf4" else kernels.code_range(format.qtype)
    if format.symmetric:
        return Grid(_stored(high, highest, format))
    scale = _stored(high - low, highest - lowest, format)
    zero = lowest - low / scale.astype(jnp.float32)
    if format.zero_dtype == "int8":
        zero = jnp.clip(jnp.round(zero), lowest, highest)
    return Grid(scale, zero.astype(format.zero_dtype))


def _extreme(groups: Array, format: Format) -> Array:
    largest = jnp.argmax(jnp.abs(groups), axis=-1, keepdims=True)
    signed = jnp.take_along_axis(groups, largest, axis=-1)[..., 0]
    return _stored(signed, kernels.code_range(format.qtype)[0], format)


def _stored(span: Array, steps: int, format: Format) -> Array:
    """The scale under which `steps` levels reach as far as `span`, as it is stored."""
    # A quotient below the smallest number is zero; the span says whether the weights are.
    scale = jnp.where(span == 0, 0.0, jnp.sign(span) * _at_least_tiny(jnp.abs(span / steps)))
    return spared(kernels.held_scale(scale * (1 if steps > 0 else -1), format.scale_dtype), format)


def _at_least_tiny(size: Array) -> Array:
    return jnp.maximum(size, kernels.smallest_scale("float32"))


def spared(scale: Array, format: Format) -> Array:
    """Scales with one in place of zero, where a code of the format is level zero.

    No division needs a case of its own then. Three of four codes of `ternary34` are a sign, so that
    its groups of zeros keep the scale zero.
    """
    return scale if format.qtype == "ternary34" else jnp.where(scale == 0, 1, scale)


def normalized(values: Array, peak: Array) -> Array:
    """Values times the power of two that brings a peak near one; squares then stay in range.

    Args:
      values: float32.
      peak: at least zero, of a shape that fits `values`; where it is zero, nothing changes.
    """
    exponent = jnp.clip(jnp.frexp(jnp.where(peak > 0, peak, 1.0))[1], -126, 126)
    return values * jnp.ldexp(jnp.ones_like(peak), -exponent)


def _best_ratio(groups: Array, low: Array, high: Array, format: Format) -> Array:
    peak = jnp.maximum(-low, high)

    def error(ratio: Array) -> Array:
        grid = _spanning(low * ratio, high * ratio, format)
        # Each group as a row of its own: whatever shares a scale is rounded together.
        scale, zero = (None if x is None else x[..., None] for x in grid)
        codes = kernels.encode(groups, scale, zero, format.qtype)
        lost = kernels.decode(codes, scale, zero, format.qtype) - groups
        return jnp.sum(jnp.square(normalized(lost, peak[..., None])), axis=-1)

    def better(best: tuple[Array, Array], ratio: Array):
        found = error(ratio)
        less = found < best[0]
        return (jnp.where(less, found, best[0]), jnp.where(less, ratio, best[1])), None

    ratios = _RATIOS.get(kernels.INTEGERS.get(format.qtype), _FEW_LEVELS)
    start = (jnp.full(low.shape, jnp.inf), jnp.ones(low.shape, jnp.float32))
    return jax.lax.scan(better, start, jnp.asarray(ratios, jnp.float32))[0][1]
