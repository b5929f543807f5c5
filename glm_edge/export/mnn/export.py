"""Export to MNN through its ONNX converter; quantized codes are inserted afterwards."""

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from glm_edge import params as boxes
from glm_edge.errors import ExportError, require
from glm_edge.export.common.directory import (
    DESCRIPTION,
    WEIGHTS,
    directory_bytes,
    write_description,
)
from glm_edge.export.common.signatures import ExportSpec, make_spec
from glm_edge.export.common.weights import (
    MNN,
    RANGES,
    Weight,
    dequantize,
    stored_bytes,
    to_params,
    to_weight,
)
from glm_edge.export.mnn.reader import BITS
from glm_edge.export.onnx.graph import GraphBuilder, StoredWeight
from glm_edge.export.onnx.model import graph_of, model_of, store
from glm_edge.export.verify.package import Package
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params
from glm_edge.writers import check_target, new_directory, require_space, scratch_beside

CONVERTED = "__matmul_converted"
# The converter's Python command line sends reports and installs packages when it is imported.
CONVERTER = "import sys, _tools; sys.exit(not _tools.mnnconvert(['mnnconvert', *sys.argv[1:]]))"
# Extents from this value on are stored in 32 bits.
UINT16_LIMIT = 1 << 16


def mnn(
    model: MultimodalGLM,
    params: Params,
    path: str | Path,
    prefill_lengths: Iterable[int] = (128,),
    cache_slots: int | None = None,
    prefill_logits: bool = False,
    attended_slots: Iterable[int] = (),
    overwrite: bool = False,
    forced_lengths: Iterable[int] = (),
) -> Package:
    """Write a model as MNN graphs that store quantized codes unchanged.

    The directory contains one graph per signature (such as `decode.mnn`, see
    `common.signatures.signatures`), one file of weights for all graphs (pass it to
    `Interpreter.setExternalFile`), and a description. A cache output has the name of its input with
    `_out` appended.

    MNN's converter does not preserve integers of an ONNX file: it rejects int4 and dequantizes
    int8. It therefore converts float32 values, which takes four bytes of memory per parameter. This
    function then inserts codes and scales into each convolution that the converter made of a
    product: symmetric, 8 or 4 bits, per row or in groups. Narrower integers are written as 4 bits.
    Embeddings are looked up as int8. In MNN's CPU backend, results agree with JAX's to 1e-5 of the
    largest value.

    Args:
      model: the model.
      params: its parameters: arrays, `Masked` (written dense, with zeros) or symmetric `Quantized`.
      path: path of the directory.
      prefill_lengths: token counts of the prefill graphs.
      cache_slots: number of cache slots; None uses the model's context length, at most 1024.
      prefill_logits: whether prefill returns logits of every token. Generation does not need them,
        and they take time.
      attended_slots: slot counts, such as `(256, 512)`. The directory gets additional graphs that
        attend to only that many slots, which is faster for short contexts.
      overwrite: whether to replace an existing exported directory.
      forced_lengths: token counts, such as `(4, 8)`, of graphs with logits of their last token, for
        runs of tokens that a grammar forces; see `ge.export.tflite`.

    Returns:
      The written directory.

    Raises:
      ExportError: a parameter or the model cannot be written; the message names a supported
        alternative.
      OutputError: the directory already exists or cannot be written, or its disk is too full.
      MissingExtraError: MNN or onnx is not installed.

    References:
      MNN, https://arxiv.org/abs/2002.12418.
    """
    path = Path(path)
    require("MNN", extra="mnn")
    library = require("onnx", extra="onnx")
    check_target(path, overwrite, DESCRIPTION, strict=True)
    sizes = prefill_lengths, cache_slots, prefill_logits, attended_slots, forced_lengths
    spec = make_spec(model, params, *sizes)
    require_space(path, _needed(spec, params))
    weights, conversions = {}, []
    for name, leaf in boxes.path_items(params):
        weights[name], changes = to_weight(name, leaf, MNN)
        conversions += changes
    with (
        new_directory(path, overwrite, mark=DESCRIPTION) as directory,
        scratch_beside(path) as scratch,
    ):
        stored = {}
        with open(scratch / WEIGHTS, "xb") as file:
            for name, weight in weights.items():
                dense = Weight(dequantize(weight), "float32")
                turned = boxes.is_matrix(name, dense.values)
                stored[name] = store(library, file, name, dense, turned)
            tables = _tables(library, file, weights)
        with open(directory / WEIGHTS, "xb") as file:
            writer = _Writer(file, weights)
            for signature in spec.signatures:
                builder = _Graph(stored, tables)
                graph = graph_of(signature, spec.shapes, stored, builder)
                source = scratch / f"{signature.name}.onnx"
                source.write_bytes(model_of(library, graph).SerializeToString())
                _convert(source, directory, builder, writer)
        parameters = {
            name: [max(weights[name].values.shape) >= UINT16_LIMIT, *position[:3]]
            for name, position in writer.positions.items()
        }
        description = spec.description(parameters, conversions)
        write_description(directory, description)
    stored_params = to_params(params, weights)
    return Package(
        path, directory_bytes(path), spec.names, tuple(conversions), model, stored_params
    )


