"""Comparison of a Core ML package with its model without running it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_edge.configs import from_dict
from glm_edge.errors import ExportError, GlmEdgeError
from glm_edge.export.common.directory import ExportedDirectory
from glm_edge.export.common.interface import Tensor, expected_tensors
from glm_edge.export.common.parsing import PARSE_ERRORS
from glm_edge.export.common.sizes import described_sizes
from glm_edge.export.common.weights import check_weights
from glm_edge.export.coreml.reader import core_ml_tools, described_by, open_package, read_weights
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params


@dataclass(frozen=True)
class Inspection:
    """Counts of a package's parts that agree with the model; the package was not run.

    Attributes:
      functions: functions with the names, inputs and outputs of the model's signatures.
      weights: quantized parameters with the model's codes, scales and zero points.
    """

    functions: int
    weights: int

    def __str__(self) -> str:
        return (
            f"{self.functions} functions and {self.weights} quantized weights equal the model's, "
            "bit for bit; the package was not run, as Core ML runs on Apple's systems only"
        )


@dataclass(frozen=True)
class CoreMLPackage(ExportedDirectory):
    """A written Core ML package; see `ExportedDirectory`."""

    def verify(self, **options: Any) -> Inspection:
        """Compare the package's specification and weights with the model; see `inspect`.

        Returns:
          Counts of the parts that agree.

        Raises:
          ExportError: an option is set, although the package is not run; or a part differs.
        """
        if options:
            raise ExportError(
                f"{self.path}: Core ML packages are not run, so verify takes no options; call "
                "verify()"
            )
        return inspect(self.path, self.model, self.params)


def inspect(path: str | Path, model: MultimodalGLM, params: Params) -> Inspection:
    """Open a package and compare its specification with the model, without running it.

    Compares names, types and shapes of all functions' inputs and outputs, and codes, scales and
    zero points of all quantized parameters. Plain values, such as those of norms, are stored inside
    the functions and are not compared. The package's description is not changed: it stays marked as
    unverified.

    Args:
      path: path of the package.
      model: model that the package was traced from.
      params: parameters with the stored values, `CoreMLPackage.params`.

    Returns:
      Counts of the parts that agree.

    Raises:
      ExportError: a part differs, or the package is damaged.
      MissingExtraError: coremltools is not installed.
    """
    package, tools = open_package(path), core_ml_tools()
    try:
        specification, described = package.get_spec(), described_by(package, path)
        config = from_dict(described["config"])
        if config != model.config:
            raise ExportError(f"{path}: contains a different model than {model.config.name}")
        sizes = described_sizes(described, config)
        functions = {entry.name: entry for entry in specification.description.functions}
        expected = expected_tensors(config, **vars(sizes))
        if functions.keys() != expected.keys():
            raise ValueError(f"functions {sorted(functions)}, expected {sorted(expected)}")
        for name, (inputs, outputs) in expected.items():
            outputs = {
                f"{key}_out" if key in inputs else key: tensor for key, tensor in outputs.items()
            }
            _compare(tools, functions[name].input, inputs, f"inputs of {name}")
            _compare(tools, functions[name].output, outputs, f"outputs of {name}")
    except (OSError, RuntimeError, *PARSE_ERRORS) as error:
        if isinstance(error, GlmEdgeError):
            raise
        raise ExportError(f"{path}: not a complete glm_edge Core ML export: {error}") from error
    return Inspection(len(expected), check_weights(read_weights(path), params, path))


def _compare(tools: Any, features: Iterable[Any], expected: dict[str, Tensor], where: str) -> None:
    types = tools.proto.FeatureTypes_pb2.ArrayFeatureType
    kinds = {types.FLOAT32: "float32", types.INT32: "int32"}
    arrays = {}
    for feature in features:
        array = feature.type.multiArrayType
        arrays[feature.name] = kinds.get(array.dataType), tuple(array.shape)
    for name in sorted(arrays.keys() | expected.keys()):
        tensor = expected.get(name)
        if tensor is None or arrays.get(name) != (tensor.type, tensor.shape):
            raise ValueError(f"{where}: {name}")
