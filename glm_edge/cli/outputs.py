"""Checks of what a command is to write, before its work."""

from pathlib import Path

from glm_edge.cli.corpora import check_absent
from glm_edge.errors import OutputError


def check_output(path: str | Path | None, overwrite: bool) -> None:
    """Refuses a file that could not be written when the work is done.

    Args:
      path: the file, or None where none is asked for.
      overwrite: whether an existing file may be replaced.

    Raises:
      OutputError: the file exists already, or its directory does not exist.
    """
    if not path:
        return
    path = Path(path)
    check_absent(path, overwrite and not path.is_dir())
    if not path.resolve().parent.is_dir():
        raise OutputError(f"{path}: its directory does not exist; make it first")
