"""The parent's side: engines that are resident in separate processes."""

import contextlib
import dataclasses
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.bench.runtimes.engine import Task
from glm_edge.configs import GLMConfig, to_dict

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S = 1800.0
LONGEST = 300
# Threads of some runtimes spin for a while after their work, and would slow the next one.
PAUSE_S = 0.3


class EngineError(Exception):
    """An error of an engine that is absent, fails or crashes; the message has the reason."""


@dataclasses.dataclass
class Spec:
    """One row of the comparison.

    Attributes:
      name: name, such as `llama.cpp Q4_0`.
      family: runtime: `ours`, `llama.cpp`, `onnxruntime`, `torch` or `jax`.
      bits: bits per weight.
      module: module of `experiments.bench.runtimes`.
      python: Python interpreter.
      task: task of the engine.
    """

    name: str
    family: str
    bits: int
    module: str
    python: str
    task: Task


def spec_of(
    name: str,
    form: str,
    path: str | Path,
    config: GLMConfig,
    slots: int,
    contexts: Sequence[int],
    lengths: Sequence[int],
    threads: int,
    bits: int = 0,
    options: Mapping[str, Any] | None = None,
    family: str = "ours",
    module: str = "litert",
    python: str | None = None,
) -> Spec:
    """Returns a row of one configuration, by default glm_edge's file in LiteRT.

    Args:
      name: name of the row.
      form: format of the weights.
      path: path of the file, or empty.
      config: configuration of the model.
      slots: number of cache slots.
      contexts: tokens in the cache before a timed step.
      lengths: prompt lengths in tokens.
      threads: number of threads of the runtime.
      bits: bits per weight; 0 for rows without a comparison by bits.
      options: options of the runtime.
      family: runtime, as in `Spec`.
      module: module of `experiments.bench.runtimes`.
      python: Python interpreter; None is this one.

    Returns:
      The row.
    """
    task = Task(
        form=form,
        path=str(path),
        config=to_dict(config),
        slots=slots,
        contexts=tuple(contexts),
        lengths=tuple(lengths),
        threads=threads,
        options=None if options is None else dict(options),
    )
    return Spec(name, family, bits, module, python or sys.executable, task)


