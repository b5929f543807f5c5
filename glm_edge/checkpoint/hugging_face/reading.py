"""Reading a Hugging Face directory, tensor by tensor."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from glm_edge.checkpoint.hugging_face.member import FamilyMember, TensorMapping
from glm_edge.checkpoint.hugging_face.members import read_config
from glm_edge.checkpoint.hugging_face.tying import untie, untied_if_heads_differ
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
from glm_edge.params.tree import nested

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
FLOATING = ("BF16", "F16", "F32", "F64")


def read(
    directory: Path, fields: dict[str, Any], dtype: str | None, placement: Placement
) -> tuple[nn.Module, dict[str, Any]]:
    """Reads a Hugging Face directory, one entry of its name table after the other.

    Args:
      directory: of the checkpoint.
      fields: its config.json.
      dtype: type of the parameters, or None for the stored one.
      placement: says on which devices the arrays go.

    Returns:
      `(model, params)`.

    Raises:
      CheckpointError: files are missing or damaged, or do not fit the configuration.
      ConfigError: config.json names an unknown model, or a field is missing or not known.
    """
    source = open_directory(directory, fields)
    plan = placement.plan(nested(source.abstract()), source.model.config)
    leaves = {}
    for entry in source.entries:
        for path, array in source.read(entry, plan, dtype):
            leaves[path] = plan[path].put(array)
    check_names(leaves, source.expected, str(directory))
    return source.model, nested(leaves)


@dataclass(frozen=True)
class HuggingFaceSource:
    """A Hugging Face directory with checked headers, whose tensors are read on demand.

    Attributes:
      model: without parameters.
      entries: tensors beside our parameters, in the order of the member's table.
      stored: names of the table to names in the files.
      files: name in the files to the file that holds it.
      expected: shape of each parameter.
    """

    model: nn.Module
    entries: list[TensorMapping]
    stored: dict[str, str]
    files: dict[str, SafetensorsFile]
    expected: Shapes

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns abstract parameters by path."""
        return {
            path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in self.expected.items()
        }

    def read(
        self, entry: TensorMapping, plan: Mapping[str, Destination], dtype: str | None
    ) -> list[tuple[str, np.ndarray]]:
        """Reads the parameters of one entry.

        Args:
          entry: one of `entries`.
          plan: where each parameter goes.
          dtype: type to cast to, or None for the stored one.

        Returns:
          Pairs of path and array.

        Raises:
          CheckpointError: a tensor is damaged, of another shape, or not finite.
        """
        return _read_entry(entry, self.stored, self.files, plan, dtype)


def open_directory(directory: Path, fields: dict[str, Any]) -> HuggingFaceSource:
    """Checks the headers of a directory; arguments and errors as in `read`."""
    name = str(fields.get("_name_or_path") or directory.resolve().name)
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
    _check_headers(entries, stored, files, expected, directory)
    return HuggingFaceSource(model, entries, stored, files, expected)


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
    """Opens the one safetensors file of a directory, or all that its index lists.

    Args:
      directory: of the checkpoint.

    Returns:
      Tensor name to the file that holds it.

    Raises:
      CheckpointError: a file is missing or damaged, a tensor is stored twice, the index and the
        files disagree, or a single file is beside an index of others.
    """
    if os.path.lexists(directory / ADAPTER):
        raise CheckpointError(
            f"{directory}: holds {ADAPTER}, so transformers would apply an adapter; "
            "merge it into them, or remove it"
        )
    single = os.path.lexists(directory / WEIGHTS)
    if not os.path.lexists(directory / INDEX):
        if not single:
            raise CheckpointError(
                f"{directory}: holds neither {WEIGHTS} nor {INDEX}{_else(directory)}"
            )
        file = SafetensorsFile(file_inside(directory, WEIGHTS))
        return dict.fromkeys(file.tensors, file)
    listed = read_json(file_inside(directory, INDEX)).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{directory / INDEX}: 'weight_map' must list tensors and files")
    if single and set(map(str, listed.values())) != {WEIGHTS}:
        raise CheckpointError(
            f"{directory}: holds {WEIGHTS} and, for other files, {INDEX}; these may be two "
            "models, so remove the one that does not belong here"
        )
    names = sorted({str(name) for name in listed.values()})
    by_name = by_tensor(SafetensorsFile(file_inside(directory, name)) for name in names)
    for name, file_name in listed.items():
        if name not in by_name or by_name[name].path.name != file_name:
            raise CheckpointError(
                f"{directory / file_name}: tensor {name!r} is missing; {INDEX} says it is there"
            )
    return by_name


def _else(directory: Path) -> str:
    """Describes the files that a directory has in place of weights."""
    shards = sorted(directory.glob("model-*-of-*.safetensors"))
    if shards:
        return f"; {len(shards)} shards such as {shards[0].name} are there without their index"
    pickled = next(iter(sorted(directory.glob("*.bin"))), None)
    return f"; {pickled.name} is a pickle: convert it to safetensors" if pickled else ""


def _canonical_names(
    member: FamilyMember, config: Any, files: dict[str, SafetensorsFile], directory: Path
) -> dict[str, str]:
    """Maps names of the member's dialect to those in the files, without ignored ones."""
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
                f"{directory}: tensors {stored[renamed]!r} and {name!r} are two names of one"
            )
        stored[renamed] = name
    return stored


def _check_headers(
    entries: list[TensorMapping],
    stored: dict[str, str],
    files: dict[str, SafetensorsFile],
    expected: Shapes,
    directory: Path,
) -> None:
    """Checks names, types and, where nothing is rearranged, shapes before a tensor is read."""
    needed = {
        name: expected[entry.paths[0]] if entry.unchanged else None
        for entry in entries
        for name in entry.names
    }
    # What has no place is named as it is stored.
    names = (name if name in needed else stored[name] for name in stored)
    check_names(names, needed, str(directory))
    for canonical, name in stored.items():
        info, where = files[name].tensors[name], f"{files[name].path}: tensor {name!r}"
        if info.dtype not in FLOATING:
            raise CheckpointError(
                f"{where}: is of type {info.dtype}, a weight must be one of {', '.join(FLOATING)}"
            )
        if (shape := needed[canonical]) is not None:
            check_shape(info.shape, shape, where)
