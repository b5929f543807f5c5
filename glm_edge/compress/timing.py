"""Seconds per step of a compression, for benchmarks."""

import contextlib
import contextvars
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

Result = TypeVar("Result")
_RECORD: contextvars.ContextVar[dict[str, float] | None] = contextvars.ContextVar(
    "_RECORD", default=None
)


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, float]]:
    """Record the seconds of each step while the context is open.

    Yields:
      Seconds by step, with compilation. Each step waits for its arguments and its results.
    """
    seconds: dict[str, float] = {}
    token = _RECORD.set(seconds)
    try:
        yield seconds
    finally:
        _RECORD.reset(token)


def timed(step: str, function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """Call a function as part of a step; without a record, only call it."""
    seconds = _RECORD.get()
    if seconds is None:
        return function(*arguments, **options)
    jax.block_until_ready((arguments, options))
    started = time.perf_counter()
    result = jax.block_until_ready(function(*arguments, **options))
    seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - started
    return result
