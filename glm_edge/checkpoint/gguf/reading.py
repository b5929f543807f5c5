"""Reading of GGUF files, tensor by tensor."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import numpy as np

from glm_edge import params as boxes
from glm_edge.checkpoint.gguf.architectures import read_config
from glm_edge.checkpoint.gguf.blocks import FORMATS, box, dequantize, dtype_of
from glm_edge.checkpoint.hugging_face.member import TensorMapping
from glm_edge.checkpoint.hugging_face.reading import (
    HuggingFaceSource,
    check_headers,
    read_source,
)
from glm_edge.checkpoint.native import check_reaches
from glm_edge.checkpoint.placement import Placement
from glm_edge.checkpoint.safetensors import DTYPES, TensorInfo, check_finite
from glm_edge.checkpoint.shapes import (
    Shapes,
    check_depth,
    check_params,
    check_shape,
    expected_shapes,
)
from glm_edge.gguf_file import GGUFFile
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params, nested

Weights = Literal["dense", "boxes"]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class DenseTensors:
    """The tensors of a GGUF file, dequantized; read like those of a safetensors file.

    Attributes:
      file: the file.
    """

    file: GGUFFile

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self.file.path

    @functools.cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Type and shape of the dense values by name, with the stored byte range."""
        return {
            name: TensorInfo(
                _NAMES[dtype_of(info.kind)], info.shape, info.begin, info.begin + info.bytes
            )
            for name, info in self.file.tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        """Read and dequantize a tensor."""
        info = self.file.tensors[name]
        return dequantize(self.file.read_rows(name), info.kind).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read and dequantize `tensor[start:stop]`."""
        info = self.file.tensors[name]
        if len(info.shape) != 2:
            return self.read(name)[start:stop]
        return dequantize(self.file.read_rows(name, start, stop), info.kind)


def read(
    path: Path, dtype: str | None, placement: Placement, weights: Weights
) -> tuple[nn.Module, Params]:
    """Read a GGUF file, one entry of the architecture's table at a time.

    Args:
      path: the file.
      dtype: type of dense parameters, or None for the stored type, which is float32 for blocks.
      placement: placement of arrays on devices.
      weights: `dense` dequantizes blocks; `boxes` keeps their codes and scales as `Quantized`.

    Returns:
      `(model, params)`.

    Raises:
      CheckpointError: the file is damaged, or does not match its metadata.
      ConfigError: the architecture is unknown, or a field is missing or unsupported.
    """
    file = GGUFFile(path)
    source = _source_of(file)
    if weights == "dense":
        return read_source(source, dtype, placement, str(path))
    plan = placement.plan(nested(source.abstract()), source.model.config)
    leaves: dict[str, Any] = {}
    for entry in source.entries:
        kind = _kind_of_boxes(file, entry)
        if kind is None:
            arrays = source.read(entry, plan, dtype)
            leaves |= {path: plan[path].put(array) for path, array in arrays}
            continue
        (rows,) = entry.read(*map(file.read_rows, entry.names))
        leaves[entry.paths[0]] = box(rows, kind)
    return source.model, _placed(leaves, placement, source.model, str(path))


def open_file(path: Path) -> HuggingFaceSource:
    """Check the header of a file whose dequantized parameters are read on demand.

    Args:
      path: the file.

    Returns:
      The source of parameters.

    Raises:
      CheckpointError: the file is damaged, or does not match its metadata.
      ConfigError: the architecture is unknown, or a field is missing or unsupported.
    """
    return _source_of(GGUFFile(path))


def build(path: Path) -> nn.Module:
    """Build the module that a file's metadata describe, without weights.

    Args:
      path: the file.

    Returns:
      The module, without parameters.

    Raises:
      CheckpointError: the header is damaged.
      ConfigError: the architecture is unknown, or a field is missing or unsupported.
    """
    return MultimodalGLM(read_config(GGUFFile(path))[1])


def _source_of(file: GGUFFile) -> HuggingFaceSource:
    architecture, config = read_config(file)
    check_depth(config, len(file.tensors), str(file.path))
    model, entries = MultimodalGLM(config), architecture.entries(config)
    expected = expected_shapes(model)
    stored, dense = {name: name for name in file.tensors}, DenseTensors(file)
    files: dict[str, Any] = dict.fromkeys(file.tensors, dense)
    check_headers(entries, stored, files, expected, file.path)
    for entry in entries:
        _check_joined(file, entry, expected)
    return HuggingFaceSource(model, entries, stored, files, expected)


def _check_joined(file: GGUFFile, entry: TensorMapping, expected: Shapes) -> None:
    """Check the shapes of tensors whose rows one parameter joins, before they are read."""
    if entry.unchanged:
        return
    shapes = [file.tensors[name].shape for name in entry.names]
    rows, columns = expected[entry.paths[0]]
    where = f"{file.path}: tensors {', '.join(map(repr, entry.names))}"
    for shape in shapes:
        check_shape(shape, (rows // len(shapes), columns), where)


def _kind_of_boxes(file: GGUFFile, entry: TensorMapping) -> str | None:
    """Return the type of blocks that all tensors of an entry share, or None."""
    kinds = {file.tensors[name].kind for name in entry.names}
    matrices = all(len(file.tensors[name].shape) == 2 for name in entry.names)
    kind = kinds.pop() if len(kinds) == 1 and len(entry.paths) == 1 else None
    return kind if matrices and kind in FORMATS else None


def _placed(leaves: dict[str, Any], placement: Placement, model: nn.Module, where: str) -> Params:
    """Check boxes, and move them to the devices of a mesh."""
    params = nested(leaves)
    for path, leaf in leaves.items():
        if boxes.is_box(leaf):
            check_finite(np.asarray(leaf.scale), f"{where}: scales of {path!r}")
    check_reaches(params, where)
    check_params(params, model, where)
    if placement.mesh is None:
        return params
    arrays, spec = boxes.to_flat(params)
    plan = placement.plan(params, model.config)
    boxed = {name for name in arrays if name.rpartition(".")[0] in spec}
    moved = {n: plan[n].put(np.asarray(a)) if n in boxed else a for n, a in arrays.items()}
    return boxes.from_flat(moved, spec)
