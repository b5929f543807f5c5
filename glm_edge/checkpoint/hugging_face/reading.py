"""Reading of Hugging Face directories, tensor by tensor."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from glm_edge.checkpoint.hugging_face.member import FamilyMember, TensorMapping
from glm_edge.checkpoint.hugging_face.members import read_config
from glm_edge.checkpoint.hugging_face.quantized.boxed import (
    abstract_box,
    check_matrices,
    read_boxes,
)
from glm_edge.checkpoint.hugging_face.quantized.config import (
    check_unpacked,
    read_method,
    with_matrices,
)
from glm_edge.checkpoint.hugging_face.quantized.matrix import PackedMatrix
from glm_edge.checkpoint.hugging_face.tying import untie, untied_if_heads_differ
from glm_edge.checkpoint.native import check_reaches
from glm_edge.checkpoint.placement import Destination, Placement
from glm_edge.checkpoint.safetensors import WEIGHTS, SafetensorsFile, by_tensor, check_finite
from glm_edge.checkpoint.shapes import (
    Shapes,
    check_depth,
    check_names,
    check_shape,
    expected_shapes,
)
from glm_edge.configs.stop_tokens import with_stop_tokens
from glm_edge.errors import CheckpointError
from glm_edge.files import CONFIG, file_inside, read_json
from glm_edge.params.boxes import DENSE, Quantized, array_fields
from glm_edge.params.tree import nested

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
FLOATING = ("BF16", "F16", "F32", "F64")


def read(
    directory: Path, fields: dict[str, Any], dtype: str | None, placement: Placement
) -> tuple[nn.Module, dict[str, Any]]:
    """Read a Hugging Face directory, one entry of the member's table at a time.

    Args:
      directory: checkpoint directory.
      fields: fields of config.json.
      dtype: type of the parameters, or None for the stored type.
      placement: placement of arrays on devices.

    Returns:
      `(model, params)`.

    Raises:
      CheckpointError: files are missing or damaged, or do not match the configuration.
      ConfigError: config.json names an unknown model, or a field is missing or unsupported.
    """
    return read_source(open_directory(directory, fields), dtype, placement, str(directory))


def read_source(
    source: "HuggingFaceSource", dtype: str | None, placement: Placement, where: str
) -> tuple[nn.Module, dict[str, Any]]:
    """Read all parameters of a source, one entry of its table at a time.

    Args:
      source: the source.
      dtype: type of the parameters, or None for the stored type.
      placement: placement of arrays on devices.
      where: file or directory for messages.

    Returns:
      `(model, params)`.

    Raises:
      CheckpointError: a tensor is damaged, or not finite.
    """
    plan = placement.plan(nested(source.abstract()), source.model.config)
    leaves: dict[str, Any] = {}
    for entry in source.entries:
        leaves |= source.leaves(entry, plan, dtype)
    check_names(leaves, source.expected, where)
    params = nested(leaves)
    check_reaches(params, where)
    return source.model, params


@dataclass(frozen=True)
class HuggingFaceSource:
    """A Hugging Face directory with checked headers, whose tensors are read on demand.

    Attributes:
      model: module without parameters.
      entries: maps between tensors and our parameters, in the order of the member's table.
      stored: names in the files by names of the table.
      files: files by names in the files.
      expected: shape by parameter path.
      matrices: quantized matrices by names of the table.
      dtype: type of the dense weights of boxes.
    """

    model: nn.Module
    entries: list[TensorMapping]
    stored: dict[str, str]
    files: dict[str, SafetensorsFile]
    expected: Shapes
    matrices: Mapping[str, PackedMatrix] = field(default_factory=dict)
    dtype: str = "float32"

    def abstract(self) -> dict[str, Any]:
        """Return abstract parameters, arrays and boxes, by path."""
        leaves: dict[str, Any] = {
            path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in self.expected.items()
        }
        for entry in self.entries:
            if entry.names[0] in self.matrices:
                format = self.matrices[entry.names[0]].format
                for path in entry.paths:
                    leaves[path] = abstract_box(self.expected[path], format, self.dtype)
        return leaves

    def leaves(
        self, entry: TensorMapping, plan: Mapping[str, Destination], dtype: str | None
    ) -> dict[str, Any]:
        """Read the parameters of one entry, and move them to their devices.

        Args:
          entry: one of `entries`.
          plan: destination of each array by name of `glm_edge.params.to_flat`.
          dtype: type to cast dense parameters to, or None for the stored type.

        Returns:
          Arrays or boxes by path.

        Raises:
          CheckpointError: a tensor is damaged, has a wrong shape, or is not finite.
        """
        if entry.names[0] in self.matrices:
            matrices = [self.matrices[name] for name in entry.names]
            boxes = read_boxes(entry, matrices, self.dtype)
            return {path: _put(path, box, plan) for path, box in boxes.items()}
        return {path: plan[path].put(array) for path, array in self.read(entry, plan, dtype)}

    def read(
        self, entry: TensorMapping, plan: Mapping[str, Destination], dtype: str | None
    ) -> list[tuple[str, np.ndarray]]:
        """Read the dense parameters of one entry.

        Args:
          entry: one of `entries`, without quantized matrices.
          plan: destination of each parameter by path.
          dtype: type to cast to, or None for the stored type.

        Returns:
          Pairs of path and array.

        Raises:
          CheckpointError: a tensor is damaged, has a wrong shape, or is not finite.
        """
        return _read_entry(entry, self.stored, self.files, plan, dtype)


def open_directory(directory: Path, fields: dict[str, Any]) -> HuggingFaceSource:
    """Check the headers of a directory; arguments and exceptions as in `read`."""
    name = str(fields.get("_name_or_path") or directory.resolve().name)
    method = read_method(fields, str(directory / CONFIG))
    member, config = read_config(fields, str(directory / CONFIG), name)
    config = with_stop_tokens(config, directory)
    files = tensor_files(directory)
    check_depth(config, len(files), str(directory))
    untied_names = _canonical_names(member, untie(config) or config, files, directory)
    config = untied_if_heads_differ(member, config, untied_names, files)
    model = member.build(config)
    stored = _canonical_names(member, config, files, directory)
    expected = expected_shapes(model)
    entries = member.entries(config)
    if method is None:
        check_unpacked(stored, str(directory / CONFIG))
        check_headers(entries, stored, files, expected, directory)
        return HuggingFaceSource(model, entries, stored, files, expected)
    tensors = with_matrices(entries, stored, files, method)
    check_headers(entries, tensors.names, tensors.files, expected, directory)
    check_matrices(entries, tensors.matrices, expected)
    dtype = _dense_type(fields)
    return HuggingFaceSource(
        model, entries, tensors.names, tensors.files, expected, tensors.matrices, dtype
    )


def _put(path: str, box: Quantized, plan: Mapping[str, Destination]) -> Quantized:
    """Move the arrays of a box to the devices of a mesh, if there is one."""
    if plan[f"{path}.data"].sharding is None:
        return box
    arrays = {
        name: plan[f"{path}.{name}"].put(np.asarray(array))
        for name, array in array_fields(box).items()
        if array is not None
    }
    return box.replace(**arrays)


def _dense_type(fields: dict[str, Any]) -> str:
    """Return the type that config.json names for weights, in the words of transformers 5 or 4."""
    named = fields.get("dtype") or fields.get("torch_dtype")
    return named if isinstance(named, str) and named in DENSE else "float32"


def _read_entry(
    entry: TensorMapping,
    stored: dict[str, str],
    files: dict[str, SafetensorsFile],
    plan: Mapping[str, Destination],
    dtype: str | None,
) -> list[tuple[str, np.ndarray]]:
    names = [stored[name] for name in entry.names]
    where = f"{files[names[0]].path}: tensor {', '.join(repr(name) for name in names)}"
    if entry.unchanged:
        pairs = zip(entry.paths, names, strict=True)
        arrays = tuple(plan[path].read(files[name], name) for path, name in pairs)
    else:
        arrays = _rearrange(entry, [files[name].read(name) for name in names], plan, where)
    leaves = []
    for path, array in zip(entry.paths, arrays, strict=True):
        target = array.dtype if dtype is None else jnp.dtype(dtype)
        if array.dtype == np.float64 and dtype is None:
            target = np.dtype(np.float32)
        with np.errstate(over="ignore"):
            array = array.astype(target, copy=False)
        check_finite(array, f"{where} as {target}")
        leaves.append((path, array))
    return leaves


def _rearrange(
    entry: TensorMapping, tensors: list[np.ndarray], plan: Mapping[str, Destination], where: str
) -> tuple[np.ndarray, ...]:
    try:
        arrays = entry.read(*tensors)
    except ValueError as error:
        shapes = ", ".join(str(tensor.shape) for tensor in tensors)
        raise CheckpointError(f"{where}: shape {shapes} does not make {entry.paths}") from error
    for path, array in zip(entry.paths, arrays, strict=True):
        check_shape(array.shape, plan[path].shape, where)
    return arrays


def tensor_files(directory: Path) -> dict[str, SafetensorsFile]:
    """Open the single safetensors file of a directory, or all files of its index.

    Args:
      directory: checkpoint directory.

    Returns:
      File by tensor name.

    Raises:
      CheckpointError: a file is missing or damaged, a tensor is stored twice, the index does not
        match the files, or the directory has both a single file and an index of other files.
    """
    if os.path.lexists(directory / ADAPTER):
        raise CheckpointError(
            f"{directory}: has {ADAPTER}, so transformers would apply an adapter; merge it into "
            "the weights, or remove it"
        )
    single = os.path.lexists(directory / WEIGHTS)
    if not os.path.lexists(directory / INDEX):
        if not single:
            raise CheckpointError(
                f"{directory}: has neither {WEIGHTS} nor {INDEX}{_else(directory)}"
            )
        file = SafetensorsFile(file_inside(directory, WEIGHTS))
        return dict.fromkeys(file.tensors, file)
    listed = read_json(file_inside(directory, INDEX)).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{directory / INDEX}: 'weight_map' must map tensors to files")
    if single and set(map(str, listed.values())) != {WEIGHTS}:
        raise CheckpointError(
            f"{directory}: has {WEIGHTS} and, for other files, {INDEX}; these may be two models, "
            "so remove one of them"
        )
    names = sorted({str(name) for name in listed.values()})
    by_name = by_tensor(SafetensorsFile(file_inside(directory, name)) for name in names)
    for name, file_name in listed.items():
        if name not in by_name or by_name[name].path.name != file_name:
            raise CheckpointError(
                f"{directory / file_name}: tensor {name!r} is missing, but {INDEX} lists it"
            )
    return by_name


def _else(directory: Path) -> str:
    """Describe files that a directory has instead of weights."""
    shards = sorted(directory.glob("model-*-of-*.safetensors"))
    if shards:
        return f"; {len(shards)} shards such as {shards[0].name} have no index"
    pickled = next(iter(sorted(directory.glob("*.bin"))), None)
    return f"; {pickled.name} is a pickle, convert it to safetensors" if pickled else ""


def _canonical_names(
    member: FamilyMember, config: Any, files: dict[str, SafetensorsFile], directory: Path
) -> dict[str, str]:
    """Map names of the member's dialect to those in the files, without ignored ones."""
    ignored = re.compile(member.ignored(config))
    stored: dict[str, str] = {}
    for name in files:
        renamed = name
        for pattern, replacement in member.renames:
            renamed = re.sub(pattern, replacement, renamed)
        if ignored.fullmatch(renamed) or ignored.fullmatch(name):
            continue
        if renamed in stored:
            raise CheckpointError(
                f"{directory}: tensors {stored[renamed]!r} and {name!r} are the same parameter"
            )
        stored[renamed] = name
    return stored


def check_headers(
    entries: list[TensorMapping],
    stored: dict[str, str],
    files: dict[str, SafetensorsFile],
    expected: Shapes,
    directory: Path,
) -> None:
    """Check names, types and the shapes of unchanged tensors, before a tensor is read.

    Args:
      entries: maps between tensors and parameters.
      stored: names in the files by names of `entries`.
      files: files by names in the files.
      expected: shape by parameter path.
      directory: directory or file for messages.

    Raises:
      CheckpointError: a tensor is missing, unexpected, or of a wrong type or shape.
    """
    needed = {
        name: expected[entry.paths[0]] if entry.unchanged else None
        for entry in entries
        for name in entry.names
    }
    # Messages show unexpected tensors by their stored name.
    names = (name if name in needed else stored[name] for name in stored)
    check_names(names, needed, str(directory))
    for canonical, name in stored.items():
        info, where = files[name].tensors[name], f"{files[name].path}: tensor {name!r}"
        if info.dtype not in FLOATING:
            raise CheckpointError(
                f"{where}: has type {info.dtype}, a weight must be one of {', '.join(FLOATING)}"
            )
        if (shape := needed[canonical]) is not None:
            check_shape(info.shape, shape, where)
