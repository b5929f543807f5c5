"""Quantization of weights to codes and back, `w' = scale * (level - zero_point)`.

Scales are `[..., out, groups]`, one per group of adjacent columns of a row, or `[..., 1, 1]`, one
per matrix. Optional zero points have the shape of the scales.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.kernels.packing import NF4_LEVELS

INTEGERS = {"int8": 8, "int6": 6, "int5": 5, "int4": 4, "int3": 3, "int2": 2}


def code_range(qtype: str) -> tuple[int, int]:
    """Return the smallest and the largest code."""
    if qtype in INTEGERS:
        return -(2 ** (INTEGERS[qtype] - 1)), 2 ** (INTEGERS[qtype] - 1) - 1
    return (0, 15) if qtype == "nf4" else (-1, 1)


def smallest_scale(dtype: str) -> float:
    """Return the smallest positive scale that a type can store.

    Args:
      dtype: `float32`, `float16` or `bfloat16`.

    Returns:
      The smallest subnormal float16, 2^-24. For other types, the smallest normal value, because
      processors read subnormal float32 as zero.
    """
    info = jnp.finfo(dtype)
    return float(info.smallest_subnormal if dtype == "float16" else info.tiny)


@functools.partial(jax.jit, static_argnames="dtype", inline=True)
def round_scale(scale: Array, dtype: str) -> Array:
    """Round scales to their stored type, without underflow to zero.

    Args:
      scale: float32 of any shape and sign.
      dtype: stored type, `float32`, `float16` or `bfloat16`.

    Returns:
      Scales in `dtype`. A scale below the range of the type becomes the smallest one. A subnormal
      scale is rounded up, so that it does not clip weights of its group. Zero stays zero.
    """
    info, smallest = jnp.finfo(dtype), smallest_scale(dtype)
    scale = scale.astype(jnp.float32)
    size = jnp.abs(scale)
    # Subnormal magnitudes become integer multiples of the smallest scale, rounded up.
    raised = jnp.maximum(jnp.ceil(size / smallest), 1.0) * smallest
    # XLA removes a cast to a narrow type and back; it does not remove this operation.
    rounded = jax.lax.reduce_precision(size, info.nexp, info.nmant)
    size = jnp.where(size < float(info.tiny), raised, rounded)
    return jnp.where(scale == 0, 0.0, jnp.where(scale < 0, -size, size)).astype(dtype)


@functools.partial(jax.jit, static_argnames="qtype", inline=True)
def quantize(weight: Array, scale: Array, zero: Array | None, qtype: str) -> Array:
    """Round each weight to the code of its nearest level.

    Args:
      weight: [..., out, in].
      scale: [..., out, groups] or [..., 1, 1].
      zero: None (symmetric), or zero points in the shape of `scale`.
      qtype: type of the codes, one of `glm_edge.kernels.packing.QTYPES`.

    Returns:
      int8 [..., out, in]; groups with scale zero receive the code of level zero.
    """
    grouped, scale, zero = _by_group(weight.astype(jnp.float32), scale, zero)
    # w / s + z; a scale of zero marks a group of zeros.
    steps = jnp.where(scale == 0, 0.0, grouped / jnp.where(scale == 0, 1.0, scale))
    if zero is not None:
        steps = steps + zero
    return round_to_codes(steps.reshape(weight.shape), qtype)


def round_to_codes(steps: Array, qtype: str) -> Array:
    """Round weights in units of their scale to codes.

    Args:
      steps: float32 `w / scale + zero`, of any shape; the last axis is a multiple of 4 for
        `ternary34`.
      qtype: type of the codes, one of `glm_edge.kernels.packing.QTYPES`.

    Returns:
      int8 codes in the same shape.
    """
    if qtype == "nf4":
        # Levels of NF4 are not evenly spaced: count the midpoints below each weight.
        levels = jnp.asarray(NF4_LEVELS, jnp.float32)
        middles = (levels[1:] + levels[:-1]) / 2
        return jnp.searchsorted(middles, steps, method="compare_all").astype(jnp.int8)
    if qtype == "ternary34":
        fours = steps.reshape(*steps.shape[:-1], -1, 4)
        # 3:4 sparsity: the smallest of four weights becomes zero (ties: the first). The others
        # become signs, including those that would round to zero.
        dropped = jnp.argmin(jnp.abs(fours), axis=-1, keepdims=True)
        signs = jnp.where(fours < 0, -1, 1)
        codes = jnp.where(jnp.arange(4) == dropped, 0, signs)
        return codes.reshape(steps.shape).astype(jnp.int8)
    low, high = code_range(qtype)
    return jnp.clip(jnp.round(steps), low, high).astype(jnp.int8)


def levels(codes: Array, qtype: str) -> Array:
    """Return the level of each code: the code itself, or a float32 value of `NF4_LEVELS`."""
    if qtype != "nf4":
        return codes
    return jnp.asarray(NF4_LEVELS, jnp.float32)[codes.astype(jnp.int32)]


def fake_quantize(weight: Array, scale: Array, zero: Array | None, qtype: str) -> Array:
    """Quantize and dequantize with straight-through gradients where codes are not clipped.

    Args:
      weight: float32 [..., out, in].
      scale: float32 [..., out, groups] or [..., 1, 1]; receives gradients.
      zero: None (symmetric), or zero points in the shape of `scale`.
      qtype: type of the codes, one of `glm_edge.kernels.packing.QTYPES`.

    Returns:
      float32 [..., out, in].

    References:
      Learned Step Size Quantization, https://arxiv.org/abs/1902.08153.
    """
    grouped, scale, zero = _by_group(weight, scale, zero)
    steps = jnp.where(scale == 0, 0.0, grouped / jnp.where(scale == 0, 1.0, scale))
    if zero is not None:
        steps = steps + zero
    # Forward: the nearest level. Backward: the identity within the range of codes, zero outside.
    codes = round_to_codes(jax.lax.stop_gradient(steps).reshape(weight.shape), qtype)
    rounded = levels(codes, qtype).astype(jnp.float32).reshape(steps.shape)
    low, high = (-1, 1) if qtype == "nf4" else code_range(qtype)
    rounded = straight_through(jnp.clip(steps, low, high), rounded)
    if zero is not None:
        rounded = rounded - zero
    return (rounded * scale).reshape(weight.shape)


def straight_through(x: Array, value: Array) -> Array:
    """Return exactly `value`, with the gradient of `x`.

    Args:
      x: array that receives the gradient.
      value: array in the same shape.

    Returns:
      `value`.

    References:
      Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation,
      https://arxiv.org/abs/1308.3432.
    """
    return jax.lax.stop_gradient(value) + (x - jax.lax.stop_gradient(x))


def dequantize(codes: Array, scale: Array, zero: Array | None, qtype: str) -> Array:
    """Dequantize codes.

    Args:
      codes: int8 [..., out, in].
      scale: [..., out, groups] or [..., 1, 1].
      zero: None (symmetric), or zero points in the shape of `scale`.
      qtype: type of the codes, one of `glm_edge.kernels.packing.QTYPES`.

    Returns:
      float32 [..., out, in].
    """
    return dequantize_levels(levels(codes, qtype), scale, zero)


def dequantize_levels(steps: Array, scale: Array, zero: Array | None = None) -> Array:
    """Compute `scale * (steps - zero)`.

    Args:
      steps: [..., out, in] levels of codes.
      scale: [..., out, groups] or [..., 1, 1].
      zero: None (symmetric), or zero points in the shape of `scale`.

    Returns:
      float32 [..., out, in].
    """
    grouped, scale, zero = _by_group(steps.astype(jnp.float32), scale, zero)
    if zero is not None:
        grouped = grouped - zero
    return (grouped * scale).reshape(steps.shape)


def _by_group(values: Array, scale: Array, zero: Array | None) -> tuple[Array, Array, Array | None]:
    """Split columns into groups, [..., out, groups, columns], with float32 scales and zeros."""
    grouped = values.reshape(*values.shape[:-1], scale.shape[-1], -1)
    zero = None if zero is None else zero.astype(jnp.float32)[..., None]
    return grouped, scale.astype(jnp.float32)[..., None], zero
