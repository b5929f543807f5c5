"""Editing of TFLite flatbuffers: weight inputs become constants with quantized codes."""

import collections
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from glm_edge.errors import ExportError, require

METADATA = b"glm_edge"
FULLY_CONNECTED_VERSION = 12
FULLY_CONNECTED_INT2_VERSION = 13
DEQUANTIZE_INT8_VERSION = 2
# Types of constants; integers have one scale per channel.
DEQUANTIZE_VERSIONS = {"float16": 3, "int8": 5, "int4": 6}
QUANTIZE_VERSION = 1
EMBEDDING_LOOKUP_VERSION = 4
SMALL_BUFFER = 1024


def schema() -> Any:
    """Import the generated classes of the TFLite schema."""
    return require("ai_edge_litert.schema_py_generated", extra="export")


@dataclass(frozen=True)
class ActivationGrid:
    """A static int8 grid of activations, `f' = scale * (code - zero)`.

    Attributes:
      scale: float32 scale.
      zero: zero point, -128 to 127.
    """

    scale: float
    zero: int


@dataclass(frozen=True)
class Constant:
    """A weight in TFLite's packing and terms.

    Attributes:
      type: `float32`, `float16`, or `int8`, `int4`, `int2` with the first code in the lowest bits.
      shape: dense shape.
      data: packed bytes, uint8.
      scale: None, float32 [out] per channel, or float16 [out, in / block_size].
      block_size: number of columns that share a scale; 0 for one scale per channel.
      zero: None, or zero points with the shape of `scale`, for codes that are dequantized before
        use.
      inputs: None, or the grid of the activations that are multiplied with it.
      outputs: None, or the grid of the products; `inputs` and `outputs` are both set, or both None.
    """

    type: str
    shape: tuple[int, ...]
    data: np.ndarray
    scale: np.ndarray | None = None
    block_size: int = 0
    inputs: ActivationGrid | None = None
    outputs: ActivationGrid | None = None
    zero: np.ndarray | None = None


