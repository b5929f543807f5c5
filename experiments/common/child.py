"""Child processes that answer lines of JSON: the parent's `Child` and the child's `serve`.

A child is a module, run by any interpreter. This file imports the standard library alone, so that
the environment of a child needs no more than the child's own packages.

Every request is one object with `do` and fields, every answer one object:

    {"do": "prefill", "length": 16}   ->   {"seconds": 0.03}

The first line of a child is `{"versions": {...}}`, or `{"missing": why}` where a package is not
installed. `{"error": why}` answers a request that fails; the child then waits for the next one.
`{"do": "quit"}` ends it.
"""

import contextlib
import importlib
import importlib.metadata
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 1800.0
MAX_MESSAGE_CHARS = 300


class ChildError(Exception):
    """Failure of a child, which is absent, refuses, or dies; the message says why.

    Attributes:
      log: standard error of the child, where libraries print too.
    """

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class Child:
    """A process that runs `serve`; close it, or use it in a `with` statement.

    Args:
      module: dotted name.
      python: interpreter; None is this one.
      timeout_s: seconds to wait for an answer; None waits until the child ends.

    Attributes:
      versions: of the child's packages.

    Raises:
      ChildError: the interpreter or a package is missing.
    """

    def __init__(
        self, module: str, python: str | None = None, timeout_s: float | None = TIMEOUT_S
    ) -> None:
        self._timeout_s, self._buffer = timeout_s, b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        python = python or sys.executable
        try:
            self._process = subprocess.Popen(
                [python, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                cwd=ROOT,
            )
        except OSError as error:
            raise ChildError(f"{python}: {error.strerror}") from error
        answer = self._answer("start")
        if "missing" in answer:
            self.close()
            raise ChildError(answer["missing"])
        self.versions: dict[str, str] = answer["versions"]

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Send a request and return its answer.

        Raises:
          ChildError: the child refuses, dies, or does not answer in time.
        """
        try:
            line = json.dumps({"do": do, **fields}) + "\n"
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except OSError:
            raise self._death(do) from None
        answer = self._answer(do)
        if "error" in answer:
            raise ChildError(f"{do}: {answer['error']}", self._log())
        return answer

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._process.stdin.write(b'{"do": "quit"}\n')
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _answer(self, do: str) -> dict[str, Any]:
        start = time.monotonic()
        while b"\n" not in self._buffer:
            remaining_s = self._timeout_s and start + self._timeout_s - time.monotonic()
            expired = remaining_s is not None and remaining_s <= 0
            if expired or not select.select([self._process.stdout], [], [], remaining_s)[0]:
                self._process.kill()
                raise ChildError(f"{do}: no answer within {self._timeout_s:g} s", self._log())
            read = os.read(self._process.stdout.fileno(), 1 << 16)
            if not read:
                raise self._death(do)
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _death(self, do: str) -> ChildError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        code = self._process.poll()
        cause = f"exit status {code}"
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                cause = signal.Signals(-code).name
        log = self._log()
        lines = log.strip().splitlines() or ["no message"]
        message = f"{do}: its process died ({cause}): {lines[-1][:MAX_MESSAGE_CHARS]}"
        return ChildError(message, log)

    def _log(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")


def serve(
    make: Callable[[], Mapping[str, Callable[..., dict[str, Any]]]], packages: Mapping[str, str]
) -> None:
    """Answer the requests of standard input until `quit` or its end, then end the process.

    Args:
      make: builds the functions that answer, by their `do`; called once the packages are there.
      packages: distributions whose versions are noted, and the module of each, which is imported
        before the first request.
    """
    # Libraries that print must not come between answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(fields: dict[str, Any]) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    versions = {}
    for package, module in packages.items():
        try:
            versions[package] = importlib.metadata.version(package)
            importlib.import_module(module)
        except ImportError as error:
            answer({"missing": f"{package} is not installed for {sys.executable}: {error}"})
            return
    answer({"versions": versions})
    functions = make()
    for line in sys.stdin:
        fields = json.loads(line)
        do = fields.pop("do")
        if do == "quit":
            break
        try:
            answer(functions[do](**fields))
        except Exception as error:  # the parent decides what a failure means
            traceback.print_exc()
            text = str(error).strip().splitlines() or [""]
            answer({"error": f"{type(error).__name__}: {text[0]}"})
    # Destructors of native libraries have nothing more to report.
    with contextlib.suppress(OSError):
        answers.close()
    os._exit(0)


def peak_bytes() -> int:
    """Return the peak RSS of this process, or 0 without /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def forget_peak() -> None:
    """Let `peak_bytes` count from now on, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
