"""Export to ONNX: our integers through `DequantizeLinear`, weights beside the graphs."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from glm_edge import __version__
from glm_edge import params as boxes
from glm_edge.errors import ExportError, require
from glm_edge.export.common.directory import (
    DESCRIPTION,
    Package,
    bytes_of,
    check_target,
    read_description,
    write_description,
    written_whole,
)
from glm_edge.export.common.offer import offer
from glm_edge.export.common.signatures import Signature
from glm_edge.export.common.weights import (
    Weight,
    held_bytes,
    held_params,
    packed_nibbles,
    weight_of,
)
from glm_edge.export.onnx.graph import GraphBuilder, StoredWeight
from glm_edge.export.tflite.file import DAMAGE
from glm_edge.files import file_inside, opened, read_bytes
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params, nested
from glm_edge.writers import require_space

OPSET, IR_VERSION = 21, 10
WEIGHTS = "weights.bin"
ALIGNMENT = 64
FLOATS = ("float32", "float16")
# Of a graph, whose weights lie beside it.
MAX_GRAPH_BYTES = 1 << 28
BITS = {"FLOAT": 32, "FLOAT16": 16, "INT8": 8, "INT4": 4}


def onnx(
    model: MultimodalGLM,
    params: Params,
    path: str | Path,
    prefill_lengths: Iterable[int] = (128,),
    cache_slots: int | None = None,
    prefill_logits: bool = False,
    attended_slots: Iterable[int] = (),
    overwrite: bool = False,
) -> Package:
    """Writes a model as ONNX graphs of opset 21 that read our own integers.

    The directory holds a graph for each signature (`decode.onnx` and so on, see
    `common.signatures.signatures`), one file of weights that all of them read, so that neither
    a second graph nor the limit of 2 GB a graph costs anything, and a description. Outputs that
    carry the cache are named like the inputs with `_out` appended.

    Integers of 8 and 4 bits are stored as they are, with float32 scales and integer zero points, a
    scale a matrix, a row or a group, and each product reads them through a `DequantizeLinear`.
    Narrower ones are written in the next wider type. Matrices are stored [in, out], as `MatMul`
    reads them: only so onnxruntime fuses both into one kernel. An embedding of 8 bits a row is
    looked up before it is dequantized, any other one after, as `Gather` takes no int4.

    Args:
      model: the model.
      params: its parameters: arrays; `Masked` (written dense, with zeros); `Quantized`.
      path: of the directory.
      prefill_lengths: lengths of the prefill graphs.
      cache_slots: slots of the cache; None takes the model's context, at most 1024.
      prefill_logits: prefill scores every token, which takes time that generation does not need.
      attended_slots: numbers of slots, such as `(256, 512)`. For each the directory gets graphs
        that look at no more slots than that, which is faster while few are filled.
      overwrite: replace a directory that an export wrote.

    Returns:
      What was written.

    Raises:
      ExportError: a parameter or the model cannot be written; the message says what would be right.
      OutputError: the directory exists already, cannot be written, or its disk is too full.
      MissingExtraError: onnx is not installed.

    References:
      DequantizeLinear, https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html.
    """
    path, library = Path(path), require("onnx", extra="onnx")
    check_target(path, overwrite, DESCRIPTION)
    offered = offer(model, params, prefill_lengths, cache_slots, prefill_logits, attended_slots)
    require_space(path, sum(held_bytes(leaf, FLOATS) for _, leaf in boxes.path_items(params)))
    with written_whole(path, overwrite, DESCRIPTION) as directory:
        weights, stored, parameters, conversions = {}, {}, {}, []
        with open(directory / WEIGHTS, "xb") as file:
            for name, leaf in boxes.path_items(params):
                weight, found = weight_of(name, leaf, "ONNX", floats=FLOATS)
                turned = is_product(name, leaf, params)
                stored[name] = store(library, file, name, weight, turned)
                weights[name] = weight
                parameters[name] = (turned, weight.group_size)
                conversions += found
        for signature in offered.signatures:
            graph = graph_of(signature, offered.shapes, stored)
            target = directory / f"{signature.name}.onnx"
            target.write_bytes(model_of(library, graph).SerializeToString())
            library.checker.check_model(str(target))
        description = offered.description(parameters, conversions)
        write_description(directory, description)
    held = held_params(params, weights)
    return Package(path, bytes_of(path), offered.names, tuple(conversions), model, held)


def is_product(path: str, leaf: Any, params: Params) -> bool:
    """True for a matrix that is multiplied with, False for one that is only looked up or added."""
    return boxes.is_matrix(path, leaf) and not (path == "embed/weight" and "head" in params)


def graph_of(
    signature: Signature,
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, StoredWeight],
    builder: GraphBuilder | None = None,
) -> Any:
    """The `GraphProto` of a signature, which reads stored weights.

    Raises:
      ExportError: ONNX has no operator for something that the signature computes.
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
    """The `ModelProto` of a graph."""
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
    """Writes a weight to a file and describes where it lies there."""

    def tensor(name: str, array: np.ndarray, kind: str) -> Any:
        data = packed_nibbles(array) if kind == "int4" else np.ascontiguousarray(array)
        file.write(bytes(-file.tell() % ALIGNMENT))
        proto = library.TensorProto(name=name, dims=array.shape)
        proto.data_type = getattr(library.TensorProto, {"float32": "FLOAT"}.get(kind, kind.upper()))
        proto.data_location = library.TensorProto.EXTERNAL
        place = {"location": WEIGHTS, "offset": file.tell(), "length": data.nbytes}
        for key, value in place.items():
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


