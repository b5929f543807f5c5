"""Safetensors files: checked headers, aligned reads on demand, and writes."""

import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from glm_edge.errors import CheckpointError
from glm_edge.files import fill, json_object, opened, read_span, version_of

WEIGHTS = "model.safetensors"
MAX_DIMENSIONS = 16
MAX_NAME_LENGTH = 500
BLOCK_BYTES = 1 << 19

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
_EXPONENTS: dict[Any, Any] = {
    np.dtype(jnp.bfloat16): np.uint16(0x7F80),
    np.dtype(np.float16): np.uint16(0x7C00),
    np.dtype(np.float32): np.uint32(0x7F800000),
    np.dtype(np.float64): np.uint64(0x7FF0000000000000),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Type, shape and byte range of a tensor in its file.

    Attributes:
      dtype: safetensors name of the type, such as `BF16`.
      shape: shape of the tensor.
      begin: offset of the first byte in the file.
      end: offset one past the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.end - self.begin


class SafetensorsFile:
    """A safetensors file with a checked header, whose tensors are read on demand.

    The file is open only during a read.

    Attributes:
      path: file path.
      tensors: `TensorInfo` by name, in the order of the header.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header.

        Args:
          path: file path.

        Raises:
          CheckpointError: the file is missing, truncated, or not a safetensors file.

        References:
          https://github.com/huggingface/safetensors#format
        """
        self.path = Path(path)
        with opened(self.path) as file:
            self._version = version_of(file)
            self.tensors = _read_header(self.path, file)

    def read(self, name: str) -> np.ndarray:
        """Read a tensor into new memory, aligned such that `to_device` needs no copy.

        Args:
          name: name of the tensor.

        Returns:
          A writable array.

        Raises:
          CheckpointError: the file was truncated or changed, or is damaged.
        """
        info = self.tensors[name]
        return self._read(name, info.begin, info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read only the bytes of `tensor[start:stop]`.

        Args:
          name: name of the tensor, which has at least one dimension.
          start: first row, at least 0.
          stop: one past the last row, at most the count of rows.

        Returns:
          A writable array of shape `[stop - start, ...]`.

        Raises:
          CheckpointError: the rows do not exist, or the file was truncated or changed.
        """
        info = self.tensors[name]
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise CheckpointError(
                f"{self.path}: tensor {name!r}: rows {start} to {stop} do not exist in shape "
                f"{info.shape}"
            )
        row = math.prod(info.shape[1:]) * DTYPES[info.dtype].itemsize
        return self._read(name, info.begin + start * row, (stop - start, *info.shape[1:]))

    def _read(self, name: str, begin: int, shape: tuple[int, ...]) -> np.ndarray:
        where, dtype = f"{self.path}: tensor {name!r}", DTYPES[self.tensors[name].dtype]
        size = math.prod(shape) * dtype.itemsize
        raw = read_span(self.path, begin, size, self._version, where)
        if dtype == np.bool_ and raw.max(initial=0) > 1:
            raise CheckpointError(f"{where}: a BOOL must be the byte 0 or 1, found {raw.max()}")
        return raw.view(dtype).reshape(shape)


def by_tensor(files: Iterable[SafetensorsFile]) -> dict[str, SafetensorsFile]:
    """Map each tensor to its file.

    Args:
      files: safetensors files.

    Returns:
      File by tensor name.

    Raises:
      CheckpointError: two files contain a tensor of the same name.
    """
    files_by_tensor: dict[str, SafetensorsFile] = {}
    for file in files:
        duplicates = sorted(set(file.tensors) & set(files_by_tensor))
        if duplicates:
            other = files_by_tensor[duplicates[0]].path.name
            raise CheckpointError(f"{file.path}: tensor {duplicates[0]!r} is also in {other}")
        files_by_tensor.update(dict.fromkeys(file.tensors, file))
    return files_by_tensor


def to_device(array: np.ndarray, sharding: Any = None) -> jax.Array:
    """Move an array to a jax device; on the host, jax uses its memory without a copy.

    Args:
      array: array of any type, which callers must not modify afterwards.
      sharding: a sharding or device; None means the default device.

    Returns:
      The jax array, after the transfer has finished, so that transfer buffers are free.
    """
    array.flags.writeable = False
    return jax.device_put(array, sharding, may_alias=True).block_until_ready()


def _read_header(path: Path, file: io.FileIO) -> dict[str, TensorInfo]:
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise CheckpointError(
            f"{path}: {size} bytes are too few for a safetensors file (8 bytes of length, "
            "a JSON header, tensors)"
        )
    prefix = np.empty(8, np.uint8)
    fill(file, prefix, str(path))
    length = int.from_bytes(prefix.tobytes(), "little")
    if length > size - 8:
        raise CheckpointError(
            f"{path}: the first 8 bytes declare a header of {length} bytes, but the file has "
            f"{size}; it is truncated or not a safetensors file"
        )
    header = json_object(file, length, f"{path}: not a safetensors file? Its header")
    header.pop("__metadata__", None)
    tensors = {
        name: _tensor_info(path, name, entry, 8 + length, size) for name, entry in header.items()
    }
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def _tensor_info(path: Path, name: str, entry: Any, start: int, size: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if len(name) > MAX_NAME_LENGTH:
        raise CheckpointError(f"{path}: a tensor's name has {len(name)} characters")
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape = fields.get("dtype"), fields.get("shape")
    offsets = fields.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: header entry must have dtype, shape and two data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{where}: type {str(dtype)[:40]!r} is unknown; known: {', '.join(DTYPES)}"
        )
    begin, end = start + offsets[0], start + offsets[1]
    if end > size:
        raise CheckpointError(
            f"{where}: ends at byte {end}, the file has {size}; it is truncated, download it again"
        )
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != needed:
        raise CheckpointError(
            f"{where}: data_offsets span {end - begin} bytes, but {dtype} of shape {tuple(shape)} "
            f"needs {needed}"
        )
    if math.prod(max(length, 1) for length in shape) >= 1 << 48:
        raise CheckpointError(f"{where}: shape {tuple(shape)} exceeds the size of any array")
    return TensorInfo(dtype, tuple(shape), begin, end)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= MAX_DIMENSIONS
        and all(type(x) is int and 0 <= x < 1 << 63 for x in value)
    )


def _check_layout(path: Path, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    position = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise CheckpointError(
                f"{path}: tensor {name!r}: begins at byte {info.begin}, the previous one ends "
                f"at {position}; tensors must follow each other without gap or overlap"
            )
        position = info.end
    if position != size:
        raise CheckpointError(
            f"{path}: tensors end at byte {position}, the file has {size}; nothing may follow them"
        )


def write_safetensors(
    path: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays one by one; equal arrays produce equal bytes.

    Args:
      path: file path.
      arrays: arrays by name, of the types of `DTYPES`.
      metadata: strings for the header.

    Raises:
      CheckpointError: the format has no name for an array's type.
    """
    for name, array in arrays.items():
        if np.dtype(array.dtype) not in _NAMES:
            raise CheckpointError(f"{path}: tensor {name!r}: safetensors has no type {array.dtype}")
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
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
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in order:
            file.write(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)


def check_finite(array: np.ndarray, where: str) -> None:
    """Refuse NaN and infinity; check in blocks, so that a large tensor needs no copy.

    Args:
      array: array of any type; integers and booleans pass.
      where: file and tensor for the message.

    Raises:
      CheckpointError: an entry is not finite.
    """
    if array.dtype.kind in "biu":
        return
    flat = array.reshape(-1)
    size = BLOCK_BYTES // array.dtype.itemsize
    # NaN and infinity have all bits of the exponent set; integers compare faster than bfloat16.
    exponent = _EXPONENTS.get(array.dtype)
    bits = flat if exponent is None else flat.view(exponent.dtype)
    scratch = np.empty(min(size, flat.size), bits.dtype)
    for start in range(0, flat.size, size):
        block = bits[start : start + size]
        if exponent is not None:
            masked = np.bitwise_and(block, exponent, out=scratch[: block.size])
            if masked.max() < exponent:
                continue
        finite = np.isfinite(flat[start : start + size])
        if not finite.all():
            index = np.unravel_index(start + int(np.argmin(finite)), array.shape)
            value = flat[start + int(np.argmin(finite))]
            raise CheckpointError(
                f"{where}: is {value} at {[int(i) for i in index]}; weights must be finite"
            )
