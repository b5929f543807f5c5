"""Products of activations with a weight stored `[out, in]`: dense, bfloat16, and low-bit.

The kernels dequantize a low-bit weight one block of rows at a time. The block stays in a core's
cache for the product, so that only packed bytes cross the memory bus. Codes that share a byte are
unpacked into separate arrays, because interleaving them costs more than the product. Each array
multiplies every second (fourth, ...) column of the activations.
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
    """Multiply in full precision.

    Args:
      x: [..., in] activations.
      weight: [out, in] of the same type.

    Returns:
      [..., out].
    """
    return jax.lax.dot_general(
        x, weight, (((x.ndim - 1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )


@jax.custom_vjp
def matmul_bf16x3(x: Array, weight: Array) -> Array:
    """Multiply few float32 rows with a bfloat16 weight, without a float32 copy of the weight.

    Each row is the exact sum of three bfloat16 rows, and their products with the weight are exact
    in float32. The result is as accurate as with a float32 weight and reads half the bytes.

    Args:
      x: float32 [..., in].
      weight: bfloat16 [out, in].

    Returns:
      float32 [..., out].
    """
    # x = x0 + x1 + x2: 24 bits of mantissa are three times the 8 of bfloat16.
    remainder, parts = x.reshape(-1, x.shape[-1]), []
    for _ in range(2):
        # XLA removes a cast to bfloat16 and back, which would make every remainder zero.
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
    # The sum runs from the smallest part to the largest, so that small terms are not lost.
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
    """Multiply in bfloat16 with float32 accumulation, forward and backward.

    Args:
      x: [..., in] activations, rounded to bfloat16.
      weight: [out, in], rounded to bfloat16.

    Returns:
      float32 [..., out].
    """
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
    """Multiply with a quantized weight, `w' = scale * (level - zero)`.

    Args:
      x: [..., in] activations.
      data: packed codes [out, bytes], see `glm_edge.kernels.packing`; with `int8`, also levels of
        any type, [out, in].
      scale: [out, in / g], one per group of `g` columns.
      zero: None (symmetric), or zero points in the shape of `scale`.
      qtype: type of the codes, one of `glm_edge.kernels.packing.QTYPES`.
      inputs: type of the factors, `float32` or `bfloat16`; sums are float32.

    Returns:
      [..., out] in the type of `x`.
    """
    block = functools.partial(_dequantized_product, qtype=qtype, inputs=inputs)
    product = _by_blocks(block, x.reshape(-1, x.shape[-1]), data, scale, zero)
    return product.reshape(*x.shape[:-1], -1).astype(x.dtype)


def dynamic_int8_matmul(
    x: Array, data: Array, scale: Array, zero: Array | None = None, qtype: str = "int8"
) -> Array:
    """Multiply rows rounded to int8 with a quantized weight, as dynamic-range kernels do.

    With one scale per row of the weight, factors are int8 and sums are int32. Scales multiply the
    sums in the order of XNNPACK's `qd8` kernels, so that both return the same bits. Gradients pass
    straight through the rounding.

    Args:
      x: [..., in] activations.
      data: packed codes [out, bytes], or levels [out, in], as in `quantized_matmul`.
      scale: [out, in / g], one per group of `g` columns.
      zero: None (symmetric), or zero points in the shape of `scale`.
      qtype: type of the codes, one of `glm_edge.kernels.packing.QTYPES`.

    Returns:
      [..., out] in the type of `x`.

    References:
      XNNPACK, `qd8` kernels, https://github.com/google/XNNPACK.
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
    """Multiply as `dynamic_int8_matmul`, with calibrated scales of activations and products.

    The order of operations is that of XNNPACK's `qs8` kernels: multiply each sum by one float32
    value per row of the weight, round to even, and clip. Gradients pass straight through the
    rounding where it does not clip, and reach the scales as in learned step size quantization.

    Args:
      x: [..., in] activations.
      data: packed codes [out, bytes], or levels [out, in], as in `quantized_matmul`.
      scale: [out, in / g], one per group of `g` columns.
      zero: None (symmetric), or zero points in the shape of `scale`.
      input_scale: scale of the activations, a scalar.
      input_zero: int8 zero point of the activations, a scalar.
      qtype: type of the codes, one of `glm_edge.kernels.packing.QTYPES`.
      output_scale: scale of the products, a scalar; None leaves products in float32.
      output_zero: int8 zero point of the products; None without `output_scale`.

    Returns:
      [..., out] in the type of `x`.

    References:
      Learned Step Size Quantization, https://arxiv.org/abs/1902.08153.
    """
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    step = jnp.broadcast_to(input_scale.astype(jnp.float32), (flat.shape[0], 1))
    offset = jnp.broadcast_to(input_zero.astype(jnp.float32), step.shape)
    # XNNPACK multiplies by the inverse; a division could round to the adjacent integer.
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
    """Round to integers in the range of int8 minus `zero`, with straight-through gradients."""
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
    """Compute `_centred_product` in integers where the weight has one scale per row.

    Args:
      centred: integers `q_x - z_x` as float32 [rows, in].
      offset: integers `z_x` as float32 [rows, 1].
      step: scales `s_x`, float32 [rows, 1].
      data: packed codes or levels, as in `quantized_matmul`.
      scale: [out, in / g], as in `quantized_matmul`.
      zero: None or zero points, as in `quantized_matmul`.
      qtype: type of the codes.

    Returns:
      float32 [rows, out].
    """
    if scale.shape[-1] > 1 or qtype == "nf4" or not jnp.issubdtype(data.dtype, jnp.integer):
        return _centred_product(centred, step, data, scale, zero, qtype)
    # For few rows, int32 factors q_x - z_x (they exceed int8) are cheapest. For more rows, the
    # int8 factors q_x are multiplied, and the term of z_x is subtracted from the sums.
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
        # sum (q_x - z_x) (q_w - z_w) also needs sum (q_x - z_x) per row of activations.
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
    """Concatenate `block(x, data, scale, zero)`, float32 [rows, R], over blocks of R rows."""
    count = round(data.shape[0] * x.shape[-1] / BLOCK)
    # On a mesh, rows of a weight may be on several devices; a loop over rows would serialize them.
    if count < 2 or not jax.sharding.get_abstract_mesh().empty:
        return block(x, data, scale, zero)
    size = data.shape[0] // count

    def run(x: Array, data: Array, scale: Array, zero: Array | None) -> Array:
        weight = data, scale, zero
        parts = jax.tree.map(lambda a: a[: count * size].reshape(count, size, -1), weight)
        # The gradient dequantizes each block again instead of storing every block.
        step = jax.checkpoint(lambda part: block(x, *part), prevent_cse=False)
        product = jnp.moveaxis(jax.lax.map(step, parts), 0, 1).reshape(x.shape[0], -1)
        # The remaining rows form a smaller last block.
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
    """Multiply [rows, in] with the planes of a weight from `packing.planes`.

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
    # Plane i contains columns i, i + n, i + 2n, ...
    pairs = [(x[:, i::count], plane) for i, plane in enumerate(planes)]

    def multiplied(pairs: list[tuple[Array, Array]]) -> Array:
        total: Any = sum(dot(a.astype(inputs), w.astype(inputs), sums) for a, w in pairs)
        return total

    def reduced(pairs: list[tuple[Array, Array]]) -> Array:
        terms = sum(a[:, None].astype(sums) * w.astype(sums) for a, w in pairs)
        return jnp.sum(terms, axis=-1)

    if x.shape[0] > FEW_ROWS:
        return multiplied(pairs)
    # On a GPU, a reduction fuses with the dequantization; a product would first write the weight.
    return jax.lax.platform_dependent(pairs, cpu=multiplied, default=reduced)


def dot(x: Array, weight: Array, sums: DTypeLike) -> Array:
    """Multiply with a separate accumulator type.

    Args:
      x: [rows, in].
      weight: [out, in] of the same type; int8 products are exact for up to 2^17 columns.
      sums: type of the accumulators and of the result.

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
    """Dequantize the planes of a weight, except for the returned scales [out] unless None."""
    groups, planes = scale.shape[-1], packing.planes(data, columns, qtype)
    # One scale per row multiplies the product: one multiplication per output, not per weight.
    if groups == 1:
        levels = [quantization.levels(plane, qtype).astype(jnp.float32) for plane in planes]
        if zero is not None:
            levels = [level - zero.astype(jnp.float32) for level in levels]
        return levels, scale[:, 0].astype(jnp.float32)
    # Groups that planes would split unevenly need columns in their original order.
    if columns // groups % len(planes):
        planes = [packing.unpack(data, columns, qtype)]
    return [quantization.dequantize(plane, scale, zero, qtype) for plane in planes], None