class Child:
    """A process with the protocol of `engine`.

    Args:
      spec: spec of the engine.

    Raises:
      EngineError: the interpreter or a package is missing.
    """

    def __init__(self, spec: Spec):
        self.spec = spec
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._buffer = b""
        try:
            self._process = subprocess.Popen(
                [spec.python, "-m", f"experiments.bench.runtimes.{spec.module}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                cwd=ROOT,
            )
        except OSError as error:
            raise EngineError(f"{spec.python}: {error.strerror}") from error
        answer = self._answer("start")
        if "missing" in answer:
            self.close()
            raise EngineError(answer["missing"])
        self.versions: dict[str, str] = answer["versions"]

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Sends a request and returns the answer.

        Raises:
          EngineError: the engine fails, crashes, or exceeds the time limit.
        """
        try:
            line = json.dumps({"do": do, **fields}) + "\n"
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except OSError:
            raise EngineError(self._death(do)) from None
        answer = self._answer(do)
        if "error" in answer:
            raise EngineError(f"{do}: {answer['error']}")
        return answer

    def load(self) -> dict[str, Any]:
        """Loads the model of the spec."""
        return self.ask("load", task=dataclasses.asdict(self.spec.task))

    def prepare(self) -> dict[str, Any]:
        """Writes the file of the spec."""
        return self.ask("prepare", task=dataclasses.asdict(self.spec.task))

    def burst(self, phase: str, count: int, steps: int = 1, pause_s: float = PAUSE_S) -> float:
        """Runs one burst: pauses, then runs one phase.

        Args:
          phase: `decode` or `prefill`.
          count: tokens in the cache before the steps, or tokens of the prompt.
          steps: number of decoding steps.
          pause_s: pause before the phase in seconds.

        Returns:
          Seconds per step (median), or of the prompt.
        """
        time.sleep(pause_s)
        if phase == "prefill":
            return self.ask("prefill", length=count)["seconds"]
        return statistics.median(self.ask(phase, context=count, steps=steps)["seconds"])

    def action(self, tokens: int, steps: int) -> dict[str, float]:
        """Times an image, a prompt of `tokens` that contains it, and `steps` decoding steps."""
        return self.ask("action", tokens=tokens, steps=steps)["seconds"]

    def peak_bytes(self) -> int:
        """Returns the peak RSS of the process since loading, in bytes."""
        return self.ask("rss")["peak_rss_bytes"]

    def close(self) -> None:
        """Ends the process."""
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
        until = time.monotonic() + TIMEOUT_S
        while b"\n" not in self._buffer:
            seconds_left = until - time.monotonic()
            if (
                seconds_left <= 0
                or not select.select([self._process.stdout], [], [], seconds_left)[0]
            ):
                self._process.kill()
                raise EngineError(f"{do}: no answer within {TIMEOUT_S:g} s")
            read = os.read(self._process.stdout.fileno(), 1 << 16)
            if not read:
                raise EngineError(self._death(do))
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _death(self, do: str) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        code = self._process.poll()
        how = f"exit status {code}"
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                how = signal.Signals(-code).name
        size = self._errors.seek(0, 2)
        self._errors.seek(max(0, size - 4096))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return (
            f"{do}: its process crashed ({how}): {lines[-1][:LONGEST] if lines else 'no message'}"
        )


def prepare(spec: Spec) -> dict[str, Any]:
    """Writes the file of an engine in a process that ends afterwards.

    Returns:
      The engine's description of its file, with `versions`.
    """
    child = Child(spec)
    try:
        return {**child.prepare(), "versions": child.versions}
    finally:
        child.close()


def start(spec: Spec, steps: int = 2) -> tuple[Child, dict[str, Any]]:
    """Starts an engine, loads its model and runs every phase once.

    If a prompt in one call crashes the process, prompts are fed token by token.

    Returns:
      The engine, and `load_seconds`, `baseline_rss_bytes`, `decode_rss_bytes` (all contexts
      decoded, no prompt yet), `peak_rss_bytes` and `batched`.

    Raises:
      EngineError: the engine cannot run.
    """
    try:
        return _start(spec, steps)
    except EngineError:
        if not spec.task.batched or spec.family != "llama.cpp":
            raise
    single = dataclasses.replace(spec.task, batched=False)
    return _start(dataclasses.replace(spec, task=single), steps)


def _start(spec: Spec, steps: int) -> tuple[Child, dict[str, Any]]:
    child = Child(spec)
    try:
        loaded = child.load()
        for context in spec.task.contexts:
            child.ask("decode", context=context, steps=steps)
        decoding = child.peak_bytes()
        for length in spec.task.lengths:
            child.ask("prefill", length=length)
        peak = child.peak_bytes()
    except BaseException:
        child.close()
        raise
    return child, {
        "load_seconds": loaded["seconds"],
        "baseline_rss_bytes": loaded["baseline_rss_bytes"],
        "decode_rss_bytes": decoding,
        "peak_rss_bytes": peak,
        "batched": spec.task.batched,
    }


def available_bytes() -> float:
    """Returns the memory available to another process in bytes, or infinity without /proc."""
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return available[0] if available else float("inf")


def profile(path: str, signature: str, threads: int, runs: int) -> dict[str, Any]:
    """Measures the time of each operator of a `.tflite` file; see `profiler`.

    Raises:
      EngineError: this release of LiteRT does not support the profiler.
    """
    command = [sys.executable, "-m", "experiments.bench.runtimes.profiler", path, signature]
    done = subprocess.run(
        [*command, str(threads), str(runs)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise EngineError(f"profile of {signature}: {lines[-1][:LONGEST]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
