"""Description of an exported file or directory, whatever its format."""

import os
from pathlib import Path
from typing import Any

from glm_edge.export.common.directory import read_description
from glm_edge.export.coreml.reader import MANIFEST, described_by, open_package
from glm_edge.export.tflite import file as tflite_file


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read the description that the export stored, without reading the weights.

    Args:
      path: a `.tflite` file, an `.mlpackage`, or a directory of ONNX or MNN graphs.

    Returns:
      Its fields; `verified` is true if the file was run and agreed with JAX.

    Raises:
      ExportError: the description is missing or damaged, or the file has another format or was not
        written by glm_edge.
      MissingExtraError: the package that reads the format is not installed.
    """
    path = Path(path)
    if not os.path.isdir(path):
        return tflite_file.read_metadata(path)
    if not os.path.isfile(path / MANIFEST):
        return read_description(path)
    return described_by(open_package(path), path)
