"""Ranges of activations for static int8 quantization, from a histogram of calibration values.

Letters: `n` bins of equal width between the lowest and the highest value, including zero.

References:
  8-bit Inference with TensorRT (entropy), GTC 2017;
  Integer Quantization for Deep Learning Inference, https://arxiv.org/abs/2004.09602.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

METHODS = ("minmax", "percentile", "mse", "entropy")
BINS = 2048
_LEVELS = 256
# Fractions of the observed range that "mse" tries, and count of widths that "entropy" tries.
_FRACTIONS = np.linspace(1.0, 1.0 / 32, 32)
_WIDTHS = 128
# Probability assigned to an empty bin of the quantized distribution.
_LEAST = 1e-6


@functools.partial(jax.jit, static_argnames="bins")
def histogram(
    rows: Array, low: Array, high: Array, valid: Array | None = None, bins: int = BINS
) -> Array:
    """Count values in bins of equal width.

    Args:
      rows: values of any shape.
      low: lower edge of the first bin, a scalar.
      high: upper edge of the last bin. Values outside count in the first or last bin.
      valid: bool in the shape of the first axis of `rows`, False at padding; None counts all.
      bins: count of bins.

    Returns:
      int32 [bins].
    """
    width = jnp.where(high > low, (high - low) / bins, 1.0)
    bin_index = jnp.clip((rows.reshape(-1) - low) / width, 0, bins - 1).astype(jnp.int32)
    if valid is None:
        return jnp.zeros(bins, jnp.int32).at[bin_index].add(1)
    counts = jnp.repeat(valid.astype(jnp.int32), rows.size // valid.size)
    return jnp.zeros(bins, jnp.int32).at[bin_index].add(counts)


def widened(low: float, high: float, symmetric: bool) -> tuple[float, float]:
    """Extend a range to include zero; a symmetric range has ends of equal magnitude."""
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    return low, high


def choose_range(
    counts: np.ndarray,
    low: float,
    high: float,
    method: str,
    percentile: float = 99.99,
    symmetric: bool = False,
) -> tuple[float, float]:
    """Choose the range of static int8 values.

    Args:
      counts: [n] values per bin.
      low: lower edge of the first bin, at most zero; `-high` for a symmetric range.
      high: upper edge of the last bin, at least zero.
      method: `minmax` spans all values; `percentile` excludes an equal share at both ends; `mse`
        minimizes the squared error; `entropy` minimizes the Kullback-Leibler divergence between
        observed and quantized values.
      percentile: percentage of the values within the range of `percentile`.
      symmetric: both ends have the same magnitude.

    Returns:
      `(low, high)`, including zero.
    """
    counts = np.asarray(counts, np.float64)
    if method == "minmax" or counts.sum() == 0 or high <= low:
        return low, high
    if method == "percentile":
        return _percentile(counts, low, high, percentile, symmetric)
    if method == "mse":
        return _least_squares(counts, low, high, symmetric)
    return _least_divergence(counts, low, high)


def int8_grid(low: float, high: float, symmetric: bool = False) -> tuple[np.float32, np.int8]:
    """Compute scale and zero point of int8 for a range that includes zero.

    Args:
      low: lower end, at most zero.
      high: upper end, at least zero.
      symmetric: uses zero point 0 and levels -127..127.

    Returns:
      `(scale, zero)`; an empty range has scale one.
    """
    if symmetric:
        return _float32_scale(max(-low, high) / 127), np.int8(0)
    scale = _float32_scale((high - low) / (_LEVELS - 1))
    return scale, np.int8(np.clip(np.round(-128 - low / np.float64(scale)), -128, 127))


def _float32_scale(scale: float) -> np.float32:
    return np.float32(max(scale, float(np.finfo(np.float32).tiny)) if scale else 1.0)


def _percentile(
    counts: np.ndarray, low: float, high: float, percentile: float, symmetric: bool
) -> tuple[float, float]:
    edges = np.linspace(low, high, len(counts) + 1)
    if symmetric:
        # Magnitudes: add each bin of the negative half to its mirror image.
        half = len(counts) // 2
        folded = counts[half:] + counts[:half][::-1]
        total = np.concatenate([[0.0], np.cumsum(folded)])
        end = float(np.interp(percentile / 100 * total[-1], total, edges[half:]))
        return -end, end
    total = np.concatenate([[0.0], np.cumsum(counts)])
    share = (100 - percentile) / 200
    ends = np.interp([share * total[-1], (1 - share) * total[-1]], total, edges)
    return widened(float(ends[0]), float(ends[1]), False)


def _least_squares(
    counts: np.ndarray, low: float, high: float, symmetric: bool
) -> tuple[float, float]:
    middles = low + (np.arange(len(counts)) + 0.5) * (high - low) / len(counts)
    best = (np.inf, low, high)
    for lower in _FRACTIONS if low < 0 and not symmetric else (1.0,):
        for upper in _FRACTIONS if high > 0 else (1.0,):
            ends = (low * (upper if symmetric else lower), high * upper)
            scale, zero = int8_grid(*ends, symmetric)
            codes = np.clip(np.round(middles / scale) + zero, -127 if symmetric else -128, 127)
            error = np.sum(counts * np.square(scale * (codes - zero) - middles))
            if error < best[0]:
                best = (error, *ends)
    return best[1:]


def _least_divergence(counts: np.ndarray, low: float, high: float) -> tuple[float, float]:
    bins = len(counts)
    middle = round(-low / (high - low) * bins)
    best = (np.inf, 0, bins)
    for width in np.linspace(min(_LEVELS, bins), bins, _WIDTHS):
        start = round(middle * (1 - width / bins))
        stop = min(bins, start + round(width))
        divergence = _divergence(counts, start, stop)
        if divergence < best[0]:
            best = (divergence, start, stop)
    edges = np.linspace(low, high, bins + 1)
    return widened(edges[best[1]], edges[best[2]], False)


def _divergence(counts: np.ndarray, start: int, stop: int) -> float:
    """Compute the divergence between values clipped to bins `start..stop` and their int8 codes."""
    # P: clipped values. Q: the mass of each int8 level, spread evenly over its occupied bins.
    inside = counts[start:stop]
    clipped = inside.copy()
    clipped[0] += counts[:start].sum()
    clipped[-1] += counts[stop:].sum()
    occupied = clipped > 0
    level = np.arange(len(inside)) * _LEVELS // len(inside)
    mass = np.bincount(level, inside, _LEVELS)
    sharing = np.bincount(level, occupied, _LEVELS)
    rounded = np.where(occupied, (mass / np.maximum(sharing, 1))[level], 0.0)
    p, q = clipped[occupied] / clipped.sum(), rounded[occupied] / max(rounded.sum(), 1.0)
    return float(np.sum(p * np.log(p / np.maximum(q, _LEAST))))
