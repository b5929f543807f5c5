"""Products of activations with a weight stored `[out, in]`: dense, bf16, and low-bit.

A low-bit weight is decoded a block of rows at a time, into a buffer that stays in a core's cache
and meets the activations there: memory carries packed bytes only, and no dense copy exists. Codes
that share a byte are decoded into separate arrays, which meet every second (fourth, ...) column of
the activations, since interleaving them costs more than the product.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from glm_edge.kernels import grid, packing

FEW_ROWS = 4
SPLIT_ROWS = 32
BLOCK = 1 << 19
"""Weights decoded at a time, 2 MB in float32."""


def dense(x: Array, weight: Array) -> Array:
    """Product in full precision: `[..., in] x [out, in] -> [..., out]`."""
    return jax.lax.dot_general(
        x, weight, (((x.ndim - 1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )


@jax.custom_vjp
def dense_split(x: Array, weight: Array) -> Array:
    """Product of few float32 rows with a bfloat16 weight, without a float32 copy of the weight.

    Each row is the exact sum of three bfloat16 rows, whose products with the weight are exact in
    float32, so the result is as accurate as that of a float32 weight and moves half the bytes.

    Args:
      x: float32 [..., in].
      weight: bfloat16 [out, in].

    Returns:
      float32 [..., out].
    """
    rest, parts = x.reshape(-1, x.shape[-1]), []
    for _ in range(2):
        # XLA drops a cast to bfloat16 and back, which would leave no rest.
        high = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(high.astype(jnp.bfloat16))
        rest = rest - high
    parts.append(rest.astype(jnp.bfloat16))
    product = jax.lax.dot_general(
        weight,
        jnp.concatenate(parts),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    terms = product.reshape(weight.shape[0], 3, -1)
    return (terms[:, 2] + terms[:, 1] + terms[:, 0]).T.reshape(*x.shape[:-1], -1)


def _dense_split_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return dense_split(x, weight), (x, weight)


def _dense_split_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = saved
    _, pull = jax.vjp(lambda x, weight: dense(x, weight.astype(x.dtype)), x, weight)
    return pull(gradient)


dense_split.defvjp(_dense_split_forward, _dense_split_backward)


@jax.custom_vjp
def dense_bf16(x: Array, weight: Array) -> Array:
    """Product of bfloat16 inputs with float32 accumulation, forward and backward."""
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


def low_bit(
    x: Array,
    data: Array,
    scale: Array,
    zero: Array | None = None,
    qtype: str = "int8",
    inputs: str = "float32",
) -> Array:
    """Product with a quantized weight, `f' = scale * (level - zero)`.

    Args:
      x: [..., in] activations.
      data: packed codes [out, bytes], see `glm_edge.kernels.packing`; with `int8`, also levels of
        any type, [out, in].
      scale: [out, in / g], one for each group of `g` columns.
      zero: None (symmetric), or zero points like `scale`.
      qtype: of the codes.
      inputs: type of the numbers multiplied, `float32` or `bfloat16`; sums are float32.

    Returns:
      [..., out] of the type of `x`.
    """
    block = functools.partial(_decoded_product, qtype=qtype, inputs=inputs)
    found = _by_blocks(block, x.reshape(-1, x.shape[-1]), data, scale, zero)
    return found.reshape(*x.shape[:-1], -1).astype(x.dtype)


def low_bit_int8(
    x: Array, data: Array, scale: Array, zero: Array | None = None, qtype: str = "int8"
) -> Array:
    """Product of rows rounded to int8 with a quantized weight, as a phone's dynamic kernels do.

    With one scale a row of the weight, int8 meets int8 and sums are int32; scales are applied
    after, in the order of XNNPACK's `qd8` kernels, so that a row on the same int8 grid gives the
    same bits. Gradients pass straight through the rounding.

    Args:
      x: [..., in] activations.
      data: as in `low_bit`, like all others.
      scale: [out, in / g].
      zero: None or zero points like `scale`.
      qtype: of the codes.

    Returns:
      [..., out] of the type of `x`.
    """
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    integers, offset, step = jax.lax.stop_gradient(rows_to_int8(flat))
    centred = grid.with_gradient_of(flat / step, integers - offset)
    found = _integer_product(centred, offset, step, data, scale, zero, qtype)
    return found.reshape(*x.shape[:-1], -1).astype(x.dtype)


def low_bit_static(
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
    """As `low_bit_int8`, on a calibrated grid of the activations, and of the products if given.

    The order of the scales is that of XNNPACK's `qs8` kernels: sums are multiplied by one float32
    number a row of the weight, rounded to even, and clipped. Gradients pass straight through the
    rounding where it does not clip, and reach the scales of the grids as in learned step size
    quantization.

    Args:
      x: [..., in] activations.
      data: as in `low_bit`.
      scale: likewise.
      zero: likewise.
      input_scale: step of the grid, a scalar.
      input_zero: its int8 zero point.
      qtype: of the codes.
      output_scale: None, or the step of the grid of the products, a scalar.
      output_zero: None, or its int8 zero point.

    Returns:
      [..., out] of the type of `x`.
    """
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    step = jnp.broadcast_to(input_scale.astype(jnp.float32), (flat.shape[0], 1))
    offset = jnp.broadcast_to(input_zero.astype(jnp.float32), step.shape)
    # Multiplied by the inverse, as the kernels do: a quotient may round to the neighbour.
    centred = _rounded(flat * (1.0 / step), offset)
    if output_scale is None:
        found = _integer_product(centred, offset, step, data, scale, zero, qtype)
    else:
        products = output_scale.astype(jnp.float32)
        ratio = step[0] * scale.astype(jnp.float32) / products
        steps = _integer_product(centred, offset, jnp.ones_like(step), data, ratio, zero, qtype)
        found = _rounded(steps, output_zero.astype(jnp.float32)) * products
    return found.reshape(*x.shape[:-1], -1).astype(x.dtype)


def _rounded(steps: Array, zero: Array) -> Array:
    """The nearest whole numbers that are int8 once `zero` is added; gradients pass."""
    inside = jnp.clip(steps, -128.0 - zero, 127.0 - zero)
    return grid.with_gradient_of(inside, jnp.round(inside))


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
    """`_centred_product` in integers, where the weight has one scale a row.

    Args:
      centred: float32 [rows, in], whole numbers; int8 once `offset` is added.
      offset: float32 [rows, 1], whole numbers.
      step: float32 [rows, 1].
      data: as in `low_bit`.
      scale: likewise.
      zero: likewise.
      qtype: likewise.

    Returns:
      float32 [rows, out].
    """
    if scale.shape[-1] > 1 or qtype == "nf4" or not jnp.issubdtype(data.dtype, jnp.integer):
        return _centred_product(centred, step, data, scale, zero, qtype)
    few = centred.shape[0] <= FEW_ROWS
    rows = (centred if few else centred + offset).astype(jnp.int32 if few else jnp.int8)
    offset = offset.astype(jnp.int32)
    sums = jnp.sum(centred, axis=-1, keepdims=True, dtype=jnp.int32)

    def block(x: Array, data: Array, scale: Array, zero: Array | None) -> Array:
        planes = packing.planes(data, x.shape[-1], qtype)
        total = _product(x, planes, x.dtype, jnp.int32)
        if not few:
            total = total - offset * sum(jnp.sum(w, axis=-1, dtype=jnp.int32) for w in planes)
        if zero is not None:
            whole = jnp.issubdtype(zero.dtype, jnp.integer)
            total = total - sums * zero[:, 0].astype(jnp.int32 if whole else jnp.float32)
        return total.astype(jnp.float32) * step * scale[:, 0].astype(jnp.float32)

    return _by_blocks(block, rows, data, scale, zero)


def _centred_product(
    centred: Array, step: Array, data: Array, scale: Array, zero: Array | None, qtype: str
) -> Array:
    return low_bit(centred, data, scale, zero, qtype) * step


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

    found = jax.vjp(product, centred, step, scale, trained)[1](gradient)
    return found[0], None, found[1], None, found[2], found[3]


_integer_product.defvjp(_integer_product_forward, _integer_product_backward)


def _by_blocks(block: Callable, x: Array, data: Array, scale: Array, zero: Array | None) -> Array:
    """Joins `block(x, data, scale, zero)`, float32 [rows, R], over the R rows of each block."""
    count = round(data.shape[0] * x.shape[-1] / BLOCK)
    # On a mesh the rows of a weight may lie on several devices, which must not take turns.
    if count < 2 or not jax.sharding.get_abstract_mesh().empty:
        return block(x, data, scale, zero)
    size = data.shape[0] // count

    def run(x: Array, data: Array, scale: Array, zero: Array | None) -> Array:
        weight = data, scale, zero
        parts = jax.tree.map(lambda a: a[: count * size].reshape(count, size, -1), weight)
        step = jax.checkpoint(lambda part: block(x, *part), prevent_cse=False)
        found = jnp.moveaxis(jax.lax.map(step, parts), 0, 1).reshape(x.shape[0], -1)
        rest = jax.tree.map(lambda a: a[count * size :], weight)
        return jnp.concatenate([found, block(x, *rest)], axis=-1) if rest[0].size else found

    return jax.lax.platform_dependent(x, data, scale, zero, cpu=run, default=block)


def _decoded_product(
    x: Array, data: Array, scale: Array, zero: Array | None, qtype: str, inputs: str
) -> Array:
    planes, pending = _decoded(data, scale, zero, qtype, x.shape[-1])

    found = _product(x.astype(jnp.float32), planes, inputs, jnp.float32)
    return found if pending is None else found * pending


def _product(x: Array, planes: list[Array], inputs: DTypeLike, sums: DTypeLike) -> Array:
    """Product of [rows, in] with the planes of a weight, see `packing.planes`.

    Args:
      x: [rows, in].
      planes: arrays [out, ceil(in / n)].
      inputs: type of the numbers multiplied.
      sums: type of their sums.

    Returns:
      [rows, out].
    """
    count, width = len(planes), planes[0].shape[-1]
    x = jnp.pad(x, ((0, 0), (0, count * width - x.shape[-1])))
    pairs = [(x[:, i::count], plane) for i, plane in enumerate(planes)]

    def multiplied(pairs: list[tuple[Array, Array]]) -> Array:
        total: Any = sum(dot(a.astype(inputs), w.astype(inputs), sums) for a, w in pairs)
        return total

    def reduced(pairs: list[tuple[Array, Array]]) -> Array:
        terms = sum(a[:, None].astype(sums) * w.astype(sums) for a, w in pairs)
        return jnp.sum(terms, axis=-1)

    if x.shape[0] > FEW_ROWS:
        return multiplied(pairs)
    # On a GPU, a reduction decodes as it reads.
    return jax.lax.platform_dependent(pairs, cpu=multiplied, default=reduced)


def dot(x: Array, weight: Array, sums: DTypeLike) -> Array:
    """Product whose sums have their own type.

    Args:
      x: [rows, in].
      weight: [out, in] of the same type; int8 meets int8 exactly for up to 2^17 columns.
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


