"""Interpreter of an exported model in another process, so that a crash raises an exception."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glm_edge.errors import ExportError, require
from glm_edge.export.verify import worker_main
from glm_edge.export.verify.worker_main import ProtocolError, receive, send

TIMEOUT = 600.0
MAX_MESSAGE_CHARS = 200
LOG_PREFIXES = ("INFO", "WARNING")
# For each runtime: its name in messages, its module, and the extra that installs it.
RUNTIMES = {
    "litert": ("LiteRT", "ai_edge_litert", "export"),
    "onnx": ("onnxruntime", "onnxruntime", "onnx"),
    "mnn": ("MNN", "MNN", "mnn"),
    "litertlm": ("LiteRT-LM", "litert_lm", "litertlm"),
}


def require_runtime(runtime: str) -> str:
    """Return the name of a runtime of `RUNTIMES`, if it is installed.

    Args:
      runtime: key of `RUNTIMES`.

    Returns:
      The name of the runtime for messages.

    Raises:
      MissingExtraError: it is not installed.
    """
    name, module, extra = RUNTIMES[runtime]
    require(module, extra=extra)
    return name


class RemoteArray:
    """An array that stays in the other process, where it can be an input without a copy.

    Attributes:
      dtype: type of the array.
      shape: shape of the array.
    """

    def __init__(
        self, process: "InterpreterProcess", key: int, dtype: np.dtype, shape: tuple
    ) -> None:
        self.process, self.key, self.dtype, self.shape = process, key, dtype, shape
        weakref.finalize(self, process.dropped.append, key)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.process.fetch(self.key)
        return array if dtype is None else array.astype(dtype)


class InterpreterProcess:
    """The runtime of one exported model, in a separate process.

    The object is thread-safe and processes one request at a time. An engine has one conversation,
    so each conversation needs its own process.

    Args:
      path: path of the file, or of the directory for `onnx` and `mnn`.
      num_threads: number of threads of the runtime, limited to the cores of this process.
      timeout: time limit in seconds for one answer, and for loading.
      runtime: `litert`, `onnx`, `mnn`, or `litertlm`, which supports `reply` instead of `run`.
      **options: arguments of the runtime's class in `glm_edge.export.verify.worker_main`.

    Raises:
      ExportError: the file does not load, or the process crashes or exceeds the time limit.
      MissingExtraError: the runtime is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        num_threads: int = 2,
        timeout: float = TIMEOUT,
        runtime: str = "litert",
        **options: Any,
    ):
        self._name = require_runtime(runtime)
        self._path, self._timeout = path, timeout
        self.dropped: list[int] = []
        # The lock keeps a request and its answer together in the pipes.
        self._lock = threading.Lock()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        # `-P`: modules in the script's folder have names of packages, and must not hide them.
        self._process = subprocess.Popen(
            [sys.executable, "-P", worker_main.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        # Pipes, since both are asked for above.
        self._questions: Any = self._process.stdin
        self._answers: Any = self._process.stdout
        self._close = weakref.finalize(self, _end, self._process)
        fields = {"do": "load", "runtime": runtime, "path": str(path)}
        # More threads than cores are slow: threads of runtimes spin while they wait for each other.
        options["num_threads"] = min(num_threads, _cores())
        self._ask({**fields, "options": options}, {}, "load it")

    def run(
        self, signature: str, inputs: Mapping[str, Any], keep: Iterable[str] = ()
    ) -> dict[str, Any]:
        """Run a signature.

        Args:
          signature: name of the signature.
          inputs: arrays, or `RemoteArray`s of this process, by name.
          keep: names of outputs that stay in the process and are returned as `RemoteArray`s.

        Returns:
          The outputs by name.

        Raises:
          ExportError: the runtime fails, or the process crashes or exceeds the time limit.
        """
        remote = {
            name: value.key
            for name, value in inputs.items()
            if isinstance(value, RemoteArray) and value.process is self
        }
        arrays = {name: np.asarray(v) for name, v in inputs.items() if name not in remote}
        fields = {"do": "run", "signature": signature, "remote": remote, "keep": list(keep)}
        answer, outputs = self._ask(fields, arrays, f"run {signature}")
        try:
            stayed = {
                name: RemoteArray(self, key, np.dtype(kind), tuple(shape))
                for name, (key, kind, shape) in answer["remote"].items()
            }
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ExportError(f"{self._path}: its process returned no valid answer") from error
        return {**outputs, **stayed}

    def fetch(self, key: int) -> np.ndarray:
        """Copy an array from the process.

        Args:
          key: key of the array in the other process.

        Returns:
          The array.
        """
        return self._ask({"do": "fetch", "key": key}, {}, "return an array")[1]["array"]

    def reply(self, content: Any, max_new_tokens: int, same: bool = False) -> tuple[str, int]:
        """Request the greedy answer of a bundle's engine to a user's message.

        Args:
          content: text, or a list of LiteRT-LM's parts as JSON values.
          max_new_tokens: most tokens per answer of the conversation that this message begins.
          same: whether the message continues the previous conversation.

        Returns:
          `(text, tokens)`: the answer, and the number of tokens of the conversation including it.

        Raises:
          ExportError: as for `run`.
        """
        fields = {"do": "reply", "content": content, "max_new_tokens": max_new_tokens, "same": same}
        return self._answer(fields)

    def branch(self, content: Any) -> tuple[str, int]:
        """Request the answer to a message in a clone of the conversation, which stays as it is.

        The clone has the context of the latest `reply`, so only the message is prefilled; see
        `worker_main.clone_conversation` for its limits.

        Args:
          content: text, or a list of LiteRT-LM's parts as JSON values.

        Returns:
          `(text, tokens)`: the answer, and the number of tokens of the clone.

        Raises:
          ExportError: as for `run`; or there is no conversation.
        """
        return self._answer({"do": "branch", "content": content})

    def _answer(self, fields: dict[str, Any]) -> tuple[str, int]:
        answer = self._ask(fields, {}, "answer a message")[0]
        text, tokens = answer.get("text"), answer.get("tokens")
        if not isinstance(text, str) or not isinstance(tokens, int):
            raise ExportError(f"{self._path}: its process returned no valid answer")
        return text, tokens

    def close(self) -> None:
        """End the process after its current answer. The object cannot be used afterwards."""
        with self._lock:
            self._close()

    def _ask(
        self, fields: dict[str, Any], arrays: Mapping[str, np.ndarray], task: str
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        with self._lock:
            return self._exchange(fields, arrays, task)

    def _exchange(
        self, fields: dict[str, Any], arrays: Mapping[str, np.ndarray], task: str
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        if not self._close.alive:
            raise ExportError(f"{self._path}: its process has ended; load the file again")
        fields = {**fields, "drop": [self.dropped.pop() for _ in range(len(self.dropped))]}
        late = threading.Event()
        timer = threading.Timer(self._timeout, self._stop, [late])
        timer.daemon = True
        timer.start()
        try:
            send(self._questions, fields, arrays)
            answer = receive(self._answers)
        except (OSError, ProtocolError):
            answer = None
        except BaseException:
            # An answer may be half read, and the next one would be read as its continuation.
            self._close()
            raise
        finally:
            timer.cancel()
        if answer is None:
            raise ExportError(f"{self._path}: {self._cause(task, late)}")
        if "error" in answer[0]:
            raise ExportError(f"{self._path}: {self._name} does not {task}: {answer[0]['error']}")
        return answer

    def _stop(self, late: threading.Event) -> None:
        late.set()
        self._process.kill()

    def _cause(self, task: str, late: threading.Event) -> str:
        """Return the reason for a missing answer."""
        try:
            # A process that crashes closes its pipes shortly before it ends.
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._close()
        if late.is_set():
            return (
                f"{self._name} did not {task} within {self._timeout:g} s; its process was stopped"
            )
        how = f"exit status {code}"
        if code < 0:
            with contextlib.suppress(ValueError):
                how = f"signal {signal.Signals(-code).name}"
        return (
            f"{self._name}'s process crashed when asked to {task} ({how}{self._last_line()}); the "
            "file is damaged or made for another release"
        )

    def _last_line(self) -> str:
        size = self._errors.seek(0, 2)
        self._errors.seek(max(0, size - 4096))
        lines = self._errors.read().decode(errors="replace").split("\n")
        # Log messages of the runtime are not the cause.
        lines = [
            line.strip() for line in lines if line.strip() and not line.startswith(LOG_PREFIXES)
        ]
        return f": {lines[-1][:MAX_MESSAGE_CHARS]}" if lines else ""


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _end(process: subprocess.Popen) -> None:
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()
    process.kill()
    process.wait()
