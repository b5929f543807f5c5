"""Writing of Hugging Face directories that transformers can open."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from glm_edge import params as boxes
from glm_edge.checkpoint.hugging_face.member import FamilyMember
from glm_edge.checkpoint.hugging_face.members import write_config
from glm_edge.checkpoint.hugging_face.reading import INDEX
from glm_edge.checkpoint.safetensors import WEIGHTS, write_safetensors
from glm_edge.files import CONFIG
from glm_edge.writers import write_json

SHARD_BYTES = 5_000_000_000


def fields_of(config: Any, params: Any) -> tuple[FamilyMember, dict[str, Any]] | None:
    """Describe a model as a Hugging Face directory.

    Args:
      config: configuration of the model.
      params: tree of arrays. Boxes cannot be stored in a Hugging Face directory.

    Returns:
      `(member, fields of config.json)`, or None if only the native format can store the model.
    """
    if any(boxes.is_box(leaf) for _, leaf in boxes.path_items(params)):
        return None
    return describe(config, {str(leaf.dtype) for _, leaf in boxes.path_items(params)})


def describe(config: Any, dtypes: set[str]) -> tuple[FamilyMember, dict[str, Any]] | None:
    """Describe a configuration as the fields of config.json.

    Args:
      config: configuration of the model.
      dtypes: types of its dense weights.

    Returns:
      `(member, fields of config.json)`, or None if no member can express the configuration.
    """
    written = write_config(config)
    if written is None:
        return None
    member, fields = written
    fields["dtype"] = next(iter(dtypes)) if len(dtypes) == 1 else "float32"
    if getattr(config, "name", ""):
        fields["_name_or_path"] = config.name
    return member, fields


def write(
    directory: Path,
    config: Any,
    params: Any,
    described: tuple[FamilyMember, dict[str, Any]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write weights and config.json into an empty directory, config.json last.

    Args:
      directory: empty directory.
      config: configuration of the model.
      params: dense parameters.
      described: result of `fields_of`.
      shard_bytes: maximum bytes per file of weights.
    """
    member, fields = described
    leaves = dict(boxes.path_items(params))
    tensors: dict[str, np.ndarray] = {}
    for entry in member.entries(config):
        arrays = entry.write(*(np.asarray(leaves[path]) for path in entry.paths))
        tensors.update(zip(entry.names, arrays, strict=True))
    write_tensors(directory, tensors, fields, shard_bytes)


def write_tensors(
    directory: Path,
    tensors: dict[str, np.ndarray],
    fields: dict[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors, in several files if necessary, then config.json.

    Args:
      directory: empty directory.
      tensors: arrays by name.
      fields: fields of config.json.
      shard_bytes: maximum bytes per file of weights.
    """
    # transformers refuses a file without the name of a framework in its metadata.
    metadata = {"format": "pt"}
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        write_safetensors(directory / WEIGHTS, tensors, metadata)
    else:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(directory / name, shard, metadata)
            weight_map |= dict.fromkeys(shard, name)
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / INDEX, index)
    write_json(directory / CONFIG, fields)


def _shards(tensors: dict[str, np.ndarray], limit: int) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard
