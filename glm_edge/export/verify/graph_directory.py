"""Runner of an exported directory of ONNX or MNN graphs."""

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from glm_edge.configs import from_dict
from glm_edge.errors import ExportError, GlmEdgeError
from glm_edge.export.common.directory import (
    DESCRIPTION,
    MAX_GRAPH_BYTES,
    WEIGHTS,
    read_description,
)
from glm_edge.export.common.interface import Tensor, expected_tensors
from glm_edge.export.common.parsing import PARSE_ERRORS
from glm_edge.export.common.sizes import DECODE, attended_by, described_sizes, step_name
from glm_edge.export.common.weights import Weight
from glm_edge.export.mnn.reader import read_weights as mnn_weights
from glm_edge.export.onnx.reader import read_weights as onnx_weights
from glm_edge.export.verify.litert_runner import run_checked
from glm_edge.export.verify.runner import SignatureRunner, check_signature
from glm_edge.export.verify.worker import TIMEOUT, InterpreterProcess
from glm_edge.files import file_inside

READERS = {"onnx": onnx_weights, "mnn": mnn_weights}


class GraphDirectoryRunner(SignatureRunner):
    """An exported directory in onnxruntime or MNN, in a separate process.

    A damaged graph can crash only that process, which also stores the caches. Products are in
    float32. By default onnxruntime would round the activations of packed weights to int8 per group,
    which is faster but which no `compute` of JAX reproduces. The runner is thread-safe; the process
    runs one signature at a time.

    Args:
      path: path of the directory.
      num_threads: number of threads of the runtime.
      timeout: time limit in seconds for one answer of that process.

    Raises:
      ExportError: glm_edge did not export the directory, or it is damaged.
      MissingExtraError: the runtime is not installed.
    """

    float32 = True

    def __init__(self, path: str | Path, num_threads: int = 2, timeout: float = TIMEOUT) -> None:
        self.description = read_description(path)
        self.path: Path = Path(path)
        runtimes = [name for name in READERS if (self.path / f"{DECODE}.{name}").exists()]
        if not runtimes:
            raise ExportError(f"{path}: damaged: contains no graph named {DECODE}")
        self.runtime = runtimes[0]
        try:
            config = from_dict(self.description["config"])
            super().__init__(config, **vars(described_sizes(self.description, config)))
            self._check_files()
        except (*PARSE_ERRORS, GlmEdgeError) as error:
            raise ExportError(f"{path}: damaged: its description: {error}") from error
        self._described_slots = tuple(self.attended_slots)
        self._worker = InterpreterProcess(self.path, num_threads, timeout, self.runtime)

    def _check_files(self) -> None:
        """Reject a graph that is missing, a pipe, or a link to outside the directory."""
        names = ["embed", *(["vision"] if self.config.vision is not None else [])]
        names += ["speech"] if self.config.speech is not None else []
        for length in self.lengths:
            names += [f"embed_{length}"] if length > 1 else []
            attended = (None, *attended_by(length, self.attended_slots, self.forced_lengths))
            names += [step_name(length, slots) for slots in attended]
        for name in names:
            graph = file_inside(self.path, f"{name}.{self.runtime}", ExportError)
            if graph.stat().st_size > MAX_GRAPH_BYTES:
                raise ValueError(
                    f"{graph.name} has {graph.stat().st_size} bytes although it contains no weights"
                )
        file_inside(self.path, WEIGHTS, ExportError)

    def run(self, signature: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run one signature on arrays that match its shapes exactly.

        Args:
          signature: name of the signature.
          **inputs: input arrays by name.

        Returns:
          Output arrays by name.
        """
        check_signature(self.path, signature, self._tensors)
        return run_checked(self._worker, self.path, signature, inputs, *self._tensors[signature])

    @functools.cached_property
    def _tensors(self) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Lists inputs and outputs of each signature after the process has opened the directory."""
        return expected_tensors(
            self.config,
            self.prefill_lengths,
            self.cache_slots,
            self.prefill_logits,
            self._described_slots,
            self.forced_lengths,
        )

    def model_digest(self) -> bytes:
        """Compute the SHA-256 of the graphs and weights, which `verify` does not change."""
        digest = hashlib.sha256()
        try:
            for file in sorted(self.path.iterdir()):
                if file.name != DESCRIPTION and file.is_file():
                    with open(file, "rb") as stream:
                        content = hashlib.file_digest(stream, "sha256").hexdigest()
                    digest.update(f"{file.name} {content}\n".encode())
        except OSError as error:
            raise ExportError(f"{self.path}: cannot be read: {error.strerror}") from error
        return digest.digest()

    def read_weights(
        self, shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> dict[str, Weight]:
        """Read the weights of the directory as its graphs store them.

        Args:
          shapes: required dense shapes of the parameters by path; None accepts any.

        Returns:
          Codes, scales and zero points by parameter path.

        Raises:
          ExportError: the directory is damaged, or a weight has the wrong shape.
        """
        return READERS[self.runtime](self.path, shapes)

    def close(self) -> None:
        """End the process, which also ends when this object is deleted."""
        self._worker.close()