def _needed(spec: ExportSpec, params: Params) -> int:
    """Estimate the peak bytes on disk, with the converter's float32 copies of weights."""
    items = dict(boxes.path_items(params))
    dense = {name: 4 * math.prod(leaf.shape) for name, leaf in items.items()}
    codes = sum(dense[name] // 4 for name in items if name.split("/")[0] == "embed")
    stored = sum(stored_bytes(leaf, MNN) for leaf in items.values())
    return sum(dense.values()) + 2 * max(spec.read_bytes(dense)) + stored + 2 * codes


class _Graph(GraphBuilder):
    """A graph of operators that MNN's converter does not change, with lookups in integer tables."""

    def __init__(
        self, stored: Mapping[str, StoredWeight], tables: Mapping[str, StoredWeight]
    ) -> None:
        super().__init__(stored)
        self.tables = tables

    def node(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        divisor = self.initializers.get(inputs[1]) if operator == "Div" else None
        if divisor is not None:
            # The converter would do the same, but write the reciprocal with six digits only.
            array = self.onnx.numpy_helper.to_array(divisor)
            operator, inputs = "Mul", (inputs[0], self.constant(np.float32(1.0) / array))
        return super().node(operator, *inputs, outputs=outputs, **attributes)

    def look_up(self, path: str, indices: str, count: int) -> str:
        if path not in self.tables:
            return super().look_up(path, indices, count)
        table = self.tables[path]
        self.initializers |= {tensor.name: tensor for tensor in (table.values, table.scale)}
        rows, groups = table.scale.dims
        codes = self.node("Gather", table.values.name, indices, axis=0)
        codes = self.node("Cast", codes, to=self.onnx.TensorProto.FLOAT)
        codes = self.node("Reshape", codes, self.sizes([count, groups, -1]))
        scale = table.scale.name
        if rows > 1:
            scale = self.node("Gather", scale, indices, axis=0)
        scale = self.node("Reshape", scale, self.sizes([-1, groups, 1]))
        product = self.node("Mul", codes, scale)
        return self.node("Reshape", product, self.sizes([count, table.values.dims[1]]))


def _tables(library: Any, file: BinaryIO, weights: Mapping[str, Weight]) -> dict[str, StoredWeight]:
    """Store the codes of a quantized embedding as int8, whatever their width."""
    tables = {}
    for path in (path for path in weights if path.split("/")[0] == "embed"):
        weight = weights[path]
        if weight.scale is not None:
            codes = store(library, file, f"{path}.codes", Weight(weight.values, "int8"), False)
            scale = store(library, file, f"{path}.scale", Weight(weight.scale, "float32"), False)
            tables[path] = StoredWeight(codes.values, scale.values)
    return tables


def _products(builder: GraphBuilder) -> dict[str, str]:
    """Map outputs, after which the converter names its convolutions, to paths of weights."""
    named = dict(builder.products)
    for node in builder.nodes:
        # The converter merges a bias into the convolution, which then has the name of the sum.
        weighted = [named[name] for name in node.input if name in named]
        if node.op_type == "Add" and weighted:
            named[node.output[0]] = weighted[0]
    return named


@dataclass
class _Writer:
    """Writer of the file of weights.

    Attributes:
      file: file that is open for writing.
      weights: weights by path.
      positions: offset and lengths by path, in the order of a convolution's fields.
      copied: offset by digest.
    """

    file: BinaryIO
    weights: Mapping[str, Weight]
    positions: dict[str, list[int]] = field(default_factory=dict)
    copied: dict[bytes, int] = field(default_factory=dict)

    def quantized(self, path: str, bias: bytes) -> list[int]:
        """Write codes, scales and bias in this order; return offset and lengths."""
        if path not in self.positions:
            weight, start = self.weights[path], self.file.tell()
            self.file.write(_header(weight) + _unsigned(weight).tobytes())
            middle = self.file.tell()
            self.file.write(b"" if weight.scale is None else weight.scale.tobytes())
            end = self.file.tell()
            self.file.write(bias)
            self.positions[path] = [start, middle - start, end - middle, len(bias), 0]
        return self.positions[path]

    def copy(self, data: bytes) -> int:
        """Write bytes of plain values once for all graphs; return their offset."""
        key = hashlib.sha256(data).digest()
        if key not in self.copied:
            self.copied[key] = self.file.tell()
            self.file.write(data)
        return self.copied[key]


def _header(weight: Weight) -> bytes:
    low, high = RANGES[weight.type]
    kind = np.uint32 if max(weight.values.shape) >= UINT16_LIMIT else np.uint16
    levels = np.arange(low, high + 1, dtype=np.int8)
    # A length of 256 does not fit one byte and is stored as 0.
    return (
        b"\x02"
        + np.array(weight.values.shape, kind).tobytes()
        + bytes([len(levels) % 256])
        + levels.tobytes()
    )


def _unsigned(weight: Weight) -> np.ndarray:
    codes = (weight.values.reshape(-1).astype(np.int16) - RANGES[weight.type][0]).astype(np.uint8)
    if weight.type == "int8":
        return codes
    codes = np.concatenate([codes, np.zeros(len(codes) % 2, np.uint8)])
    return (codes[0::2] << 4) | codes[1::2]


def _convert(source: Path, directory: Path, builder: _Graph, writer: _Writer) -> None:
    raw, text = source.with_suffix(".mnn"), source.with_suffix(".json")
    scratch, target = source.parent, directory.absolute() / f"{source.stem}.mnn"
    _run(scratch, "-f", "ONNX", "--modelFile", source, "--MNNModel", raw, "--saveExternalData")
    _run(scratch, "-f", "MNN", "--modelFile", raw, "--JsonFile", text)
    graph = json.loads(text.read_text())
    outside = raw.with_name(f"{raw.name}.weight")
    content = np.memmap(outside, np.uint8, "r") if outside.exists() else np.zeros(0, np.uint8)
    products = _products(builder)
    for operator in graph["oplists"]:
        main = operator.get("main", {})
        _restore(operator, builder, writer.weights)
        if "external" not in main:
            continue
        start, *lengths = main["external"]
        path = products.get(operator["name"].removesuffix(CONVERTED))
        if operator["type"] == "Convolution" and path and writer.weights[path].scale is not None:
            bias = content[start + lengths[0] : start + sum(lengths[:2])].tobytes()
            main["quanParameter"] = _parameters(writer.weights[path])
            main["external"] = writer.quantized(path, bias)
        else:
            data = content[start : start + sum(lengths)].tobytes()
            main["external"] = [writer.copy(data), *lengths]
    text.write_text(json.dumps(graph))
    _run(scratch, "-f", "JSON", "--modelFile", text, "--MNNModel", target)
    del content
    for file in (source, raw, text, outside):
        file.unlink(missing_ok=True)


def _restore(operator: Any, builder: _Graph, weights: Mapping[str, Weight]) -> None:
    """Restore exact values, of which the converter's JSON has only six decimal places."""
    main = operator.get("main", {})
    if "float32s" not in main and "external" in main:
        return
    exact = _exact(operator["name"], builder, weights) if "float32s" in main else None
    if exact is not None:
        main["float32s"] = exact.reshape(-1).tolist()
    elif any(value != round(value) for value in _floats(main)):
        raise ExportError(
            f"MNN: the converter added constants ({operator['type']} {operator['name']}) that its "
            "JSON does not store exactly"
        )


def _exact(name: str, builder: _Graph, weights: Mapping[str, Weight]) -> np.ndarray | None:
    path = name.removesuffix(".scale")
    if path in weights and path != name:
        return weights[path].scale
    if path in weights:
        dense = dequantize(weights[path])
        return dense.T if boxes.is_matrix(path, dense) else dense
    tensor = builder.initializers.get(name)
    return None if tensor is None else builder.onnx.numpy_helper.to_array(tensor)


def _floats(tree: Any) -> Iterator[float]:
    if isinstance(tree, float):
        yield tree
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _floats(value)


def _parameters(weight: Weight) -> dict[str, Any]:
    return {
        "type": 1,
        "aMaxOrBits": BITS[weight.type],
        "aMin": 0,
        "readType": 0,
        "quantScale": 1.0,
        "scaleIn": 0.0,
        "scaleOut": 0.0,
        "useInt32": False,
        "has_scaleInt": False,
        "shapeInt32": max(weight.values.shape) >= UINT16_LIMIT,
        "weightSize": 0,
    }


def _run(scratch: Path, *arguments: Any) -> None:
    # The converter copies weights to its working folder.
    done = subprocess.run(
        [sys.executable, "-c", CONVERTER, "--bizCode", "glm_edge", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=scratch,
    )
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines() or ["no message"]
        raise ExportError(f"MNN's converter failed: {lines[-1]}")
