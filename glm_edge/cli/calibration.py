"""Calibration batches from a file."""

import io
import math
import os
import zipfile
from typing import Any

import numpy as np
from numpy.lib import format as npy
from tokenizers import Tokenizer

from glm_edge.cli import corpora
from glm_edge.errors import DataError
from glm_edge.files import opened, shown_path

Batch = dict[str, Any]
MAX_ARRAY_BYTES = 1 << 32
MAX_ROWS = 1 << 20
# numpy reads members in pieces of 256 KiB; only a directory of very many members needs a larger
# read.
_MAX_PIECE = 1 << 20
_ENCRYPTED = 1
_HEADERS = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
}


def from_file(
    path: str, tokenizer: Tokenizer | None, count: int, length: int, batch: int
) -> list[Batch]:
    """Read calibration batches.

    Args:
      path: UTF-8 text, or an .npz file whose arrays have the same number of rows.
      tokenizer: tokenizer of the model; only text needs it.
      count: number of evenly spaced windows of text.
      length: tokens per window of text.
      batch: rows per batch.

    Returns:
      Batches of `tokens` [batch, length], and of the other arrays of an .npz file.

    Raises:
      DataError: the file cannot be read or is too short, or the tokenizer is missing.
    """
    if path.endswith(".npz"):
        arrays = read_arrays(path)
        rows = len(next(iter(arrays.values())))
        starts = range(0, rows, batch)
        return [{k: v[i : i + batch] for k, v in arrays.items()} for i in starts]
    if tokenizer is None:
        raise DataError(
            f"{path}: text needs the model's tokenizer.json; otherwise pass an .npz file"
        )
    ids = corpora.encode_text(tokenizer, corpora.read_text(path))
    if len(ids) < length:
        raise DataError(f"{path}: {len(ids)} tokens are fewer than one window of {length}")
    windows = ids[: len(ids) // length * length].reshape(-1, length).astype(np.int32)
    chosen = windows[np.unique(np.linspace(0, len(windows) - 1, count).astype(int))]
    return [{"tokens": chosen[i : i + batch]} for i in range(0, len(chosen), batch)]


def read_arrays(path: str) -> dict[str, np.ndarray]:
    """Read an untrusted .npz file.

    Args:
      path: path of the file; its arrays are numeric or boolean, and not empty.

    Returns:
      Arrays by name, all with the same number of rows.

    Raises:
      DataError: the file cannot be read, is damaged, contains other data, or exceeds
        `MAX_ARRAY_BYTES` or `MAX_ROWS`.
    """
    shown = shown_path(path)
    with opened(path, DataError) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_ARRAY_BYTES:
            raise DataError(f"{shown}: has {size} bytes; the maximum is {MAX_ARRAY_BYTES}")
        try:
            with zipfile.ZipFile(_Pieces(file)) as archive:
                arrays = _members(archive, shown)
        except DataError:
            raise
        # For a damaged file, zipfile and numpy raise exceptions of a dozen classes.
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or "it is truncated"
            raise DataError(f"{shown}: cannot be read as arrays: {reason}") from error
    if not arrays:
        raise DataError(f"{shown}: contains no array; calibration needs at least the array tokens")
    for name, array in arrays.items():
        if not array.ndim:
            raise DataError(f"{shown}: {name[:60]!r} is a scalar; all arrays need rows")
        if not array.size:
            raise DataError(f"{shown}: {name[:60]!r} of shape {array.shape} is empty")
    rows = {name: len(array) for name, array in arrays.items()}
    if len(set(rows.values())) != 1:
        raise DataError(
            f"{shown}: all arrays must have the same number of rows; found {str(rows)[:200]}"
        )
    if max(rows.values()) > MAX_ROWS:
        raise DataError(f"{shown}: {max(rows.values())} rows; the maximum is {MAX_ROWS}")
    return arrays


class _Pieces(io.BufferedReader):
    """A reader that limits the size of single reads, against archives with millions of members."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > _MAX_PIECE:
            raise zipfile.BadZipFile(f"its directory claims {size} bytes")
        return super().read(size)


def _members(archive: zipfile.ZipFile, where: str) -> dict[str, np.ndarray]:
    """Read the arrays of an archive after checking the sum of their declared sizes."""
    members = archive.infolist()
    total = sum(member.file_size for member in members)
    if total > MAX_ARRAY_BYTES:
        raise DataError(f"{where}: its arrays have {total} bytes; the maximum is {MAX_ARRAY_BYTES}")
    arrays = {}
    for member in members:
        name = member.filename.removesuffix(".npy")
        if name in arrays:
            raise DataError(f"{where}: holds {name[:60]!r} twice")
        # For other compressions, which numpy does not write, zipfile does not limit the
        # decompressed size of a piece.
        packed = member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if packed or member.flag_bits & _ENCRYPTED:
            raise DataError(
                f"{where}: {name[:60]!r} is encrypted or compressed in a way that numpy does not "
                "write; use np.savez or np.savez_compressed"
            )
        _check_header(archive, member, f"{where}: {name[:60]!r}")
        with archive.open(member) as file:
            arrays[name] = npy.read_array(file, allow_pickle=False)
    return arrays


def _check_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo, where: str) -> None:
    """Reject a member that is not a numeric array of its declared size, without reading it."""
    with archive.open(member) as file:
        version = npy.read_magic(file)
        if version not in _HEADERS:
            raise DataError(f"{where} is not a numeric array")
        shape, _, dtype = _HEADERS[version](file)
        if dtype.kind not in "biuf":
            raise DataError(f"{where} has type {str(dtype)[:60]}; it must be numeric or boolean")
        claimed, stored = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
    if min(shape, default=0) < 0 or claimed != stored:
        raise DataError(f"{where} of shape {str(shape)[:60]} does not match its {stored} bytes")
