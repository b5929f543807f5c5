"""Quantization of the rows of a key-value cache, symmetric, `x' = scale * q`.

The values of one head at one token share a scale: int8 in -127..127, or int4 in -7..7, two per
byte.
"""

import jax.numpy as jnp
from jax import Array

from glm_edge.kernels import packing, quantization

LARGEST = {"int8": 127, "int4": 7}
SCALE_DTYPE = jnp.float16


def quantize_rows(rows: Array, qtype: str) -> tuple[Array, Array]:
    """Quantize each row with a scale from its largest magnitude.

    Args:
      rows: [..., H].
      qtype: `int8` or `int4`.

    Returns:
      `(data, scale)`: int8 [..., H] or uint8 [..., ceil(H / 2)], and float16 [..., 1].

    References:
      KVQuant (a comparison of cache formats), https://arxiv.org/abs/2401.18079.
    """
    rows = rows.astype(jnp.float32)
    scale = jnp.max(jnp.abs(rows), axis=-1, keepdims=True) / LARGEST[qtype]
    # Without the limit, a scale beyond the range of float16 would make the row infinite.
    scale = jnp.minimum(scale, jnp.finfo(SCALE_DTYPE).max).astype(SCALE_DTYPE)
    codes = quantization.quantize(rows, scale, None, qtype)
    # The lowest code of two's complement has no positive counterpart.
    codes = jnp.maximum(codes, -LARGEST[qtype])
    return packing.pack(codes, qtype), scale


def dequantize_rows(data: Array, scale: Array, columns: int) -> Array:
    """Dequantize rows from `quantize_rows`.

    Args:
      data: codes from `quantize_rows`; the array type distinguishes int8 from int4.
      scale: float16 [..., 1] from `quantize_rows`.
      columns: values per row, `H`.

    Returns:
      float32 [..., H].
    """
    qtype = "int8" if data.dtype == jnp.int8 else "int4"
    return quantization.dequantize(packing.unpack(data, columns, qtype), scale, None, qtype)
