"""Packing of small integers into bytes, along the last axis, low nibble first."""

import jax.numpy as jnp
from jax import Array


def pack_int4(values: Array) -> Array:
    """Packs two signed four-bit integers to a byte.

    Args:
      values: int8 [..., C] in -8..7.

    Returns:
      uint8 [..., ceil(C / 2)]; column `2i` is the low nibble of byte `i`; an odd `C` is padded
      with zero.
    """
    columns = values.shape[-1]
    padding = [(0, 0)] * (values.ndim - 1) + [(0, columns % 2)]
    nibbles = jnp.pad(values, padding).astype(jnp.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(data: Array, columns: int) -> Array:
    """Inverse of `pack_int4`.

    Args:
      data: uint8 [..., ceil(C / 2)].
      columns: `C`.

    Returns:
      int8 [..., C] in -8..7.
    """
    nibbles = jnp.stack([data & 0xF, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)
    return ((nibbles[..., :columns] ^ 8).astype(jnp.int8)) - 8
