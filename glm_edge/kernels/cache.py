"""Rows of a cache of keys and values as small integers, `f' = scale * q`.

The numbers of one head at one token share a symmetric grid: int8 in -127..127, or int4 in -7..7,
two to a byte.
"""

import jax.numpy as jnp
from jax import Array

from glm_edge.kernels import grid, packing

LARGEST = {"int8": 127, "int4": 7}
SCALE_DTYPE = jnp.float16


def quantize_rows(rows: Array, qtype: str) -> tuple[Array, Array]:
    """Rounds each row to its own grid, which its largest number spans.

    Args:
      rows: [..., H].
      qtype: `int8` or `int4`.

    Returns:
      `(data, scale)`: int8 [..., H] or uint8 [..., ceil(H / 2)], and float16 [..., 1].

    References:
      KVQuant compares grids of caches, https://arxiv.org/abs/2401.18079.
    """
    rows = rows.astype(jnp.float32)
    scale = jnp.max(jnp.abs(rows), axis=-1, keepdims=True) / LARGEST[qtype]
    # Scales that float16 cannot hold would be infinite, and so would the row.
    scale = jnp.minimum(scale, jnp.finfo(SCALE_DTYPE).max).astype(SCALE_DTYPE)
    codes = grid.encode(rows, scale, None, qtype)
    codes = jnp.maximum(codes, -LARGEST[qtype])
    return packing.pack(codes, qtype), scale


def dequantize_rows(data: Array, scale: Array, columns: int) -> Array:
    """Inverse of `quantize_rows` but for its rounding.

    Args:
      data: from `quantize_rows`; its type says which it is.
      scale: likewise.
      columns: `H`.

    Returns:
      float32 [..., H].
    """
    qtype = "int8" if data.dtype == jnp.int8 else "int4"
    return grid.decode(packing.unpack(data, columns, qtype), scale, None, qtype)
