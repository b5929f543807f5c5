"""Suppression of the output of native libraries."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

from glm_edge.process_wide import shared


@shared
@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress what native libraries print to standard error."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as sink:
        terminal = os.dup(2)
        try:
            os.dup2(sink.fileno(), 2)
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
