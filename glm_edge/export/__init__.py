"""Export of compressed models to on-device files, and verification of those files."""

from glm_edge.export.common.weights import Conversion
from glm_edge.export.compressed_tensors.export import (
    CompressedTensorsDirectory,
    WeightInspection,
    compressed_tensors,
)
from glm_edge.export.coreml.export import coreml
from glm_edge.export.coreml.verify import CoreMLPackage, Inspection
from glm_edge.export.delegates.compatibility import Compatibility, compatibility
from glm_edge.export.litertlm.export import Bundle, litertlm
from glm_edge.export.metadata import read_metadata
from glm_edge.export.mnn.export import mnn
from glm_edge.export.onnx.export import onnx
from glm_edge.export.tflite.export import ExportedModel, tflite
from glm_edge.export.tflite.file import read_constants
from glm_edge.export.tflite.function import ExportedFunction, FunctionVerification, function
from glm_edge.export.verify.graph_directory import GraphDirectoryRunner
from glm_edge.export.verify.litert_runner import LiteRTRunner
from glm_edge.export.verify.package import Package
from glm_edge.export.verify.results import Verification
from glm_edge.export.verify.verify import Window, verify

# Earlier names of two of the runners.
LiteRTModel = LiteRTRunner
PackageModel = GraphDirectoryRunner

__all__ = [
    "Bundle",
    "Compatibility",
    "CompressedTensorsDirectory",
    "Conversion",
    "CoreMLPackage",
    "ExportedFunction",
    "ExportedModel",
    "FunctionVerification",
    "GraphDirectoryRunner",
    "Inspection",
    "LiteRTModel",
    "LiteRTRunner",
    "Package",
    "PackageModel",
    "Verification",
    "WeightInspection",
    "Window",
    "compatibility",
    "compressed_tensors",
    "coreml",
    "function",
    "litertlm",
    "mnn",
    "onnx",
    "read_constants",
    "read_metadata",
    "tflite",
    "verify",
]


def __dir__() -> list[str]:
    """List the public names, without the modules that they come from."""
    return __all__
