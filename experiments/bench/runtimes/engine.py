"""Engines: runtimes with one model that answer the requests of `experiments.common.child`.

{"do": "prepare", "task": TASK}    writes the model's file -> what was written
{"do": "load", "task": TASK}       -> {"seconds", "baseline_rss_bytes"}
{"do": "decode", "context": C, "steps": N}  -> {"seconds": [of each step]}
{"do": "prefill", "length": T}     -> {"seconds": until the scores of the last token}
{"do": "action", "tokens": T, "steps": N}   -> {"seconds"}; see `bench/time_to_action.py`
{"do": "passes", "context": C, "counts": [of tokens]}  -> {"seconds": of all passes}
{"do": "rss"}                      -> {"peak_rss_bytes"}
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.common import child

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
        """Return one of `options`."""
        return (self.options or {}).get(name, default)

    def step(self, length: int, slot: int) -> tuple[str, int | None]:
        """Return `step_signature` by the option `attended_slots`."""
        return step_signature(length, slot, self.option("attended_slots", []))


class Engine:
    """One runtime; subclasses load a model."""

    def prepare(self, task: Task) -> dict[str, Any]:
        """Write the file that `load` opens.

        Returns:
          `file_bytes`; `weight_bytes`, which one step reads; and the list `notes`.
        """
        raise NotImplementedError

    def load(self, task: Task) -> None:
        """Open the file, ready to decode a token."""
        raise NotImplementedError

    def decode(self, context: int, steps: int) -> list[float]:
        """Decode tokens after `context` others; return seconds from each token to its logits."""
        raise NotImplementedError

    def prefill(self, length: int) -> float:
        """Return the seconds from a prompt to the logits of its last token."""
        raise NotImplementedError

    def action(self, tokens: int, steps: int) -> dict[str, float]:
        """Time an image, a prompt of `tokens` that contains it, and `steps` tokens."""
        raise NotImplementedError

    def passes(self, context: int, counts: Sequence[int]) -> float:
        """Return the seconds of passes of several tokens each, behind `context` others.

        Each pass ends with the choice of the next token from the logits of its last one.
        """
        raise NotImplementedError


def step_signature(length: int, slot: int, attended_slots: Iterable[int]) -> tuple[str, int | None]:
    """Return the fastest signature of an exported file for a range of tokens.

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
    """Measure the seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def random_matrix(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Draw a weight that preserves the scale of its inputs, float32 [rows, columns]."""
    return rng.standard_normal((rows, columns), np.float32) * np.float32(columns**-0.5)


def serve(make: Callable[[], Engine], packages: dict[str, str]) -> None:
    """Answer requests until `quit` or the end of input.

    Args:
      make: function that makes the engine.
      packages: module by distribution; the versions are recorded.
    """
    child.serve(lambda: _functions(make()), packages)


def _functions(engine: Engine) -> dict[str, Callable[..., dict[str, Any]]]:
    """Return the answers of an engine by request."""

    def load(task: dict[str, Any]) -> dict[str, Any]:
        child.forget_peak()
        baseline, loaded = child.peak_bytes(), Task(**task)
        seconds = timed(lambda: (engine.load(loaded), engine.decode(loaded.contexts[0], 1)))
        return {"seconds": seconds, "baseline_rss_bytes": baseline}

    return {
        "prepare": lambda task: engine.prepare(Task(**task)),
        "load": load,
        "decode": lambda context, steps: {"seconds": engine.decode(context, steps)},
        "prefill": lambda length: {"seconds": engine.prefill(length)},
        "passes": lambda context, counts: {"seconds": engine.passes(context, counts)},
        "action": lambda tokens, steps: {"seconds": engine.action(tokens, steps)},
        "rss": lambda: {"peak_rss_bytes": child.peak_bytes()},
    }
