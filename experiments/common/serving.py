"""The model service as a child process of a script."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from glm_edge.errors import DataError

READY_S = 600.0


class Served(NamedTuple):
    """A running service.

    Attributes:
      base_url: address, which ends with `/v1`.
      pid: process, None for a service that ran before.
      ready_s: seconds from its start until it was ready.
    """

    base_url: str
    pid: int | None
    ready_s: float


@contextlib.contextmanager
def served(
    model: str,
    base_url: str | None = None,
    options: Sequence[str] = (),
    ready_s: float = READY_S,
) -> Iterator[Served]:
    """Serve a model while a block runs.

    Args:
      model: checkpoint directory, or the name of a shipped model.
      base_url: address of a service that runs already; then nothing is started.
      options: further flags of `python -m glm_edge.serve`.
      ready_s: seconds in which the service must become ready.

    Yields:
      The service.

    Raises:
      DataError: the service ends, or is not ready in time.
    """
    if base_url is not None:
        yield Served(base_url, None, 0.0)
        return
    started, port = time.monotonic(), _free_port()
    command = [sys.executable, "-m", "glm_edge.serve", f"--model={model}", f"--port={port}"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, *options], stdout=log, stderr=subprocess.STDOUT, env=dict(os.environ)
        )
        try:
            _wait_until_ready(process, f"http://127.0.0.1:{port}/health", ready_s, log)
            seconds = time.monotonic() - started
            yield Served(f"http://127.0.0.1:{port}/v1", process.pid, seconds)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen, health: str, ready_s: float, log: Any) -> None:
    deadline = time.monotonic() + ready_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            log.seek(0)
            lines = log.read().strip().splitlines() or ["no message"]
            raise DataError(f"the service ended: {lines[-1]}")
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            urllib.request.urlopen(health, timeout=5) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise DataError(f"the service was not ready after {ready_s:g} s")
