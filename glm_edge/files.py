"""Readers of untrusted files: regular, bounded, and inside their directory."""

import contextlib
import functools
import io
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from glm_edge.errors import CheckpointError, GlmEdgeError

CONFIG = "config.json"
MAX_JSON_BYTES = 1 << 23
MAX_JSON_VALUES = 500_000
MAX_JSON_DEPTH = 64
MAX_DIGITS = 20
MAX_FILE_NAME = 255
MAX_SHOWN = 400
MAX_TEXT_BYTES = 1 << 20
# Alignment in bytes of a buffer that jax uses without a copy.
ALIGNMENT = 64

BinaryFile = io.FileIO | io.BytesIO
ErrorType = type[GlmEdgeError]
Version = tuple[int, int]


def file_inside(directory: Path, name: str, error: ErrorType = CheckpointError) -> Path:
    """Find a regular file of a checkpoint; refuse symbolic links that leave the directory.

    Links may point inside the directory. In a snapshot of a Hugging Face cache
    (`models--*/snapshots/*`) they may also point into `blobs` of the same repository.

    Args:
      directory: checkpoint directory.
      name: file name from config.json or from the index.
      error: exception type to raise.

    Returns:
      Path of the file inside `directory`.

    Raises:
      GlmEdgeError: as type `error`: the name contains a directory, or the file is missing, is not a
        regular file, or is a link to another directory.
    """
    plain = isinstance(name, str) and name.isprintable() and name not in ("", "..")
    if not plain or name != Path(name).name:
        raise error(
            f"{shown_path(directory)}: file {str(name)[:200]!r} must be a plain name in the same "
            "directory"
        )
    if len(name) > MAX_FILE_NAME:
        raise error(
            f"{shown_path(directory)}: file {name[:60]!r}… has a name of {len(name)} characters"
        )
    path = directory / name
    try:
        mode = path.stat().st_mode
        if path.is_symlink():
            _check_link(directory, path, error)
    except (OSError, ValueError) as failure:
        if isinstance(failure, GlmEdgeError):
            raise
        raise _unreadable(path, failure, error) from failure
    _check_regular(path, mode, error)
    return path


def _check_link(directory: Path, path: Path, error: ErrorType) -> None:
    root, target = directory.resolve(), path.resolve(strict=True)
    allowed = [root]
    for parent in root.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            allowed.append(parent.parent / "blobs")
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise error(
            f"{path}: is a link that leads out of the checkpoint, to {target}; put the file itself "
            "there, or load the directory that contains it"
        )


def _check_regular(path: Path, mode: int, error: ErrorType) -> None:
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise error(f"{path}: is {kind}; it must be a file")


def _unreadable(path: Path, failure: Exception, error: ErrorType) -> GlmEdgeError:
    reason = getattr(failure, "strerror", None) or failure
    return error(f"{shown_path(path)}: cannot be read: {reason}")


