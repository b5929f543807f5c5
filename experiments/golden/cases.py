"""Folders of reference cases: a checkpoint, inputs, outputs and the reference's rounding noise."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glm_edge.errors import DataError

ABSOLUTE = 1e-4
NOISE_FACTOR = 10
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One reference case.

    Attributes:
      folder: folder of the case.
      meta: content of its meta.json.
      inputs: input arrays by subcase and name.
      outputs: output arrays by subcase and name.
    """

    folder: Path
    meta: dict[str, Any]
    inputs: dict[str, Arrays]
    outputs: dict[str, Arrays]

    @property
    def has_model(self) -> bool:
        """True for a case with a checkpoint, False for a processor's inputs and outputs."""
        return (self.folder / "config.json").is_file()

    def tolerance(self, output: str) -> float:
        """Return the tolerance: 1e-4 plus ten times the reference's rounding noise."""
        noise = self.meta.get("fp32_vs_fp64_max_abs", {})
        key = output if output in noise else output.replace("greedy_logits", "logits")
        return ABSOLUTE + NOISE_FACTOR * float(noise.get(key, 0.0))


def read_case(folder: Path) -> Case:
    """Read a case.

    Args:
      folder: folder with inputs.npz, outputs.npz and meta.json.

    Returns:
      The case.

    Raises:
      DataError: the folder is not a case.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        inputs = _by_subcase(np.load(folder / "inputs.npz"))
        outputs = _by_subcase(np.load(folder / "outputs.npz"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not a reference case: {error}") from error
    if not isinstance(meta, dict) or not outputs or set(outputs) - set(inputs):
        raise DataError(
            f"{folder}: not a reference case: arrays must be named <subcase>.<name> and every "
            f"subcase with outputs ({', '.join(outputs)}) needs inputs ({', '.join(inputs)})"
        )
    return Case(folder, meta, inputs, outputs)


def find_cases(folder: Path) -> list[Path]:
    """Find the folders of cases under a folder, or the folder itself if it is a case.

    Raises:
      DataError: there is no case.
    """
    if (folder / "outputs.npz").is_file():
        return [folder]
    folders = sorted(path.parent for path in folder.glob("*/outputs.npz"))
    if not folders:
        raise DataError(f"{folder}: contains no folder with outputs.npz, inputs.npz and meta.json")
    return folders


def _by_subcase(arrays: Any) -> dict[str, Arrays]:
    grouped: dict[str, Arrays] = {}
    for key in arrays.files:
        subcase, _, name = key.partition(".")
        grouped.setdefault(subcase, {})[name] = arrays[key]
    return grouped
