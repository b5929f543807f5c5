"""Rounding of weights to codes and back, `w' = scale * (level - zero_point)`.

A scale is `[..., out, groups]`, one per group of neighbouring columns of a row, or `[..., 1, 1]`,
one per matrix. Zero points, if any, have the shape of the scales.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.kernels.packing import NF4_LEVELS

INTEGERS = {"int8": 8, "int6": 6, "int5": 5, "int4": 4, "int3": 3, "int2": 2}


def code_range(qtype: str) -> tuple[int, int]:
    """Returns the smallest and the largest code."""
    if qtype in INTEGERS:
        return -(2 ** (INTEGERS[qtype] - 1)), 2 ** (INTEGERS[qtype] - 1) - 1
    return (0, 15) if qtype == "nf4" else (-1, 1)


def smallest_scale(dtype: str) -> float:
    """Returns the smallest positive scale that a type can store.

    Args:
      dtype: `float32`, `float16` or `bfloat16`.

    Returns:
      The smallest subnormal float16, 2^-24; of other types the smallest normal value, since
      processors read subnormal float32 as zero.
    """
    info = jnp.finfo(dtype)
    return float(info.smallest_subnormal if dtype == "float16" else info.tiny)


@functools.partial(jax.jit, static_argnames="dtype", inline=True)
def round_scale(scale: Array, dtype: str) -> Array:
    """Rounds scales to the type in which they are stored, without making one zero.

    Args:
      scale: float32, of any shape and sign.
      dtype: to store them in.

    Returns:
      Scales in `dtype`. One below the range of the type becomes its smallest; a subnormal one is
      rounded up, so that it does not clip the weights that it spans. Zero stays zero.
    """
    info, smallest = jnp.finfo(dtype), smallest_scale(dtype)
    scale = scale.astype(jnp.float32)
    size = jnp.abs(scale)
    # Subnormal sizes become whole multiples of the smallest scale, rounded up.
    raised = jnp.maximum(jnp.ceil(size / smallest), 1.0) * smallest
    # XLA drops a cast to a narrow type and back; it does not drop this operation.
    rounded = jax.lax.reduce_precision(size, info.nexp, info.nmant)
    size = jnp.where(size < float(info.tiny), raised, rounded)
    return jnp.where(scale == 0, 0.0, jnp.where(scale < 0, -size, size)).astype(dtype)


@functools.partial(jax.jit, static_argnames="qtype", inline=True)
def quantize(weight: Array, scale: Array, zero: Array | None, qtype: str) -> Array:
    """Rounds each weight to the code of its nearest level.

    Args:
      weight: [..., out, in].
      scale: see the module's docstring.
      zero: None, or like `scale`.
      qtype: of the codes, see `glm_edge.kernels.packing`.

    Returns:
      int8 [..., out, in]; at scale zero, the code of level zero.
    """
    grouped, scale, zero = _by_group(weight.astype(jnp.float32), scale, zero)
    # w / s + z; a scale of zero marks a group of zeros.
    steps = jnp.where(scale == 0, 0.0, grouped / jnp.where(scale == 0, 1.0, scale))
    if zero is not None:
        steps = steps + zero
    return round_to_codes(steps.reshape(weight.shape), qtype)


def round_to_codes(steps: Array, qtype: str) -> Array:
    """Rounds weights in units of their scale to codes; int8 of the same shape."""
    if qtype == "nf4":
        # Levels of NF4 are not evenly spaced: count the midpoints below each weight.
        levels = jnp.asarray(NF4_LEVELS, jnp.float32)
        middles = (levels[1:] + levels[:-1]) / 2
        return jnp.searchsorted(middles, steps, method="compare_all").astype(jnp.int8)
    if qtype == "ternary34":
        fours = steps.reshape(*steps.shape[:-1], -1, 4)
        # 3:4 sparsity: of four weights the smallest becomes zero, the first one of equals; the
        # others become signs, even those that would round to zero.
        dropped = jnp.argmin(jnp.abs(fours), axis=-1, keepdims=True)
        signs = jnp.where(fours < 0, -1, 1)
        codes = jnp.where(jnp.arange(4) == dropped, 0, signs)
        return codes.reshape(steps.shape).astype(jnp.int8)
    low, high = code_range(qtype)
    return jnp.clip(jnp.round(steps), low, high).astype(jnp.int8)


def levels(codes: Array, qtype: str) -> Array:
    """Returns the level of each code: the code itself, or a float32 of `NF4_LEVELS`."""
    if qtype != "nf4":
        return codes
    return jnp.asarray(NF4_LEVELS, jnp.float32)[codes.astype(jnp.int32)]


def fake_quantize(weight: Array, scale: Array, zero: Array | None, qtype: str) -> Array:
    """Quantizes and dequantizes with a gradient that ignores the rounding where it does not clip.

    Args:
      weight: float32 [..., out, in].
      scale: float32, see the module's docstring; gradients reach it.
      zero: None, or like `scale`.
      qtype: of the codes.

    Returns:
      float32 [..., out, in].
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
    """Returns exactly `value`, with the gradient of `x`."""
    return jax.lax.stop_gradient(value) + (x - jax.lax.stop_gradient(x))


def dequantize(codes: Array, scale: Array, zero: Array | None, qtype: str) -> Array:
    """Reconstructs weights from codes, float32 [..., out, in]; arguments as in `quantize`."""
    return dequantize_levels(levels(codes, qtype), scale, zero)


def dequantize_levels(steps: Array, scale: Array, zero: Array | None = None) -> Array:
    """Computes `scale * (steps - zero)`, float32, of the levels of codes, [..., out, in]."""
    grouped, scale, zero = _by_group(steps.astype(jnp.float32), scale, zero)
    if zero is not None:
        grouped = grouped - zero
    return (grouped * scale).reshape(steps.shape)


def _by_group(values: Array, scale: Array, zero: Array | None) -> tuple[Array, Array, Array | None]:
    """Splits columns into groups, [..., out, groups, columns], beside float32 scales and zeros."""
    grouped = values.reshape(*values.shape[:-1], scale.shape[-1], -1)
    zero = None if zero is None else zero.astype(jnp.float32)[..., None]
    return grouped, scale.astype(jnp.float32)[..., None], zero
