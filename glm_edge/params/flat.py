"""One flat form of a parameter tree, for safetensors, Orbax, export and hashing."""

from __future__ import annotations

from typing import Any

from jax import Array

from glm_edge.errors import BoxError
from glm_edge.params.boxes import array_fields, describe, is_box, rebuild
from glm_edge.params.tree import Params, nested, path_items

Spec = dict[str, dict[str, Any]]
REQUIRED = {
    "Masked": {"value", "mask"},
    "Quantized": {"data", "scale"},
    "FakeQuantized": {"value", "scale"},
    "Narrow": {"value"},
}


def to_flat(params: Params) -> tuple[dict[str, Array], Spec]:
    """Flatten a tree into named arrays and the description of its boxes.

    Args:
      params: tree of arrays and boxes.

    Returns:
      `(arrays, spec)`. A plain parameter is `arrays[path]`. The arrays of a box are
      `arrays[path + "." + field]`, with its static fields in `spec[path]`.

    Raises:
      BoxError: a box cannot be stored, see `describe`.
    """
    arrays: dict[str, Array] = {}
    spec: Spec = {}
    for path, leaf in path_items(params):
        if not is_box(leaf):
            arrays[path] = leaf
            continue
        spec[path] = describe(leaf)
        for name, value in array_fields(leaf).items():
            if value is not None:
                arrays[f"{path}.{name}"] = value
    return arrays, spec


def from_flat(arrays: dict[str, Array], spec: Spec) -> Params:
    """Rebuild a tree from its flat form, the inverse of `to_flat`.

    Args:
      arrays: arrays by name.
      spec: descriptions of boxes by path.

    Returns:
      Tree of arrays and boxes.

    Raises:
      BoxError: an array of a described box is missing, or arrays do not match their description.
    """
    plain = dict(arrays)
    leaves = {}
    for path, static in spec.items():
        names = [name for name in plain if name.rpartition(".")[0] == path]
        fields = {name.rpartition(".")[2]: plain.pop(name) for name in names}
        kind = static.get("box")
        required = REQUIRED.get(kind, set()) if isinstance(kind, str) else set()
        if required - set(fields):
            raise BoxError(f"{path}: array {sorted(required - set(fields))[0]!r} is missing")
        try:
            leaves[path] = rebuild(fields, static)
        except BoxError as error:
            raise BoxError(f"{path}: {error}") from error
    leaves.update(plain)
    return nested(leaves)
