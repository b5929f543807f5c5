"""Rounding weights to low-bit integers."""

import functools
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress.report import Report, Row
from glm_edge.compress.transform import (
    Context,
    Result,
    Transform,
    check_pattern,
    check_whole,
    register,
)
from glm_edge.errors import BoxError, RecipeError
from glm_edge.kernels import matmul
from glm_edge.params import Format, Quantized
from glm_edge.params.boxes import num_groups
from glm_edge.params.tree import Params

SCALES = ("max", "extreme", "mse")
# Fractions of the largest magnitude that "mse" tries; 0.875 is 7/8, the whole range of int4.
_CLIP_RATIOS = np.linspace(1.0, 0.5, 41).astype(np.float32)


def rtn(
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool = True,
    where: str | None = None,
    scale: str = "max",
    scale_dtype: str | None = None,
    fallback_bits: int | None = None,
    stacked: str | None = None,
) -> Transform:
    """Rounds weights to the nearest integer, `q = round(f / s + z)`, `f' = s (q - z)`.

    Symmetric scales have no zero point; affine grids span zero, which they hold exactly. A scale
    is rounded to its stored type before the integers are computed, and a group of zeros gets scale
    one. Zeros of a masked weight stay zero and its mask is dropped. Biases and norms are left.

    Args:
      bits: 8 or 4.
      group_size: columns (inputs) that share a scale; None for one scale a row (per channel).
      symmetric: False for affine, with an integer zero point.
      where: regular expression searched in each path; None rounds every matrix that is not yet
        quantized.
      scale: `max`, the largest magnitude lands on `2^(bits-1) - 1`; `mse`, the fraction of it, at
        least one half, that gives the least squared error; `extreme`, the signed extreme lands on
        `-2^(bits-1)` (symmetric only; scales may be negative, which phone kernels refuse).
      scale_dtype: `float32`, `float16` or `bfloat16`; None is float32 per channel and bfloat16 for
        groups.
      fallback_bits: per-channel width for a matrix whose columns are not whole groups; None raises
        there.
      stacked: regular expression of stock kernels whose first axis is a layer axis (`nn.scan`).

    Returns:
      The transform.

    Raises:
      RecipeError: an option has no meaning; on call, a pattern matches nothing or a quantized
        weight, columns are not whole groups, or weights are not finite.

    References:
      Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
      https://arxiv.org/abs/1712.05877.
    """
    check_pattern("quantize.rtn", "where", where)
    check_pattern("quantize.rtn", "stacked", stacked)
    check_whole("quantize.rtn", bits=bits, group_size=1 if group_size is None else group_size)
    if scale not in SCALES:
        raise RecipeError(f"quantize.rtn: scale must be one of {', '.join(SCALES)}, not {scale!r}")
    if scale == "extreme" and not symmetric:
        raise RecipeError("quantize.rtn: scale='extreme' is symmetric; affine takes max or mse")
    try:
        _format(bits, group_size, symmetric, scale_dtype)
        if fallback_bits is not None:
            _format(fallback_bits, None, symmetric, scale_dtype)
    except BoxError as error:
        raise RecipeError(f"quantize.rtn: {error}") from error
    options = {
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "where": where,
        "scale": scale,
        "scale_dtype": scale_dtype,
        "fallback_bits": fallback_bits,
        "stacked": stacked,
    }
    return Transform("quantize.rtn", options)


def _apply_rtn(
    model: nn.Module,
    params: Params,
    context: Context,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    where: str | None,
    scale: str,
    scale_dtype: str | None,
    fallback_bits: int | None,
    stacked: str | None,
) -> Result:
    wanted = _format(bits, group_size, symmetric, scale_dtype)
    fallback = fallback_bits and _format(fallback_bits, None, symmetric, None)
    has_layer_axis = re.compile(stacked or "(?!)").search
    formats = {
        path: _fitting(path, _columns(path, leaf.shape, has_layer_axis(path)), wanted, fallback)
        for path, leaf in _not_yet_quantized(params, where)
    }
    rows: list[Row] = []

    def convert(path: str, leaf: Any) -> Any:
        if path not in formats:
            return leaf
        format = formats[path]
        box, error = quantize_leaf(path, leaf, format, scale, bool(has_layer_axis(path)))
        rows.append(_row(path, leaf, box, error, format is not wanted))
        context.advance("quantize", len(rows), len(formats))
        return box

    rounded = boxes.map_with_path(convert, params)
    return model, rounded, Report.of(rows, params, rounded)


