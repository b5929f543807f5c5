"""Faults of the disk as one error."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from glm_edge.errors import GlmEdgeError, OutputError


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn faults of the disk into OutputError.

    Args:
      path: path for the message.

    Raises:
      OutputError: the disk is full, or cannot be written.
    """
    try:
        yield
    except GlmEdgeError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{path}: cannot be written: {reason}") from error
