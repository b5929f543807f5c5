"""Products of activations with a weight stored `[out, in]`: dense, bf16, and low-bit.

A low-bit weight is dequantized one block of rows at a time, into a buffer that stays in a core's
cache and is multiplied there: memory carries packed bytes only, without a dense copy. Codes that
share a byte are unpacked into separate arrays, which are multiplied with every second (fourth, ...)
column of the activations, since interleaving them costs more than the product.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from glm_edge.kernels import packing, quantization

FEW_ROWS = 4
SPLIT_ROWS = 32
BLOCK = 1 << 19
"""Weights dequantized at a time, 2 MB in float32."""


def dense(x: Array, weight: Array) -> Array:
    """Multiplies in full precision: `[..., in] x [out, in] -> [..., out]`."""
    return jax.lax.dot_general(
        x, weight, (((x.ndim - 1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )


@jax.custom_vjp
def matmul_bf16x3(x: Array, weight: Array) -> Array:
    """Multiplies few float32 rows with a bfloat16 weight, without a float32 copy of the weight.

    Each row is the exact sum of three bfloat16 rows, whose products with the weight are exact in
    float32, so the result is as accurate as that of a float32 weight and moves half the bytes.

    Args:
      x: float32 [..., in].
      weight: bfloat16 [out, in].

    Returns:
      float32 [..., out].
    """
    # x = x0 + x1 + x2: 24 bits of mantissa are three times the 8 of bfloat16.
    remainder, parts = x.reshape(-1, x.shape[-1]), []
    for _ in range(2):
        # XLA drops a cast to bfloat16 and back, which would leave no remainder.
        high = jax.lax.reduce_precision(remainder, exponent_bits=8, mantissa_bits=7)
        parts.append(high.astype(jnp.bfloat16))
        remainder = remainder - high
    parts.append(remainder.astype(jnp.bfloat16))
    # One product reads the weight once for all three parts.
    product = jax.lax.dot_general(
        weight,
        jnp.concatenate(parts),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    # Summed from the smallest part to the largest, so that small terms are not lost.
    terms = product.reshape(weight.shape[0], 3, -1)
    return (terms[:, 2] + terms[:, 1] + terms[:, 0]).T.reshape(*x.shape[:-1], -1)


def _matmul_bf16x3_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return matmul_bf16x3(x, weight), (x, weight)


def _matmul_bf16x3_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = saved
    _, vjp = jax.vjp(lambda x, weight: dense(x, weight.astype(x.dtype)), x, weight)
    return vjp(gradient)


matmul_bf16x3.defvjp(_matmul_bf16x3_forward, _matmul_bf16x3_backward)


@jax.custom_vjp
def dense_bf16(x: Array, weight: Array) -> Array:
    """Multiplies bfloat16 inputs with float32 accumulation, forward and backward."""
    return _bf16_dot(x, weight, (((x.ndim - 1,), (1,)), ((), ())))


def _bf16_dot(a: Array, b: Array, dimensions: Any) -> Array:
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _dense_bf16_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return dense_bf16(x, weight), (x, weight)


def _dense_bf16_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = saved
    rows = tuple(range(x.ndim - 1))
    x_gradient = _bf16_dot(gradient, weight, (((x.ndim - 1,), (0,)), ((), ())))
    weight_gradient = _bf16_dot(gradient, x, ((rows, rows), ((), ())))
    return x_gradient.astype(x.dtype), weight_gradient.astype(weight.dtype)


dense_bf16.defvjp(_dense_bf16_forward, _dense_bf16_backward)


def quantized_matmul(
    x: Array,
    data: Array,
    scale: Array,
    zero: Array | None = None,
    qtype: str = "int8",
    inputs: str = "float32",
) -> Array:
    """Multiplies with a quantized weight, `w' = scale * (level - zero)`.

    Args:
      x: [..., in] activations.
      data: packed codes [out, bytes], see `glm_edge.kernels.packing`; with `int8`, also levels of
        any type, [out, in].
      scale: [out, in / g], one per group of `g` columns.
      zero: None (symmetric), or zero points like `scale`.
      qtype: of the codes.
      inputs: type of the factors, `float32` or `bfloat16`; sums are float32.

    Returns:
      [..., out] of the type of `x`.
    """
    block = functools.partial(_dequantized_product, qtype=qtype, inputs=inputs)
    product = _by_blocks(block, x.reshape(-1, x.shape[-1]), data, scale, zero)
    return product.reshape(*x.shape[:-1], -1).astype(x.dtype)


def dynamic_int8_matmul(
    x: Array, data: Array, scale: Array, zero: Array | None = None, qtype: str = "int8"
) -> Array:
    """Multiplies rows rounded to int8 with a quantized weight, as dynamic kernels of phones do.

    With one scale per row of the weight, factors are int8 and sums are int32. Scales are applied
    afterwards, in the order of XNNPACK's `qd8` kernels, so that equal int8 rows give equal bits.
    Gradients pass straight through the rounding.

    Args:
      x: [..., in] activations.
      data: as in `quantized_matmul`.
      scale: [out, in / g].
      zero: None or zero points like `scale`.
      qtype: of the codes.

    Returns:
      [..., out] of the type of `x`.
    """
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    # x' = s_x (q_x - z_x), one scale and zero point per row; the centred integers are q_x - z_x.
    integers, offset, step = jax.lax.stop_gradient(rows_to_int8(flat))
    centred = quantization.straight_through(flat / step, integers - offset)
    product = _integer_product(centred, offset, step, data, scale, zero, qtype)
    return product.reshape(*x.shape[:-1], -1).astype(x.dtype)


def static_int8_matmul(
    x: Array,
    data: Array,
    scale: Array,
    zero: Array | None,
    input_scale: Array,
    input_zero: Array,
    qtype: str = "int8",
    output_scale: Array | None = None,
    output_zero: Array | None = None,
) -> Array:
    """Multiplies as `dynamic_int8_matmul`, with calibrated scales of activations and products.

    The order of the scales is that of XNNPACK's `qs8` kernels: sums are multiplied by one float32
    value per row of the weight, rounded to even, and clipped. Gradients pass straight through the
    rounding where it does not clip, and reach the scales as in learned step size quantization.

    Args:
      x: [..., in] activations.
      data: as in `quantized_matmul`.
      scale: as in `quantized_matmul`.
      zero: as in `quantized_matmul`.
      input_scale: scale of the activations, a scalar.
      input_zero: their int8 zero point.
      qtype: of the codes.
      output_scale: None, or the scale of the products, a scalar.
      output_zero: None, or their int8 zero point.

    Returns:
      [..., out] of the type of `x`.
    """
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    step = jnp.broadcast_to(input_scale.astype(jnp.float32), (flat.shape[0], 1))
    offset = jnp.broadcast_to(input_zero.astype(jnp.float32), step.shape)
    # Multiplied by the inverse, as XNNPACK does: a quotient may round to the neighbour.
    centred = _rounded(flat * (1.0 / step), offset)
    if output_scale is None or output_zero is None:
        product = _integer_product(centred, offset, step, data, scale, zero, qtype)
    else:
        # Requantization: sums times s_x s_w / s_y are products in units of s_y.
        output_step = output_scale.astype(jnp.float32)
        ratio = step[0] * scale.astype(jnp.float32) / output_step
        steps = _integer_product(centred, offset, jnp.ones_like(step), data, ratio, zero, qtype)
        product = _rounded(steps, output_zero.astype(jnp.float32)) * output_step
    return product.reshape(*x.shape[:-1], -1).astype(x.dtype)


def _rounded(steps: Array, zero: Array) -> Array:
    """Rounds to integers that are int8 once `zero` is added; gradients pass."""
    inside = jnp.clip(steps, -128.0 - zero, 127.0 - zero)
    return quantization.straight_through(inside, jnp.round(inside))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _integer_product(
    centred: Array,
    offset: Array,
    step: Array,
    data: Array,
    scale: Array,
    zero: Array | None,
    qtype: str,
) -> Array:
    """Computes `_centred_product` in integers where the weight has one scale per row.

    Args:
      centred: float32 [rows, in], integers; int8 once `offset` is added.
      offset: float32 [rows, 1], integers, `z_x`.
      step: float32 [rows, 1], `s_x`.
      data: as in `quantized_matmul`.
      scale: as in `quantized_matmul`.
      zero: as in `quantized_matmul`.
      qtype: as in `quantized_matmul`.

    Returns:
      float32 [rows, out].
    """
    if scale.shape[-1] > 1 or qtype == "nf4" or not jnp.issubdtype(data.dtype, jnp.integer):
        return _centred_product(centred, step, data, scale, zero, qtype)
    # Few rows are centred before the product, which exceeds int8. Of more rows the int8 integers
    # are multiplied, and the offset's share is subtracted afterwards.
    few = centred.shape[0] <= FEW_ROWS
    rows = (centred if few else centred + offset).astype(jnp.int32 if few else jnp.int8)
    offset = offset.astype(jnp.int32)
    sums = jnp.sum(centred, axis=-1, keepdims=True, dtype=jnp.int32)

    def block(x: Array, data: Array, scale: Array, zero: Array | None) -> Array:
        planes = packing.planes(data, x.shape[-1], qtype)
        total = _product(x, planes, x.dtype, jnp.int32)
        # sum (q_x - z_x) q_w = sum q_x q_w - z_x sum q_w
        if not few:
            total = total - offset * sum(jnp.sum(w, axis=-1, dtype=jnp.int32) for w in planes)
        # sum (q_x - z_x) (q_w - z_w) needs the sum of each row of activations too.
        if zero is not None:
            is_integer = jnp.issubdtype(zero.dtype, jnp.integer)
            total = total - sums * zero[:, 0].astype(jnp.int32 if is_integer else jnp.float32)
        return total.astype(jnp.float32) * step * scale[:, 0].astype(jnp.float32)

    return _by_blocks(block, rows, data, scale, zero)


def _centred_product(
    centred: Array, step: Array, data: Array, scale: Array, zero: Array | None, qtype: str
) -> Array:
    return quantized_matmul(centred, data, scale, zero, qtype) * step


def _integer_product_forward(
    centred: Array,
    offset: Array,
    step: Array,
    data: Array,
    scale: Array,
    zero: Array | None,
    qtype: str,
) -> tuple[Array, tuple]:
    saved = centred, offset, step, data, scale, zero
    return _integer_product(*saved, qtype), saved


def _integer_product_backward(qtype: str, saved: tuple, gradient: Array) -> tuple:
    centred, _, step, data, scale, zero = saved
    trained = zero if zero is not None and jnp.issubdtype(zero.dtype, jnp.floating) else None

    def product(centred: Array, step: Array, scale: Array, trained: Array | None) -> Array:
        points = zero if trained is None else trained
        return _centred_product(centred, step, data, scale, points, qtype)

    _, vjp = jax.vjp(product, centred, step, scale, trained)
    centred_gradient, step_gradient, scale_gradient, zero_gradient = vjp(gradient)
    return centred_gradient, None, step_gradient, None, scale_gradient, zero_gradient


_integer_product.defvjp(_integer_product_forward, _integer_product_backward)


def _by_blocks(block: Callable, x: Array, data: Array, scale: Array, zero: Array | None) -> Array:
    """Concatenates `block(x, data, scale, zero)`, float32 [rows, R], over blocks of R rows."""
    count = round(data.shape[0] * x.shape[-1] / BLOCK)
    # On a mesh the rows of a weight may be on several devices, which must not take turns.
    if count < 2 or not jax.sharding.get_abstract_mesh().empty:
        return block(x, data, scale, zero)
    size = data.shape[0] // count

    def run(x: Array, data: Array, scale: Array, zero: Array | None) -> Array:
        weight = data, scale, zero
        parts = jax.tree.map(lambda a: a[: count * size].reshape(count, size, -1), weight)
        # Dequantized again for the gradient, which would keep every block otherwise.
        step = jax.checkpoint(lambda part: block(x, *part), prevent_cse=False)
        product = jnp.moveaxis(jax.lax.map(step, parts), 0, 1).reshape(x.shape[0], -1)
        # A last block of fewer rows than the others.
        tail = jax.tree.map(lambda a: a[count * size :], weight)
        return jnp.concatenate([product, block(x, *tail)], axis=-1) if tail[0].size else product

    return jax.lax.platform_dependent(x, data, scale, zero, cpu=run, default=block)


def _dequantized_product(
    x: Array, data: Array, scale: Array, zero: Array | None, qtype: str, inputs: str
) -> Array:
    planes, row_scale = _dequantized_planes(data, scale, zero, qtype, x.shape[-1])
    product = _product(x.astype(jnp.float32), planes, inputs, jnp.float32)
    return product if row_scale is None else product * row_scale


def _product(x: Array, planes: list[Array], inputs: DTypeLike, sums: DTypeLike) -> Array:
    """Multiplies [rows, in] with the planes of a weight, see `packing.planes`.

    Args:
      x: [rows, in].
      planes: arrays [out, ceil(in / n)].
      inputs: type of the factors.
      sums: type of their sums.

    Returns:
      [rows, out].
    """
    count, width = len(planes), planes[0].shape[-1]
    x = jnp.pad(x, ((0, 0), (0, count * width - x.shape[-1])))
    # Plane i holds columns i, i + n, i + 2n, ...
    pairs = [(x[:, i::count], plane) for i, plane in enumerate(planes)]

    def multiplied(pairs: list[tuple[Array, Array]]) -> Array:
        total: Any = sum(dot(a.astype(inputs), w.astype(inputs), sums) for a, w in pairs)
        return total

    def reduced(pairs: list[tuple[Array, Array]]) -> Array:
        terms = sum(a[:, None].astype(sums) * w.astype(sums) for a, w in pairs)
        return jnp.sum(terms, axis=-1)

    if x.shape[0] > FEW_ROWS:
        return multiplied(pairs)
    # On a GPU, a reduction dequantizes as it reads; a product would write the weight first.
    return jax.lax.platform_dependent(pairs, cpu=multiplied, default=reduced)


def dot(x: Array, weight: Array, sums: DTypeLike) -> Array:
    """Multiplies with a separate type of the sums.

    Args:
      x: [rows, in].
      weight: [out, in] of the same type; int8 products are exact for up to 2^17 columns.
      sums: type of the sums and of the result.

    Returns:
      [rows, out].
    """
    return jax.lax.dot_general(
        x,
        weight,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=sums,
    )


def _dequantized_planes(
    data: Array, scale: Array, zero: Array | None, qtype: str, columns: int
) -> tuple[list[Array], Array | None]:
    """Dequantizes the planes of a weight; scales [out], if not None, are yet to be applied."""
    groups, planes = scale.shape[-1], packing.planes(data, columns, qtype)
    # One scale per row multiplies the product: one multiplication per output, not per weight.
    if groups == 1:
        levels = [quantization.levels(plane, qtype).astype(jnp.float32) for plane in planes]
        if zero is not None:
            levels = [level - zero.astype(jnp.float32) for level in levels]
        return levels, scale[:, 0].astype(jnp.float32)
    # Groups that planes would cut unevenly need columns in order.
    if columns // groups % len(planes):
        planes = [packing.unpack(data, columns, qtype)]
    return [quantization.dequantize(plane, scale, zero, qtype) for plane in planes], None


def round_rows_to_int8(x: Array) -> Array:
    """Quantizes each row with `rows_to_int8` and dequantizes it; [..., C] of the same type."""
    integers, zero, step = rows_to_int8(x)
    return ((integers - zero) * step).astype(x.dtype)


def rows_to_int8(x: Array) -> tuple[Array, Array, Array]:
    """Quantizes each row to affine int8, as dynamic kernels of phones do.

    The range spans the row's minimum, its maximum and zero, which is represented exactly.

    Args:
      x: [..., C] activations.

    Returns:
      `(integers, zero, step)`, all of the same type: [..., C] in -128..127, [..., 1], [..., 1].

    References:
      XNNPACK, `xnn_qd8_asymmetric_quantization_params`.
    """
    low = jnp.minimum(x.min(axis=-1, keepdims=True), 0.0)
    high = jnp.maximum(x.max(axis=-1, keepdims=True), 0.0)
    inverse = jnp.where(high == low, 1.0, 255.0 / (high - low))
    from_low, from_high = low * inverse, high * inverse
    # XNNPACK takes the zero point from the end of the range that rounds with the smaller error.
    nearer_low = (-128.0 + from_low) + (127.0 + from_high) > 0.0
    zero = jnp.where(nearer_low, -128.0 - from_low, 127.0 - from_high)
    zero = jnp.round(jnp.clip(zero, -128.0, 127.0))
    return jnp.clip(jnp.round(x * inverse) + zero, -128.0, 127.0), zero, 1.0 / inverse
