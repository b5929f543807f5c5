"""The checkpoint that --checkpoint names."""

import os
from pathlib import Path

import glm_edge as ge
from glm_edge.files import CONFIG


def checkpoint_of(given: str | None) -> Path:
    """Finds the directory that --checkpoint names.

    Args:
      given: a checkpoint directory, or the --out_dir of `glm-edge compress`, which holds one as
        `checkpoint`; None or empty is the shipped nano.

    Returns:
      The directory of the checkpoint.
    """
    if not given:
        return ge.shipped("nano")
    directory = Path(given)
    inner = directory / "checkpoint"
    # `Path.exists` raises for a name that is too long.
    outer_holds, inner_holds = (os.path.exists(path / CONFIG) for path in (directory, inner))
    return inner if inner_holds and not outer_holds else directory
