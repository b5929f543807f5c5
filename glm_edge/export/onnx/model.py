"""ONNX models of signatures, with weights in a separate file."""

from collections.abc import Mapping
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from glm_edge import __version__
from glm_edge.export.common.directory import WEIGHTS
from glm_edge.export.common.signatures import Signature
from glm_edge.export.common.weights import Weight, pack_nibbles
from glm_edge.export.onnx.graph import GraphBuilder, StoredWeight
from glm_edge.params.tree import nested

OPSET, IR_VERSION = 21, 10
ALIGNMENT = 64


def graph_of(
    signature: Signature,
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, StoredWeight],
    builder: GraphBuilder | None = None,
) -> Any:
    """Lower a signature to a `GraphProto` that reads stored weights.

    Args:
      signature: the signature.
      shapes: dense shapes of the parameters by path.
      stored: stored weights by path.
      builder: builder of the graph.

    Returns:
      `GraphProto`.

    Raises:
      ExportError: an operation of the signature has no lowering to ONNX.
    """
    structs = {
        path: jax.ShapeDtypeStruct(shape, jnp.float32)
        for path, shape in shapes.items()
        if path.split("/")[0] in signature.subtrees
    }

    def function(params: Mapping[str, Any], inputs: Any) -> Any:
        return signature.function(nested(dict(params)), inputs)

    builder = GraphBuilder(stored) if builder is None else builder
    return builder.lower(function, structs, signature.inputs)


def model_of(library: Any, graph: Any) -> Any:
    """Make the `ModelProto` of a graph."""
    return library.helper.make_model(
        graph,
        opset_imports=[library.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="glm_edge",
        producer_version=__version__,
    )


def store(
    library: Any, file: BinaryIO, path: str, weight: Weight, transposed: bool
) -> StoredWeight:
    """Write a weight to a file and describe its offset there.

    Args:
      library: the module `onnx`.
      file: file of weights, open for writing.
      path: path of the parameter.
      weight: the weight.
      transposed: whether to store the matrix [in, out].

    Returns:
      The stored weight.
    """

    def tensor(name: str, array: np.ndarray, kind: str) -> Any:
        data = pack_nibbles(array) if kind == "int4" else np.ascontiguousarray(array)
        file.write(bytes(-file.tell() % ALIGNMENT))
        proto = library.TensorProto(name=name, dims=array.shape)
        proto.data_type = getattr(library.TensorProto, {"float32": "FLOAT"}.get(kind, kind.upper()))
        proto.data_location = library.TensorProto.EXTERNAL
        position = {"location": WEIGHTS, "offset": file.tell(), "length": data.nbytes}
        for key, value in position.items():
            proto.external_data.add(key=key, value=str(value))
        file.write(data.tobytes())
        return proto

    def turned(array: np.ndarray) -> np.ndarray:
        return array.T if transposed else array

    values = tensor(path, turned(weight.values), weight.type)
    if weight.scale is None:
        return StoredWeight(values, transposed=transposed, rows=True)
    axis = int(transposed)
    attributes = {"axis": axis}
    per_row = not weight.group_size and weight.scale.shape[0] == len(weight.values)
    if weight.group_size:
        attributes = {"axis": 1 - axis, "block_size": weight.group_size}

    def grouped(array: np.ndarray) -> np.ndarray:
        if weight.group_size:
            return turned(array)
        return array.reshape(-1) if per_row else array.reshape(())

    scale = tensor(f"{path}.scale", grouped(weight.scale), "float32")
    zero = None
    if weight.zero is not None:
        zero = tensor(f"{path}.zero", grouped(weight.zero), weight.type)
    rows = per_row and weight.type == "int8"
    return StoredWeight(values, scale, zero, attributes, transposed, rows)
