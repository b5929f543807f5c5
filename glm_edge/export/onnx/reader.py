"""Reader of the weights of an exported directory of ONNX graphs."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glm_edge.errors import ExportError, require
from glm_edge.export.common.directory import (
    MAX_GRAPH_BYTES,
    WEIGHTS,
    map_weights,
    read_description,
)
from glm_edge.export.common.parsing import PARSE_ERRORS
from glm_edge.export.common.weights import Weight
from glm_edge.files import file_inside, read_bytes

BITS = {"FLOAT": 32, "FLOAT16": 16, "INT8": 8, "INT4": 4}


def read_weights(
    path: str | Path, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Weight]:
    """Read the weights of an exported directory as its graphs store them.

    Args:
      path: path of the directory.
      shapes: dense shapes of the parameters by path; None uses those of the graphs, and only the
        file's size then limits memory.

    Returns:
      Codes [out, in], scales and zero points by parameter path.

    Raises:
      ExportError: the directory is missing, damaged, or not a glm_edge export.
      MissingExtraError: onnx is not installed.
    """
    path, library = Path(path), require("onnx", extra="onnx")
    message = require("google.protobuf.message", extra="onnx")
    damage = (*PARSE_ERRORS, message.DecodeError, library.checker.ValidationError)
    description = read_description(path)
    try:
        tensors: dict[str, Any] = {}
        for name in description["signatures"]:
            graph = file_inside(path, f"{name}.onnx", ExportError)
            model = library.load_model_from_string(read_bytes(graph, MAX_GRAPH_BYTES, ExportError))
            tensors |= {t.name: t for t in model.graph.initializer if t.external_data}
        content = map_weights(path)

        def array(name: str, turned: bool) -> np.ndarray:
            tensor = _load(library, tensors[name], content)
            values = library.numpy_helper.to_array(tensor)
            return values.T if turned else values

        weights = {}
        for name, (turned, group_size) in description["parameters"].items():
            if name in tensors:
                _check_shape(name, tensors, turned, shapes)
            values = array(name, turned)
            scale, zero = (
                array(f"{name}.{part}", turned) if f"{name}.{part}" in tensors else None
                for part in ("scale", "zero")
            )
            kind = str(values.dtype)
            if scale is not None:
                values = values.astype(np.int8)
                shape = scale.shape if group_size else (-1, 1)
                scale = scale.reshape(shape)
                zero = None if zero is None else zero.astype(np.int8).reshape(shape)
            weights[name] = Weight(values, kind, scale, zero, group_size)
    except (OSError, *damage) as error:
        raise ExportError(f"{path}: not a complete glm_edge ONNX export: {error}") from error
    return weights


def _load(library: Any, tensor: Any, content: np.ndarray) -> Any:
    """Read the bytes of a tensor after checking its offset in the file of weights."""
    position = {entry.key: entry.value for entry in tensor.external_data}
    if position.get("location") != WEIGHTS:
        raise ValueError(
            f"{tensor.name}: is stored in {position.get('location')!r}, not in {WEIGHTS}"
        )
    start, length = int(position["offset"]), int(position["length"])
    bits = BITS[library.TensorProto.DataType.Name(tensor.data_type)]
    if length != -(-math.prod(tensor.dims) * bits // 8):
        raise ValueError(f"{tensor.name}: {length} bytes for {list(tensor.dims)}")
    if not 0 <= start <= start + length <= len(content):
        raise ValueError(f"{tensor.name}: ends beyond the {len(content)} bytes of {WEIGHTS}")
    loaded = library.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    loaded.raw_data = content[start : start + length].tobytes()
    return loaded


def _check_shape(
    name: str,
    tensors: Mapping[str, Any],
    turned: bool,
    shapes: Mapping[str, tuple[int, ...]] | None,
) -> None:
    shape = tuple(tensors[name].dims)[:: -1 if turned else 1]
    if shapes is not None and shapes.get(name) != shape:
        raise ValueError(f"{name}: shape {shape}, expected the model's {shapes.get(name)}")
    for part in ("scale", "zero"):
        dims = tensors[f"{name}.{part}"].dims if f"{name}.{part}" in tensors else ()
        if math.prod(dims) > math.prod(shape):
            raise ValueError(f"{name}.{part}: shape {list(dims)} beside {shape}")
