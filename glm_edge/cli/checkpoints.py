"""The checkpoint that --checkpoint names."""

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
    return inner if not (directory / CONFIG).exists() and (inner / CONFIG).exists() else directory