class FlatModel:
    """A TFLite model opened for editing.

    Attributes:
      model: unpacked `ModelT`.
    """

    def __init__(self, content: bytes) -> None:
        self.schema = schema()
        self.model = self.schema.ModelT.InitFromPackedBuf(content, 0)
        self._names = {v: k for k, v in vars(self.schema.BuiltinOperator).items() if k[0] != "_"}

    def operator_name(self, operator: Any) -> str:
        """Return the builtin name of an operator, such as `FULLY_CONNECTED`."""
        code = self.model.operatorCodes[operator.opcodeIndex]
        return self._names[max(code.builtinCode, code.deprecatedBuiltinCode)]

    def operator_names(self) -> set[str]:
        """Return builtin names of all operators of all signatures, `CUSTOM` for custom ones."""
        return {
            self.operator_name(operator)
            for graph in self.model.subgraphs
            for operator in graph.operators
        }

    def attach(self, weights: Mapping[str, tuple[str, Constant]], in_float32: bool = False) -> None:
        """Convert weight inputs of every signature to constants, each stored once.

        Args:
          weights: `(path, constant)` by input name.
          in_float32: whether to dequantize quantized weights first, so that any operator can read
            them. A constant may then have a different shape with the same number of values.

        Raises:
          ExportError: an operator cannot read a quantized weight.
        """
        stored: dict[str, tuple[int, int]] = {}
        rounded: dict[tuple[int, int, ActivationGrid], int] = {}
        for signature in self.model.signatureDefs:
            graph = self.model.subgraphs[signature.subgraphIndex]
            consumers = _consumers(graph)
            for entry in [i for i in signature.inputs if i.name.decode() in weights]:
                path, constant = weights[entry.name.decode()]
                index = int(entry.tensorIndex)
                signature.inputs.remove(entry)
                graph.inputs = graph.inputs[graph.inputs != index]
                if not consumers[index]:
                    continue
                if path not in stored:
                    stored[path] = self._store(constant)
                dense = constant.type == "float16" or (in_float32 and constant.scale is not None)
                if dense:
                    index = self._widen(graph, index, constant)
                self._describe(graph, index, path, constant, stored[path])
                if dense:
                    continue
                for operator, position in consumers[index]:
                    self._read_constant(graph, operator, position, path, constant)
                    if constant.inputs is not None:
                        self._make_static(graph, operator, path, constant, rounded)

    def _store(self, constant: Constant) -> tuple[int, int]:
        data, scale = self.add_buffer(constant.data), constant.scale
        return data, 0 if scale is None or not constant.block_size else self.add_buffer(scale)

    def _widen(self, graph: Any, index: int, constant: Constant) -> int:
        """Add a tensor that operators convert to the float32 tensor `index`; return its index."""
        version = DEQUANTIZE_VERSIONS[constant.type]
        code = self._operator_code("DEQUANTIZE", version)
        source = self.add_tensor(graph, "", constant.shape, constant.type.upper())
        if constant.shape == tuple(graph.tensors[index].shape):
            graph.operators.insert(0, self._conversion(code, source, index))
            return source
        dense = self.add_tensor(graph, "", constant.shape, "FLOAT32")
        graph.operators[:0] = [
            self._conversion(code, source, dense),
            self._reshape(graph, dense, index),
        ]
        return source

    def _describe(
        self, graph: Any, index: int, path: str, constant: Constant, buffers: tuple[int, int]
    ) -> None:
        tensor = graph.tensors[index]
        if tuple(tensor.shape) != constant.shape:
            raise ExportError(
                f"{path}: shape {constant.shape}, expected the graph's {tensor.shape}"
            )
        tensor.name, tensor.buffer = path.encode(), buffers[0]
        tensor.type = getattr(self.schema.TensorType, constant.type.upper())
        if constant.scale is None:
            return
        parameters = self.schema.QuantizationParametersT()
        parameters.quantizedDimension = 0
        if constant.block_size:
            details = self.schema.BlockwiseQuantizationT()
            details.blockSize, details.zeroPoints = constant.block_size, -1
            details.scales = self.add_tensor(
                graph, f"{path}.scale", constant.scale.shape, "FLOAT16", buffers[1]
            )
            parameters.details = details
            parameters.detailsType = self.schema.QuantizationDetails.BlockwiseQuantization
        else:
            parameters.scale = constant.scale
            zero = np.zeros(constant.scale.shape) if constant.zero is None else constant.zero
            parameters.zeroPoint = zero.astype(np.int64)
        tensor.quantization = parameters

    def _read_constant(
        self, graph: Any, operator: Any, position: int, path: str, constant: Constant
    ) -> None:
        name = self.operator_name(operator)
        if name == "FULLY_CONNECTED" and position == 1:
            code = self.model.operatorCodes[operator.opcodeIndex]
            two_bits = constant.type == "int2"
            version = FULLY_CONNECTED_INT2_VERSION if two_bits else FULLY_CONNECTED_VERSION
            code.version = max(code.version, version)
            # Read only if XNNPACK declines the operator; gives the fallback kernel the same grid.
            operator.builtinOptions.asymmetricQuantizeInputs = constant.scale is not None
        elif name in ("GATHER", "GATHER_ND") and position == 0 and len(constant.shape) == 2:
            self._gather_to_lookup(graph, operator)
        elif constant.scale is not None:
            raise ExportError(
                f"{path}: {name} cannot read {constant.type}; leave this weight unquantized"
            )

    def _make_static(
        self,
        graph: Any,
        product: Any,
        path: str,
        constant: Constant,
        rounded: dict[tuple[int, int, ActivationGrid], int],
    ) -> None:
        """Round the input and output of a product to the grids of its constant.

        Args:
          graph: subgraph of the product.
          product: operator of the product.
          path: path of the weight.
          constant: weight with grids.
          rounded: int8 tensor, which other products also read, by `(subgraph, tensor, grid)`.
        """
        biased = any(int(index) >= 0 for index in product.inputs[2:])
        if self.operator_name(product) != "FULLY_CONNECTED" or biased:
            raise ExportError(f"{path}: a product with a bias does not support static ranges")
        inputs, outputs = constant.inputs, constant.outputs
        if inputs is None or outputs is None:
            raise ExportError(f"{path}: static ranges are of inputs and of outputs, one is missing")
        source, result = int(product.inputs[0]), int(product.outputs[0])
        key = (id(graph), source, inputs)
        if key not in rounded:
            rounded[key] = self._add_int8(graph, source, inputs)
            code = self._operator_code("QUANTIZE", QUANTIZE_VERSION)
            quantize = self._conversion(code, source, rounded[key])
            # Right after the operator that computes its input, so that every reader comes later.
            made = [i for i, o in enumerate(graph.operators) if source in o.outputs]
            graph.operators.insert(made[0] + 1 if made else 0, quantize)
        reached = self._add_int8(graph, result, outputs)
        product.inputs = np.array([rounded[key], *product.inputs[1:]], np.int32)
        product.outputs = np.array([reached], np.int32)
        product.builtinOptions.asymmetricQuantizeInputs = False
        code = self._operator_code("DEQUANTIZE", DEQUANTIZE_INT8_VERSION)
        at = next(i for i, operator in enumerate(graph.operators) if operator is product)
        graph.operators.insert(at + 1, self._conversion(code, reached, result))

    def _add_int8(self, graph: Any, like: int, grid: ActivationGrid) -> int:
        index = self.add_tensor(graph, "", tuple(graph.tensors[like].shape), "INT8")
        parameters = self.schema.QuantizationParametersT()
        parameters.scale = np.array([grid.scale], np.float32)
        parameters.zeroPoint = np.array([grid.zero], np.int64)
        graph.tensors[index].quantization = parameters
        return index

    def _conversion(self, code: int, source: int, target: int) -> Any:
        operator = self.schema.OperatorT()
        operator.opcodeIndex = code
        operator.inputs = np.array([source], np.int32)
        operator.outputs = np.array([target], np.int32)
        return operator

    def _gather_to_lookup(self, graph: Any, gather: Any) -> None:
        table, indices = (int(i) for i in gather.inputs[:2])
        output = int(gather.outputs[0])
        rows = int(np.prod(graph.tensors[indices].shape))
        shape = graph.tensors[output].shape
        flat = self.add_tensor(graph, "", (rows,), "INT32")
        looked_up = self.add_tensor(graph, "", (rows, int(shape[-1])), "FLOAT32")
        lookup = self.schema.OperatorT()
        lookup.opcodeIndex = self._operator_code("EMBEDDING_LOOKUP", EMBEDDING_LOOKUP_VERSION)
        lookup.inputs = np.array([flat, table], np.int32)
        lookup.outputs = np.array([looked_up], np.int32)
        at = next(i for i, operator in enumerate(graph.operators) if operator is gather)
        graph.operators[at : at + 1] = [
            self._reshape(graph, indices, flat),
            lookup,
            self._reshape(graph, looked_up, output),
        ]

    def _reshape(self, graph: Any, source: int, target: int) -> Any:
        shape = np.asarray(graph.tensors[target].shape, np.int32)
        operator = self.schema.OperatorT()
        operator.opcodeIndex = self._operator_code("RESHAPE", 1)
        extents = self.add_tensor(graph, "", shape.shape, "INT32", self.add_buffer(shape))
        operator.inputs = np.array([source, extents], np.int32)
        operator.outputs = np.array([target], np.int32)
        operator.builtinOptions = self.schema.ReshapeOptionsT()
        operator.builtinOptions.newShape = shape
        operator.builtinOptionsType = self.schema.BuiltinOptions.ReshapeOptions
        return operator

    def _operator_code(self, name: str, version: int) -> int:
        builtin = getattr(self.schema.BuiltinOperator, name)
        for index, code in enumerate(self.model.operatorCodes):
            if max(code.builtinCode, code.deprecatedBuiltinCode) == builtin:
                code.version = max(code.version, version)
                return index
        code = self.schema.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode = builtin, min(builtin, 127)
        code.version = version
        self.model.operatorCodes.append(code)
        return len(self.model.operatorCodes) - 1

    def add_buffer(self, array: np.ndarray) -> int:
        """Append the bytes of an array as a buffer and return its index."""
        buffer = self.schema.BufferT()
        buffer.data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.model.buffers.append(buffer)
        return len(self.model.buffers) - 1

    def add_tensor(
        self, graph: Any, name: str, shape: tuple[int, ...], type: str, buffer: int = 0
    ) -> int:
        """Append a tensor to a subgraph and return its index."""
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape = name.encode(), np.asarray(shape, np.int32)
        tensor.type, tensor.buffer = getattr(self.schema.TensorType, type), buffer
        graph.tensors.append(tensor)
        return len(graph.tensors) - 1

    def add_metadata(self, fields: Mapping[str, Any]) -> None:
        """Replace the converter's metadata with a JSON object for `read_metadata`.

        The converter's metadata names the oldest runtime for the graph without weights.
        """
        entry = self.schema.MetadataT()
        text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        entry.name, entry.buffer = METADATA, self.add_buffer(np.frombuffer(text, np.uint8))
        self.model.metadata = [entry]

    def compact(self, names: Collection[bytes] = ()) -> None:
        """Remove unused tensors and buffers, and the names of unnamed results.

        Args:
          names: names that are kept although they look like generated ones.
        """
        for index, graph in enumerate(self.model.subgraphs):
            signatures = [s for s in self.model.signatureDefs if s.subgraphIndex == index]
            _compact_tensors(graph, signatures, self.model.buffers, names)
        _compact_buffers(self.model)


