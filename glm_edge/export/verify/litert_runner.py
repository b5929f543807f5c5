"""Runner of an exported `.tflite` file in LiteRT."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glm_edge.configs import from_dict
from glm_edge.errors import DataError, ExportError, GlmEdgeError, require
from glm_edge.export.common.interface import Tensor
from glm_edge.export.common.parsing import PARSE_ERRORS
from glm_edge.export.common.quiet import quiet
from glm_edge.export.common.sizes import described_sizes
from glm_edge.export.tflite.file import read_metadata, unverified_digest
from glm_edge.export.tflite.interface import checked_graphs
from glm_edge.export.tflite.reader import Graph
from glm_edge.export.verify.runner import SignatureRunner, check_signature
from glm_edge.export.verify.worker import TIMEOUT, InterpreterProcess


class LiteRTRunner(SignatureRunner):
    """An exported file in the LiteRT interpreter, which runs without JAX.

    The runner is thread-safe; the interpreter runs one signature at a time.

    Args:
      path: path of the file.
      num_threads: number of threads of the interpreter.
      isolated: whether to check all tables of the file and run it in a separate process, so that a
        damaged file can crash only that process. The process stores the caches; other arrays are
        copied through a pipe.
      timeout: time limit in seconds for one answer of that process.

    Raises:
      ExportError: glm_edge did not export the file, or it is damaged or does not load.
      MissingExtraError: LiteRT is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        num_threads: int = 2,
        isolated: bool = False,
        timeout: float = TIMEOUT,
    ):
        description = read_metadata(path)
        try:
            config = from_dict(description["config"])
            sizes = described_sizes(description, config)
            super().__init__(config, **vars(sizes))
        except (*PARSE_ERRORS, GlmEdgeError) as error:
            raise ExportError(f"{path}: damaged: its description: {error}") from error
        self.path: str | Path = path
        self.description = description
        self._graphs: dict[str, Graph] = {}
        self._worker: InterpreterProcess | None = None
        self._runners: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._digest: bytes | None = None
        if isolated:
            self._graphs = checked_graphs(
                path,
                self.config,
                self.prefill_lengths,
                self.cache_slots,
                self.prefill_logits,
                self.attended_slots,
                self.forced_lengths,
            )
            self._names = frozenset(self._graphs)
            self._worker = InterpreterProcess(path, num_threads, timeout)
            return
        interpreter = require("ai_edge_litert.interpreter", extra="export")
        try:
            with quiet():
                self.interpreter = interpreter.Interpreter(
                    model_path=str(path), num_threads=num_threads
                )
            self._names = frozenset(self.interpreter.get_signature_list())
        except (ValueError, RuntimeError) as error:
            raise ExportError(f"{path}: LiteRT cannot load it: {error}") from error

    def run(self, signature: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run one signature on arrays that match its shapes exactly."""
        check_signature(self.path, signature, self._names)
        if self._worker is not None:
            graph = self._graphs[signature]
            tensors = graph.inputs, graph.outputs
            return run_checked(self._worker, self.path, signature, inputs, *tensors)
        # A call sets inputs, invokes, and copies outputs, all in the memory of one interpreter.
        with self._lock:
            if signature in self._runners:
                return self._runners[signature](**inputs)
            # The first run allocates memory, and the runtime then logs its delegate.
            with quiet():
                self._runners[signature] = self.interpreter.get_signature_runner(signature)
                return self._runners[signature](**inputs)

    def model_digest(self) -> bytes:
        """Compute the SHA-256 of the file, which `verify` does not change."""
        if self._digest is None:
            self._digest = unverified_digest(self.path)
        return self._digest

    def close(self) -> None:
        """End the process of an isolated file, which also ends when this object is deleted."""
        if self._worker is not None:
            self._worker.close()


def run_checked(
    process: InterpreterProcess,
    path: str | Path,
    signature: str,
    inputs: Mapping[str, Any],
    takes: Mapping[str, Tensor],
    gives: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Run a signature in another process, which keeps outputs that are named like inputs.

    Args:
      process: process that runs it.
      path: path of the exported model, for messages.
      signature: name of the signature.
      inputs: input arrays by name.
      takes: expected tensors of `inputs`.
      gives: expected tensors of the outputs.

    Returns:
      Output arrays by name; `RemoteArray`s for those that stay in the process.

    Raises:
      DataError: an input is missing, or has the wrong type or shape.
      ExportError: an output is missing, or has the wrong type or shape; or the process fails.
    """
    for name, tensor in takes.items():
        if name not in inputs or not tensor.fits(inputs[name]):
            raise DataError(f"{signature}: {name} must be {tensor.type} {list(tensor.shape)}")
    outputs = process.run(signature, inputs, takes.keys() & gives.keys())
    for name, tensor in gives.items():
        if name not in outputs or not tensor.fits(outputs[name]):
            raise ExportError(f"{path}: {signature} gives no {tensor.type} {name!r}")
    return outputs
