"""GGUF files: checked header, metadata and tensor table, and reads of stored bytes on demand."""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glm_edge.errors import CheckpointError
from glm_edge.files import (
    CONFIG,
    BinaryFile,
    file_inside,
    fill,
    opened,
    read_span,
    shown_path,
    version_of,
)

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
# Bounds of the header. The largest published vocabularies have 262,144 tokens and 515,000 merges.
MAX_HEADER_BYTES = 1 << 26
MAX_FIELDS = 1 << 12
MAX_VALUES = 1 << 21
MAX_TENSORS = 1 << 16
MAX_NAME = 256
MAX_STRING = 1 << 20
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16
BLOCK_BYTES = 1 << 18

# Types of metadata values by code: name and struct format. Strings and arrays have no format.
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_BOOL, _FLOAT32 = 7, 6

# Values and bytes per block of the types that this library reads.
BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q8_0": (32, 34),
}
# Types of tensors by code; the codes of removed types are missing.
TYPES = {
    **dict(enumerate(("F32", "F16", "Q4_0", "Q4_1"))),
    **dict(enumerate(("Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), 6)),
    **dict(enumerate(("Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S"), 15)),
    **dict(enumerate(("IQ2_S", "IQ4_XS", "I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16"), 22)),
    **dict(enumerate(("TQ1_0", "TQ2_0"), 34)),
    39: "MXFP4",
}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Type, shape and position of a tensor in its file.

    Attributes:
      kind: name of the type, a key of `BLOCKS`.
      shape: shape with the contiguous axis last, the reverse of the file's order.
      begin: offset of the first byte in the file.
    """

    kind: str
    shape: tuple[int, ...]
    begin: int

    @property
    def num_rows(self) -> int:
        """Count of rows; a vector is one row."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, the values along the last axis."""
        values, size = BLOCKS[self.kind]
        return self.shape[-1] // values * size

    @property
    def bytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.num_rows * self.row_bytes


class GGUFFile:
    """A GGUF file with a checked header, whose tensors are read on demand.

    The file is open only during a read.

    Attributes:
      path: file path.
      metadata: values by key: numbers, booleans, strings, and lists of these.
      tensors: `GGUFTensor` by name, in the order of the file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Read and check the header.

        Args:
          path: file path.

        Raises:
          CheckpointError: the file is missing, truncated, damaged, of an unknown version, or
            contains a tensor of an unsupported type.

        References:
          https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
        """
        self.path = Path(path)
        with opened(self.path) as file:
            self._version = version_of(file)
            cursor = _Cursor(self.path, file, self._version[0])
            num_tensors, num_fields = _read_counts(cursor)
            self.metadata = _read_metadata(cursor, num_fields)
            self.tensors = _read_tensors(cursor, num_tensors, _alignment(cursor, self.metadata))

    def read_rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read the stored bytes of rows of a tensor, its values along the last axis.

        Args:
          name: name of the tensor.
          start: first row, at least 0.
          stop: one past the last row; None reads to the end.

        Returns:
          uint8 [rows, bytes per row].

        Raises:
          CheckpointError: the rows do not exist, or the file was truncated or changed.
        """
        info = self.tensors[name]
        stop = info.num_rows if stop is None else stop
        where = f"{self.path}: tensor {name!r}"
        if not 0 <= start <= stop <= info.num_rows:
            raise CheckpointError(
                f"{where}: rows {start} to {stop} do not exist in shape {info.shape}"
            )
        size, begin = (stop - start) * info.row_bytes, info.begin + start * info.row_bytes
        raw = read_span(self.path, begin, size, self._version, where)
        return raw.reshape(stop - start, info.row_bytes)


def find_gguf(path: str | os.PathLike) -> Path | None:
    """Find the GGUF file that a checkpoint path names.

    Args:
      path: a file, or a directory. A directory with a config.json is not a GGUF checkpoint.

    Returns:
      The file itself if it ends in `.gguf` or begins like one, the only `.gguf` file of the
      directory, or None.

    Raises:
      CheckpointError: the directory has several such files, its file is a link that leaves it, or
        the file cannot be read.
    """
    path = Path(path)
    if os.path.isfile(path):
        # Files of a download cache are named by their hash.
        return path if path.suffix == SUFFIX or _begins_like_gguf(path) else None
    if not os.path.isdir(path) or os.path.lexists(path / CONFIG):
        return None
    names = sorted(file.name for file in path.glob(f"*{SUFFIX}"))
    if len(names) > 1:
        raise CheckpointError(
            f"{shown_path(path)}: has {len(names)} GGUF files, such as {names[0]} and {names[1]}; "
            "pass the path of one of them"
        )
    return file_inside(path, names[0]) if names else None


def _begins_like_gguf(path: Path) -> bool:
    with opened(path) as file:
        return file.read(len(MAGIC)) == MAGIC


class _Cursor:
    """A reader of the header, which never exceeds the file or `MAX_HEADER_BYTES`.

    Attributes:
      where: file for messages.
      size: size of the file in bytes.
      position: offset of the next byte.
    """

    def __init__(self, path: Path, file: BinaryFile, size: int) -> None:
        self.where, self.size = str(path), size
        self.position = 0
        self._file, self._values = file, 0
        self._block, self._start = memoryview(b""), 0

    def take(self, count: int, part: str) -> memoryview:
        """Return the next bytes; `part` describes them for messages."""
        if count > self.size - self.position:
            raise CheckpointError(
                f"{self.where}: {part} needs {count} bytes at byte {self.position}, the file has "
                f"{self.size}; it is truncated or damaged"
            )
        if self.position + count > MAX_HEADER_BYTES:
            raise CheckpointError(f"{self.where}: its header exceeds {MAX_HEADER_BYTES} bytes")
        at = self.position - self._start
        if at + count > len(self._block):
            self._fetch(max(count, BLOCK_BYTES))
            at = 0
        self.position += count
        return self._block[at : at + count]

    def _fetch(self, count: int) -> None:
        target = np.empty(min(count, self.size - self.position), np.uint8)
        self._file.seek(self.position)
        fill(self._file, target, self.where)
        self._block, self._start = target.data, self.position

    def unpack(self, layout: str, part: str) -> Any:
        """Return the next little-endian number."""
        layout = f"<{layout}"
        return struct.unpack(layout, self.take(struct.calcsize(layout), part))[0]

    def text(self, part: str, limit: int = MAX_STRING) -> str:
        """Return the next string, a length and UTF-8 bytes."""
        length = self.unpack("Q", part)
        if length > limit:
            raise CheckpointError(
                f"{self.where}: {part} has {length} bytes of text; the limit is {limit}"
            )
        try:
            return str(self.take(length, part), "utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.where}: {part} is not UTF-8: {error}") from error

    def count_values(self, count: int, part: str) -> None:
        """Add to the values of the metadata, and refuse too many before they are read."""
        self._values += count
        if self._values > MAX_VALUES:
            raise CheckpointError(
                f"{self.where}: {part} has {count} values; the limit of all is {MAX_VALUES}"
            )


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """Read magic, version and the counts of tensors and fields."""
    magic = bytes(cursor.take(4, "the magic number"))
    if magic != MAGIC:
        raise CheckpointError(
            f"{cursor.where}: not a GGUF file: begins with {magic!r} instead of {MAGIC!r}"
        )
    version = cursor.unpack("I", "the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        reason = "is big-endian" if swapped else f"has version {version}"
        raise CheckpointError(
            f"{cursor.where}: {reason}; this library reads little-endian GGUF of versions "
            f"{' and '.join(map(str, VERSIONS))}"
        )
    counts = []
    for part, limit in (("tensors", MAX_TENSORS), ("fields", MAX_FIELDS)):
        counts.append(cursor.unpack("Q", f"the count of {part}"))
        if counts[-1] > limit:
            raise CheckpointError(
                f"{cursor.where}: declares {counts[-1]} {part}; the limit is {limit}"
            )
    return counts[0], counts[1]


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        key = cursor.text(f"the name of field {index}", MAX_NAME)
        if key in metadata:
            raise CheckpointError(f"{cursor.where}: field {key!r} appears twice")
        part = f"field {key!r}"
        metadata[key] = _read_value(cursor, cursor.unpack("I", part), part)
    return metadata


def _read_value(cursor: _Cursor, kind: int, part: str) -> Any:
    if kind == _STRING:
        return cursor.text(part)
    if kind in _SCALARS:
        return _read_numbers(cursor, kind, 1, part)[0]
    if kind != _ARRAY:
        raise CheckpointError(f"{cursor.where}: {part} has the unknown type {kind}")
    inner, length = cursor.unpack("I", part), cursor.unpack("Q", part)
    cursor.count_values(length, part)
    if inner == _STRING:
        return [cursor.text(part) for _ in range(length)]
    if inner not in _SCALARS:
        raise CheckpointError(
            f"{cursor.where}: {part} is an array of the unsupported type {inner}; it must contain "
            "numbers or strings"
        )
    return _read_numbers(cursor, inner, length, part)


def _read_numbers(cursor: _Cursor, kind: int, count: int, part: str) -> list[Any]:
    layout = "B" if kind == _BOOL else _SCALARS[kind]
    raw = np.frombuffer(cursor.take(count * struct.calcsize(layout), part), f"<{layout}")
    if kind == _BOOL:
        if raw.max(initial=0) > 1:
            raise CheckpointError(
                f"{cursor.where}: {part} is a boolean {raw.max()}; it must be the byte 0 or 1"
            )
        return [bool(value) for value in raw]
    if kind == _FLOAT32:
        # The shortest decimal, so that an epsilon of 1e-5 is not 9.999999747378752e-06.
        return [float(str(value)) for value in raw]
    return raw.tolist()


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    value = metadata.get(ALIGNMENT, 32)
    if type(value) is not int or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise CheckpointError(
            f"{cursor.where}: field {ALIGNMENT!r} is {value!r:.60}; it must be a power of two in "
            f"8..{MAX_ALIGNMENT}"
        )
    return value


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GGUFTensor]:
    described = [_read_tensor(cursor, index) for index in range(count)]
    # Data follows the header; each tensor follows the previous one, at the next multiple.
    start = position = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, kind, shape, offset in described:
        where = f"{cursor.where}: tensor {name!r}"
        if name in tensors:
            raise CheckpointError(f"{where}: appears twice")
        info = GGUFTensor(kind, shape, start + offset)
        if info.begin != position:
            raise CheckpointError(
                f"{where}: begins at byte {info.begin}, the previous one ends before {position}; "
                "tensors must follow each other without gap or overlap"
            )
        if info.bytes > cursor.size - info.begin:
            raise CheckpointError(
                f"{where}: ends at byte {info.begin + info.bytes}, the file has {cursor.size}; it "
                "is truncated, download it again"
            )
        tensors[name] = info
        position = -(-(info.begin + info.bytes) // alignment) * alignment
    if cursor.size > position:
        raise CheckpointError(
            f"{cursor.where}: tensors end at byte {position}, the file has {cursor.size}; nothing "
            "may follow them"
        )
    return tensors


def _read_tensor(cursor: _Cursor, index: int) -> tuple[str, str, tuple[int, ...], int]:
    """Read name, type, shape and offset of a tensor."""
    name = cursor.text(f"the name of tensor {index}", MAX_NAME)
    part = f"tensor {name!r}"
    where = f"{cursor.where}: {part}"
    dimensions = cursor.unpack("I", part)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise CheckpointError(
            f"{where}: has {dimensions} dimensions; it must have 1 to {MAX_DIMENSIONS}"
        )
    shape = tuple(cursor.unpack("Q", part) for _ in range(dimensions))[::-1]
    code = cursor.unpack("I", part)
    kind = TYPES.get(code, f"of code {code}")
    if kind not in BLOCKS:
        raise CheckpointError(
            f"{where}: type {kind} is unsupported; supported: {', '.join(BLOCKS)}; convert the "
            "file, for example with llama-quantize to Q8_0"
        )
    if min(shape) < 1 or math.prod(shape) >= 1 << 48:
        raise CheckpointError(f"{where}: shape {shape} is not that of an array")
    if shape[-1] % BLOCKS[kind][0]:
        raise CheckpointError(
            f"{where}: has rows of {shape[-1]} values, not a multiple of the {BLOCKS[kind][0]} "
            f"values of a {kind} block"
        )
    return name, kind, shape, cursor.unpack("Q", part)
