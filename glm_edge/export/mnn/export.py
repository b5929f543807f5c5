"""Export to MNN, through its converter from ONNX, with our integers put in afterwards."""

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
    Package,
    bytes_of,
    check_target,
    read_description,
    write_description,
    written_whole,
)
from glm_edge.export.common.offer import Offer, offer
from glm_edge.export.common.weights import (
    RANGES,
    Weight,
    dequantized,
    held_bytes,
    held_params,
    weight_of,
)
from glm_edge.export.onnx.export import graph_of, mapped, model_of, store
from glm_edge.export.onnx.graph import GraphBuilder, StoredWeight
from glm_edge.export.tflite.file import DAMAGE, scratch_beside
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params
from glm_edge.writers import require_space

WEIGHTS = "weights.bin"
CONVERTED = "__matmul_converted"
BITS = {"int8": 8, "int4": 4}
# In front of a weight's codes, at the most: a mark, two extents, and all levels.
HEADER_BYTES = 1 + 8 + 1 + 256
# The converter's own command line calls home and installs packages when it is imported.
CONVERTER = "import sys, _tools; sys.exit(not _tools.mnnconvert(['mnnconvert', *sys.argv[1:]]))"
SHORT = 1 << 16


def mnn(
    model: MultimodalGLM,
    params: Params,
    path: str | Path,
    prefill_lengths: Iterable[int] = (128,),
    cache_slots: int | None = None,
    prefill_logits: bool = False,
    attended_slots: Iterable[int] = (),
    overwrite: bool = False,
) -> Package:
    """Writes a model as MNN graphs that hold our own integers.

    The directory holds a graph for each signature (`decode.mnn` and so on, see
    `common.signatures.signatures`), one file of weights that all of them read (give it to
    `Interpreter.setExternalFile`), and a description. Outputs that carry the cache are named like
    the inputs with `_out` appended.

    MNN's converter keeps no integers of an ONNX file: it refuses int4, and dequantizes int8. So it
    is given float32 numbers, which takes four bytes of memory a parameter, and each convolution it
    made of a product is then given our codes and scales: symmetric, 8 or 4 bits, per row or in
    groups. Narrower integers are written as 4 bits. Embeddings are looked up as int8. In its CPU
    backend, results agree with JAX's to 1e-5 of the largest.

    Args:
      model: the model.
      params: its parameters: arrays; `Masked` (written dense, with zeros); symmetric `Quantized`.
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
      MissingExtraError: MNN or onnx is not installed.

    References:
      MNN, https://arxiv.org/abs/2002.12418.
    """
    path = Path(path)
    require("MNN", extra="mnn")
    library = require("onnx", extra="onnx")
    check_target(path, overwrite, DESCRIPTION)
    offered = offer(model, params, prefill_lengths, cache_slots, prefill_logits, attended_slots)
    require_space(path, _needed(offered, params))
    weights, conversions = {}, []
    for name, leaf in boxes.path_items(params):
        weights[name], found = weight_of(name, leaf, "MNN", affine=False)
        conversions += found
    with (
        written_whole(path, overwrite, DESCRIPTION) as directory,
        scratch_beside(path) as scratch,
    ):
        stored = {}
        with open(scratch / WEIGHTS, "xb") as file:
            for name, weight in weights.items():
                dense = Weight(dequantized(weight), "float32")
                turned = boxes.is_matrix(name, dense.values)
                stored[name] = store(library, file, name, dense, turned)
            tables = _tables(library, file, weights)
        with open(directory / WEIGHTS, "xb") as file:
            writer = _Writer(file, weights)
            for signature in offered.signatures:
                builder = _Graph(stored, tables)
                graph = graph_of(signature, offered.shapes, stored, builder)
                source = scratch / f"{signature.name}.onnx"
                source.write_bytes(model_of(library, graph).SerializeToString())
                _convert(source, directory, builder, writer)
        parameters = {
            name: [max(weights[name].values.shape) >= SHORT, *place[:3]]
            for name, place in writer.places.items()
        }
        description = offered.description(parameters, conversions)
        write_description(directory, description)
    held = held_params(params, weights)
    return Package(path, bytes_of(path), offered.names, tuple(conversions), model, held)


