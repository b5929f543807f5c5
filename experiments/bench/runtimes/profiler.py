"""Time of each operator of a `.tflite` file, by LiteRT's profiler.

    python -m experiments.bench.runtimes.profiler FILE.tflite SIGNATURE THREADS RUNS

The profiler is part of LiteRT's C interface only, so this module calls `libLiteRt.so` directly, in
a separate process. Inputs are zeros, as the kernels' time does not depend on values. Prints one
JSON object with microseconds of one run by operator and by node, medians over runs.
"""

import collections
import ctypes
import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

CPU, WRITE = 1, 1
# Larger than `LiteRtRankedTensorType`.
TENSOR_TYPE_BYTES = 512
# Event types of a delegate's operator, and of an operator that the interpreter runs.
DELEGATED, OPERATOR = 8, 2
SLOWEST = 12
LIBC = ctypes.CDLL(None)


class Event(ctypes.Structure):
    """`ProfiledEventData` of LiteRT's C interface."""

    _fields_ = (
        ("tag", ctypes.c_char_p),
        ("kind", ctypes.c_int),
        ("start_us", ctypes.c_uint64),
        ("elapsed_us", ctypes.c_uint64),
        ("memory", ctypes.c_size_t * 6),
        ("metadata", ctypes.c_uint64 * 2),
        ("source", ctypes.c_int),
    )


