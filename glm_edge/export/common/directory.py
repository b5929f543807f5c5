"""Exports that are a directory: their description, their file of weights, and its size."""

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
# Of a graph, whose weights are in a file of their own.
MAX_GRAPH_BYTES = 1 << 28


@dataclass(frozen=True)
class ExportedDirectory:
    """A written directory.

    Attributes:
      path: the directory.
      file_bytes: of all its files.
      signatures: names of its entry points.
      conversions: parameters that are stored in another form than in the model.
      model: the model it was traced from.
      params: the parameters as the directory stores them.
    """

    path: Path
    file_bytes: int
    signatures: tuple[str, ...]
    conversions: tuple[Conversion, ...]
    model: MultimodalGLM = field(repr=False)
    params: Params = field(repr=False)


def write_description(directory: Path, description: dict[str, Any]) -> None:
    """Writes the description of a directory, whole or not at all.

    Raises:
      OutputError: it cannot be written.
    """
    content = json.dumps(description, indent=1).encode()
    write_stream(directory / DESCRIPTION, lambda file: file.write(content))


def read_description(directory: str | Path) -> dict[str, Any]:
    """Reads the description of an exported directory of graphs.

    Raises:
      ExportError: it is missing or damaged.
    """
    try:
        path = file_inside(Path(directory), DESCRIPTION, ExportError)
        return read_json(path, ExportError)
    except ExportError as error:
        raise ExportError(f"{directory}: is not a complete export of glm_edge: {error}") from error


def check_tree(directory: Path) -> None:
    """Refuses a directory that holds anything but files and directories.

    Args:
      directory: that another library is going to open as it likes.

    Raises:
      ExportError: it is missing, or holds a link, a pipe or a device.
    """
    if not directory.is_dir():
        raise ExportError(f"{directory}: is not a directory")
    for folder, directories, names in os.walk(directory):
        for path in (Path(folder, name) for name in (*directories, *names)):
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                kind = "a link" if stat.S_ISLNK(mode) else "a pipe, socket or device"
                raise ExportError(f"{path}: is {kind}; an export holds files and directories")


def directory_bytes(path: Path) -> int:
    """Sums the bytes of all files of a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def map_weights(directory: Path) -> np.ndarray:
    """Maps the file of weights of a directory into memory, without reading it.

    Raises:
      ExportError: it is missing, empty, not a regular file, or a link that leads out.
    """
    with opened(file_inside(directory, WEIGHTS, ExportError), ExportError) as file:
        return np.memmap(file, np.uint8, "r")
