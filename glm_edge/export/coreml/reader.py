"""Reader of exported Core ML packages; it does not run them."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from glm_edge.errors import ExportError, GlmEdgeError, require
from glm_edge.export.common.directory import check_tree
from glm_edge.export.common.parsing import PARSE_ERRORS
from glm_edge.export.common.quiet import quiet
from glm_edge.export.common.weights import Weight
from glm_edge.files import parse_json

MANIFEST = "Manifest.json"
METADATA = "glm_edge"


def read_weights(path: str | Path) -> dict[str, Weight]:
    """Read the quantized weights of a package as its functions read them.

    Args:
      path: path of the package.

    Returns:
      Codes, scales and zero points by parameter path.

    Raises:
      ExportError: the package is missing, damaged, or not a glm_edge export.
      MissingExtraError: coremltools is not installed.
    """
    weights = {}
    try:
        package = open_package(path)
        described = described_by(package, path)
        names = {name.replace("/", "_"): name for name in described["parameters"]}
        for function in _program(package).functions.values():
            for operation in function.operations:
                if operation.op_type == "constexpr_blockwise_shift_scale":
                    weights[names[operation.outputs[0].name]] = _weight(operation)
    except GlmEdgeError:
        raise
    except (OSError, RuntimeError, *PARSE_ERRORS) as error:
        raise ExportError(f"{path}: not a complete glm_edge Core ML export: {error}") from error
    return weights


def open_package(path: str | Path) -> Any:
    """Open a package in coremltools without loading it into a runtime.

    Args:
      path: path of the package.

    Returns:
      coremltools' `MLModel`, not loaded into a runtime.

    Raises:
      ExportError: one of its files is a pipe, a device or a link, or coremltools cannot open it.
      MissingExtraError: coremltools is not installed.
    """
    check_tree(Path(path))
    tools, message = core_ml_tools(), require("google.protobuf.message", extra="coreml")
    try:
        return tools.models.MLModel(str(path), skip_model_load=True)
    # Some exceptions of coremltools derive directly from Exception.
    except (OSError, RuntimeError, message.DecodeError, *PARSE_ERRORS) as error:
        raise ExportError(f"{path}: not a complete glm_edge Core ML export: {error}") from error


def described_by(package: Any, path: str | Path) -> dict[str, Any]:
    """Read the description of a package opened by `open_package`.

    Args:
      package: result of `open_package`.
      path: path of the package, for messages.

    Returns:
      The fields of the description.

    Raises:
      ExportError: the description is missing, or is not a JSON object within the usual limits.
    """
    metadata = package.get_spec().description.metadata.userDefined
    if METADATA not in metadata:
        raise ExportError(f"{path}: a Core ML package that glm_edge did not export")
    where = f"{path}: not a complete glm_edge Core ML export: its description"
    described = parse_json(metadata[METADATA], where, ExportError)
    if not isinstance(described, dict):
        raise ExportError(f"{where}: must be a JSON object, not {type(described).__name__}")
    return described


def _program(package: Any) -> Any:
    loader = require("coremltools.converters.mil.frontend.milproto.load", extra="coreml")
    specification = package.get_spec()
    return loader.load(
        specification, specification.specificationVersion, file_weights_dir=package.weights_dir
    )


def _weight(operation: Any) -> Weight:
    types = require("coremltools.converters.mil.mil.types", extra="coreml")
    data, scale = operation.data.val, np.asarray(operation.scale.val)
    kind = types.builtin_to_string(operation.data.dtype)
    zero = None if operation.offset is None else np.asarray(operation.offset.val).astype(np.int8)
    groups = scale.shape[-1]
    size = data.shape[-1] // groups if groups > 1 else 0
    return Weight(np.asarray(data).astype(np.int8), kind, scale, zero, size)


def core_ml_tools() -> Any:
    """Import coremltools with its log messages turned off.

    Returns:
      The module `coremltools`.

    Raises:
      MissingExtraError: coremltools is not installed.
    """
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    with quiet():
        return require("coremltools", extra="coreml")
