"""Products of activations with a weight stored `[out, in]`: dense, bf16, and low-bit."""

import jax
import jax.numpy as jnp
from jax import Array

FEW_ROWS = 4
SPLIT_ROWS = 32


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


def _dense_split_forward(x, weight):
    return dense_split(x, weight), (x, weight)


def _dense_split_backward(saved, gradient):
    x, weight = saved
    _, pull = jax.vjp(lambda x, weight: dense(x, weight.astype(x.dtype)), x, weight)
    return pull(gradient)


dense_split.defvjp(_dense_split_forward, _dense_split_backward)


@jax.custom_vjp
def dense_bf16(x: Array, weight: Array) -> Array:
    """Product of bfloat16 inputs with float32 accumulation, forward and backward."""
    return _bf16_dot(x, weight, (((x.ndim - 1,), (1,)), ((), ())))


def _bf16_dot(a: Array, b: Array, dimensions) -> Array:
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _dense_bf16_forward(x, weight):
    return dense_bf16(x, weight), (x, weight)


def _dense_bf16_backward(saved, gradient):
    x, weight = saved
    rows = tuple(range(x.ndim - 1))
    x_gradient = _bf16_dot(gradient, weight, (((x.ndim - 1,), (0,)), ((), ())))
    weight_gradient = _bf16_dot(gradient, x, ((rows, rows), ((), ())))
    return x_gradient.astype(x.dtype), weight_gradient.astype(weight.dtype)


dense_bf16.defvjp(_dense_bf16_forward, _dense_bf16_backward)


def low_bit(x: Array, integers: Array, scale: Array, zero: Array | None = None) -> Array:
    """Product with a quantized weight, `f' = scale * (q - zero)`.

    For few rows the weight is never materialised in float: its integers are multiplied and
    reduced in one fused loop. For many rows it is dequantized once.

    Args:
      x: [..., in] activations.
      integers: int8 [out, in].
      scale: [out, in / g] of one group of `g` columns each.
      zero: None (symmetric) or integers like `scale`.

    Returns:
      [..., out].
    """
    rows = x.size // x.shape[-1]
    if rows > FEW_ROWS:
        return dense(x, dequantize(integers, scale, zero).astype(x.dtype))
    groups = scale.shape[-1]
    grouped = integers.reshape(integers.shape[0], groups, -1)
    steps = grouped.astype(x.dtype)
    if zero is not None:
        steps = steps - zero[..., None].astype(x.dtype)
    flat = x.reshape(rows, 1, groups, -1)
    partial = jnp.sum(flat * steps[None], axis=-1)
    return jnp.sum(partial * scale.astype(x.dtype), axis=-1).reshape(*x.shape[:-1], -1)


def dequantize(integers: Array, scale: Array, zero: Array | None = None) -> Array:
    """`f' = scale * (q - zero)` by groups of columns.

    Args:
      integers: int8 [..., out, in].
      scale: [..., out, in / g].
      zero: None or integers like `scale`.

    Returns:
      float32 [..., out, in].
    """
    grouped = integers.reshape(*scale.shape, -1).astype(jnp.float32)
    if zero is not None:
        grouped = grouped - zero[..., None].astype(jnp.float32)
    return (grouped * scale[..., None].astype(jnp.float32)).reshape(integers.shape)


def quantize(weight: Array, scale: Array, zero: Array | None, bits: int) -> Array:
    """`q = round(f / scale + zero)`, clipped to the signed range of `bits`.

    Args:
      weight: [..., out, in].
      scale: [..., out, in / g].
      zero: None or integers like `scale`.
      bits: width of the integers.

    Returns:
      int8 [..., out, in].
    """
    limit = 2 ** (bits - 1)
    grouped = weight.reshape(*scale.shape, -1).astype(jnp.float32)
    steps = grouped / scale[..., None].astype(jnp.float32)
    if zero is not None:
        steps = steps + zero[..., None].astype(jnp.float32)
    integers = jnp.clip(jnp.round(steps), -limit, limit - 1)
    return integers.astype(jnp.int8).reshape(weight.shape)


def low_bit_int8(x: Array, integers: Array, scale: Array, zero: Array | None = None) -> Array:
    """Product of rows rounded to int8 with a quantized weight, as a phone's dynamic kernels do.

    Integers are multiplied and summed first, scales applied after, in the order of XNNPACK's
    `qd8` kernels, so that a row on the same int8 grid gives the same bits.

    Args:
      x: [..., in] activations.
      integers: int8 [out, in].
      scale: [out, in / g].
      zero: None or integers like `scale`.

    Returns:
      [..., out].
    """
    centred, step = rows_to_int8(x)
    if scale.shape[-1] > 1:
        return low_bit(centred, integers, scale, zero) * step
    total = low_bit(centred, integers, jnp.ones_like(scale, x.dtype), zero)
    return total * step * scale[:, 0].astype(x.dtype)


def round_rows_to_int8(x: Array) -> Array:
    """Rounds each row to the grid of `rows_to_int8`; [..., C] of the same type."""
    centred, step = rows_to_int8(x)
    return (centred * step).astype(x.dtype)


def rows_to_int8(x: Array) -> tuple[Array, Array]:
    """Each row's own asymmetric int8 grid, as a phone's dynamic kernels choose it.

    The grid spans the row's minimum and maximum, zero included, and represents zero exactly.

    Args:
      x: [..., C] activations.

    Returns:
      `(centred, step)`: `q - z` of the same type, [..., C] in -255..255, and [..., 1].

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
    integers = jnp.clip(jnp.round(x * inverse) + zero, -128.0, 127.0)
    return integers - zero, 1.0 / inverse
