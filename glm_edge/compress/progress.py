"""A progress line for scripts and notebooks."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from glm_edge.errors import DataError

Progress = Callable[[str, int, int], None]
# Seconds between two lines of a stage if the output is a file.
QUIET_SECONDS = 30.0


class ProgressLine:
    """A progress line with bar, stage, elapsed seconds and remaining seconds.

    A terminal or a notebook shows one line that is rewritten. A file receives lines without control
    characters: at the end of each stage, and every 30 seconds. Elapsed seconds of a stage count
    from the end of the previous stage, or from the creation of the line. The first step shows no
    remaining time, since it includes compilation.

    Pass it as `progress=`; `progress=True` uses the defaults.

        recipe(model, params, calibration=batches, progress=ge.ProgressLine(width=40))

    Args:
      stream: output stream; None means standard error.
      width: characters of the bar.
    """

    def __init__(self, stream: TextIO | None = None, width: int = 30) -> None:
        self.stream, self.width = stream, width
        self.stage, self.first, self.done = "", 0, 0
        self.started = self.first_at = self.called = self.written = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        name, now = stage.split(":", 1)[0], time.monotonic()
        if name != self.stage or done <= self.done:
            self.stage, self.first, self.first_at, self.started = name, done, now, self.called
        self.done, self.called = done, now
        filled = self.width * done // max(total, 1)
        bar = "#" * filled + "." * (self.width - filled)
        seconds, steps = now - self.started, done - self.first
        stream, ended, remaining = self.stream or sys.stderr, done >= total, ""
        if steps > 0 and not ended:
            remaining = f", {(now - self.first_at) / steps * (total - done):.0f} s left"
        text = f"[{bar}] {done}/{total} {stage} {seconds:.0f} s{remaining}"
        if stream.isatty() or (self.stream is None and "ipykernel" in sys.modules):
            stream.write(f"\r{text}\033[K{chr(10) if ended else ''}")
        elif ended or now - self.written >= QUIET_SECONDS:
            self.written = now
            stream.write(f"{text}\n")
        stream.flush()


def progress_of(progress: Progress | bool | None) -> Progress | None:
    """Convert the argument `progress=` to a callback.

    Args:
      progress: a callback, True for a `ProgressLine`, or None or False for no progress.

    Returns:
      The callback, or None.

    Raises:
      DataError: `progress` has another type.
    """
    if progress is None or isinstance(progress, bool):
        return ProgressLine() if progress else None
    if not callable(progress):
        raise DataError(
            f"progress must be True or a function of (stage, done, total), not {progress!r}"
        )
    return progress
