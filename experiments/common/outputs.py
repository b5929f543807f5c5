"""The output directory of a script."""

import os
from pathlib import Path

from glm_edge.errors import OutputError


def prepare_directory(directory: Path, overwrite: bool, result: str = "report.json") -> Path:
    """Create the directory of --out_dir.

    Args:
      directory: path of the directory.
      overwrite: whether existing results may be replaced.
      result: name of the file that marks finished results, such as `table.csv`.

    Returns:
      The directory.

    Raises:
      OutputError: the directory contains results, is a file, or cannot be written.
    """
    if directory.is_file():
        raise OutputError(f"{directory}: is a file; use a directory for --out_dir")
    if (directory / result).exists() and not overwrite:
        name = "a table" if result == "table.csv" else "results"
        raise OutputError(
            f"{directory}: already contains {name}; use a different --out_dir or pass --overwrite"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{directory}: cannot be created ({error.strerror})") from error
    if not os.access(directory, os.W_OK):
        raise OutputError(f"{directory}: cannot be written; use a different --out_dir")
    return directory
