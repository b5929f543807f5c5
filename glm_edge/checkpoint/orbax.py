"""Flat arrays in an Orbax directory, beside the config.json that says what they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glm_edge.checkpoint.shapes import check_names, check_shape
from glm_edge.errors import CheckpointError

ARRAYS = "arrays"


def write(directory: Path, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Writes arrays into `directory/arrays`.

    Args:
      directory: of the checkpoint, which exists.
      arrays: name to array.

    Returns:
      Type and shape of each array, for config.json.
    """
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save((directory / ARRAYS).absolute(), dict(arrays))
    return {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}


def read(directory: Path, described: Any) -> dict[str, np.ndarray]:
    """Reads arrays from `directory/arrays` on whatever devices there are now.

    Args:
      directory: of the checkpoint.
      described: what `write` returned.

    Returns:
      Name to array.

    Raises:
      CheckpointError: arrays are missing, damaged, or not as described.
    """
    source = directory / ARRAYS
    if not _is_description(described):
        raise CheckpointError(f"{directory}: config.json must describe the arrays of {source}")
    if source.is_symlink() or not source.is_dir():
        raise CheckpointError(
            f"{source}: Orbax directory is missing or a link; config.json describes it"
        )
    import orbax.checkpoint as ocp

    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in described}
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            arrays = checkpointer.restore(source.absolute(), restore_args=as_numpy)
    # Orbax and tensorstore raise many kinds of error for a damaged directory.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{source}: Orbax cannot restore it: {reason[:200]}") from error
    check_names(arrays, {name: entry[1] for name, entry in described.items()}, str(source))
    for name, (dtype, shape) in described.items():
        where = f"{source}: tensor {name!r}"
        check_shape(arrays[name].shape, shape, where)
        if str(arrays[name].dtype) != dtype:
            raise CheckpointError(f"{where}: is {arrays[name].dtype}, config.json says {dtype}")
    return arrays


def _is_description(value: Any) -> bool:
    """True for `{name: [type, [sizes]]}`."""
    return isinstance(value, dict) and all(
        isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], list)
        for entry in value.values()
    )
