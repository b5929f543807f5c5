"""Flat arrays in an Orbax directory, described by a config.json."""

import contextlib
import gc
import logging
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glm_edge.checkpoint.shapes import check_names, check_shape
from glm_edge.errors import CheckpointError, GlmEdgeError
from glm_edge.process_wide import shared

ARRAYS = "arrays"


def check_path(path: Path, error: type[GlmEdgeError]) -> None:
    """Refuse paths that Orbax cannot write, or cannot read back.

    Args:
      path: checkpoint directory.
      error: exception type to raise.

    Raises:
      GlmEdgeError: as type `error`: the path contains a backslash or is not UTF-8.
    """
    name = str(path.absolute())
    if "\\" in name or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise error(
            f"{name!r:.200}: Orbax cannot use a path with a backslash or with bytes that are not "
            "UTF-8; choose another path, or format='safetensors'"
        )


def write(directory: Path, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Write arrays into `directory/arrays`.

    Args:
      directory: existing checkpoint directory.
      arrays: arrays by name.

    Returns:
      Type and shape by name, for config.json.
    """
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save((directory / ARRAYS).absolute(), dict(arrays))
    return {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}


def read(directory: Path, described: Any) -> dict[str, np.ndarray]:
    """Read arrays from `directory/arrays` as numpy arrays, independent of the current devices.

    Args:
      directory: checkpoint directory.
      described: result of `write`.

    Returns:
      Arrays by name.

    Raises:
      CheckpointError: arrays are missing, damaged, or do not match the description.
    """
    source = directory / ARRAYS
    if not _is_description(described):
        raise CheckpointError(f"{directory}: config.json must describe the arrays of {source}")
    if source.is_symlink() or not source.is_dir():
        raise CheckpointError(
            f"{source}: Orbax directory is missing or a link, but config.json describes it"
        )
    check_path(source, CheckpointError)
    _check_files(source)
    import orbax.checkpoint as ocp

    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in described}
    reason = None
    with _quiet_tasks():
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                arrays = checkpointer.restore(source.absolute(), restore_args=as_numpy)
        # Orbax and tensorstore raise exceptions of many types for a damaged directory.
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
    if reason is not None:
        raise CheckpointError(f"{source}: Orbax cannot restore it: {reason[:200]}")
    check_names(arrays, {name: entry[1] for name, entry in described.items()}, str(source))
    for name, (dtype, shape) in described.items():
        where = f"{source}: tensor {name!r}"
        check_shape(arrays[name].shape, shape, where)
        if str(arrays[name].dtype) != dtype:
            raise CheckpointError(f"{where}: is {arrays[name].dtype}, config.json says {dtype}")
    return arrays


def _check_files(source: Path) -> None:
    """Refuse pipes, devices and links to other directories before Orbax opens them."""
    root = source.resolve()
    for folder, directories, names in os.walk(source, onerror=_refuse):
        for name in (*directories, *names):
            path = Path(folder, name)
            try:
                mode = path.stat().st_mode
                inside = not path.is_symlink() or path.resolve().is_relative_to(root)
            except OSError as error:
                _refuse(error)
            if not inside or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                kind = "a pipe, socket or device" if inside else "a link that leads out"
                raise CheckpointError(f"{path}: is {kind}; an Orbax directory contains only files")


def _refuse(error: OSError) -> None:
    raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error


@shared
@contextlib.contextmanager
def _quiet_tasks() -> Iterator[None]:
    """Suppress the tracebacks of tasks that Orbax abandons."""
    logger = logging.getLogger("asyncio")
    disabled, hook = logger.disabled, sys.unraisablehook
    logger.disabled, sys.unraisablehook = True, lambda _: None
    try:
        yield
    finally:
        # Abandoned tasks print when they are garbage-collected.
        gc.collect()
        logger.disabled, sys.unraisablehook = disabled, hook


def _is_description(value: Any) -> bool:
    """Test for `{name: [type, [sizes]]}`."""
    return isinstance(value, dict) and all(
        isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], list)
        for entry in value.values()
    )
