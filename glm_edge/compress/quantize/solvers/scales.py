"""Scales and zero points from extremes or from a search, and rounding with them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.kernels import quantization as kernels
from glm_edge.params import Format
from glm_edge.params.formats import PER_TENSOR

SCALES = ("max", "extreme", "mse", "fit")
# Fractions of the largest magnitude that "mse" tries; 0.875 is 7/8, the full range of int4.
_RATIOS = {8: np.linspace(1.0, 0.7, 13), 6: np.linspace(1.0, 0.6, 25), 4: np.linspace(1.0, 0.5, 41)}
_FEW_LEVELS = np.linspace(1.0, 0.2, 65)
# Smallest tried fraction of the range of "max", smaller for fewer levels.
_LEAST = {"int8": 0.9, "int6": 0.8, "int5": 0.7, "int4": 0.55, "int3": 0.4, "nf4": 0.6}
_LEAST_OF_FEW = 0.2
_COARSE, _FINE = 12, (-0.67, -0.33, 0.33, 0.67)
_COARSE_AFFINE = 6
# Alternations of "fit"; the paper observes convergence in about ten.
_FITTED = 10


class Grid(NamedTuple):
    """Scales and zero points, `f' = scale * (level - zero)`.

    Attributes:
      scale: scales in the shape of `Format.scale_shape`, in the stored type.
      zero: None, or zero points in the same shape, in their stored type.
    """

    scale: Array
    zero: Array | None = None

    def map(self, function: Callable[[Array], Array]) -> "Grid":
        """Apply a function to the scales, and to the zero points where there are any."""
        return Grid(function(self.scale), None if self.zero is None else function(self.zero))

    def where(self, choice: Array, other: "Grid") -> "Grid":
        """Take the entries of this grid where `choice` is True, and else those of `other`."""
        zero = None
        if self.zero is not None and other.zero is not None:
            zero = jnp.where(choice, self.zero, other.zero)
        return Grid(jnp.where(choice, self.scale, other.scale), zero)


@functools.partial(jax.jit, static_argnames=("format", "scale"), inline=True)
def choose(weight: Array, format: Format, scale: str = "max") -> Grid:
    """Choose scales and zero points of a weight by its extremes or by squared error.

    Args:
      weight: [..., out, in].
      format: type, grouping, symmetry, types of scales and zero points.
      scale: `max` maps the largest magnitude to the largest level; `mse` uses the fraction of it
        with the least squared error; `fit` starts there and alternates rounding with least squares;
        `extreme` maps the signed extreme to the lowest integer (symmetric only; scales may be
        negative).

    Returns:
      Scales and zero points. Groups of zeros have scale one, or zero without a code for level zero
      (`ternary34`). A scale below the range of its type becomes the smallest one of the type.

    References:
      PT2-LLM, whose iterative ternary fitting `fit` generalizes to every type,
      https://arxiv.org/abs/2510.03267.
    """
    groups = _grouped(weight.astype(jnp.float32), format)
    low, high = _extremes(groups, format.symmetric)
    if scale == "fit":
        return _fitted(groups, low, high, format)
    if scale == "mse":
        ratio = _best_ratio(groups, low, high, format)
        low, high = low * ratio, high * ratio
    elif scale == "extreme":
        return Grid(_extreme(groups, format))
    return _spanning(low, high, format)


def encode(weight: Array, grid: Grid, format: Format) -> Array:
    """Round weights to codes of the nearest levels, int8 [..., out, in]."""
    return kernels.quantize(weight, grid.scale, grid.zero, format.qtype)


def decode(codes: Array, grid: Grid, format: Format) -> Array:
    """Dequantize codes, float32 [..., out, in]."""
    return kernels.dequantize(codes, grid.scale, grid.zero, format.qtype)


@functools.partial(jax.jit, static_argnames=("format", "scale"))
def nearest(weight: Array, format: Format, scale: str = "max") -> tuple[Array, Grid]:
    """Round a weight to nearest with the scales of `choose`.

    Args:
      weight: [..., out, in].
      format: target format.
      scale: see `choose`.

    Returns:
      `(codes, grid)`: int8 [..., out, in], and its scales and zero points.
    """
    weight = weight.astype(jnp.float32)
    grid = choose(weight, format, scale)
    return encode(weight, grid, format), grid


def _grouped(weight: Array, format: Format) -> Array:
    """Split weights by scale, [..., rows of scales, groups, weights per scale]."""
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
    """Compute the grid with its lowest and highest levels at `low` and `high`."""
    lowest, highest = (-1, 1) if format.qtype == "nf4" else kernels.code_range(format.qtype)
    if format.symmetric:
        return Grid(_scale_of(high, highest, format))
    scale = _scale_of(high - low, highest - lowest, format)
    zero = lowest - low / scale.astype(jnp.float32)
    if format.zero_dtype == "int8":
        zero = jnp.clip(jnp.round(zero), lowest, highest)
    return Grid(scale, zero.astype(format.zero_dtype))


def _extreme(groups: Array, format: Format) -> Array:
    largest = jnp.argmax(jnp.abs(groups), axis=-1, keepdims=True)
    signed = jnp.take_along_axis(groups, largest, axis=-1)[..., 0]
    return _scale_of(signed, kernels.code_range(format.qtype)[0], format)


def _scale_of(span: Array, steps: int, format: Format) -> Array:
    """Compute the stored scale with `span = steps * scale`."""
    # A quotient can underflow to zero although the span is not zero.
    scale = jnp.where(span == 0, 0.0, jnp.sign(span) * _at_least_tiny(jnp.abs(span / steps)))
    return spared(kernels.round_scale(scale * (1 if steps > 0 else -1), format.scale_dtype), format)


def _at_least_tiny(size: Array) -> Array:
    return jnp.maximum(size, kernels.smallest_scale("float32"))


def spared(scale: Array, format: Format) -> Array:
    """Replace scales of zero by one, if the format has a code for level zero.

    Divisions by scales then need no special case. `ternary34` cannot represent four zeros by codes,
    so its groups of zeros keep the scale zero.
    """
    return scale if format.qtype == "ternary34" else jnp.where(scale == 0, 1, scale)


def normalized(values: Array, peak: Array) -> Array:
    """Scale values by a power of two, such that `peak` is near one and squares stay in range.

    Args:
      values: float32.
      peak: non-negative, broadcastable to `values`; zero leaves values unchanged.

    Returns:
      float32 in the shape of `values`.
    """
    exponent = jnp.clip(jnp.frexp(jnp.where(peak > 0, peak, 1.0))[1], -126, 126)
    return values * jnp.ldexp(jnp.ones_like(peak), -exponent)


def _best_ratio(groups: Array, low: Array, high: Array, format: Format) -> Array:
    peak = jnp.maximum(-low, high)

    def error(ratio: Array) -> Array:
        grid = _spanning(low * ratio, high * ratio, format)
        # Each group becomes a row, so that weights of one scale are rounded together.
        scale, zero = grid.map(lambda x: x[..., None])
        codes = kernels.quantize(groups, scale, zero, format.qtype)
        lost = kernels.dequantize(codes, scale, zero, format.qtype) - groups
        return jnp.sum(jnp.square(normalized(lost, peak[..., None])), axis=-1)

    def better(best: tuple[Array, Array], ratio: Array) -> tuple[tuple[Array, Array], None]:
        lost_by_ratio = error(ratio)
        less = lost_by_ratio < best[0]
        return (jnp.where(less, lost_by_ratio, best[0]), jnp.where(less, ratio, best[1])), None

    ratios = _RATIOS.get(kernels.INTEGERS.get(format.qtype, 0), _FEW_LEVELS)
    start = (jnp.full(low.shape, jnp.inf), jnp.ones(low.shape, jnp.float32))
    return jax.lax.scan(better, start, jnp.asarray(ratios, jnp.float32))[0][1]


def _fitted(groups: Array, low: Array, high: Array, format: Format) -> Grid:
    """Alternate rounding and least squares, and keep the best grid of each group.

    Affine formats start twice: from the grid of `mse`, and from a symmetric one around the mean.
    """
    peak = jnp.maximum(-low, high)
    ratio = _best_ratio(groups, low, high, format)
    starts = [_spanning(low * ratio, high * ratio, format)]
    if not format.symmetric:
        mean = jnp.mean(groups, axis=-1)
        centred = groups - mean[..., None]
        reach = jnp.max(jnp.abs(centred), axis=-1)
        symmetric = dataclasses.replace(format, symmetric=True)
        reach = reach * _best_ratio(centred, -reach, reach, symmetric)
        scale = _spanning(-reach, reach, symmetric).scale.astype(jnp.float32)
        starts.append(stored(Grid(scale, -mean / scale), format))

    def step(carry: tuple[Array, Grid, Grid], _: None) -> tuple[tuple[Array, Grid, Grid], None]:
        least, best, grid = carry
        wide = grid.map(lambda x: x[..., None])
        codes = kernels.quantize(groups, *wide, format.qtype)
        lost = normalized(kernels.dequantize(codes, *wide, format.qtype) - groups, peak[..., None])
        error = jnp.sum(jnp.square(lost), axis=-1)
        less = error < least
        levels = kernels.levels(codes, format.qtype).astype(jnp.float32)
        fitted = _least_squares(groups, levels, grid, format)
        return (jnp.where(less, error, least), grid.where(less, best), fitted), None

    least = jnp.full(low.shape, jnp.inf)
    best = starts[0]
    for grid in starts:
        (least, best, _), _ = jax.lax.scan(step, (least, best, grid), None, length=_FITTED)
    return best


def _least_squares(groups: Array, levels: Array, grid: Grid, format: Format) -> Grid:
    """Fit scales, and zero points if any, to weights with fixed levels, [..., columns] each."""
    power, along = (jnp.sum(levels * x, axis=-1) for x in (levels, groups))
    if grid.zero is not None:
        sums = power, jnp.sum(levels, axis=-1), jnp.float32(levels.shape[-1])
        return fit_pair(sums, (along, jnp.sum(groups, axis=-1)), grid.scale, format)
    scale = along / jnp.where(power > 0, power, jnp.inf)
    return stored(Grid(jnp.where(scale > 0, scale, grid.scale.astype(jnp.float32))), format)


def fit_pair(
    sums: tuple[Array, Array, Array], right: tuple[Array, Array], scale: Array, format: Format
) -> Grid:
    """Fit the scale `a` and the offset `m` of `a T + m` to a target `w` by least squares.

    The squared error is `(w - a T - m)^T S (w - a T - m)`: that of weights with the identity as
    `S`, that of outputs with a Gram matrix.

    Args:
      sums: `T^T S T`, `T^T S 1` and `1^T S 1` of levels `T` and a positive definite `S`.
      right: `T^T S w` and `1^T S w`.
      scale: scale that is kept if all levels are equal, or if the fitted scale is not positive.
      format: affine format.

    Returns:
      The stored grid, with the zero point `-m / a`. The zero point is fitted to the stored scale.

    References:
      PT2-LLM (its two closed forms), https://arxiv.org/abs/2510.03267.
    """
    power, cross, weight = sums
    # Eliminating m leaves one equation in a; its curvature vanishes if all levels are equal.
    slope = cross / weight
    curvature, gain = power - slope * cross, right[0] - slope * right[1]
    varied = (curvature > 1e-5 * power) & (gain > 0)
    fitted = jnp.where(varied, gain / jnp.where(varied, curvature, 1.0), scale.astype(jnp.float32))
    wide = stored(Grid(fitted), format).scale.astype(jnp.float32)
    return stored(Grid(wide, (cross - right[1] / wide) / weight), format)


def stored(grid: Grid, format: Format) -> Grid:
    """Round float32 scales and zero points to their stored types; integer ones to a level."""
    scale = spared(kernels.round_scale(grid.scale, format.scale_dtype), format)
    if grid.zero is None:
        return Grid(scale)
    zero = grid.zero
    if format.zero_dtype == "int8":
        zero = jnp.clip(jnp.round(zero), *kernels.code_range(format.qtype))
    return Grid(scale, zero.astype(format.zero_dtype))


def per_group_format(format: Format) -> Format:
    """Return the format of a single group."""
    size = PER_TENSOR if format.group_size == PER_TENSOR else None
    return dataclasses.replace(format, group_size=size)


def nearest_columns(weight: Array, grid: Grid, format: Format) -> Array:
    """Round weights [columns, out] with one scale per output, [out], and dequantize them."""
    grid = grid.map(lambda x: x[:, None])
    return decode(encode(weight.T, grid, format), grid, format).T


def search_scale(weight: Array, format: Format, scale: str, loss: Callable[[Grid], Array]) -> Grid:
    """Search the scale of a group with the smallest loss.

    Args:
      weight: [columns, out], one group per output.
      format: target format.
      scale: `max` and `fit` for no search, `mse` for fractions of `max`, `extreme` for both signs
        too.
      loss: function of a grid [out] that returns losses [out].

    Returns:
      The grid, [out] in the stored types; all entries are equal for one scale per matrix.
    """
    group_format = per_group_format(format)
    if scale == "fit":
        fitted = choose(weight.T, group_format, "fit")
        return fitted.map(lambda x: jnp.broadcast_to(x[:, 0], weight.shape[1:]))
    # Four values per output, the minimum for ternary34; `choose` reads only the extremes.
    ends = jnp.stack([weight.min(axis=0), weight.max(axis=0)] * 2, axis=-1)

    def grid_of(ratio: Array) -> Grid:
        """Build a grid from ratios [2] or [2, out] of both ends; negative ones flip the sign."""
        lower, upper = jnp.broadcast_to(ratio.reshape(2, -1), (2, ends.shape[0]))
        shrunk = ends * jnp.abs(jnp.stack([lower, upper] * 2, axis=-1))
        candidate = choose(shrunk, group_format, "max")
        scale, zero = candidate.map(lambda x: jnp.broadcast_to(x[:, 0], ends.shape[:1]))
        return Grid(jnp.where(lower < 0, -scale, scale), zero)

    if scale == "max":
        return grid_of(jnp.ones(2))

    # A coarse search over all ratios, then a fine one around the best ratio of each output, in one
    # loop, so that `loss` is compiled once.
    coarse, step = _candidate_ratios(format, scale == "extreme")
    fine = (1.0 + step * jnp.asarray(_FINE, jnp.float32))[:, None]
    factors = jnp.concatenate([jnp.asarray(coarse), jnp.broadcast_to(fine, (len(_FINE), 2))])

    def better(
        carry: tuple[Array, Array, Array], tried: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array, Array], None]:
        least, best, center = carry
        index, factor = tried
        center = jnp.where(index == len(coarse), best, center)
        ratio = center * factor[:, None]
        candidate = loss(grid_of(ratio))
        less = candidate < least
        return (jnp.where(less, candidate, least), jnp.where(less, ratio, best), center), None

    ones = jnp.ones((2, ends.shape[0]))
    start = (jnp.full(ends.shape[:1], jnp.inf), ones, ones)
    return grid_of(jax.lax.scan(better, start, (jnp.arange(len(factors)), factors))[0][1])


def _candidate_ratios(format: Format, both_signs: bool) -> tuple[np.ndarray, float]:
    """List pairs of ratios [K, 2], and the relative step between adjacent ratios."""
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
