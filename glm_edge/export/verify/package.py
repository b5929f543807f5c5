"""Exported directories of graphs that a runtime can run."""

from collections.abc import Iterable
from dataclasses import dataclass

from glm_edge.export.common.directory import ExportedDirectory
from glm_edge.export.verify.results import Verification
from glm_edge.export.verify.verify import Window, verify


@dataclass(frozen=True)
class Package(ExportedDirectory):
    """A written directory of ONNX or MNN graphs; see `ExportedDirectory`."""

    def verify(
        self,
        windows: Iterable[Window] | None = None,
        threshold: float | None = None,
        compute: str | None = None,
        free_running: int = 8,
        seed: int = 0,
        check: bool = True,
    ) -> Verification:
        """Run the directory in onnxruntime or MNN and compare it with the JAX model.

        See `glm_edge.export.verify` for the arguments.
        """
        return verify(
            self.path,
            self.model,
            self.params,
            windows,
            threshold=threshold,
            compute=compute,
            free_running=free_running,
            seed=seed,
            check=check,
        )