class Profiled:
    """A compiled file with timed operators.

    Args:
      path: of the file.
      signature: name of the signature to run.
      threads: number of XNNPACK threads.

    Raises:
      RuntimeError: LiteRT fails, or this release has a different C interface.
    """

    def __init__(self, path: str, signature: str, threads: int):
        folder = Path(importlib.util.find_spec("ai_edge_litert").origin).parent
        self.litert = ctypes.CDLL(str(folder / "libLiteRt.so"))
        environment = self._made("LiteRtCreateEnvironment", 0, None)
        model = self._made("LiteRtCreateModelFromFile", environment, path.encode())
        options = self._made("LiteRtCreateOptions")
        self._call("LiteRtSetOptionsHardwareAccelerators", options, CPU)
        for identifier, text in (
            ("runtime_options_string", "enable_profiling = true\n"),
            ("xnnpack", f"num_threads = {threads}\n"),
        ):
            opaque = self._opaque(identifier, text)
            self._call("LiteRtAddOpaqueOptions", options, opaque)
        self.compiled = self._made("LiteRtCreateCompiledModel", environment, model, options)
        self.index, handle = self._signature(model, signature)
        input_buffers = self._buffers(environment, handle, "Input", {})
        # Tensors that are carried from run to run share one buffer, as in `litert`.
        taken = self._buffers(environment, handle, "Output", input_buffers)
        self.inputs, self.outputs = (
            (ctypes.c_void_p * len(buffers))(*buffers.values())
            for buffers in (input_buffers, taken)
        )
        self.profiler = self._made("LiteRtCompiledModelGetProfiler", self.compiled)

    def run(self) -> float:
        """Run once; return the seconds."""
        started = time.perf_counter()
        self._call(
            "LiteRtRunCompiledModel",
            self.compiled,
            ctypes.c_size_t(self.index),
            ctypes.c_size_t(len(self.inputs)),
            self.inputs,
            ctypes.c_size_t(len(self.outputs)),
            self.outputs,
        )
        return time.perf_counter() - started

    def events(self, runs: int) -> tuple[list[Event], float]:
        """Return the events of a number of runs, and the seconds of one run."""
        self.run()
        self._call("LiteRtStartProfiler", self.profiler)
        seconds = sorted(self.run() for _ in range(runs))[runs // 2]
        self._call("LiteRtStopProfiler", self.profiler)
        count = ctypes.c_int()
        self._call("LiteRtGetNumProfilerEvents", self.profiler, ctypes.byref(count))
        recorded = (Event * count.value)()
        self._call("LiteRtGetProfilerEvents", self.profiler, count, recorded)
        return list(recorded), seconds

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.litert, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: LiteRT returned status {status}")

    def _made(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self._call(name, *arguments, ctypes.byref(made))
        return made

    def _opaque(self, identifier: str, text: str) -> ctypes.c_void_p:
        # The library frees the memory that is passed to it.
        LIBC.strdup.restype = ctypes.c_void_p
        payload = ctypes.c_void_p(LIBC.strdup(text.encode()))
        free = ctypes.cast(LIBC.free, ctypes.c_void_p)
        return self._made("LiteRtCreateOpaqueOptions", identifier.encode(), payload, free)

    def _signature(self, model: ctypes.c_void_p, wanted: str) -> tuple[int, ctypes.c_void_p]:
        count = ctypes.c_size_t()
        self._call("LiteRtGetNumModelSignatures", model, ctypes.byref(count))
        for index in range(count.value):
            handle = self._made("LiteRtGetModelSignature", model, ctypes.c_size_t(index))
            name = ctypes.c_char_p()
            self._call("LiteRtGetSignatureKey", handle, ctypes.byref(name))
            if name.value.decode() == wanted:
                return index, handle
        raise RuntimeError(f"the file has no signature {wanted!r}")

    def _buffers(
        self, environment: Any, signature: Any, side: str, shared: dict[str, Any]
    ) -> dict[str, Any]:
        """Make a zeroed buffer per input or output, or use the shared one of that name."""
        count = ctypes.c_size_t()
        self._call(f"LiteRtGetNumSignature{side}s", signature, ctypes.byref(count))
        made = {}
        for index in range(count.value):
            c_index, name = ctypes.c_size_t(index), ctypes.c_char_p()
            self._call(f"LiteRtGetSignature{side}Name", signature, c_index, ctypes.byref(name))
            key = name.value.decode()
            made[key] = shared.get(key) or self._buffer(environment, signature, side, c_index)
        return made

    def _buffer(self, environment: Any, signature: Any, side: str, c_index: Any) -> Any:
        kind = ctypes.create_string_buffer(TENSOR_TYPE_BYTES)
        tensor = self._made(f"LiteRtGetSignature{side}TensorByIndex", signature, c_index)
        self._call("LiteRtGetRankedTensorType", tensor, kind)
        index = ctypes.c_size_t(self.index)
        needs = self._made(
            f"LiteRtGetCompiledModel{side}BufferRequirements", self.compiled, index, c_index
        )
        buffer = self._made(
            "LiteRtCreateManagedTensorBufferFromRequirements", environment, kind, needs
        )
        size, address = ctypes.c_size_t(), ctypes.c_void_p()
        self._call("LiteRtGetTensorBufferSize", buffer, ctypes.byref(size))
        self._call("LiteRtLockTensorBuffer", buffer, ctypes.byref(address), WRITE)
        ctypes.memset(address, 0, size.value)
        self._call("LiteRtUnlockTensorBuffer", buffer)
        return buffer


def by_operator(events: list[Event], runs: int, seconds: float) -> dict[str, Any]:
    """Compute microseconds per run by kind of operator and of the slowest nodes, slowest first.

    Args:
      events: events of equal runs, in order.
      runs: number of runs.
      seconds: seconds of one run; `elsewhere` is the part outside operators: dispatch and buffers.

    Raises:
      RuntimeError: the runs differ, so their events cannot be assigned.
    """
    events = [event for event in events if event.kind in (DELEGATED, OPERATOR)]
    count = len(events) // runs
    if not count or len(events) % runs:
        raise RuntimeError(f"{len(events)} events do not divide into {runs} runs; use fewer runs")
    kinds: dict[str, list[float]] = collections.defaultdict(list)
    nodes = []
    for c_index in range(count):
        same = events[c_index::count]
        name = same[0].tag.decode(errors="replace")
        spent = statistics.median(event.elapsed_us for event in same)
        kinds[name].append(spent)
        nodes.append((spent, f"{name} ({c_index} of {count})"))
    total = sum(spent for spent, _ in nodes)
    return {
        "us": 1e6 * seconds,
        "elsewhere_us": 1e6 * seconds - total,
        "operators": [
            {"operator": name, "us": sum(spent), "count": len(spent)}
            for name, spent in sorted(kinds.items(), key=lambda item: -sum(item[1]))
        ],
        "nodes": [
            {"node": name, "us": spent} for spent, name in sorted(nodes, reverse=True)[:SLOWEST]
        ],
    }


def main(argv: list[str]) -> None:
    path, signature, threads, runs = argv[1], argv[2], int(argv[3]), int(argv[4])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    events, seconds = Profiled(path, signature, threads).events(runs)
    answers.write(json.dumps(by_operator(events, runs, seconds)) + "\n")
    answers.flush()
    # The library's objects end with the process.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv)