def _decoded(
    data: Array, scale: Array, zero: Array | None, qtype: str, columns: int
) -> tuple[list[Array], Array | None]:
    """Planes of the weight in float32, and scales [out] that are yet to be applied, or None."""
    groups, planes = scale.shape[-1], packing.planes(data, columns, qtype)
    if groups == 1:
        levels = [grid.levels(plane, qtype).astype(jnp.float32) for plane in planes]
        if zero is not None:
            levels = [level - zero.astype(jnp.float32) for level in levels]
        return levels, scale[:, 0].astype(jnp.float32)
    if columns // groups % len(planes):
        planes = [packing.unpack(data, columns, qtype)]
    return [grid.decode(plane, scale, zero, qtype) for plane in planes], None


def round_rows_to_int8(x: Array) -> Array:
    """Rounds each row to the grid of `rows_to_int8`; [..., C] of the same type."""
    integers, zero, step = rows_to_int8(x)
    return ((integers - zero) * step).astype(x.dtype)


def rows_to_int8(x: Array) -> tuple[Array, Array, Array]:
    """Each row's own asymmetric int8 grid, as a phone's dynamic kernels choose it.

    The grid spans the row's minimum and maximum, zero included, and represents zero exactly.

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
    nearer_low = (-128.0 + from_low) + (127.0 + from_high) > 0.0
    zero = jnp.where(nearer_low, -128.0 - from_low, 127.0 - from_high)
    zero = jnp.round(jnp.clip(zero, -128.0, 127.0))
    return jnp.clip(jnp.round(x * inverse) + zero, -128.0, 127.0), zero, 1.0 / inverse