register("quantize.rtn", rtn, _apply_rtn)


def quantize_leaf(
    path: str, leaf: Any, format: Format, scale: str = "max", stacked: bool = False
) -> tuple[Quantized, float]:
    """Rounds one parameter.

    Args:
      path: of the parameter; a leaf named `kernel` is `[..., in, out]`, any other
        `[..., out, in]`.
      leaf: array or `Masked`.
      format: to store it in.
      scale: see `rtn`.
      stacked: a kernel's first axis is a layer axis.

    Returns:
      `(box, relative error)`.

    Raises:
      RecipeError: the weight is not finite, or its scales do not fit the format's scale type.
    """
    matrix, kernel_shape = _as_rows(path, leaf, stacked)
    integers, scales, zero, error = round_to_nearest(matrix, format, scale)
    if not np.isfinite(error) or not bool(jnp.isfinite(scales).all()):
        raise RecipeError(
            f"{path}: NaN or infinity in the weights, or scales beyond {format.scale_dtype}"
        )
    box = boxes.quantized(integers, scales, zero, format, kernel_shape, str(leaf_dtype(leaf)))
    return box, float(error)


@functools.partial(jax.jit, static_argnames=("format", "scale"))
def round_to_nearest(
    weight: Array, format: Format, scale: str = "max"
) -> tuple[Array, Array, Array | None, Array]:
    """Integers and scales of a matrix.

    Args:
      weight: [..., out, in].
      format: bits, grouping, symmetry, type of scales.
      scale: see `rtn`.

    Returns:
      `(integers, scale, zero, error)`: int8 [..., out, in]; [..., out, groups] in the stored type;
      int8 zero points like it, or None; and the relative error, a scalar.
    """
    weight = weight.astype(jnp.float32)
    groups = num_groups(weight.shape[-1], format)
    grouped = weight.reshape(*weight.shape[:-1], groups, -1)
    low, high = _extremes(grouped, format.symmetric)
    ratio = jnp.ones(low.shape, jnp.float32)
    if scale == "mse":
        ratio = _best_ratio(grouped, low, high, format)
    scales, zero = _grid(low * ratio, high * ratio, grouped, format, scale)
    integers = matmul.quantize(weight, scales, zero, format.bits)
    lost = matmul.dequantize(integers, scales, zero) - weight
    norm = jnp.linalg.norm(weight)
    error = jnp.where(norm == 0.0, 0.0, jnp.linalg.norm(lost) / norm)
    return integers, scales, zero, error


def _extremes(grouped: Array, symmetric: bool) -> tuple[Array, Array]:
    if symmetric:
        high = jnp.max(jnp.abs(grouped), axis=-1)
        return -high, high
    return jnp.minimum(grouped.min(axis=-1), 0.0), jnp.maximum(grouped.max(axis=-1), 0.0)


def _grid(
    low: Array, high: Array, grouped: Array, format: Format, scale: str
) -> tuple[Array, Array | None]:
    """Scale in its stored type, and zero point, of groups that span `low..high`."""
    half = 2 ** (format.bits - 1)
    if not format.symmetric:
        scales = _stored((high - low) / (2 * half - 1), format)
        zero = jnp.round(-half - low / scales.astype(jnp.float32))
        return scales, jnp.clip(zero, -half, half - 1).astype(jnp.int8)
    if scale == "extreme":
        largest = jnp.argmax(jnp.abs(grouped), axis=-1, keepdims=True)
        signed = jnp.take_along_axis(grouped, largest, axis=-1)[..., 0]
        return _stored(signed / -half, format), None
    return _stored(high / (half - 1), format), None


