"""Tied output heads, which config.json declares and stored tensors may override."""

import dataclasses
from typing import Any

import numpy as np

from glm_edge.checkpoint.hugging_face.member import FamilyMember
from glm_edge.checkpoint.safetensors import SafetensorsFile

HEAD, EMBEDDING = ("head/weight",), ("embed/weight",)


def untied_if_heads_differ(
    member: FamilyMember, config: Any, stored: dict[str, str], files: dict[str, SafetensorsFile]
) -> Any:
    """Untie a model whose stored head differs from its embedding, as transformers 5 does.

    Args:
      member: member of the family.
      config: configuration of the model.
      stored: names in the files by names of the untied model's tensors.
      files: files by names in the files.

    Returns:
      The configuration, or a copy of it with untied embeddings.
    """
    untied = untie(config)
    if untied is None:
        return config
    names = {entry.paths: stored.get(entry.names[0]) for entry in member.entries(untied)}
    head, embedding = names[HEAD], names[EMBEDDING]
    if head is None or embedding is None:
        return config
    same = _bytes_of(head, files[head]), _bytes_of(embedding, files[embedding])
    return config if np.array_equal(*same) else untied


def untie(config: Any) -> Any:
    """Return the configuration with untied embeddings, or None if they are untied already."""
    decoder = getattr(config, "decoder", None)
    if decoder is None or not decoder.tie_embeddings:
        return None
    return dataclasses.replace(config, decoder=dataclasses.replace(decoder, tie_embeddings=False))


def _bytes_of(name: str, file: SafetensorsFile) -> np.ndarray:
    return file.read(name).reshape(-1).view(np.uint8)
