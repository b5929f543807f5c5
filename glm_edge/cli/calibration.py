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
# numpy reads members in pieces of 256 KiB; only a directory of very many takes more at once.
_MAX_PIECE = 1 << 20
_ENCRYPTED = 1
_HEADERS = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
}


def from_file(
    path: str, tokenizer: Tokenizer | None, count: int, length: int, batch: int
) -> list[Batch]:
    """Reads calibration batches.

    Args:
      path: UTF-8 text, or an .npz file of arrays with as many rows each.
      tokenizer: of the model; only text needs it.
      count: windows of text, taken evenly from it.
      length: tokens of a window of text.
      batch: rows of a batch.

    Returns:
      Batches of `tokens` [batch, length] and of what else an .npz file holds.

    Raises:
      DataError: the file cannot be read, is too short, or there is no tokenizer.
    """
    if path.endswith(".npz"):
        arrays = read_arrays(path)
        rows = len(next(iter(arrays.values())))
        starts = range(0, rows, batch)
        return [{k: v[i : i + batch] for k, v in arrays.items()} for i in starts]
    if tokenizer is None:
        raise DataError(f"{path}: text needs the model's tokenizer.json; or give an .npz file")
    ids = corpora.encode_text(tokenizer, corpora.read_text(path))
    if len(ids) < length:
        raise DataError(f"{path}: {len(ids)} tokens are fewer than one window of {length}")
    windows = ids[: len(ids) // length * length].reshape(-1, length).astype(np.int32)
    chosen = windows[np.unique(np.linspace(0, len(windows) - 1, count).astype(int))]
    return [{"tokens": chosen[i : i + batch]} for i in range(0, len(chosen), batch)]


def read_arrays(path: str) -> dict[str, np.ndarray]:
    """Reads an untrusted .npz file.

    Args:
      path: of the file; it holds numbers or booleans, no array is empty.

    Returns:
      Arrays by name, of as many rows each.

    Raises:
      DataError: the file cannot be read, is damaged, holds something else, or takes more than
        `MAX_ARRAY_BYTES` or `MAX_ROWS`.
    """
    shown = shown_path(path)
    with opened(path, DataError) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_ARRAY_BYTES:
            raise DataError(f"{shown}: holds {size} bytes; at most {MAX_ARRAY_BYTES} are read")
        try:
            with zipfile.ZipFile(_Pieces(file)) as archive:
                arrays = _members(archive, shown)
        except DataError:
            raise
        # Of a damaged file, zipfile and numpy raise errors of a dozen classes.
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or "it ends too early"
            raise DataError(f"{shown}: cannot be read as arrays: {reason}") from error
    if not arrays:
        raise DataError(f"{shown}: holds no array; calibration needs one of tokens at least")
    for name, array in arrays.items():
        if not array.ndim:
            raise DataError(f"{shown}: {name[:60]!r} is a single number; all arrays need rows")
        if not array.size:
            raise DataError(f"{shown}: {name[:60]!r} of shape {array.shape} holds nothing")
    rows = {name: len(array) for name, array in arrays.items()}
    if len(set(rows.values())) != 1:
        raise DataError(
            f"{shown}: all arrays must have the same number of rows; found {str(rows)[:200]}"
        )
    if max(rows.values()) > MAX_ROWS:
        raise DataError(f"{shown}: {max(rows.values())} rows; at most {MAX_ROWS} are read")
    return arrays


class _Pieces(io.BufferedReader):
    """A reader that limits single reads, against directories of millions of members."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > _MAX_PIECE:
            raise zipfile.BadZipFile(f"its directory claims {size} bytes")
        return super().read(size)


def _members(archive: zipfile.ZipFile, where: str) -> dict[str, np.ndarray]:
    """Reads the arrays of an archive, after their declared sizes are summed."""
    members = archive.infolist()
    total = sum(member.file_size for member in members)
    if total > MAX_ARRAY_BYTES:
        raise DataError(
            f"{where}: its arrays take {total} bytes; at most {MAX_ARRAY_BYTES} are read"
        )
    arrays = {}
    for member in members:
        name = member.filename.removesuffix(".npy")
        if name in arrays:
            raise DataError(f"{where}: holds {name[:60]!r} twice")
        # Of other compressions, zipfile does not bound what a piece grows to; numpy writes none.
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
    """Refuses a member that is not an array of numbers of its size, before memory is taken."""
    with archive.open(member) as file:
        version = npy.read_magic(file)
        if version not in _HEADERS:
            raise DataError(f"{where} is not an array of numbers")
        shape, _, dtype = _HEADERS[version](file)
        if dtype.kind not in "biuf":
            raise DataError(f"{where} holds {str(dtype)[:60]}; it must hold numbers or booleans")
        claimed, stored = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
    if min(shape, default=0) < 0 or claimed != stored:
        raise DataError(f"{where} of shape {str(shape)[:60]} does not fill its {stored} bytes")
