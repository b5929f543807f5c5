"""Export of a compressed model to the file that a phone runs, and the check that it runs it."""

from glm_edge.export.compatibility import Compatibility, compatibility
from glm_edge.export.constants import Conversion
from glm_edge.export.container import read_constants
from glm_edge.export.coreml import coreml
from glm_edge.export.inspection import Inspection
from glm_edge.export.litertlm import Bundle, litertlm
from glm_edge.export.metadata import read_metadata
from glm_edge.export.mnn import mnn
from glm_edge.export.onnx import onnx
from glm_edge.export.package import Package
from glm_edge.export.package_model import PackageModel
from glm_edge.export.runtime import LiteRTModel
from glm_edge.export.tflite import ExportedModel, tflite
from glm_edge.export.verify import Verification, Window, verify

__all__ = [
    "Bundle",
    "Compatibility",
    "Conversion",
    "ExportedModel",
    "Inspection",
    "LiteRTModel",
    "Package",
    "PackageModel",
    "Verification",
    "Window",
    "compatibility",
    "coreml",
    "litertlm",
    "mnn",
    "onnx",
    "read_constants",
    "read_metadata",
    "tflite",
    "verify",
]


def __dir__() -> list[str]:
    return __all__