def read_weights(
    path: str | Path, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Weight]:
    """Reads the weights of an exported directory back, as its graphs hold them.

    Args:
      path: the directory.
      shapes: dense shapes of the parameters by path; None takes those that the graphs say, whose
        memory only the size of the file limits.

    Returns:
      Parameter path to its codes, scales and zero points, [out, in] again.

    Raises:
      ExportError: the directory is missing, damaged, or no export.
      MissingExtraError: onnx is not installed.
    """
    path, library = Path(path), require("onnx", extra="onnx")
    message = require("google.protobuf.message", extra="onnx")
    damage = (*DAMAGE, message.DecodeError, library.checker.ValidationError)
    description = read_description(path)
    try:
        held = {}
        for name in description["signatures"]:
            graph = file_inside(path, f"{name}.onnx", ExportError)
            content = read_bytes(graph, MAX_GRAPH_BYTES, ExportError)
            model = library.load_model_from_string(content)
            held |= {t.name: t for t in model.graph.initializer if t.external_data}
        stored = mapped(path)

        def array(name: str, turned: bool) -> np.ndarray | None:
            if name not in held:
                return None
            tensor = _loaded(library, held[name], stored)
            read = library.numpy_helper.to_array(tensor)
            return read.T if turned else read

        found = {}
        for name, (turned, group_size) in description["parameters"].items():
            if name in held:
                _check_shape(name, held, turned, shapes)
            values, scale = array(name, turned), array(f"{name}.scale", turned)
            zero, kind = array(f"{name}.zero", turned), str(values.dtype)
            if scale is not None:
                values = values.astype(np.int8)
                shape = scale.shape if group_size else (-1, 1)
                scale = scale.reshape(shape)
                zero = None if zero is None else zero.astype(np.int8).reshape(shape)
            found[name] = Weight(values, kind, scale, zero, group_size)
    except (OSError, *damage) as error:
        raise ExportError(f"{path}: no whole ONNX export of glm_edge: {error}") from error
    return found


def mapped(directory: Path) -> np.ndarray:
    """The file of weights of a directory as bytes, mapped rather than read.

    Raises:
      ExportError: it is missing, empty, not a regular file, or a link that leads out.
    """
    with opened(file_inside(directory, WEIGHTS, ExportError), ExportError) as file:
        return np.memmap(file, np.uint8, "r")


def _loaded(library: Any, tensor: Any, stored: np.ndarray) -> Any:
    """A tensor with its bytes, once its place in the file of weights is found to be right."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    if place.get("location") != WEIGHTS:
        raise ValueError(f"{tensor.name}: lies in {place.get('location')!r}, not in {WEIGHTS}")
    start, length = int(place["offset"]), int(place["length"])
    bits = BITS[library.TensorProto.DataType.Name(tensor.data_type)]
    if length != -(-math.prod(tensor.dims) * bits // 8):
        raise ValueError(f"{tensor.name}: {length} bytes for {list(tensor.dims)}")
    if not 0 <= start <= start + length <= len(stored):
        raise ValueError(f"{tensor.name}: ends behind the {len(stored)} bytes of {WEIGHTS}")
    whole = library.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    whole.raw_data = stored[start : start + length].tobytes()
    return whole


def _check_shape(
    name: str,
    held: Mapping[str, Any],
    turned: bool,
    shapes: Mapping[str, tuple[int, ...]] | None,
) -> None:
    shape = tuple(held[name].dims)[:: -1 if turned else 1]
    if shapes is not None and shapes.get(name) != shape:
        raise ValueError(f"{name}: shape {shape}, the model's is {shapes.get(name)}")
    for part in ("scale", "zero"):
        dims = held[f"{name}.{part}"].dims if f"{name}.{part}" in held else ()
        if math.prod(dims) > math.prod(shape):
            raise ValueError(f"{name}.{part}: shape {list(dims)} beside {shape}")
