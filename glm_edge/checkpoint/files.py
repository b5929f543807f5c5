"""Files of a checkpoint: safetensors read by memory map, JSON, directories that appear whole."""

import contextlib
import json
import math
import os
import shutil
import struct
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from glm_edge.errors import CheckpointError, OutputError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
FINITE_BLOCK = 1 << 22

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file.

    Attributes:
      dtype: safetensors name of the type, such as `BF16`.
      shape: of the tensor.
      begin: first byte in the file.
      end: one past the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A safetensors file whose header has been checked; tensors are read on demand.

    Attributes:
      path: of the file.
      tensors: name to `TensorInfo`, in the header's order.
    """

    def __init__(self, path: Path):
        """Reads and checks the header.

        Args:
          path: of the file.

        Raises:
          CheckpointError: the file is missing, truncated, or not a safetensors file.

        References:
          https://github.com/huggingface/safetensors#format
        """
        self.path = Path(path)
        self.tensors = _read_header(self.path)
        self._bytes = np.memmap(self.path, np.uint8, mode="r")

    def read(self, name: str) -> np.ndarray:
        """Returns a read-only view of a tensor in the memory map."""
        info = self.tensors[name]
        raw = self._bytes[info.begin : info.end]
        return raw.view(DTYPES[info.dtype]).reshape(info.shape)


def _read_header(path: Path) -> dict[str, TensorInfo]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(
                    f"{path}: {size} bytes are too few for a safetensors file (8 of length, "
                    "a JSON header, tensors)"
                )
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: the first 8 bytes ask for a header of {length} bytes, the file has "
                    f"{size}; it is truncated or not a safetensors file"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, its header is not JSON") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file, its header is not an object")
    header.pop("__metadata__", None)
    tensors = {
        name: _tensor_info(path, name, entry, 8 + length, size) for name, entry in header.items()
    }
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def _tensor_info(path: Path, name: str, entry: Any, start: int, size: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape = fields.get("dtype"), fields.get("shape")
    offsets = fields.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: header entry must hold dtype, shape and two data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: type {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    begin, end = start + offsets[0], start + offsets[1]
    if end > size:
        raise CheckpointError(
            f"{where}: ends at byte {end}, the file has {size}; it is truncated, fetch it again"
        )
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != needed:
        raise CheckpointError(
            f"{where}: data_offsets span {end - begin} bytes, {dtype} of shape {tuple(shape)} "
            f"takes {needed}"
        )
    return TensorInfo(dtype, tuple(shape), begin, end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and x >= 0 for x in value)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    position = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise CheckpointError(
                f"{path}: tensor {name!r}: begins at byte {info.begin}, the one before ends at "
                f"{position}; tensors must follow each other without gap or overlap"
            )
        position = info.end
    if position != size:
        raise CheckpointError(
            f"{path}: tensors end at byte {position}, the file has {size}; nothing may follow them"
        )


def write_safetensors(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays one by one; the same arrays give the same bytes.

    Args:
      path: of the file.
      arrays: name to array; types as in `DTYPES`.

    Raises:
      CheckpointError: the format has no name for an array's type.
    """
    for name, array in arrays.items():
        if np.dtype(array.dtype) not in _NAMES:
            raise CheckpointError(f"{path}: tensor {name!r}: safetensors has no type {array.dtype}")
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header, offset = {}, 0
    for name in order:
        array = arrays[name]
        end = offset + array.size * array.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[np.dtype(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name in order:
            file.write(np.ascontiguousarray(np.asarray(arrays[name])).tobytes())


def check_finite(array: np.ndarray, where: str) -> None:
    """Refuses NaN and infinity, block by block so that a large tensor needs no copy.

    Args:
      array: of any type; integers and booleans pass.
      where: file and tensor, for the message.

    Raises:
      CheckpointError: an entry is not finite.
    """
    if array.dtype.kind in "biu":
        return
    flat = array.reshape(-1)
    for start in range(0, flat.size, FINITE_BLOCK):
        finite = np.isfinite(flat[start : start + FINITE_BLOCK])
        if not finite.all():
            index = np.unravel_index(start + int(np.argmin(finite)), array.shape)
            value = flat[start + int(np.argmin(finite))]
            raise CheckpointError(
                f"{where}: holds {value} at {[int(i) for i in index]}; weights must be finite"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      path: of the file.

    Returns:
      The object.

    Raises:
      CheckpointError: the file is missing or does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, found {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object, keys in the order given."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_directory(target: Path, overwrite: bool) -> Iterator[Path]:
    """Gives a temporary directory beside `target` that takes its place when all went well.

    Args:
      target: directory to create; an empty one may exist.
      overwrite: replaces an existing checkpoint (a directory that holds a config.json).

    Yields:
      The temporary directory. After an error it is removed and `target` is as it was.

    Raises:
      OutputError: `target` exists and may not be replaced, or its parent cannot be written.
    """
    target = Path(os.path.abspath(target))
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        _check_target(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror}") from error
    try:
        yield temporary
        _sync(temporary)
        _take_place(temporary, target)
        _sync_path(target.parent)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        if not any(target.iterdir()) or (overwrite and (target / CONFIG).is_file()):
            return
        if overwrite:
            raise OutputError(
                f"{target}: is not a checkpoint (no {CONFIG}), so overwrite=True leaves it alone; "
                "remove it or name another directory"
            )
        raise OutputError(
            f"{target}: exists and is not empty; name another directory or pass overwrite=True"
        )
    if target.exists() or target.is_symlink():
        raise OutputError(f"{target}: exists and is not a directory; name another path")


def _sync(directory: Path) -> None:
    for folder, _, names in os.walk(directory, topdown=False):
        for path in (*(os.path.join(folder, name) for name in names), folder):
            _sync_path(path)


def _sync_path(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_place(temporary: Path, target: Path) -> None:
    if not target.is_dir() or not any(target.iterdir()):
        os.replace(temporary, target)
        return
    # A directory cannot replace a full one in one step: the old one steps aside first.
    aside = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.old"
    os.replace(target, aside)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
