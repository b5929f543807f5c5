"""The parent's side: engines that are resident in separate processes."""

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

# Threads of some runtimes spin for a while after their work, and would slow the next one.
PAUSE_S = 0.3


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
    """Return a row of one configuration, by default glm_edge's file in LiteRT.

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


class EngineProcess(Child):
    """A process that runs an engine with the protocol of `engine`.

    Args:
      spec: spec of the engine.

    Raises:
      ChildError: the interpreter or a package is missing.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__(f"experiments.bench.runtimes.{spec.module}", spec.python)
        self.spec = spec

    def load(self) -> dict[str, Any]:
        """Load the model of the spec."""
        return self.ask("load", task=dataclasses.asdict(self.spec.task))

    def prepare(self) -> dict[str, Any]:
        """Write the file of the spec."""
        return self.ask("prepare", task=dataclasses.asdict(self.spec.task))

    def burst(self, phase: str, count: int, steps: int = 1, pause_s: float = PAUSE_S) -> float:
        """Run one burst: pauses, then run one phase.

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
        """Time an image, a prompt of `tokens` that contains it, and `steps` decoding steps."""
        return self.ask("action", tokens=tokens, steps=steps)["seconds"]

    def passes(self, context: int, counts: Sequence[int]) -> float:
        """Time passes of several tokens each, behind `context` others."""
        return self.ask("passes", context=context, counts=list(counts))["seconds"]

    def peak_bytes(self) -> int:
        """Return the peak RSS of the process since loading, in bytes."""
        return self.ask("rss")["peak_rss_bytes"]


def prepare(spec: Spec) -> dict[str, Any]:
    """Write the file of an engine in a process that ends afterwards.

    Returns:
      The engine's description of its file, with `versions`.
    """
    with EngineProcess(spec) as child:
        return {**child.prepare(), "versions": child.versions}


def start(spec: Spec, steps: int = 2) -> tuple[EngineProcess, dict[str, Any]]:
    """Start an engine, load its model and run every phase once.

    If a prompt in one call crashes the process, prompts are fed token by token.

    Returns:
      The engine, and `load_seconds`, `baseline_rss_bytes`, `decode_rss_bytes` (all contexts
      decoded, no prompt yet), `peak_rss_bytes` and `batched`.

    Raises:
      ChildError: the engine cannot run.
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
    """Return the memory available to another process in bytes, or infinity without /proc."""
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return available[0] if available else float("inf")


def profile(path: str, signature: str, threads: int, runs: int) -> dict[str, Any]:
    """Measure the time of each operator of a `.tflite` file; see `profiler`.

    Raises:
      ChildError: this release of LiteRT does not support the profiler.
    """
    command = [sys.executable, "-m", "experiments.bench.runtimes.profiler", path, signature]
    done = subprocess.run(
        [*command, str(threads), str(runs)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ChildError(f"profile of {signature}: {lines[-1][:MAX_MESSAGE_CHARS]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
