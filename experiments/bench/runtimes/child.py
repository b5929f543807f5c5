"""Engines that are resident in processes of their own, as the parent sees them."""

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.bench.runtimes.engine import Task
from experiments.common.child import MAX_MESSAGE_CHARS, ROOT, Child, ChildError
from glm_edge.configs import GLMConfig, to_dict

# Threads of some runtimes spin for a while after their work and would slow who runs next.
PAUSE_S = 0.3


@dataclasses.dataclass
class Spec:
    """One row of the comparison.

    Attributes:
      name: such as `llama.cpp Q4_0`.
      family: who wrote the runtime: `ours`, `llama.cpp`, `onnxruntime`, `torch` or `jax`.
      bits: of a weight.
      module: of `experiments.bench.runtimes`.
      python: the interpreter.
      task: what it runs.
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
    """Returns a row of one configuration: our file in LiteRT, unless told otherwise.

    Args:
      name: of the row.
      form: of the weights.
      path: of the file, or empty.
      config: of the model.
      slots: of the cache.
      contexts: tokens in the cache before a timed step.
      lengths: of prompts.
      threads: of the runtime.
      bits: of a weight; 0 where nothing is compared by them.
      options: of the runtime.
      family: who wrote the runtime.
      module: of `experiments.bench.runtimes`.
      python: the interpreter; None is this one.

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


class EngineProcess(Child):
    """A process that runs an engine, see `engine`.

    Args:
      spec: of the engine.

    Raises:
      ChildError: the interpreter or a package is missing.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__(f"experiments.bench.runtimes.{spec.module}", spec.python)
        self.spec = spec

    def load(self) -> dict[str, Any]:
        """Loads the model of the spec."""
        return self.ask("load", task=dataclasses.asdict(self.spec.task))

    def prepare(self) -> dict[str, Any]:
        """Writes the file of the spec."""
        return self.ask("prepare", task=dataclasses.asdict(self.spec.task))

    def burst(self, phase: str, count: int, steps: int = 1, pause_s: float = PAUSE_S) -> float:
        """Takes a turn: pauses, then runs one phase.

        Args:
          phase: `decode` or `prefill`.
          count: tokens in the cache before the steps, or of the prompt.
          steps: of decoding.
          pause_s: seconds to wait first.

        Returns:
          Seconds of a step (the median of all), or of the prompt.
        """
        time.sleep(pause_s)
        if phase == "prefill":
            return self.ask("prefill", length=count)["seconds"]
        return statistics.median(self.ask(phase, context=count, steps=steps)["seconds"])

    def action(self, tokens: int, steps: int) -> dict[str, float]:
        """Seconds of an image, of a prompt of `tokens` that contains it, and of `steps` more."""
        return self.ask("action", tokens=tokens, steps=steps)["seconds"]

    def peak_bytes(self) -> int:
        """Returns the peak RSS of the process since it loaded."""
        return self.ask("rss")["peak_rss_bytes"]


def prepare(spec: Spec) -> dict[str, Any]:
    """Writes the file of an engine in a process that ends with it.

    Returns:
      What the engine says of its file, with `versions`.
    """
    with EngineProcess(spec) as child:
        return {**child.prepare(), "versions": child.versions}


def start(spec: Spec, steps: int = 2) -> tuple[EngineProcess, dict[str, Any]]:
    """Starts an engine, loads its model and runs everything once.

    Where feeding a prompt at once kills the process, it is fed token by token.

    Returns:
      The engine, and `load_seconds`, `baseline_rss_bytes`, `decode_rss_bytes` (all contexts
      decoded, no prompt yet), `peak_rss_bytes` and `batched`.

    Raises:
      ChildError: it cannot be run.
    """
    try:
        return _start(spec, steps)
    except ChildError:
        if not spec.task.batched or spec.family != "llama.cpp":
            raise
    single = dataclasses.replace(spec.task, batched=False)
    return _start(dataclasses.replace(spec, task=single), steps)


def _start(spec: Spec, steps: int) -> tuple[EngineProcess, dict[str, Any]]:
    child = EngineProcess(spec)
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
    """Returns the memory available to another process, or infinity without /proc."""
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return available[0] if available else float("inf")


def profile(path: str, signature: str, threads: int, runs: int) -> dict[str, Any]:
    """Measures the time of each operator of a `.tflite` file, see `profiler`.

    Raises:
      ChildError: this release of LiteRT cannot be profiled so.
    """
    command = [sys.executable, "-m", "experiments.bench.runtimes.profiler", path, signature]
    done = subprocess.run(
        [*command, str(threads), str(runs)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ChildError(f"profile of {signature}: {lines[-1][:MAX_MESSAGE_CHARS]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
