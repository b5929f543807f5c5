"""Writer and reader of the `.tflite` file around a model; large buffers follow the flatbuffer."""

import contextlib
import dataclasses
import functools
import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from glm_edge import files
from glm_edge.errors import ExportError, GlmEdgeError, require
from glm_edge.export.common.parsing import PARSE_ERRORS, EntryCounter
from glm_edge.export.tflite.flatbuffer import (
    METADATA,
    SMALL_BUFFER,
    ActivationGrid,
    Constant,
    schema,
)
from glm_edge.writers import check_target, write_stream

IDENTIFIER = b"TFL3"
SMALLEST = 8
ALIGNMENT = 64
INLINE_ALIGNMENT = 16
INLINE_LIMIT = 1 << 30
SHARED_VECTOR = 1 << 20
UNVERIFIED, VERIFIED = b'"verified":false', b'"verified":true '


@functools.cache
def _builder_class() -> type:
    flatbuffers: Any = require("flatbuffers", extra="export")

    class Builder(flatbuffers.Builder):
        """A builder that aligns bytes for in-place reads, and stores equal vectors once."""

        def __init__(self) -> None:
            super().__init__(1 << 16)
            self._offsets: dict[Any, int] = {}

        def StartVector(self, elemSize: int, numElems: int, alignment: int) -> int:  # noqa: N802, N803
            alignment = max(alignment, INLINE_ALIGNMENT) if elemSize == 1 else alignment
            return super().StartVector(elemSize, numElems, alignment)

        def CreateNumpyVector(self, x: np.ndarray) -> int:  # noqa: N802
            if x.nbytes > SHARED_VECTOR:
                return super().CreateNumpyVector(x)
            key = (x.dtype.str, x.tobytes())
            if key not in self._offsets:
                self._offsets[key] = super().CreateNumpyVector(x)
            return self._offsets[key]

    return Builder


def write(model: Any, path: Path, overwrite: bool, inline_limit: int = INLINE_LIMIT) -> int:
    """Write a model as a file atomically.

    Args:
      model: `ModelT`.
      path: path of the file.
      overwrite: whether to replace an existing file.
      inline_limit: largest total size in bytes of buffers inside the flatbuffer. Beyond it, large
        buffers are stored after the flatbuffer.

    Returns:
      The size of the file in bytes.

    Raises:
      OutputError: the file already exists, its directory cannot be written, or its disk is too
        full.
    """
    needed = sum(buffer.data.nbytes for buffer in model.buffers if buffer.data is not None)
    check_target(path, overwrite, None, needed)
    return write_stream(path, lambda file: _write(model, file, inline_limit))


