"""Checks of a command's output files before its work starts."""

from pathlib import Path

from glm_edge.cli.corpora import check_absent
from glm_edge.errors import OutputError


def check_output(path: str | Path | None, overwrite: bool) -> None:
    """Reject an output file that cannot be written, before the work starts.

    Args:
      path: path of the output file, or None without an output.
      overwrite: whether an existing file may be replaced.

    Raises:
      OutputError: the file already exists, or its directory does not exist.
    """
    if not path:
        return
    path = Path(path)
    check_absent(path, overwrite and not path.is_dir())
    if not path.resolve().parent.is_dir():
        raise OutputError(f"{path}: its directory does not exist; create it first")
