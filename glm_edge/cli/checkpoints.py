"""Lookup of the checkpoint that --checkpoint names."""

import os
from pathlib import Path

import glm_edge as ge
from glm_edge.checkpoint.native import STOCK
from glm_edge.errors import CheckpointError
from glm_edge.files import CONFIG, read_json


def checkpoint_of(checkpoint: str | None) -> Path:
    """Find the directory that --checkpoint names.

    Args:
      checkpoint: a checkpoint directory, or the --out_dir of `glm-edge compress`, which contains
        `checkpoint`; None or empty is the shipped model nano.

    Returns:
      The directory of the checkpoint.

    Raises:
      CheckpointError: it contains the parameters of a module that is not part of this library.
    """
    if not checkpoint:
        return ge.shipped("nano")
    directory = Path(checkpoint)
    inner = directory / "checkpoint"
    # `Path.exists` raises for a name that is too long.
    outer_holds, inner_holds = (os.path.exists(path / CONFIG) for path in (directory, inner))
    if inner_holds and not outer_holds:
        directory = inner
    _refuse_stock(directory)
    return directory


def _refuse_stock(directory: Path) -> None:
    try:
        fields = read_json(directory / CONFIG)
    # Loading the checkpoint reports the error.
    except CheckpointError:
        return
    if fields.get("architecture") == STOCK:
        raise CheckpointError(
            f"{directory}: contains the parameters of a user-defined module, which the command "
            f"line cannot build; use ge.load({str(directory)!r}, model=module) in Python"
        )