def _write(model: Any, file: Any, inline_limit: int) -> None:
    buffers = [buffer for buffer in model.buffers if buffer.data is not None]
    if sum(buffer.data.nbytes for buffer in buffers) <= inline_limit:
        file.write(_pack(model))
        return
    outside = [buffer for buffer in buffers if buffer.data.nbytes >= SMALL_BUFFER]
    blobs = [buffer.data for buffer in outside]
    for buffer, blob in zip(outside, blobs, strict=True):
        # A nonzero offset reserves a field of the final width, so that the second pass has the same
        # length.
        buffer.data, buffer.offset, buffer.size = None, ALIGNMENT, blob.nbytes
    end = len(_pack(model))
    for buffer, blob in zip(outside, blobs, strict=True):
        buffer.offset = -(-end // ALIGNMENT) * ALIGNMENT
        end = buffer.offset + blob.nbytes
    file.write(_pack(model))
    for buffer, blob in zip(outside, blobs, strict=True):
        file.seek(buffer.offset)
        file.write(memoryview(blob))
        buffer.data, buffer.offset, buffer.size = blob, 0, 0


def _pack(model: Any) -> memoryview:
    builder = _builder_class()()
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    return memoryview(builder.Bytes)[builder.Head() :]


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read the description that the export stored, without reading the weights.

    Args:
      path: path of the file.

    Returns:
      Its fields.

    Raises:
      ExportError: the file is missing, not TFLite, damaged, or not written by glm_edge.
    """
    with opened(Path(path)) as (model, content):
        return _description(model, content, path)


def _description(model: Any, content: np.ndarray, path: str | Path) -> dict[str, Any]:
    entries = EntryCounter()
    for index in entries(model.MetadataLength()):
        entry = model.Metadata(index)
        if entry.Name() == METADATA:
            text = _bytes_of(model.Buffers(entry.Buffer()), content)
            where = f"{path}: damaged TFLite file: its description"
            fields = files.parse_json(text.tobytes(), where, ExportError)
            if not isinstance(fields, dict):
                raise ExportError(f"{where}: must be a JSON object, not {type(fields).__name__}")
            return fields
    raise ExportError(f"{path}: a TFLite file that glm_edge did not export")


def read_constants(
    path: str | Path, start: int = 0, size: int | None = None
) -> dict[str, Constant]:
    """Read the weights of an exported file as they are stored.

    Args:
      path: path of the file.
      start: offset of the model's first byte in bytes, for a section of a larger file.
      size: bytes of the model; None reads to the end of the file.

    Returns:
      Packed bytes and scales by parameter path.

    Raises:
      ExportError: the file is missing, not TFLite, damaged, or not written by glm_edge.
    """
    types = vars(schema().TensorType)
    names = {number: name.lower() for name, number in types.items() if isinstance(number, int)}
    constants: dict[str, Constant] = {}
    with opened(Path(path), start, size) as (model, content):
        paths, entries = set(_description(model, content, path)["parameters"]), EntryCounter()
        for subgraph in entries(model.SubgraphsLength()):
            graph = model.Subgraphs(subgraph)
            for index in entries(graph.TensorsLength()):
                tensor = graph.Tensors(index)
                name = (tensor.Name() or b"").decode()
                if name in paths and name not in constants:
                    constants[name] = _constant(model, graph, tensor, names, content)
            for name, grids in _static_grids(graph, entries):
                if name in constants:
                    constants[name] = dataclasses.replace(constants[name], **grids)
    return constants


def _static_grids(graph: Any, entries: EntryCounter) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield weights that are multiplied with int8 activations, and the activations' grids."""
    for index in entries(graph.OperatorsLength()):
        operator = graph.Operators(index)
        if operator.InputsLength() < 2 or not operator.OutputsLength():
            continue
        ends = {"inputs": operator.Inputs(0), "outputs": operator.Outputs(0)}
        if operator.Inputs(1) < 0 or min(ends.values()) < 0:
            continue
        tensors = {side: graph.Tensors(at) for side, at in ends.items()}
        if all(tensor.Type() == schema().TensorType.INT8 for tensor in tensors.values()):
            name = (graph.Tensors(operator.Inputs(1)).Name() or b"").decode()
            yield name, {side: _grid(tensor) for side, tensor in tensors.items()}


def _grid(tensor: Any) -> ActivationGrid:
    quantization = tensor.Quantization()
    return ActivationGrid(float(quantization.Scale(0)), int(quantization.ZeroPoint(0)))


def _constant(model: Any, graph: Any, tensor: Any, names: dict[int, str], content: Any) -> Constant:
    scale, zero, block_size = None, None, 0
    quantization = tensor.Quantization()
    if quantization is not None and quantization.DetailsType():
        details = schema().BlockwiseQuantization()
        details.Init(quantization.Details().Bytes, quantization.Details().Pos)
        scales, block_size = graph.Tensors(details.Scales()), details.BlockSize()
        stored = _bytes_of(model.Buffers(scales.Buffer()), content).tobytes()
        scale = np.frombuffer(stored, np.float16).reshape(scales.ShapeAsNumpy())
    elif quantization is not None and quantization.ScaleLength():
        scale = np.array(quantization.ScaleAsNumpy())
        points = np.array(quantization.ZeroPointAsNumpy())
        zero = points if points.any() else None
    return Constant(
        names[tensor.Type()],
        tuple(int(extent) for extent in tensor.ShapeAsNumpy()),
        _bytes_of(model.Buffers(tensor.Buffer()), content),
        scale,
        block_size,
        zero=zero,
    )


def _bytes_of(buffer: Any, content: np.ndarray) -> np.ndarray:
    """Return the bytes of a buffer as a view, without allocating memory for sparse files."""
    if buffer.Offset():
        return content[buffer.Offset() : buffer.Offset() + buffer.Size()]
    return buffer.DataAsNumpy() if buffer.DataLength() else np.zeros(0, np.uint8)


def mark_verified(path: str | Path) -> None:
    """Mark the descriptions of an exported file as verified.

    Args:
      path: path of the file.
    """
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        # Both values have the same length, so that no offset in the file changes.
        at = view.find(UNVERIFIED)
        while at >= 0:
            view[at : at + len(VERIFIED)] = VERIFIED
            at = view.find(UNVERIFIED, at)


def unverified_digest(path: str | Path) -> bytes:
    """Compute the SHA-256 of an exported file as it was before `mark_verified`.

    Args:
      path: path of the file.

    Returns:
      32 bytes.

    Raises:
      ExportError: the file is missing, not a regular file, or cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with (
            files.opened(path, ExportError) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
            memoryview(view) as content,
        ):
            start, at = 0, view.find(VERIFIED)
            while at >= 0:
                digest.update(content[start:at])
                digest.update(UNVERIFIED)
                start = at + len(VERIFIED)
                at = view.find(VERIFIED, start)
            digest.update(content[start:])
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read: {error}") from error
    return digest.digest()


@contextlib.contextmanager
def opened(path: Path, start: int = 0, size: int | None = None) -> Iterator[tuple[Any, np.ndarray]]:
    """Map a file into memory and open its root table.

    Args:
      path: path of the file, which must be a regular file.
      start: offset of the model's first byte in bytes, for a section of a larger file.
      size: bytes of the model; None reads to the end of the file.

    Yields:
      `(model, data)`: the root table, and the bytes uint8 [size].

    Raises:
      ExportError: the file is missing, not a regular file, not TFLite, or damaged.
    """
    try:
        with files.opened(path, ExportError) as file:
            size = os.fstat(file.fileno()).st_size - start if size is None else size
            if size < SMALLEST:
                raise ExportError(f"{path}: not a TFLite file: it has {size} bytes")
            content = np.memmap(file, np.uint8, "r", start, (size,))
        if content[4:8].tobytes() != IDENTIFIER:
            raise ExportError(
                f"{path}: not a TFLite file: it lacks the identifier {IDENTIFIER.decode()}"
            )
        yield schema().Model.GetRootAs(content, 0), content
    except GlmEdgeError:
        raise
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror}") from error
    except PARSE_ERRORS as error:
        raise ExportError(f"{path}: damaged TFLite file: {error}") from error
