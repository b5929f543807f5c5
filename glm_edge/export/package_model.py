"""Running an exported directory of ONNX or MNN graphs as a phone's runtime does."""

from pathlib import Path

import numpy as np

from glm_edge.configs import from_dict
from glm_edge.errors import ExportError, GlmEdgeError
from glm_edge.export.child import TIMEOUT, ChildInterpreter
from glm_edge.export.container import DAMAGE
from glm_edge.export.contents import Tensor
from glm_edge.export.integers import Weight
from glm_edge.export.interface import expected_tensors
from glm_edge.export.mnn import read_weights as mnn_weights
from glm_edge.export.offer import check_lengths
from glm_edge.export.onnx import read_weights as onnx_weights
from glm_edge.export.package import read_description
from glm_edge.export.runtime import PhoneModel, run_checked
from glm_edge.export.trace import DECODE, step_name

READERS = {"onnx": onnx_weights, "mnn": mnn_weights}


class PackageModel(PhoneModel):
    """An exported directory in onnxruntime or in MNN, in a process of its own.

    A damaged graph can crash nothing else there; the caches stay in that process. Products are
    taken in float32: onnxruntime would by default round the activations that meet packed weights to
    int8, group by group, which is faster and which no `compute` of JAX does.

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
        held = [name for name in READERS if (self.path / f"{DECODE}.{name}").is_file()]
        if not held:
            raise ExportError(f"{path}: damaged: holds no graph named {DECODE}")
        self.runtime = held[0]
        try:
            super().__init__(
                from_dict(self.description["config"]),
                self.description["prefill_lengths"],
                self.description["cache_slots"],
                self.description["prefill_logits"],
                self.description["attended_slots"],
            )
            self._check_sizes()
        except (*DAMAGE, GlmEdgeError) as error:
            raise ExportError(f"{path}: damaged: its description: {error}") from error
        self._tensors: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        self._child = ChildInterpreter(self.path, num_threads, timeout, self.runtime)

    def _check_sizes(self) -> None:
        """Refuses numbers that would cost much before a graph is found to be of others."""
        lengths, slots = check_lengths(self.config, self.prefill_lengths, self.cache_slots)
        if lengths != self.prefill_lengths or not isinstance(slots, int):
            raise ValueError(f"prefill lengths {self.prefill_lengths[:8]}, {slots} slots")
        for name in (*map(step_name, lengths), "embed"):
            if not (self.path / f"{name}.{self.runtime}").is_file():
                raise ValueError(f"there is no graph {name}")

    def run(self, signature: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Runs one signature on arrays of exactly its shapes."""
        if not self._tensors:
            self._tensors = expected_tensors(
                self.config,
                self.prefill_lengths,
                self.cache_slots,
                self.prefill_logits,
                self.attended_slots,
            )
        return run_checked(self._child, self.path, signature, inputs, *self._tensors[signature])

    def read_weights(self) -> dict[str, Weight]:
        """The weights of the directory, as its graphs hold them."""
        return READERS[self.runtime](self.path)

    def close(self) -> None:
        """Ends the process, which otherwise ends with this object."""
        self._child.close()