def _consumers(graph: Any) -> dict[int, list[tuple[Any, int]]]:
    consumers = collections.defaultdict(list)
    for operator in graph.operators:
        for position, index in enumerate(operator.inputs):
            consumers[int(index)].append((operator, position))
    return consumers


def _compact_tensors(
    graph: Any, signatures: Iterable[Any], buffers: list[Any], names: Collection[bytes]
) -> None:
    entries = [entry for s in signatures for entry in (*s.inputs, *s.outputs)]
    used = {int(i) for i in (*graph.inputs, *graph.outputs)}
    used |= {int(entry.tensorIndex) for entry in entries}
    for operator in graph.operators:
        used |= {int(i) for i in (*operator.inputs, *operator.outputs) if i >= 0}
    scales = [_scales(graph.tensors[i]) for i in used]
    used |= {details.scales for details in scales if details is not None}

    indices = sorted(used)
    new_index = {old: new for new, old in enumerate(indices)} | {-1: -1}
    bound = {int(i) for i in (*graph.inputs, *graph.outputs)}
    for index in indices:
        tensor = graph.tensors[index]
        if buffers[tensor.buffer].data is None:
            tensor.buffer = 0
        name = tensor.name or b""
        if index not in bound and name not in names and b"/" not in name.split(b".")[0]:
            tensor.name = b""
        if _scales(tensor) is not None:
            _scales(tensor).scales = new_index[_scales(tensor).scales]
    graph.tensors = [graph.tensors[i] for i in indices]
    graph.inputs = _renumbered(graph.inputs, new_index)
    graph.outputs = _renumbered(graph.outputs, new_index)
    for operator in graph.operators:
        operator.inputs = _renumbered(operator.inputs, new_index)
        operator.outputs = _renumbered(operator.outputs, new_index)
    for entry in entries:
        entry.tensorIndex = new_index[int(entry.tensorIndex)]


def _scales(tensor: Any) -> Any:
    return None if tensor.quantization is None else tensor.quantization.details


def _renumbered(indices: np.ndarray, new_index: Mapping[int, int]) -> np.ndarray:
    return np.array([new_index[int(i)] for i in indices], np.int32)


def _compact_buffers(model: Any) -> None:
    buffers, new_index = [model.buffers[0]], {0: 0}
    contents: dict[bytes | int, int] = {}
    readers = [t for graph in model.subgraphs for t in graph.tensors] + list(model.metadata)
    for reader in readers:
        old = reader.buffer
        if old not in new_index:
            data = model.buffers[old].data
            key = data.tobytes() if data.nbytes < SMALL_BUFFER else old
            new_index[old] = contents.setdefault(key, len(buffers))
            if new_index[old] == len(buffers):
                buffers.append(model.buffers[old])
        reader.buffer = new_index[old]
    model.buffers = buffers
