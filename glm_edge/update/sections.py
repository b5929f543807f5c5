"""Splits files into sections: tensors where a file lists them, content-defined chunks elsewhere."""

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glm_edge.checkpoint.safetensors import DTYPES, SafetensorsFile
from glm_edge.errors import UpdateError
from glm_edge.files import opened
from glm_edge.update.plan import MAX_SECTION_BYTES

MIN_CHUNK = 1 << 18
# A boundary is expected every 2**20 bytes: the upper 20 of 32 bits are zero.
_BOUNDARY_SHIFT = np.uint32(12)
_WINDOW = 32
_BLOCK = 1 << 24
# One pseudo-random value per byte. Hashes of the byte are the same with every numpy.
_GEAR = np.frombuffer(
    b"".join(hashlib.sha256(bytes([byte])).digest()[:4] for byte in range(256)), "<u4"
)


@dataclass(frozen=True, slots=True)
class Span:
    """A section of a file to publish.

    Attributes:
      name: tensor and piece, empty for a chunk.
      begin: offset of the first byte.
      size: count of bytes, at most `MAX_SECTION_BYTES`.
      stride: bytes per value.
    """

    name: str
    begin: int
    size: int
    stride: int = 1


def split(path: Path) -> list[Span]:
    """Split a file into sections.

    A `.safetensors` file is split into its header and pieces of its tensors. Other files are split
    at boundaries that depend on the 32 bytes before them, so that an insertion moves them along.

    Args:
      path: file path.

    Returns:
      Sections in order, without gaps.

    Raises:
      CheckpointError: a safetensors file is malformed.
      UpdateError: the file cannot be read.
    """
    if path.suffix == ".safetensors":
        return _tensors(path)
    return _chunks(path)


def _tensors(path: Path) -> list[Span]:
    infos = sorted(SafetensorsFile(path).tensors.items(), key=lambda item: item[1].begin)
    size, end, spans = path.stat().st_size, 0, []
    for name, info in infos:
        spans += _pieces(f"before {name}" if end else "header", end, info.begin, 1)
        spans += _pieces(f"tensor {name}", info.begin, info.end, DTYPES[info.dtype].itemsize)
        end = max(end, info.end)
    return spans + _pieces("end" if end else "header", end, size, 1)


def _pieces(name: str, begin: int, end: int, stride: int) -> list[Span]:
    # Pieces begin at multiples of the limit, so that those of equal tensors correspond.
    return [
        Span(f"{name} {at - begin}", at, min(MAX_SECTION_BYTES, end - at), stride)
        for at in range(begin, end, MAX_SECTION_BYTES)
    ]


def _chunks(path: Path) -> list[Span]:
    *inner, size = _boundaries(path)
    begin, spans = 0, []
    for boundary in (*inner, size):
        if boundary - begin < MIN_CHUNK and boundary < size:
            continue
        pieces = _pieces("", begin, boundary, 1)
        spans += [dataclasses.replace(span, name="") for span in pieces]
        begin = boundary
    return spans


def _boundaries(path: Path) -> Iterator[int]:
    """Yield each possible end of a chunk, and the size of the file last."""
    total, tail = 0, np.empty(0, np.uint8)
    with opened(path, UpdateError) as file:
        while block := file.read(_BLOCK):
            data = np.concatenate([tail, np.frombuffer(block, np.uint8)])
            # h[i] = sum over k < 32 of gear[byte[i - k]] << k, by doubling the window five times.
            hashes = _GEAR[data]
            for window in (1, 2, 4, 8, 16):
                hashes[window:] += hashes[:-window] << np.uint32(window)
            for end in np.flatnonzero(hashes >> _BOUNDARY_SHIFT == 0) + 1:
                if end > len(tail):
                    yield total - len(tail) + int(end)
            total += len(block)
            tail = data[-(_WINDOW - 1) :]
    yield total
