"""Encoding of a section against old bytes, and its exact inverse."""

import functools
from typing import Any

import numpy as np

from glm_edge.errors import UpdateError, require
from glm_edge.update.plan import MAX_BASE_BYTES, MAX_SECTION_BYTES

LEVEL = 12
# Dictionary and section together; a device allocates at most this window.
_WINDOW_LOG = (MAX_BASE_BYTES + MAX_SECTION_BYTES - 1).bit_length()


def compress(content: bytes, base: bytes = b"", level: int = LEVEL) -> bytes:
    """Compress bytes with zstd.

    Args:
      content: bytes to compress.
      base: dictionary; empty compresses without one.
      level: level of zstd, 1 to 22.

    Returns:
      One zstd frame, which declares its size.
    """
    zstandard = require("zstandard", extra="update")
    # The window covers the dictionary, and so must the table of positions: the small table of a low
    # level forgets the beginning of the dictionary.
    window_log = max(10, (len(base) + len(content)).bit_length())
    tables = {"hash_log": window_log} if base else {}
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, window_log=window_log, write_content_size=True, write_dict_id=False, **tables
    )
    dictionary = _dictionary(base) if base else None
    writer = zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters)
    return writer.compress(content)


def decompress(packed: bytes, size: int, where: str, base: bytes = b"") -> bytes:
    """Invert `compress`.

    Args:
      packed: zstd frame.
      size: expected count of bytes.
      where: name for messages.
      base: the dictionary of `compress`.

    Returns:
      The bytes.

    Raises:
      UpdateError: the frame is damaged, or has another size.
    """
    zstandard = require("zstandard", extra="update")
    try:
        if zstandard.frame_content_size(packed) != size:
            raise UpdateError(f"{where}: does not decompress to {size} bytes")
        dictionary = _dictionary(base) if base else None
        reader = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=1 << _WINDOW_LOG)
        return reader.decompress(packed)
    except zstandard.ZstdError as error:
        raise UpdateError(f"{where}: cannot be decompressed: {error}") from error


def encode(content: bytes, base: bytes, stride: int, level: int = LEVEL) -> dict[str, bytes]:
    """Encode bytes against old ones by every method that applies.

    Codes of re-quantized weights differ in few bits (`xor`) or by one step (`subtract`). Healed
    floats share their upper bytes, which the stride brings together.

    Args:
      content: new bytes.
      base: old bytes, not empty.
      stride: bytes per value.
      level: level of zstd.

    Returns:
      zstd frame by method.
    """
    encoded = {"patch": compress(content, base, level)}
    if len(base) == len(content) and len(content) % stride == 0:
        new, old = _planes(content, stride), _planes(base, stride)
        encoded["xor"] = compress((new ^ old).tobytes(), level=level)
        encoded["subtract"] = compress((new - old).tobytes(), level=level)
    return encoded


def decode(method: str, packed: bytes, base: bytes, size: int, stride: int, where: str) -> bytes:
    """Invert `encode`.

    Args:
      method: `plain`, `patch`, `xor` or `subtract`.
      packed: zstd frame.
      base: old bytes.
      size: expected count of bytes.
      stride: bytes per value.
      where: name for messages.

    Returns:
      The new bytes.

    Raises:
      UpdateError: the frame is damaged, or does not match the base.
    """
    if method in ("plain", "patch"):
        return decompress(packed, size, where, base if method == "patch" else b"")
    change = np.frombuffer(decompress(packed, size, where), np.uint8)
    old = _planes(base, stride)
    if old.size != size:
        raise UpdateError(f"{where}: the installed bytes have another size")
    planes = old ^ change if method == "xor" else old + change
    return planes.reshape(stride, -1).T.tobytes()


def _planes(content: bytes, stride: int) -> np.ndarray:
    """Return byte 0 of every value, then byte 1, and so on."""
    return np.frombuffer(content, np.uint8).reshape(-1, stride).T.reshape(-1)


@functools.lru_cache(maxsize=1)
def _dictionary(base: bytes) -> Any:
    zstandard = require("zstandard", extra="update")
    return zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
