"""Grids that weights are rounded to: `f' = scale * (level - zero)`, a scale for each group.

A scale is `[..., out, groups]`, one for each group of neighbouring columns of a row, or
`[..., 1, 1]`, one for a matrix.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.kernels.packing import NF4_LEVELS

INTEGERS = {"int8": 8, "int6": 6, "int5": 5, "int4": 4, "int3": 3, "int2": 2}


def code_range(qtype: str) -> tuple[int, int]:
    """Smallest and largest code."""
    if qtype in INTEGERS:
        return -(2 ** (INTEGERS[qtype] - 1)), 2 ** (INTEGERS[qtype] - 1) - 1
    return (0, 15) if qtype == "nf4" else (-1, 1)


def smallest_scale(dtype: str) -> float:
    """The smallest positive scale that a type holds.

    Args:
      dtype: `float32`, `float16` or `bfloat16`.

    Returns:
      Of float16 the smallest subnormal number, 2^-24. Of the others the smallest normal one, since
      processors read subnormal float32 as zero.
    """
    info = jnp.finfo(dtype)
    return float(info.smallest_subnormal if dtype == "float16" else info.tiny)


@functools.partial(jax.jit, static_argnames="dtype", inline=True)
def held_scale(scale: Array, dtype: str) -> Array:
    """Rounds scales to the type in which they are stored, so that none becomes zero.

    Args:
      scale: float32, of any shape and sign.
      dtype: to store them in.

    Returns:
      Scales in `dtype`. One below what the type holds becomes the smallest; a subnormal one is
      rounded up, so that it does not clip the weights that it spans. Zero stays zero.
    """
    info, smallest = jnp.finfo(dtype), smallest_scale(dtype)
    scale = scale.astype(jnp.float32)
    size = jnp.abs(scale)
    raised = jnp.maximum(jnp.ceil(size / smallest), 1.0) * smallest
    # A cast there and back is what a compiler may leave out; this is not.
    rounded = jax.lax.reduce_precision(size, info.nexp, info.nmant)
    size = jnp.where(size < float(info.tiny), raised, rounded)
    return jnp.where(scale == 0, 0.0, jnp.where(scale < 0, -size, size)).astype(dtype)


@functools.partial(jax.jit, static_argnames="qtype", inline=True)
def encode(weight: Array, scale: Array, zero: Array | None, qtype: str) -> Array:
    """Code of the level nearest to each weight.

    Args:
      weight: [..., out, in].
      scale: see the module's docstring.
      zero: None, or like `scale`.
      qtype: of the codes, see `glm_edge.kernels.packing`.

    Returns:
      int8 [..., out, in]; at scale zero, the code of level zero.
    """
    grouped, scale, zero = _by_group(weight.astype(jnp.float32), scale, zero)
    steps = jnp.where(scale == 0, 0.0, grouped / jnp.where(scale == 0, 1.0, scale))
    if zero is not None:
        steps = steps + zero
    return nearest_code(steps.reshape(weight.shape), qtype)


def nearest_code(steps: Array, qtype: str) -> Array:
    """Code of the level nearest to a weight in units of its scale; int8 of the same shape."""
    if qtype == "nf4":
        levels = jnp.asarray(NF4_LEVELS, jnp.float32)
        middles = (levels[1:] + levels[:-1]) / 2
        return jnp.searchsorted(middles, steps, method="compare_all").astype(jnp.int8)
    if qtype == "ternary34":
        fours = steps.reshape(*steps.shape[:-1], -1, 4)
        # The first of equals is zero, whatever else rounds there.
        dropped = jnp.argmin(jnp.abs(fours), axis=-1, keepdims=True)
        signs = jnp.where(fours < 0, -1, 1)
        codes = jnp.where(jnp.arange(4) == dropped, 0, signs)
        return codes.reshape(steps.shape).astype(jnp.int8)
    low, high = code_range(qtype)
    return jnp.clip(jnp.round(steps), low, high).astype(jnp.int8)


def levels(codes: Array, qtype: str) -> Array:
    """Level of each code: itself, or a float32 one of `NF4_LEVELS`."""
    if qtype != "nf4":
        return codes
    return jnp.asarray(NF4_LEVELS, jnp.float32)[codes.astype(jnp.int32)]


def straight_through(weight: Array, scale: Array, zero: Array | None, qtype: str) -> Array:
    """`decode(encode(weight))` whose gradient ignores the rounding where it does not clip.

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
    codes = nearest_code(jax.lax.stop_gradient(steps).reshape(weight.shape), qtype)
    reached = levels(codes, qtype).astype(jnp.float32).reshape(steps.shape)
    low, high = (-1, 1) if qtype == "nf4" else code_range(qtype)
    reached = with_gradient_of(jnp.clip(steps, low, high), reached)
    if zero is not None:
        reached = reached - zero
    return (reached * scale).reshape(weight.shape)


def with_gradient_of(x: Array, value: Array) -> Array:
    """`value`, exactly, with the gradient of `x`."""
    return jax.lax.stop_gradient(value) + (x - jax.lax.stop_gradient(x))


def decode(codes: Array, scale: Array, zero: Array | None, qtype: str) -> Array:
    """Weights that codes stand for, float32 [..., out, in]; arguments as in `encode`."""
    return dequantize(levels(codes, qtype), scale, zero)


def dequantize(steps: Array, scale: Array, zero: Array | None = None) -> Array:
    """`scale * (steps - zero)`, float32; `steps` are the levels of codes, [..., out, in]."""
    grouped, scale, zero = _by_group(steps.astype(jnp.float32), scale, zero)
    if zero is not None:
        grouped = grouped - zero
    return (grouped * scale).reshape(steps.shape)


def _by_group(values: Array, scale: Array, zero: Array | None) -> tuple[Array, Array, Array | None]:
    """[..., out, groups, columns], with scale and zero point in float32 beside it."""
    grouped = values.reshape(*values.shape[:-1], scale.shape[-1], -1)
    zero = None if zero is None else zero.astype(jnp.float32)[..., None]
    return grouped, scale.astype(jnp.float32)[..., None], zero
