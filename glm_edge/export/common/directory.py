"""Exported directories: description, file of weights, and size."""

import json
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from glm_edge.errors import ExportError
from glm_edge.export.common.weights import Conversion
from glm_edge.files import file_inside, opened, read_json
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params
from glm_edge.writers import write_stream

DESCRIPTION = "glm_edge.json"
WEIGHTS = "weights.bin"
# Limit for one graph file; its weights are in a separate file.
MAX_GRAPH_BYTES = 1 << 28


@dataclass(frozen=True)
class ExportedDirectory:
    """A written directory.

    Attributes:
      path: path of the directory.
      file_bytes: total bytes of its files.
      signatures: names of its signatures.
      conversions: parameters that are stored in a different form than in the model.
      model: model that was traced.
      params: parameters with the values that the directory stores.
    """

    path: Path
    file_bytes: int
    signatures: tuple[str, ...]
    conversions: tuple[Conversion, ...]
    model: MultimodalGLM = field(repr=False)
    params: Params = field(repr=False)


def write_description(directory: Path, description: dict[str, Any]) -> None:
    """Write the description of a directory atomically.

    Args:
      directory: path of the directory.
      description: JSON values by field.

    Raises:
      OutputError: the description cannot be written.
    """
    content = json.dumps(description, indent=1).encode()
    write_stream(directory / DESCRIPTION, lambda file: file.write(content))


def read_description(directory: str | Path) -> dict[str, Any]:
    """Read the description of an exported directory of graphs.

    Args:
      directory: path of the directory.

    Returns:
      The fields of the description.

    Raises:
      ExportError: the description is missing or damaged.
    """
    try:
        path = file_inside(Path(directory), DESCRIPTION, ExportError)
        return read_json(path, ExportError)
    except ExportError as error:
        raise ExportError(f"{directory}: not a complete glm_edge export: {error}") from error


def check_tree(directory: Path) -> None:
    """Reject a directory that contains anything except regular files and directories.

    Args:
      directory: directory that a third-party library will open without these checks.

    Raises:
      ExportError: the directory is missing, or contains a link, a pipe or a device.
    """
    if not directory.is_dir():
        raise ExportError(f"{directory}: not a directory")
    for folder, directories, names in os.walk(directory):
        for path in (Path(folder, name) for name in (*directories, *names)):
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                kind = "a link" if stat.S_ISLNK(mode) else "a pipe, socket or device"
                raise ExportError(
                    f"{path}: is {kind}; an export contains only regular files and directories"
                )


def directory_bytes(path: Path) -> int:
    """Sum the bytes of all files of a directory.

    Args:
      path: path of the directory.

    Returns:
      The total bytes.
    """
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def map_weights(directory: Path) -> np.ndarray:
    """Map the file of weights of a directory into memory, without reading it.

    Args:
      directory: path of the directory.

    Returns:
      The bytes of the file, uint8 [bytes], read-only.

    Raises:
      ExportError: the file is missing, empty, not a regular file, or a link to outside the
        directory.
    """
    with opened(file_inside(directory, WEIGHTS, ExportError), ExportError) as file:
        return np.memmap(file, np.uint8, "r")