def round_rows_to_int8(x: Array) -> Array:
    """Quantize each row with `rows_to_int8` and dequantize it; [..., C] in the same type."""
    integers, zero, step = rows_to_int8(x)
    return ((integers - zero) * step).astype(x.dtype)


def rows_to_int8(x: Array) -> tuple[Array, Array, Array]:
    """Quantize each row to affine int8, as dynamic-range kernels do.

    The range of a row spans its minimum, its maximum and zero. Zero is represented exactly.

    Args:
      x: [..., C] activations.

    Returns:
      `(integers, zero, step)` in the type of `x`: integers [..., C] in -128..127, zero points
      [..., 1] and scales [..., 1].

    References:
      XNNPACK, `xnn_qd8_asymmetric_quantization_params`.
    """
    low = jnp.minimum(x.min(axis=-1, keepdims=True), 0.0)
    high = jnp.maximum(x.max(axis=-1, keepdims=True), 0.0)
    inverse = jnp.where(high == low, 1.0, 255.0 / (high - low))
    from_low, from_high = low * inverse, high * inverse
    # XNNPACK computes the zero point from the end of the range with the smaller rounding error.
    nearer_low = (-128.0 + from_low) + (127.0 + from_high) > 0.0
    zero = jnp.where(nearer_low, -128.0 - from_low, 127.0 - from_high)
    zero = jnp.round(jnp.clip(zero, -128.0, 127.0))
    return jnp.clip(jnp.round(x * inverse) + zero, -128.0, 127.0), zero, 1.0 / inverse