def shown_path(path: str | os.PathLike) -> str:
    """Format a path for a one-line message: quote unprintable paths and truncate long ones."""
    text = os.fspath(path)
    if text.isprintable() and len(text) <= MAX_SHOWN:
        return text
    return repr(text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…")


@contextlib.contextmanager
def opened(path: str | os.PathLike, error: ErrorType = CheckpointError) -> Iterator[io.FileIO]:
    """Open a regular file for reading, without blocking on pipes.

    Args:
      path: file path.
      error: exception type to raise.

    Yields:
      The unbuffered binary file.

    Raises:
      GlmEdgeError: as type `error`: the path cannot be opened or read, or is not a regular file.
    """
    path = Path(path)

    def open_regular(name: str, flags: int) -> int:
        # Without O_NONBLOCK, opening a pipe waits for its writer.
        descriptor = os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
        try:
            _check_regular(path, os.fstat(descriptor).st_mode, error)
        except GlmEdgeError:
            os.close(descriptor)
            raise
        return descriptor

    try:
        with open(path, "rb", buffering=0, opener=open_regular) as file:
            yield file
    except GlmEdgeError:
        raise
    # A name with a null character raises ValueError.
    except (OSError, ValueError) as failure:
        raise _unreadable(path, failure, error) from failure


def fill(
    file: BinaryFile, target: np.ndarray, where: str, error: ErrorType = CheckpointError
) -> None:
    """Read bytes until an array is full; one system call reads at most 2 GB.

    Args:
      file: file from `opened`, positioned at the first byte to read.
      target: contiguous bytes `[N]` to fill.
      where: file (and section) for messages.
      error: exception type to raise.

    Raises:
      GlmEdgeError: as type `error`: the file ends before `target` is full.
    """
    view, done = target.data, 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise error(
                f"{where}: {len(view) - done} of {len(view)} bytes are missing; the file was "
                "truncated while it was read"
            )
        done += count


def version_of(file: io.FileIO) -> Version:
    """Return size and modification time of an open file, to detect changes between reads."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def read_span(path: Path, begin: int, size: int, version: Version, where: str) -> np.ndarray:
    """Read a part of a file whose header was read before.

    Args:
      path: file path.
      begin: offset of the first byte.
      size: count of bytes.
      version: `version_of` the file when its header was read.
      where: file and tensor for messages.

    Returns:
      Bytes in new memory, uint8 [size], aligned such that jax uses them without a copy.

    Raises:
      CheckpointError: the file cannot be read, was truncated, or changed since then.
    """
    with opened(path) as file:
        if version_of(file) != version:
            raise CheckpointError(
                f"{where}: the file changed since its header was read; load it again"
            )
        buffer = np.empty(size + ALIGNMENT, np.uint8)
        raw = buffer[-buffer.ctypes.data % ALIGNMENT :][:size]
        file.seek(begin)
        fill(file, raw, where)
        return raw


def read_bytes(path: str | os.PathLike, limit: int, error: ErrorType = CheckpointError) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Args:
      path: file path.
      limit: maximum size in bytes.
      error: exception type to raise.

    Returns:
      The bytes of the file.

    Raises:
      GlmEdgeError: as type `error`: the file cannot be read, is not a regular file, or exceeds
        `limit`.
    """
    with opened(path, error) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise error(f"{path}: has {size} bytes; the limit is {limit}")
        target = np.empty(size, np.uint8)
        fill(file, target, str(path), error)
        return target.tobytes()


def read_text(
    path: str | os.PathLike, error: ErrorType = CheckpointError, limit: int = MAX_TEXT_BYTES
) -> str:
    """Read a regular file of at most `limit` bytes as UTF-8 text.

    Args:
      path: file path.
      error: exception type to raise.
      limit: maximum size in bytes.

    Returns:
      The text of the file.

    Raises:
      GlmEdgeError: as type `error`: `read_bytes` fails, or the file is not UTF-8.
    """
    try:
        return read_bytes(path, limit, error).decode()
    except UnicodeDecodeError as failure:
        raise error(f"{path}: is not UTF-8 text: {failure}") from failure


def read_json(path: str | os.PathLike, error: ErrorType = CheckpointError) -> dict[str, Any]:
    """Read a JSON object of at most `MAX_JSON_BYTES`.

    Args:
      path: file path.
      error: exception type to raise.

    Returns:
      The object as a dictionary.

    Raises:
      GlmEdgeError: as type `error`: the file is missing, too large, or not a JSON object.
    """
    with opened(path, error) as file:
        return json_object(file, os.fstat(file.fileno()).st_size, str(path), error)


def json_object(
    file: BinaryFile, size: int, where: str, error: ErrorType = CheckpointError
) -> dict[str, Any]:
    """Read a JSON object from a section of a file.

    Args:
      file: file from `opened`, positioned at the first byte of the object.
      size: length of the section in bytes.
      where: file (and section) for messages.
      error: exception type to raise.

    Returns:
      The object as a dictionary.

    Raises:
      GlmEdgeError: as type `error`: the section is not a JSON object, repeats a name, or exceeds
        a limit.
    """
    _check_json_bytes(size, where, error)
    target = np.empty(size, np.uint8)
    fill(file, target, where, error)
    raw = target.tobytes()
    del target
    value = parse_json(raw, where, error)
    if not isinstance(value, dict):
        raise error(f"{where}: must be a JSON object, not {type(value).__name__}")
    return value


def parse_json(
    raw: bytes | str,
    where: str,
    error: ErrorType = CheckpointError,
    max_bytes: int = MAX_JSON_BYTES,
    max_values: int = MAX_JSON_VALUES,
) -> Any:
    """Parse JSON within limits on bytes, values, depth and digits.

    Args:
      raw: JSON text or UTF-8 bytes.
      where: file (and section) for messages.
      error: exception type to raise.
      max_bytes: maximum length in bytes.
      max_values: maximum number of values.

    Returns:
      The value, of any JSON type.

    Raises:
      GlmEdgeError: as type `error`: the text is not JSON, repeats a name in one object, or exceeds
        a limit.
    """
    try:
        raw = raw.encode() if isinstance(raw, str) else raw
    except UnicodeEncodeError as failure:
        raise error(f"{where}: not JSON: {failure}") from failure
    _check_json_bytes(len(raw), where, error, max_bytes)
    # Three bytes such as `[],` become 70 in memory, so values are counted before parsing.
    if sum(map(raw.count, (b",", b"[", b"{"))) > max_values:
        raise error(f"{where}: has more than {max_values} JSON values")
    unique = functools.partial(_unique, where=where, error=error)
    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique, parse_int=_integer)
    except GlmEdgeError:
        raise
    except RecursionError as failure:
        raise error(f"{where}: not JSON that can be read: nested too deep") from failure
    except ValueError as failure:
        raise error(f"{where}: not JSON: {failure}") from failure
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_JSON_DEPTH):
        nested = (x.values() if isinstance(x, dict) else x for x in level)
        level = [y for x in nested for y in x if isinstance(y, dict | list)]
    if level:
        raise error(f"{where}: is nested deeper than {MAX_JSON_DEPTH}")
    return value


def _check_json_bytes(size: int, where: str, error: ErrorType, limit: int = MAX_JSON_BYTES) -> None:
    if size > limit:
        raise error(f"{where}: is JSON of {size} bytes; the limit is {limit}")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]], where: str, error: ErrorType) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        known: set[str] = set()
        duplicate = next(
            name
            for name, _ in pairs
            if name in known or known.add(name)  # type: ignore[func-returns-value]
        )
        raise error(f"{where}: the name {duplicate[:200]!r} appears twice in one JSON object")
    return fields
