"""The checkpoint that --checkpoint names, and its tokenizer."""

from pathlib import Path
from typing import Any

import glm_edge as ge
from glm_edge.errors import CheckpointError
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


def require_tokenizer(checkpoint: Path) -> Any:
    """Opens a checkpoint's tokenizer.

    Raises:
      CheckpointError: the checkpoint has none.
    """
    tokenizer = ge.load_tokenizer(checkpoint)
    if tokenizer is None:
        raise CheckpointError(f"{checkpoint}: tokenizer.json is missing; text cannot be read")
    return tokenizer