def _needed(offered: Offer, params: Params) -> int:
    """Bytes on the disk at the most: the converter's float32 copies of weights beside the file."""
    items = dict(boxes.path_items(params))
    dense = {name: 4 * math.prod(leaf.shape) for name, leaf in items.items()}
    codes = sum(dense[name] // 4 for name in items if name.split("/")[0] == "embed")
    held = sum(map(held_bytes, items.values()))
    return sum(dense.values()) + 2 * max(offered.read_bytes(dense)) + held + 2 * codes


class _Graph(GraphBuilder):
    """Written in operators that MNN's converter leaves alone; looks rows up among integers."""

    def __init__(self, stored: Mapping[str, StoredWeight], tables: Mapping[str, StoredWeight]):
        super().__init__(stored)
        self.tables = tables

    def node(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        divisor = self.initializers.get(inputs[1]) if operator == "Div" else None
        if divisor is not None:
            # The converter would do the same, and print the reciprocal with six digits.
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
    """The embedding's codes as int8, whatever their width, where it has codes."""
    found = {}
    for path in (path for path in weights if path.split("/")[0] == "embed"):
        weight = weights[path]
        if weight.scale is not None:
            codes = store(library, file, f"{path}.codes", Weight(weight.values, "int8"), False)
            scale = store(library, file, f"{path}.scale", Weight(weight.scale, "float32"), False)
            found[path] = StoredWeight(codes.values, scale.values)
    return found


def _products(builder: GraphBuilder) -> dict[str, str]:
    """Outputs that the converter names its convolutions after, to paths of weights."""
    named = dict(builder.products)
    for node in builder.nodes:
        # It takes a bias into the convolution, and the name of the sum with it.
        weighted = [named[name] for name in node.input if name in named]
        if node.op_type == "Add" and weighted:
            named[node.output[0]] = weighted[0]
    return named


def read_weights(
    path: str | Path, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Weight]:
    """Reads the quantized weights of an exported directory back, as its convolutions read them.

    Args:
      path: the directory.
      shapes: dense shapes of the parameters by path; None takes those that the file says, whose
        memory only its size limits.

    Returns:
      Parameter path to its codes and scales.

    Raises:
      ExportError: the directory is missing, damaged, or no export.
    """
    path, found = Path(path), {}
    description = read_description(path)
    try:
        places = description["parameters"]
        content = mapped(path)
        for name, (wide, start, length, scales) in places.items():
            stored = content[start : start + length + scales]
            shape = _shape(stored, wide)
            if shapes is not None and shapes.get(name) != shape:
                raise ValueError(f"{name}: shape {shape}, the model's is {shapes.get(name)}")
            if max(length, scales // 4) > HEADER_BYTES + math.prod(shape):
                raise ValueError(f"{name}: {length} bytes of codes, {scales} of scales of {shape}")
            found[name] = _weight(np.array(stored), length, wide)
    except (OSError, *DAMAGE) as error:
        raise ExportError(f"{path}: no whole MNN export of glm_edge: {error}") from error
    return found


def _shape(content: np.ndarray, wide: bool) -> tuple[int, ...]:
    extents = content[1:9].tobytes() if wide else content[1:5].tobytes()
    return tuple(np.frombuffer(extents, np.uint32 if wide else np.uint16).tolist())


def _weight(content: np.ndarray, length: int, wide: bool) -> Weight:
    """Inverse of what `_Writer.quantized` writes."""
    header, shape = 9 if wide else 5, _shape(content, wide)
    kind = "int8" if content[header] == 0 else "int4"
    codes = content[header + 1 + 2 ** BITS[kind] : length]
    if kind == "int4":
        codes = np.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)[: shape[0] * shape[1]]
    codes = (codes.astype(np.int16) + RANGES[kind][0]).astype(np.int8).reshape(shape)
    scale = content[length:].view(np.float32).reshape(shape[0], -1)
    groups = scale.shape[1]
    return Weight(codes, kind, scale, None, shape[1] // groups if groups > 1 else 0)


@dataclass
class _Writer:
    """Writes the file of weights.

    Attributes:
      file: open for writing.
      weights: by path.
      places: path to place and lengths, as a convolution names them.
      copied: digest to place.
    """

    file: BinaryIO
    weights: Mapping[str, Weight]
    places: dict[str, list[int]] = field(default_factory=dict)
    copied: dict[bytes, int] = field(default_factory=dict)

    def quantized(self, path: str, bias: bytes) -> list[int]:
        """Place and lengths of a weight's codes, scales and bias, which lie one after another."""
        if path not in self.places:
            weight, start = self.weights[path], self.file.tell()
            self.file.write(_header(weight) + _unsigned(weight).tobytes())
            middle = self.file.tell()
            self.file.write(weight.scale.tobytes())
            end = self.file.tell()
            self.file.write(bias)
            self.places[path] = [start, middle - start, end - middle, len(bias), 0]
        return self.places[path]

    def copy(self, data: bytes) -> int:
        """Place of bytes that are no codes of ours, stored once for all graphs."""
        key = hashlib.sha256(data).digest()
        if key not in self.copied:
            self.copied[key] = self.file.tell()
            self.file.write(data)
        return self.copied[key]


def _header(weight: Weight) -> bytes:
    low, high = RANGES[weight.type]
    kind = np.uint32 if max(weight.values.shape) >= SHORT else np.uint16
    levels = np.arange(low, high + 1, dtype=np.int8)
    # A length of 256 does not fit the byte and reads as 0.
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
    held = np.memmap(outside, np.uint8, "r") if outside.exists() else np.zeros(0, np.uint8)
    products = _products(builder)
    for operator in graph["oplists"]:
        main = operator.get("main", {})
        _restore(operator, builder, writer.weights)
        if "external" not in main:
            continue
        start, *lengths = main["external"]
        path = products.get(operator["name"].removesuffix(CONVERTED))
        if operator["type"] == "Convolution" and path and writer.weights[path].scale is not None:
            bias = held[start + lengths[0] : start + sum(lengths[:2])].tobytes()
            main["quanParameter"] = _parameters(writer.weights[path])
            main["external"] = writer.quantized(path, bias)
        else:
            data = held[start : start + sum(lengths)].tobytes()
            main["external"] = [writer.copy(data), *lengths]
    text.write_text(json.dumps(graph))
    _run(scratch, "-f", "JSON", "--modelFile", text, "--MNNModel", target)
    del held
    for file in (source, raw, text, outside):
        file.unlink(missing_ok=True)


def _restore(operator: Any, builder: _Graph, weights: Mapping[str, Weight]) -> None:
    """Puts exact numbers where the converter's JSON holds six digits behind the point."""
    main = operator.get("main", {})
    if "float32s" not in main and "external" in main:
        return
    exact = _exact(operator["name"], builder, weights) if "float32s" in main else None
    if exact is not None:
        main["float32s"] = exact.reshape(-1).tolist()
    elif any(value != round(value) for value in _floats(main)):
        raise ExportError(
            f"MNN: the converter made numbers of its own ({operator['type']} {operator['name']}), "
            "which its JSON does not hold exactly"
        )


def _exact(name: str, builder: _Graph, weights: Mapping[str, Weight]) -> np.ndarray | None:
    path = name.removesuffix(".scale")
    if path in weights and path != name:
        return weights[path].scale
    if path in weights:
        dense = dequantized(weights[path])
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
        "shapeInt32": max(weight.values.shape) >= SHORT,
        "weightSize": 0,
    }


def _run(scratch: Path, *arguments: Any) -> None:
    # It copies weights to its working folder.
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
