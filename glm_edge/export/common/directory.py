"""Exports that are a directory: what the caller gets, and writing it whole."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm_edge.errors import ExportError, OutputError
from glm_edge.export.tflite.file import write_beside
from glm_edge.export.tflite.weights import Conversion
from glm_edge.files import file_inside, read_json
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params
from glm_edge.writers import new_directory, refuse_link, remove_litter

DESCRIPTION = "glm_edge.json"


@dataclass(frozen=True)
class Package:
    """A written directory.

    Attributes:
      path: the directory.
      file_bytes: of all its files.
      signatures: names of its entry points.
      conversions: parameters held in another form than they were given.
      model: the model it was traced from.
      params: the parameters as the directory holds them.
    """

    path: Path
    file_bytes: int
    signatures: tuple[str, ...]
    conversions: tuple[Conversion, ...]
    model: MultimodalGLM = field(repr=False)
    params: Params = field(repr=False)

    def verify(self, windows: Any = None, **options: Any) -> Any:
        """Compares the directory with the JAX model of the same integers; see `verify.verify`.

        ONNX runs in onnxruntime and MNN in its own runtime. Core ML runs on Apple's systems only:
        the result is what `inspection.inspect` read in the package, which stays unverified.
        """
        if self.path.suffix == ".mlpackage":
            from glm_edge.export.coreml.verify import inspect

            if windows is not None or options:
                raise ExportError(
                    f"{self.path}: Core ML packages are not run here, so that there is nothing to "
                    "choose: call verify()"
                )
            return inspect(self.path, self.model, self.params)
        from glm_edge.export.verify.verify import verify

        return verify(self.path, self.model, self.params, windows, **options)


@contextlib.contextmanager
def written_whole(path: Path, overwrite: bool, mark: str) -> Iterator[Path]:
    """Gives a directory beside `path` to write into, and moves it there when all went well.

    Args:
      path: the directory to write.
      overwrite: replace a directory that exists, if an export wrote it.
      mark: name of a file that such a directory holds.

    Raises:
      OutputError: `path` exists, is no export, or cannot be written.
    """
    # What a killed export moved aside is put back before anything is refused.
    remove_litter(path)
    check_target(path, overwrite, mark)
    with new_directory(path, overwrite, mark=mark) as directory:
        yield directory


def check_target(path: Path, overwrite: bool, mark: str) -> None:
    """Refuses a path that cannot take the directory, before any work is done.

    Raises:
      OutputError: it exists, is no export or a link, or its directory is missing or read-only.
    """
    refuse_link(path)
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: exists; choose another path or pass overwrite=True")
    if path.exists() and not (path / mark).is_file():
        raise OutputError(f"{path}: holds no {mark}, so no export wrote it; choose another path")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path}: directory {path.parent} is missing or cannot be written")


def write_description(directory: Path, description: dict[str, Any]) -> None:
    """Writes what a directory says about itself, whole or not at all.

    Raises:
      OutputError: it cannot be written.
    """
    content = json.dumps(description, indent=1).encode()
    write_beside(directory / DESCRIPTION, lambda file: file.write(content))


def read_description(directory: str | Path) -> dict[str, Any]:
    """Reads what an exported directory of graphs says about itself.

    Raises:
      ExportError: it is missing or damaged.
    """
    try:
        path = file_inside(Path(directory), DESCRIPTION, ExportError)
        return read_json(path, ExportError)
    except ExportError as error:
        raise ExportError(f"{directory}: no whole export of glm_edge: {error}") from error


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


def bytes_of(path: Path) -> int:
    """Bytes of all files of a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
