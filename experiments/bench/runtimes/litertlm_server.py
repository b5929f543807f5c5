"""LiteRT-LM's own server with an exported bundle, as a peer of the model service."""

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import glm_edge as ge
from glm_edge.cli.checkpoints import checkpoint_of
from glm_edge.errors import DataError, MissingExtraError

READY_S = 120.0


@contextlib.contextmanager
def litertlm_served(model: str) -> Iterator[tuple[str, str]]:
    """Export a model as a float bundle, and serve it with `litert-lm serve`.

    Args:
      model: checkpoint directory, or the name of a shipped model.

    Yields:
      `(base_url, name)`: the server's address, and the name that requests must give.

    Raises:
      MissingExtraError: LiteRT-LM is not installed.
      DataError: the server does not start.
    """
    program = shutil.which("litert-lm", path=str(Path(sys.executable).parent)) or shutil.which(
        "litert-lm"
    )
    if program is None:
        raise MissingExtraError('litert-lm is not installed: pip install "glm_edge[litertlm]"')
    checkpoint = checkpoint_of(model)
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        bundle = Path(folder) / "model.litertlm"
        loaded, params = ge.load(checkpoint)
        ge.export.litertlm(loaded, params, checkpoint, bundle, (32, 128), 512)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        process = subprocess.Popen(
            [program, "serve", "--port", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait_until_ready(process, f"http://127.0.0.1:{port}/v1/models")
            yield f"http://127.0.0.1:{port}/v1", str(bundle)
        finally:
            process.terminate()
            process.wait(30)


def _wait_until_ready(process: subprocess.Popen, url: str) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DataError(f"litert-lm serve ended with status {process.returncode}")
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.2)
    raise DataError(f"litert-lm serve was not ready after {READY_S:g} s")
