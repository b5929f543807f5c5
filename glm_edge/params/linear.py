"""Products and look-ups with boxed parameters."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from glm_edge.kernels import embedding, matmul
from glm_edge.params.boxes import Quantized, Weight, dense

COMPUTE = ("float32", "bfloat16", "int8_dynamic", "int8_static")


def linear(x: Array, weight: Weight, compute: str = "float32") -> Array:
    """Multiply activations with a weight or box, `[..., in] x [out, in] -> [..., out]`.

    Args:
      x: [..., in] activations.
      weight: array or box of dense shape [out, in].
      compute: `float32` is the reference. `bfloat16` rounds inputs and accumulates in float32.
        `int8_dynamic` rounds the inputs of a quantized weight to int8 with one scale per row, as
        on-device kernels do. `int8_static` rounds them with the calibrated scale of the box (one
        per row without it), and rounds products if the box has an output scale.

    Returns:
      [..., out] activations.
    """
    if isinstance(weight, Quantized) and not weight.kernel_shape:
        return _quantized_linear(x, weight, compute)
    weight = dense(weight)
    few = x.size // x.shape[-1] <= matmul.SPLIT_ROWS
    if few and (x.dtype, weight.dtype) == (jnp.float32, jnp.bfloat16):
        return matmul.matmul_bf16x3(x, weight)
    if compute == "bfloat16":
        return matmul.dense_bf16(x, weight)
    return matmul.dense(x, weight.astype(x.dtype))


def _quantized_linear(x: Array, weight: Quantized, compute: str) -> Array:
    groups = (weight.data.shape[-2], weight.scale.shape[-1])
    scale = jnp.broadcast_to(weight.scale, groups)
    zero = None if weight.zero is None else jnp.broadcast_to(weight.zero, groups)
    packed, qtype = (weight.data, scale, zero), weight.format.qtype
    step, offset = weight.input_scale, weight.input_zero
    if compute == "int8_static" and step is not None and offset is not None:
        outputs = (weight.output_scale, weight.output_zero)
        return matmul.static_int8_matmul(x, *packed, step, offset, qtype, *outputs)
    if compute.startswith("int8"):
        return matmul.dynamic_int8_matmul(x, *packed, qtype)
    inputs = "bfloat16" if compute == "bfloat16" else "float32"
    return matmul.quantized_matmul(x, *packed, qtype, inputs)


def lookup(weight: Weight, tokens: Array) -> Array:
    """Read rows of an embedding and dequantize only these.

    The result is at least float32, since activations start here.

    Args:
      weight: array or box of dense shape [V, D].
      tokens: integers of any shape.

    Returns:
      [..., D] in float32 or wider.
    """
    if not isinstance(weight, Quantized) or weight.kernel_shape:
        return _widen(embedding.take_rows(dense(weight), tokens))
    per_row = weight.scale.shape[-2] == weight.data.shape[-2]
    rows = weight.replace(
        data=weight.data[tokens],
        scale=weight.scale[tokens] if per_row else weight.scale[0],
        zero=weight.zero[tokens] if per_row and weight.zero is not None else weight.zero,
    )
    return _widen(rows.unbox())


def _widen(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
