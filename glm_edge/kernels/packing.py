"""Packing of small codes into bytes along the last axis, with the first code in the lowest bits.

A code is a signed integer (`int8` to `int2`), a sign or zero (`ternary`, `ternary34`), or an index
into `NF4_LEVELS` (`nf4`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# 4-bit NormalFloat: quantiles of a normal distribution, including zero and both ends.
# https://arxiv.org/abs/2305.14314, appendix E.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# Codes per unit, and bytes per unit.
_UNITS = {
    "int8": (1, 1),
    "int6": (4, 3),
    "int5": (8, 5),
    "int4": (2, 1),
    "nf4": (2, 1),
    "int3": (8, 3),
    "int2": (4, 1),
    "ternary": (5, 1),
    "ternary34": (32, 5),
}
QTYPES = tuple(_UNITS)
# Bits per code of the types that read three bytes as one integer.
_IN_THREE_BYTES = {"int6": 6, "int3": 3}


def unit(qtype: str) -> int:
    """Return the codes per unit of complete bytes; a row can be split only between units."""
    return _UNITS[qtype][0]


def packed_columns(columns: int, qtype: str) -> int:
    """Count the bytes of a packed row.

    Args:
      columns: count of codes.
      qtype: one of `QTYPES`.

    Returns:
      Bytes of complete units.
    """
    codes, size = _UNITS[qtype]
    return -(-columns // codes) * size


def stored_dtype(qtype: str) -> np.dtype:
    """Return the array type of packed codes: int8 for `int8`, otherwise uint8."""
    return np.dtype(np.int8 if qtype == "int8" else np.uint8)


@functools.partial(jax.jit, static_argnames="qtype")
def pack(codes: Array, qtype: str) -> Array:
    """Pack the codes of each row.

    Args:
      codes: int8 [..., C] within the range of `qtype`. For `ternary34`, each group of four
        contains exactly one zero; an incomplete last group contains at most one.
      qtype: one of `QTYPES`.

    Returns:
      uint8 [..., packed_columns(C)], the last unit padded with zeros; int8 `codes` for `int8`.

    Example:
      >>> pack(jnp.asarray([1, -2, 7, 0], jnp.int8), "int4")
      Array([225,   7], dtype=uint8)
    """
    if qtype == "int8":
        return codes
    codes = _filled(codes, qtype)
    if qtype == "ternary":
        # Five digits of base 3, the most significant digit first.
        digits = (codes + 1).astype(jnp.uint8)
        number = sum(digits[..., i] * jnp.uint8(3 ** (4 - i)) for i in range(5))
        # number / 243 in units of 1/256, rounded up, so that multiplication recovers the digits.
        return ((number.astype(jnp.uint32) * 256 + 242) // 243).astype(jnp.uint8)
    if qtype == "ternary34":
        return _pack_ternary34(codes)
    if qtype in _IN_THREE_BYTES:
        return _join_three_bytes(codes, _IN_THREE_BYTES[qtype])
    if qtype == "int5":
        return _join_fives(codes.astype(jnp.uint8) & 31)
    width = 2 if qtype == "int2" else 4
    return _join(codes.astype(jnp.uint8) & (2**width - 1), width)


@functools.partial(jax.jit, static_argnames=("columns", "qtype"))
def unpack(data: Array, columns: int, qtype: str) -> Array:
    """Unpack the codes of each row, the inverse of `pack`.

    Args:
      data: uint8 [..., packed_columns(C)]; int8 [..., C] for `int8`.
      columns: count of codes per row, `C`.
      qtype: one of `QTYPES`.

    Returns:
      int8 [..., C].
    """
    if qtype == "int8":
        return data
    words, count = _words(data, qtype)
    codes = _code(words[..., None], jnp.arange(count), qtype)
    return codes.reshape(*data.shape[:-1], -1)[..., :columns]


def planes(data: Array, columns: int, qtype: str) -> list[Array]:
    """Unpack into several arrays, without the cost of interleaving codes.

    Args:
      data: uint8 [..., packed_columns(C)]; int8 [..., C] for `int8`.
      columns: count of codes per row, `C`.
      qtype: one of `QTYPES`.

    Returns:
      `n` arrays int8 [..., ceil(C / n)]. Array `i` contains the codes of columns `i`, `i + n`,
      `i + 2 n` and so on; the last columns may be padded with the code zero.
    """
    if qtype == "int8":
        return [data]
    words, count = _words(data, qtype)
    words = words[..., : -(-columns // count)]
    return [_code(words, i, qtype) for i in range(count)]


def _words(data: Array, qtype: str) -> tuple[Array, int]:
    """Read packed bytes as integers of several adjacent codes; also returns codes per integer."""
    if qtype in _IN_THREE_BYTES:
        parts = data.reshape(*data.shape[:-1], -1, 3).astype(jnp.int32)
        # XLA computes a sum once, and a chain of bit operations once per plane.
        words = jnp.sum(parts << jnp.asarray([0, 8, 16]), axis=-1, dtype=jnp.int32)
        return words, unit(qtype)
    if qtype in ("int5", "ternary34"):
        units = data.reshape(*data.shape[:-1], -1, 5)
        # Four bytes of low nibbles and one of fifth bits; a word is one code of five bits. XLA
        # computes a stack once, and a broadcast once per plane.
        low = jnp.stack([units[..., :4] & 0xF, units[..., :4] >> 4], axis=-1)
        high = (units[..., 4:] >> jnp.arange(8, dtype=jnp.uint8)) & 1
        words = low.reshape(high.shape) | (high << 4)
        return words.reshape(*data.shape[:-1], -1), unit(qtype) // 8
    return data, unit(qtype)


def _code(words: Array, index: Array | int, qtype: str) -> Array:
    """Extract the code at `index` of each word, as int8."""
    if qtype == "ternary":
        # The byte f is a fraction in units of 1/256. Multiplying by 3^index in uint8 wraps, which
        # removes the earlier digits. The next digit is the integer part of 3 f, (3 * f) >> 8.
        fraction = words * (jnp.asarray(3, jnp.uint8) ** jnp.asarray(index, jnp.uint8))
        return (fraction > 85).astype(jnp.int8) + (fraction > 170).astype(jnp.int8) - 1
    if qtype == "ternary34":
        # Bits 3 and 4 are the index of the zero, bits 0 to 2 the signs of the other three.
        zero_index, index = words >> 3, jnp.asarray(index, jnp.uint8)
        sign = (words >> jnp.minimum(index - (index > zero_index), 2)) & 1
        return jnp.where(zero_index == index, 0, 2 * sign.astype(jnp.int8) - 1).astype(jnp.int8)
    if qtype in _IN_THREE_BYTES:
        # Shifting to the top of 32 bits and back extends the sign.
        width = _IN_THREE_BYTES[qtype]
        return ((words << (32 - width * (1 + index))) >> (32 - width)).astype(jnp.int8)
    if qtype == "int5":
        return (words << 3).astype(jnp.int8) >> 3
    width = 2 if qtype == "int2" else 4
    index = jnp.asarray(index, jnp.uint8)
    if qtype == "nf4":
        return ((words >> (width * index)) & 0xF).astype(jnp.int8)
    top = (words << (8 - width - width * index)).astype(jnp.int8)
    return top >> (8 - width)


def _filled(codes: Array, qtype: str) -> Array:
    """Split codes into units, [..., units, codes per unit], and pads the last unit."""
    size, columns = unit(qtype), codes.shape[-1]
    missing = -columns % size
    if qtype == "ternary34" and missing:
        # Padding keeps one zero per group of four: the first padding code is zero unless the
        # incomplete group already contains one.
        tail = jnp.asarray(np.arange(columns, columns + missing) % 4 != 0, jnp.int8)
        tail = jnp.broadcast_to(tail, (*codes.shape[:-1], missing))
        if columns % 4:
            cut = codes[..., columns - columns % 4 :]
            tail = tail.at[..., 0].set(jnp.any(cut == 0, axis=-1).astype(jnp.int8))
        codes = jnp.concatenate([codes, tail], axis=-1)
    elif missing:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)])
    return codes.reshape(*codes.shape[:-1], -1, size)


def _join(fields: Array, width: int) -> Array:
    shifts = jnp.arange(0, 8, width, dtype=jnp.uint8)
    return jnp.sum(fields << shifts, axis=-1, dtype=jnp.uint8)


def _join_three_bytes(codes: Array, width: int) -> Array:
    """Join [..., units, codes per unit] to [..., 3 bytes per unit]."""
    fields = (codes.astype(jnp.uint8) & (2**width - 1)).astype(jnp.uint32)
    shifts = width * jnp.arange(codes.shape[-1], dtype=jnp.uint32)
    # One 24-bit integer per unit, then its bytes, the lowest first.
    number = jnp.sum(fields << shifts, axis=-1, dtype=jnp.uint32)
    parts = (number[..., None] >> (8 * jnp.arange(3, dtype=jnp.uint32))) & 0xFF
    return parts.astype(jnp.uint8).reshape(*parts.shape[:-2], -1)


def _pack_ternary34(codes: Array) -> Array:
    """Pack four codes in five bits: two for the index of the zero, three for the signs."""
    fours = codes.reshape(*codes.shape[:-1], 8, 4)
    zero_index = jnp.argmin(jnp.abs(fours), axis=-1)
    # Indices of the three signs, in order.
    others = jnp.arange(3) + (jnp.arange(3) >= zero_index[..., None])
    signs = jnp.take_along_axis(fours, others, axis=-1) > 0
    fields = zero_index * 8 + jnp.sum(signs << jnp.arange(3), axis=-1)
    return _join_fives(fields.astype(jnp.uint8))


def _join_fives(fields: Array) -> Array:
    """Join [..., units, 8] integers of five bits to [..., 5 bytes per unit], low bits first."""
    low = _join((fields & 0xF).reshape(*fields.shape[:-1], 4, 2), 4)
    high = _join(fields >> 4, 1)
    packed = jnp.concatenate([low, high[..., None]], axis=-1)
    return packed.reshape(*packed.shape[:-2], -1)
