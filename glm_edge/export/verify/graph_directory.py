"""Running an exported directory of ONNX or MNN graphs as a phone's runtime does."""

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from glm_edge.configs import from_dict
from glm_edge.errors import ExportError, GlmEdgeError
from glm_edge.export.common.directory import read_description
from glm_edge.export.common.offer import described_sizes
from glm_edge.export.common.signatures import DECODE, attended_by, step_name
from glm_edge.export.common.weights import Weight
from glm_edge.export.mnn.export import read_weights as mnn_weights
from glm_edge.export.onnx.export import MAX_GRAPH_BYTES, WEIGHTS
from glm_edge.export.onnx.export import read_weights as onnx_weights
from glm_edge.export.tflite.file import DAMAGE
from glm_edge.export.tflite.interface import expected_tensors
from glm_edge.export.tflite.reader import Tensor
from glm_edge.export.verify.runner import PhoneModel, run_checked
from glm_edge.export.verify.worker import TIMEOUT, ChildInterpreter
from glm_edge.files import file_inside

READERS = {"onnx": onnx_weights, "mnn": mnn_weights}


class PackageModel(PhoneModel):
    """An exported directory in onnxruntime or in MNN, in a process of its own.

    A damaged graph can crash nothing else there; the caches stay in that process. Products are
    taken in float32: onnxruntime would by default round the activations that meet packed weights to
    int8, group by group, which is faster and which no `compute` of JAX does. Several threads may
    call it; the process runs one signature at a time.

    Args:
      path: of the directory.
      num_threads: of the runtime.
      timeout: seconds for one answer of that process.

    Raises:
      ExportError: the directory is not one that glm_edge exported, or is damaged.
      MissingExtraError: the runtime is not installed.
    """

    float32 = True

    def __init__(self, path: str | Path, num_threads: int = 2, timeout: float = TIMEOUT):
        self.path, self.description = Path(path), read_description(path)
        held = [name for name in READERS if (self.path / f"{DECODE}.{name}").exists()]
        if not held:
            raise ExportError(f"{path}: damaged: holds no graph named {DECODE}")
        self.runtime = held[0]
        try:
            config = from_dict(self.description["config"])
            super().__init__(config, **vars(described_sizes(self.description, config)))
            self._check_files()
        except (*DAMAGE, GlmEdgeError) as error:
            raise ExportError(f"{path}: damaged: its description: {error}") from error
        self._described_slots = tuple(self.attended_slots)
        self._child = ChildInterpreter(self.path, num_threads, timeout, self.runtime)

    def _check_files(self) -> None:
        """Refuses a graph that is missing, a pipe, or a link out, before the runtime opens it."""
        names = ["embed", *(["vision"] if self.config.vision is not None else [])]
        names += ["speech"] if self.config.speech is not None else []
        for length in (1, *self.prefill_lengths):
            names += [f"embed_{length}"] if length > 1 else []
            attended = (None, *attended_by(length, self.attended_slots))
            names += [step_name(length, slots) for slots in attended]
        for name in names:
            graph = file_inside(self.path, f"{name}.{self.runtime}", ExportError)
            if graph.stat().st_size > MAX_GRAPH_BYTES:
                raise ValueError(f"{graph.name} has {graph.stat().st_size} bytes, without weights")
        file_inside(self.path, WEIGHTS, ExportError)

    def run(self, signature: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Runs one signature on arrays of exactly its shapes."""
        return run_checked(self._child, self.path, signature, inputs, *self._tensors[signature])

    @functools.cached_property
    def _tensors(self) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Inputs and outputs of each signature, once the process has opened the directory."""
        return expected_tensors(
            self.config,
            self.prefill_lengths,
            self.cache_slots,
            self.prefill_logits,
            self._described_slots,
        )

    def read_weights(
        self, shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> dict[str, Weight]:
        """The weights of the directory, as its graphs hold them.

        Args:
          shapes: dense shapes that the parameters must have, by path; None takes any.

        Raises:
          ExportError: the directory is damaged, or a weight has another shape.
        """
        return READERS[self.runtime](self.path, shapes)

    def close(self) -> None:
        """Ends the process, which otherwise ends with this object."""
        self._child.close()
