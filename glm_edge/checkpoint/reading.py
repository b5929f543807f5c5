"""Reading files that may be damaged or hostile: links, pipes, truncation, JSON, NaN."""

import contextlib
import functools
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from glm_edge.errors import CheckpointError

MAX_JSON_BYTES = 1 << 23
MAX_JSON_VALUES = 500_000
MAX_JSON_DEPTH = 64
MAX_DIGITS = 20
MAX_FILE_NAME = 255
BLOCK_BYTES = 1 << 19

_EXPONENTS = {
    np.dtype(jnp.bfloat16): np.uint16(0x7F80),
    np.dtype(np.float16): np.uint16(0x7C00),
    np.dtype(np.float32): np.uint32(0x7F800000),
    np.dtype(np.float64): np.uint64(0x7FF0000000000000),
}


def file_inside(directory: Path, name: str) -> Path:
    """Finds a regular file of a checkpoint; a link may not lead out of it.

    A link is followed inside the directory and, from a snapshot of a Hugging Face cache
    (`models--*/snapshots/*`), into the `blobs` of the same repository.

    Args:
      directory: of the checkpoint.
      name: of the file, as config or index say it.

    Returns:
      Its path in `directory`.

    Raises:
      CheckpointError: the name is not a plain one, or the file is missing, not a regular file, or
        a link that leads elsewhere.
    """
    plain = isinstance(name, str) and name.isprintable() and name not in ("", "..")
    if not plain or name != Path(name).name:
        raise CheckpointError(
            f"{directory}: file {str(name)[:200]!r} must be a plain name in the same directory"
        )
    if len(name) > MAX_FILE_NAME:
        raise CheckpointError(f"{directory}: file {name[:60]!r}… has a name of {len(name)} letters")
    path = directory / name
    try:
        mode = path.stat().st_mode
        if path.is_symlink():
            _check_link(directory, path)
    except OSError as error:
        raise _unreadable(path, error) from error
    _check_regular(path, mode)
    return path


def _check_link(directory: Path, path: Path) -> None:
    root, target = directory.resolve(), path.resolve(strict=True)
    allowed = [root]
    for parent in root.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            allowed.append(parent.parent / "blobs")
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise CheckpointError(
            f"{path}: is a link that leads out of the checkpoint, to {target}; put the file itself "
            "there, or load the directory that holds it"
        )


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        found = "a directory" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise CheckpointError(f"{path}: is {found}; it must be a file")


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read: {error.strerror or error}")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file; never waits for a pipe.

    Args:
      path: of the file.

    Yields:
      The unbuffered file.

    Raises:
      CheckpointError: it cannot be opened or read, or is not a regular file.
    """

    def open_regular(name: str, flags: int) -> int:
        # Without O_NONBLOCK, opening a pipe waits for its writer.
        descriptor = os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
        try:
            _check_regular(path, os.fstat(descriptor).st_mode)
        except CheckpointError:
            os.close(descriptor)
            raise
        return descriptor

    try:
        with open(path, "rb", buffering=0, opener=open_regular) as file:
            yield file
    except OSError as error:
        raise _unreadable(path, error) from error


def fill(file: BinaryIO, target: np.ndarray, where: str) -> None:
    """Reads bytes until an array is full; one call of the system reads 2 GB at most.

    Args:
      file: from `opened`, at the first byte to read.
      target: bytes `[N]`, contiguous.
      where: file (and part of it), for the message.

    Raises:
      CheckpointError: the file ends before.
    """
    view, done = memoryview(target), 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise CheckpointError(
                f"{where}: {len(view) - done} of {len(view)} bytes are missing; the file was "
                "truncated while it was read"
            )
        done += count


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
                f"{where}: holds {value} at {[int(i) for i in index]}; weights must be finite"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of at most `MAX_JSON_BYTES`.

    Args:
      path: of the file.

    Returns:
      The object.

    Raises:
      CheckpointError: the file is missing, is too large, or does not hold a JSON object.
    """
    with opened(path) as file:
        return json_object(file, os.fstat(file.fileno()).st_size, str(path))


def json_object(file: BinaryIO, size: int, where: str) -> dict[str, Any]:
    """Reads a JSON object from a part of a file.

    Args:
      file: from `opened`, at the first byte of the object.
      size: bytes of the part.
      where: file (and part of it), for the message.

    Returns:
      The object.

    Raises:
      CheckpointError: it is not a JSON object, names something twice, or exceeds a limit.
    """
    if size > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{where}: is JSON of {size} bytes; more than {MAX_JSON_BYTES} are not read"
        )
    target = np.empty(size, np.uint8)
    fill(file, target, where)
    raw = target.tobytes()
    del target
    # Three bytes such as `[],` become 70 in memory, so what they hold is counted first.
    if sum(map(raw.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise CheckpointError(f"{where}: holds more than {MAX_JSON_VALUES} JSON values")
    unique = functools.partial(_unique, where=where)
    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique, parse_int=_integer)
    except CheckpointError:
        raise
    except RecursionError as error:
        raise CheckpointError(f"{where}: not JSON that can be read: nested too deep") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: must hold a JSON object, found {type(value).__name__}")
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        nested = (x.values() if isinstance(x, dict) else x for x in level)
        level = [y for x in nested for y in x if isinstance(y, dict | list)]
    if level:
        raise CheckpointError(f"{where}: is nested deeper than {MAX_JSON_DEPTH}")
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise CheckpointError(f"{where}: the name {twice[:200]!r} stands twice in one JSON object")
    return fields