def _stored(scale: Array, format: Format) -> Array:
    scale = scale.astype(format.scale_dtype)
    return jnp.where(scale == 0, jnp.ones_like(scale), scale)


def _best_ratio(grouped: Array, low: Array, high: Array, format: Format) -> Array:
    def error(ratio: Array) -> Array:
        scales, zero = _grid(low * ratio, high * ratio, grouped, format, "max")
        flat = grouped.reshape(*grouped.shape[:-2], -1)
        integers = matmul.quantize(flat, scales, zero, format.bits)
        lost = matmul.dequantize(integers, scales, zero) - flat
        return jnp.sum(jnp.square(lost).reshape(grouped.shape), axis=-1)

    def better(best: tuple[Array, Array], ratio: Array):
        found = error(ratio)
        less = found < best[0]
        return (jnp.where(less, found, best[0]), jnp.where(less, ratio, best[1])), None

    start = (jnp.full(low.shape, jnp.inf), jnp.ones(low.shape, jnp.float32))
    return jax.lax.scan(better, start, jnp.asarray(_CLIP_RATIOS))[0][1]


def _format(bits: int, group_size: int | None, symmetric: bool, scale_dtype: str | None) -> Format:
    default = "bfloat16" if group_size else "float32"
    return Format(bits, group_size, symmetric, scale_dtype or default)


def _not_yet_quantized(params: Params, where: str | None) -> list[tuple[str, Any]]:
    leaves = dict(boxes.path_items(params))
    chosen = boxes.select(params, where)
    again = [path for path in chosen if isinstance(leaves[path], Quantized)]
    if where is not None and again:
        raise RecipeError(
            f"quantize.rtn: where={where!r} names {again[0]}, which is {leaves[again[0]].format} "
            "already; narrow the pattern"
        )
    return [(path, leaves[path]) for path in chosen if path not in again]


def _fitting(path: str, columns: int, wanted: Format, fallback: Format | None) -> Format:
    if wanted.group_size is None or columns % wanted.group_size == 0:
        return wanted
    if fallback:
        return fallback
    raise RecipeError(
        f"{path}: {columns} columns are not whole groups of {wanted.group_size}; choose a divisor, "
        "or fallback_bits=8 to round such a matrix per channel"
    )


def _columns(path: str, shape: tuple[int, ...], stacked: Any) -> int:
    if path.rsplit("/", 1)[-1] != "kernel":
        return shape[-1]
    return math.prod(shape[bool(stacked) : -1])


def _as_rows(path: str, leaf: Any, stacked: bool) -> tuple[Array, tuple[int, ...]]:
    """The dense weight as [..., out, in], and the kernel shape that undoes it."""
    weight = boxes.dense(leaf)
    if path.rsplit("/", 1)[-1] != "kernel":
        return weight, ()
    layers, kernel_shape = weight.shape[:stacked], weight.shape[stacked:]
    flat = weight.reshape(*layers, -1, weight.shape[-1])
    return jnp.swapaxes(flat, -1, -2), kernel_shape


def leaf_dtype(leaf: Any) -> Any:
    """Type of the dense weight of an array or `Masked`."""
    return leaf.value.dtype if isinstance(leaf, boxes.Masked) else leaf.dtype


def _row(path: str, before: Any, after: Quantized, error: float, fell_back: bool) -> Row:
    kept = float(before.mask.mean()) if isinstance(before, boxes.Masked) else 1.0
    action = f"{after.format}{' (fallback)' if fell_back else ''}"
    stored = boxes.stored_bytes(after)
    return Row(
        "quantize.rtn",
        path,
        action,
        kept,
        8 * stored / boxes.count(after),
        boxes.stored_bytes(before),
        stored,
        error,
    )
