"""Reader of graphs, operators and tensors of a TFLite file, without running it.

The file is untrusted: every index and extent is checked.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glm_edge.export.common.interface import Tensor
from glm_edge.export.common.parsing import EntryCounter
from glm_edge.export.tflite.file import opened
from glm_edge.export.tflite.flatbuffer import schema

MAX_RANK = 8
MAX_ELEMENTS = 1 << 40
_BITS = {
    "float32": 32,
    "float16": 16,
    "bfloat16": 16,
    "int2": 2,
    "int4": 4,
    "int8": 8,
    "uint8": 8,
    "int16": 16,
    "uint16": 16,
    "int32": 32,
    "uint32": 32,
    "int64": 64,
    "uint64": 64,
    "float64": 64,
    "bool": 8,
}


@dataclass(frozen=True)
class Operator:
    """An operator of a graph.

    Attributes:
      name: builtin name such as `FULLY_CONNECTED`, or `CUSTOM <name>`.
      version: version of the operator.
      inputs: input tensors, None for an absent optional input.
      outputs: output tensors.
      options: values of its options by field name of the schema, such as `KeepNumDims`.
      input_indices: indices of `inputs` among the graph's tensors, -1 for absent ones.
      output_indices: indices of `outputs` among the graph's tensors.
    """

    name: str
    version: int
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    options: Mapping[str, Any]
    input_indices: tuple[int, ...]
    output_indices: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """A signature, or a graph that another graph calls.

    Attributes:
      name: name of the signature, or else of the graph.
      inputs: input tensors by the signature's names; by position for a graph without a signature.
      outputs: output tensors by the signature's names; by position for a graph without a signature.
      operators: operators in execution order.
    """

    name: str
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    operators: tuple[Operator, ...]


def read_graphs(path: str | Path) -> list[Graph]:
    """Read the graphs of a TFLite file, without its weights.

    Args:
      path: path of the file.

    Returns:
      The graphs, in the file's order.

    Raises:
      ExportError: the file is missing, not TFLite, or damaged: an index, an extent or a buffer
        points outside the file.
    """
    with opened(Path(path)) as (model, content):
        return _Reader(path, model, len(content)).graphs()


class _Reader:
    """A reader of the tables of one file; raises `PARSE_ERRORS`."""

    def __init__(self, path: str | Path, model: Any, file_bytes: int) -> None:
        self._path, self._model, self._file_bytes = path, model, file_bytes
        self._range = EntryCounter()
        names = schema()
        self._types = _names_of(names.TensorType)
        self._operators = _names_of(names.BuiltinOperator)
        self._options = _names_of(names.BuiltinOptions)
        self._schema = names

    def graphs(self) -> list[Graph]:
        model = self._model
        self._buffers = [self._buffer_bytes(i) for i in self._range(model.BuffersLength())]
        if not self._buffers or self._buffers[0]:
            raise ValueError("buffer 0 must exist and be empty")
        self._codes = [
            self._code(model.OperatorCodes(i)) for i in self._range(model.OperatorCodesLength())
        ]
        signatures: dict[int, Any] = {}
        for index in self._range(model.SignatureDefsLength()):
            signature = model.SignatureDefs(index)
            graph = _within(signature.SubgraphIndex(), model.SubgraphsLength(), "subgraph")
            if graph in signatures:
                raise ValueError(f"two signatures share subgraph {graph}")
            signatures[graph] = signature
        return [
            self._graph(model.Subgraphs(i), signatures.get(i))
            for i in self._range(model.SubgraphsLength())
        ]

    def _buffer_bytes(self, index: int) -> int:
        buffer = self._model.Buffers(index)
        offset, size = buffer.Offset(), buffer.Size()
        if offset > 1:
            if offset + size > self._file_bytes:
                raise ValueError(
                    f"buffer {index} ends at byte {offset + size}, but the file has "
                    f"{self._file_bytes}"
                )
            return size
        length = buffer.DataLength()
        # Raises if the vector extends beyond the file.
        return len(buffer.DataAsNumpy()) if length else 0

    def _code(self, code: Any) -> tuple[str, int]:
        number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        name = self._operators[number]
        if name == "CUSTOM":
            name = f"CUSTOM {_text(code.CustomCode())}"
        return name, code.Version()

    def _graph(self, graph: Any, signature: Any) -> Graph:
        tensors = [self._tensor(graph.Tensors(i)) for i in self._range(graph.TensorsLength())]
        if signature is None:
            inputs, outputs = (
                {str(at): tensor for at, tensor in enumerate(self._picked(tensors, indices))}
                for indices in (graph.InputsAsNumpy(), graph.OutputsAsNumpy())
            )
            name = _text(graph.Name())
        else:
            inputs = self._named(tensors, signature.Inputs, signature.InputsLength())
            outputs = self._named(tensors, signature.Outputs, signature.OutputsLength())
            name = _text(signature.SignatureKey())
            self._picked(tensors, graph.InputsAsNumpy())
            self._picked(tensors, graph.OutputsAsNumpy())
        operators = tuple(
            self._operator(graph.Operators(i), tensors)
            for i in self._range(graph.OperatorsLength())
        )
        return Graph(name, inputs, outputs, operators)

    def _named(self, tensors: list[Tensor], entry: Any, length: int) -> dict[str, Tensor]:
        entries = [entry(i) for i in self._range(length)]
        named = {
            _text(e.Name()): tensors[_within(e.TensorIndex(), len(tensors), "tensor")]
            for e in entries
        }
        if len(named) != len(entries):
            raise ValueError("a signature has two tensors with the same name")
        return named

    def _picked(self, tensors: list[Tensor], indices: Any) -> Iterator[Tensor]:
        indices = _vector(indices)
        self._range(len(indices))
        return (tensors[_within(int(i), len(tensors), "tensor")] for i in indices.tolist())

    def _tensor(self, tensor: Any) -> Tensor:
        name, kind = _text(tensor.Name()), self._types[tensor.Type()].lower()
        shape = _extents(_vector(tensor.ShapeAsNumpy()), 0)
        signature = _extents(_vector(tensor.ShapeSignatureAsNumpy()), -1)
        stored = self._buffers[_within(tensor.Buffer(), len(self._buffers), "buffer")]
        bits = _BITS.get(kind)
        if stored and bits and tensor.Sparsity() is None:
            needed = -(-math.prod(shape) * bits // 8)
            if stored != needed:
                raise ValueError(
                    f"tensor {name!r}: {stored} bytes, but {kind} {shape} needs {needed}"
                )
        return Tensor(
            name,
            kind,
            signature if -1 in signature and len(signature) == len(shape) else shape,
            stored > 0,
            self._quantization(tensor, name, shape),
        )

    def _quantization(self, tensor: Any, name: str, shape: tuple[int, ...]) -> str:
        parameters = tensor.Quantization()
        if parameters is None:
            return ""
        if parameters.DetailsType():
            if parameters.DetailsType() != self._schema.QuantizationDetails.BlockwiseQuantization:
                return "other"
            details = self._schema.BlockwiseQuantization()
            details.Init(parameters.Details().Bytes, parameters.Details().Pos)
            if details.BlockSize() < 1 or not shape or shape[-1] % details.BlockSize():
                raise ValueError(f"tensor {name!r}: blocks of {details.BlockSize()} in {shape}")
            return f"blocks of {details.BlockSize()}"
        scales = _vector(parameters.ScaleAsNumpy())
        if not len(scales):
            return ""
        if len(scales) == 1:
            return "tensor"
        dimension = parameters.QuantizedDimension()
        if not 0 <= dimension < len(shape) or shape[dimension] != len(scales):
            raise ValueError(f"tensor {name!r}: {len(scales)} scales along axis {dimension}")
        return "channel"

    def _operator(self, operator: Any, tensors: list[Tensor]) -> Operator:
        code = _within(operator.OpcodeIndex(), len(self._codes), "operator code")
        inputs = _vector(operator.InputsAsNumpy()).tolist()
        outputs = _vector(operator.OutputsAsNumpy()).tolist()
        self._range(len(inputs) + len(outputs))
        name, version = self._codes[code]
        return Operator(
            name,
            version,
            tuple(None if i == -1 else tensors[_within(i, len(tensors), "tensor")] for i in inputs),
            tuple(tensors[_within(i, len(tensors), "tensor")] for i in outputs),
            self._fields(operator),
            tuple(inputs),
            tuple(outputs),
        )

    def _fields(self, operator: Any) -> dict[str, Any]:
        """Read the numeric and boolean options of an operator."""
        kind, table = operator.BuiltinOptionsType(), operator.BuiltinOptions()
        if not kind or table is None:
            return {}
        options = getattr(self._schema, self._options[kind])()
        options.Init(table.Bytes, table.Pos)
        return {
            field: getattr(options, field)()
            for field in _SCALARS
            if callable(getattr(options, field, None))
        }


# The options that the rules of delegates use.
_SCALARS = (
    "Axis",
    "Beta",
    "EllipsisMask",
    "FusedActivationFunction",
    "KeepDims",
    "KeepNumDims",
    "Mode",
    "NewAxisMask",
    "ShrinkAxisMask",
    "WeightsFormat",
)


def _names_of(enumeration: Any) -> dict[int, str]:
    return {number: name for name, number in vars(enumeration).items() if isinstance(number, int)}


def _text(value: bytes | None) -> str:
    return (value or b"").decode()


def _vector(value: Any) -> np.ndarray:
    # The generated readers return 0 for an absent vector.
    return value if isinstance(value, np.ndarray) else np.zeros(0, np.int32)


def _extents(vector: np.ndarray, least: int) -> tuple[int, ...]:
    if len(vector) > MAX_RANK:
        raise ValueError(f"a tensor with {len(vector)} dimensions")
    extents = tuple(vector.tolist())
    if any(extent < least for extent in extents) or abs(math.prod(extents)) > MAX_ELEMENTS:
        raise ValueError(f"a tensor with shape {extents}")
    return extents


def _within(index: int, length: int, kind: str) -> int:
    if not 0 <= index < length:
        raise IndexError(f"{kind} {index} of {length}")
    return index
