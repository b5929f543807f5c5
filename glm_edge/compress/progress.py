"""A progress line for scripts and notebooks."""

import sys
import time
from typing import TextIO


class ProgressLine:
    """Rewrites one line with a bar, the stage, the seconds so far and those left.

    Pass it as `progress=`.

    Args:
      stream: where to write; None is standard error.
      width: characters of the bar.
    """

    def __init__(self, stream: TextIO | None = None, width: int = 30):
        self.stream, self.width = stream, width
        self.stage, self.done, self.started = "", 0, 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        name = stage.split(":", 1)[0]
        if name != self.stage or done <= self.done:
            self.stage, self.started = name, time.monotonic()
        self.done = done
        filled = self.width * done // max(total, 1)
        bar = "#" * filled + "." * (self.width - filled)
        seconds = time.monotonic() - self.started
        left = f", {seconds / done * (total - done):.0f} s left" if 0 < done < total else ""
        stream = self.stream or sys.stderr
        end = "\n" if done >= total else ""
        stream.write(f"\r[{bar}] {done}/{total} {stage} {seconds:.0f} s{left}\033[K{end}")
        stream.flush()
