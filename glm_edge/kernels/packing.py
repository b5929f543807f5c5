"""Packing of small codes into bytes, along the last axis, the first code in the lowest bits.

A code is a signed integer (`int8` to `int2`), a sign or zero (`ternary`, `ternary34`), or an index
into `NF4_LEVELS` (`nf4`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# 4-bit NormalFloat: quantiles of a normal distribution, zero and both ends included.
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

# Codes that fill a whole number of bytes, and that number.
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
# Widths whose units of three bytes are read as one number.
_IN_THREE_BYTES = {"int6": 6, "int3": 3}


def unit(qtype: str) -> int:
    """Codes that fill a whole number of bytes: a row may be cut only between such units."""
    return _UNITS[qtype][0]


def packed_columns(columns: int, qtype: str) -> int:
    """Bytes that `columns` codes of a row take."""
    codes, size = _UNITS[qtype]
    return -(-columns // codes) * size


def stored_dtype(qtype: str) -> np.dtype:
    """Type of packed codes."""
    return np.dtype(np.int8 if qtype == "int8" else np.uint8)


@functools.partial(jax.jit, static_argnames="qtype")
def pack(codes: Array, qtype: str) -> Array:
    """Packs the codes of each row.

    Args:
      codes: int8 [..., C] within the range of `qtype`; of `ternary34`, each four neighbours hold
        exactly one zero, and at most one where fewer than four are left at the end.
      qtype: one of `QTYPES`.

    Returns:
      uint8 [..., packed_columns(C)], a last unit filled up with zeros; int8 `codes` for `int8`.
    """
    if qtype == "int8":
        return codes
    codes = _filled(codes, qtype)
    if qtype == "ternary":
        digits = (codes + 1).astype(jnp.uint8)
        number = sum(digits[..., i] * jnp.uint8(3 ** (4 - i)) for i in range(5))
        # The fraction number / 243 in 256ths, rounded up: digits come back by multiplication.
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
    """Inverse of `pack`.

    Args:
      data: uint8 [..., packed_columns(C)]; int8 [..., C] for `int8`.
      columns: `C`.
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
    """Unpacks to several arrays, so that nothing need be interleaved.

    Args:
      data: as in `unpack`, like all others.
      columns: `C`.
      qtype: one of `QTYPES`.

    Returns:
      `n` arrays int8 [..., ceil(C / n)]; array `i` holds the codes of columns `i`, `i + n`,
      `i + 2 n` and so on; the last may be filled up with the code zero.
    """
    if qtype == "int8":
        return [data]
    words, count = _words(data, qtype)
    words = words[..., : -(-columns // count)]
    return [_code(words, i, qtype) for i in range(count)]


def _words(data: Array, qtype: str) -> tuple[Array, int]:
    """Whole numbers that each hold the same number of neighbouring codes, and that number."""
    if qtype in _IN_THREE_BYTES:
        parts = data.reshape(*data.shape[:-1], -1, 3).astype(jnp.int32)
        # XLA computes a sum once, and a chain of bit operations once for each plane.
        words = jnp.sum(parts << jnp.asarray([0, 8, 16]), axis=-1, dtype=jnp.int32)
        return words, unit(qtype)
    if qtype in ("int5", "ternary34"):
        units = data.reshape(*data.shape[:-1], -1, 5)
        # XLA computes stacked numbers once, and broadcast ones once for each plane.
        low = jnp.stack([units[..., :4] & 0xF, units[..., :4] >> 4], axis=-1)
        high = (units[..., 4:] >> jnp.arange(8, dtype=jnp.uint8)) & 1
        words = low.reshape(high.shape) | (high << 4)
        return words.reshape(*data.shape[:-1], -1), unit(qtype) // 8
    return data, unit(qtype)


def _code(words: Array, index: Array | int, qtype: str) -> Array:
    """Code at place `index` of each word, as int8."""
    if qtype == "ternary":
        # The product wraps: what remains is the fraction after the digits before. A digit is the
        # whole part of three fractions, (3 * fraction) >> 8.
        fraction = words * (jnp.asarray(3, jnp.uint8) ** jnp.asarray(index, jnp.uint8))
        return (fraction > 85).astype(jnp.int8) + (fraction > 170).astype(jnp.int8) - 1
    if qtype == "ternary34":
        place, index = words >> 3, jnp.asarray(index, jnp.uint8)
        sign = (words >> jnp.minimum(index - (index > place), 2)) & 1
        return jnp.where(place == index, 0, 2 * sign.astype(jnp.int8) - 1).astype(jnp.int8)
    if qtype in _IN_THREE_BYTES:
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
    """[..., units, codes of a unit], the last unit filled up."""
    size, columns = unit(qtype), codes.shape[-1]
    missing = -columns % size
    if qtype == "ternary34" and missing:
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
    """[..., units, codes of a unit] to [..., 3 bytes of each unit]."""
    fields = (codes.astype(jnp.uint8) & (2**width - 1)).astype(jnp.uint32)
    shifts = width * jnp.arange(codes.shape[-1], dtype=jnp.uint32)
    number = jnp.sum(fields << shifts, axis=-1, dtype=jnp.uint32)
    parts = (number[..., None] >> (8 * jnp.arange(3, dtype=jnp.uint32))) & 0xFF
    return parts.astype(jnp.uint8).reshape(*parts.shape[:-2], -1)


def _pack_ternary34(codes: Array) -> Array:
    """Place of the zero in two bits and three signs in three: five bits, four low and one high."""
    fours = codes.reshape(*codes.shape[:-1], 8, 4)
    place = jnp.argmin(jnp.abs(fours), axis=-1)
    slots = jnp.arange(3) + (jnp.arange(3) >= place[..., None])
    signs = jnp.take_along_axis(fours, slots, axis=-1) > 0
    return _join_fives((place * 8 + jnp.sum(signs << jnp.arange(3), axis=-1)).astype(jnp.uint8))


def _join_fives(fields: Array) -> Array:
    """[..., units, 8] numbers of five bits to [..., 5 bytes of each unit]: low bits, then high."""
    low = _join((fields & 0xF).reshape(*fields.shape[:-1], 4, 2), 4)
    high = _join(fields >> 4, 1)
    packed = jnp.concatenate([low, high[..., None]], axis=-1)
    return packed.reshape(*packed.shape[:-2], -1)
