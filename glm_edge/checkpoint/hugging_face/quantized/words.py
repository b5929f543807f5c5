"""Packing of unsigned codes into 32-bit words along the last axis, first code in the lowest bits.

Codes follow each other without gaps, also across the border of two words: 32 codes take as many
words as a code has bits. Letters used for shapes: `R` rows, `C` codes per row, `W` words per row.
"""

import numpy as np

WORD_BITS = 32
BYTE_BITS = 8
CHUNK_CODES = 1 << 22


def num_words(codes: int, bits: int) -> int:
    """Count the words of a packed row.

    Args:
      codes: codes per row.
      bits: bits per code.

    Returns:
      Words per row.
    """
    return -(-codes * bits // WORD_BITS)


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes.

    Args:
      codes: uint8 [R, C], each below 2^bits.
      bits: bits per code, 1 to 8.

    Returns:
      int32 [R, W], the last word padded with zero bits.
    """
    rows, columns = codes.shape
    packed = np.zeros((rows, num_words(columns, bits) * WORD_BITS // BYTE_BITS), np.uint8)
    for start, stop in _chunks(rows, columns):
        joined = _join(codes[start:stop], bits)
        packed[start:stop, : joined.shape[1]] = joined
    return packed.view("<i4")


def _join(codes: np.ndarray, bits: int) -> np.ndarray:
    """Join codes to bytes, [R, C] to [R, ceil(C * bits / 8)]."""
    if BYTE_BITS % bits == 0:
        per_byte = BYTE_BITS // bits
        codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_byte)))
        joined = codes[:, 0::per_byte].copy()
        for index in range(1, per_byte):
            joined |= codes[:, index::per_byte] << np.uint8(bits * index)
        return joined
    planes = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
    return np.packbits(planes.reshape(len(codes), -1), axis=-1, bitorder="little")


def unpack_words(words: np.ndarray, columns: int, bits: int) -> np.ndarray:
    """Unpack codes, the inverse of `pack_words`.

    Args:
      words: int32 [R, W].
      columns: codes per row, `C`.
      bits: bits per code, 1 to 8.

    Returns:
      uint8 [R, C].
    """
    stored = np.ascontiguousarray(words, "<i4").view(np.uint8)
    codes = np.empty((len(stored), columns), np.uint8)
    for start, stop in _chunks(len(stored), columns):
        codes[start:stop] = _split(stored[start:stop], bits)[:, :columns]
    return codes


def _split(stored: np.ndarray, bits: int) -> np.ndarray:
    """Split bytes into all their codes, [R, B] to [R, B * 8 // bits]."""
    if BYTE_BITS % bits == 0:
        shifts = np.arange(0, BYTE_BITS, bits, dtype=np.uint8)
        codes = (stored[..., None] >> shifts) & np.uint8(2**bits - 1)
        return codes.reshape(len(stored), -1)
    planes = np.unpackbits(stored, axis=-1, bitorder="little")
    count = planes.shape[1] // bits
    fields = planes[:, : count * bits].reshape(len(stored), count, bits)
    return np.packbits(fields, axis=-1, bitorder="little")[..., 0]


def _chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Split rows into ranges, so that intermediate arrays stay small beside the result."""
    step = max(1, CHUNK_CODES // max(1, columns))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def signed(codes: np.ndarray, middle: int) -> np.ndarray:
    """Shift unsigned codes to signed ones.

    Args:
      codes: uint8 of any shape.
      middle: code of zero, 2^(bits - 1).

    Returns:
      int8 in the same shape, `codes - middle`.
    """
    # Modulo 256, this subtraction is exact for the int8 results.
    return np.ascontiguousarray(codes - np.uint8(middle)).view(np.int8)


def unsigned(codes: np.ndarray, middle: int) -> np.ndarray:
    """Shift signed codes to unsigned ones, the inverse of `signed`.

    Args:
      codes: int8 of any shape.
      middle: code of zero, 2^(bits - 1).

    Returns:
      uint8 in the same shape, `codes + middle`.
    """
    return np.ascontiguousarray(codes).view(np.uint8) + np.uint8(middle)
