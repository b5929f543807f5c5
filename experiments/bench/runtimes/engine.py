"""The child's side: one runtime with one model, which answers lines of JSON.

Requests, which have `do`, and answers are one JSON object per line:

    {"do": "prepare", "task": TASK}    writes the model's file -> what was written
    {"do": "load", "task": TASK}       -> {"seconds", "baseline_rss_bytes"}
    {"do": "decode", "context": C, "steps": N}  -> {"seconds": [of each step]}
    {"do": "prefill", "length": T}     -> {"seconds": until the scores of the last token}
    {"do": "action", "tokens": T, "steps": N}   -> {"seconds"}; see `bench/time_to_action.py`
    {"do": "rss"}                      -> {"peak_rss_bytes"}
    {"do": "quit"}

The first line of a child is `{"versions": {...}}`, or `{"missing": reason}` if a package is not
installed. The answer to a request that fails is `{"error": reason}`; the child continues.
"""

import contextlib
import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Settings that the exported graphs of all runtimes share.
HIDDEN = -1e9
CACHE = "kv_cache_"


@dataclass(frozen=True)
class Task:
    """The task of an engine.

    Attributes:
      form: format of the weights, in the runtime's notation.
      path: path of the model's file or directory; empty for a runtime that makes its weights
        itself.
      config: configuration of the model, from `glm_edge.configs.to_dict`.
      slots: number of cache slots.
      contexts: tokens in the cache before a timed step.
      lengths: prompt lengths in tokens.
      threads: number of threads of the runtime.
      batched: whether prefill processes several tokens per call; False feeds them one by one.
      options: options of the runtime.
    """

    form: str
    path: str
    config: dict[str, Any]
    slots: int
    contexts: tuple[int, ...]
    lengths: tuple[int, ...]
    threads: int
    batched: bool = True
    options: dict[str, Any] | None = None

    @property
    def decoder(self) -> dict[str, Any]:
        """Configuration of the decoder."""
        return self.config["decoder"]

    def option(self, name: str, default: Any = None) -> Any:
        """Returns one of `options`."""
        return (self.options or {}).get(name, default)

    def step(self, length: int, slot: int) -> tuple[str, int | None]:
        """Returns `step_signature` by the option `attended_slots`."""
        return step_signature(length, slot, self.option("attended_slots", []))


class Engine:
    """One runtime; subclasses load a model."""

    def prepare(self, task: Task) -> dict[str, Any]:
        """Writes the file that `load` opens.

        Returns:
          `file_bytes`; `weight_bytes`, which one step reads; and the list `notes`.
        """
        raise NotImplementedError

    def load(self, task: Task) -> None:
        """Opens the file, ready to decode a token."""
        raise NotImplementedError

    def decode(self, context: int, steps: int) -> list[float]:
        """Decodes tokens after `context` others; returns seconds from each token to its logits."""
        raise NotImplementedError

    def prefill(self, length: int) -> float:
        """Returns the seconds from a prompt to the logits of its last token."""
        raise NotImplementedError

    def action(self, tokens: int, steps: int) -> dict[str, float]:
        """Times an image, a prompt of `tokens` that contains it, and `steps` tokens."""
        raise NotImplementedError


def step_signature(length: int, slot: int, attended_slots: Iterable[int]) -> tuple[str, int | None]:
    """Returns the fastest signature of an exported file for a range of tokens.

    Args:
      length: number of tokens of the call.
      slot: slot of the first token.
      attended_slots: slot counts of the file's signatures; see `ge.export.tflite`.

    Returns:
      Its name, and the number of slots that it attends to; None for all.
    """
    name = "decode" if length == 1 else f"prefill_{length}"
    fitting = sorted(slots for slots in attended_slots if slots >= length)
    if length > 1:
        # A prompt has only one signature with fewer slots.
        fitting = fitting[:1]
    attended = next((slots for slots in fitting if slot + length <= slots), None)
    return (name, None) if attended is None else (f"{name}_{attended}", attended)


def timed(run: Callable[[], Any]) -> float:
    """Measures the seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_bytes() -> int:
    """Returns the peak RSS of this process in bytes, or 0 without /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def forget_peak() -> None:
    """Resets the peak of `peak_bytes`, if the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def random_matrix(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Draws a weight that preserves the scale of its inputs, float32 [rows, columns]."""
    return rng.standard_normal((rows, columns), np.float32) * np.float32(columns**-0.5)


def serve(make: Callable[[], Engine], packages: dict[str, str]) -> None:
    """Answers requests until `quit` or the end of input.

    Args:
      make: function that makes the engine.
      packages: module by distribution; the versions are recorded.
    """
    # Output of libraries must not mix with answers.
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
    engine = make()
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "quit":
            break
        try:
            answer(_answer(engine, request))
        except Exception as error:  # the parent handles failures
            text = str(error).strip().splitlines() or [""]
            answer({"error": f"{type(error).__name__}: {text[0]}"})
    # Skips destructors of native libraries.
    with contextlib.suppress(OSError):
        answers.close()
    os._exit(0)


def _answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    do = request["do"]
    if do == "prepare":
        return engine.prepare(Task(**request["task"]))
    if do == "load":
        forget_peak()
        baseline, task = peak_bytes(), Task(**request["task"])
        seconds = timed(lambda: (engine.load(task), engine.decode(task.contexts[0], 1)))
        return {"seconds": seconds, "baseline_rss_bytes": baseline}
    if do == "decode":
        return {"seconds": engine.decode(request["context"], request["steps"])}
    if do == "prefill":
        return {"seconds": engine.prefill(request["length"])}
    if do == "action":
        return {"seconds": engine.action(request["tokens"], request["steps"])}
    if do == "rss":
        return {"peak_rss_bytes": peak_bytes()}
    raise ValueError(f"unknown request {do!r}")
