"""Paths, selection and arithmetic over trees of arrays and boxes."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from glm_edge.errors import RecipeError
from glm_edge.params.boxes import Box, Quantized, Weight, array_fields, is_box, tree_leaves
from glm_edge.params.patterns import compiled, shared_steps

Params = dict[str, Any]
"""A tree of arrays and boxes: nested dictionaries, whose leaves are `Weight`."""

Tree = Mapping[str, Any] | Sequence[Any] | Weight | np.ndarray
"""Any tree of arrays and boxes, such as `Params`, a list of leaves, or one leaf."""

MATRIX_NAMES = ("weight", "kernel", "embedding")
"""Names of the parameters that multiply or embed."""


def path_items(params: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields `(path, array or box)` with `/` between names, in the tree's order."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)[0]:
        yield path_string(path), leaf


def path_string(path: tuple[Any, ...]) -> str:
    """Joins a key path of `jax.tree_util` with `/`."""
    return "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def map_with_path(function: Callable[[str, Any], Any], params: Params) -> Params:
    """Maps `(path, array or box)` over a tree, boxes kept whole."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(path_string(path), leaf), params, is_leaf=is_box
    )


def is_matrix(path: str, leaf: Weight | np.ndarray) -> bool:
    """Tests for a weight that multiplies or embeds, as quantization and masks need."""
    name = path.rsplit("/", 1)[-1]
    floating = isinstance(leaf, Box) or jnp.issubdtype(leaf.dtype, jnp.floating)
    return name in MATRIX_NAMES and len(leaf.shape) >= 2 and floating


@shared_steps()
def select(params: Params, where: str | None) -> list[str]:
    """Paths of the matrices that a pattern selects.

    Args:
      params: tree of arrays and boxes.
      where: regular expression searched in each path; None selects every matrix.

    Returns:
      Paths in the tree's order.

    Raises:
      RecipeError: the pattern is malformed or selects nothing.
    """
    try:
        pattern = compiled(where)
    except ValueError as error:
        raise RecipeError(f"where={where!r} is not a regular expression: {error}") from error
    matrices = [path for path, leaf in path_items(params) if is_matrix(path, leaf)]
    chosen = [path for path in matrices if pattern.search(path)]
    if not matrices:
        raise RecipeError(
            f"where={where!r} matches none of 0 matrices, which are floating arrays of two axes or "
            f"more named {', '.join(MATRIX_NAMES)}; is params model.init(...)['params']?"
        )
    if not chosen:
        examples = ", ".join(matrices[:3])
        raise RecipeError(f"where={where!r} matches none of {len(matrices)} matrices ({examples}…)")
    return chosen


def partition(params: Params, scales: bool = False) -> tuple[Params, Params]:
    """Splits a tree into what trains and what does not, the only door into `grad` and optimizers.

    Floating arrays and the trainable fields of boxes go left; integers, masks, packed data and
    frozen scales go right. Each side holds None where the other holds an array.

    Args:
      params: tree of arrays and boxes.
      scales: also trains scales and floating zero points of quantized weights.

    Returns:
      `(trainable, frozen)`; `combine` puts them back together, as `glm_edge.params.Masked` shows.
    """

    def trains(box: Any, name: str, value: Any) -> bool:
        if scales and isinstance(box, Quantized) and name in ("scale", "zero"):
            return value is not None and jnp.issubdtype(value.dtype, jnp.inexact)
        return name in box.trainable

    def split(leaf: Any, trainable: bool) -> Any:
        if not is_box(leaf):
            return leaf if jnp.issubdtype(leaf.dtype, jnp.inexact) == trainable else None
        fields = {}
        for name, value in array_fields(leaf).items():
            stays = trains(leaf, name, value) == trainable
            fields[name] = split(value, trainable) if is_box(value) else value if stays else None
        return leaf.replace(**fields)

    return (
        jax.tree.map(lambda leaf: split(leaf, True), params, is_leaf=is_box),
        jax.tree.map(lambda leaf: split(leaf, False), params, is_leaf=is_box),
    )


def combine(trainable: Params, frozen: Params) -> Params:
    """Combines the two trees of `partition`."""
    return jax.tree.map(
        lambda first, second: second if first is None else first,
        trainable,
        frozen,
        is_leaf=lambda node: node is None,
    )


def cast(params: Params, dtype: DTypeLike) -> Params:
    """Casts what trains to a floating type; masks, integers and scales keep theirs."""
    trainable, frozen = partition(params)
    return combine(jax.tree.map(lambda array: array.astype(dtype), trainable), frozen)


def count(params: Tree) -> int:
    """Counts the parameters: entries of the dense arrays, pruned zeros included."""
    return sum(math.prod(leaf.shape) for leaf in tree_leaves(params))


def stored_bytes(params: Tree) -> int:
    """Counts the bytes of all stored arrays: packed integers, scales, zero points, masks."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def nested(flat: dict[str, Any]) -> Params:
    """Builds a nested tree from `{path: leaf}`."""
    return traverse_util.unflatten_dict({tuple(path.split("/")): v for path, v in flat.items()})
