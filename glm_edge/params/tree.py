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

# Annotations quote these names, so that `help` shows them and not the union.
Tree = Mapping[str, Any] | Sequence[Any] | Weight | np.ndarray
"""Any tree of arrays and boxes, such as `Params`, a list of leaves, or one leaf."""

MATRIX_NAMES = ("weight", "kernel", "embedding")
"""Last path components of matrices (weights of products and embeddings)."""


def path_items(params: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield `(path, array or box)` in the tree's order, with `/` between names."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)[0]:
        yield path_string(path), leaf


def path_string(path: tuple[Any, ...]) -> str:
    """Join a key path of `jax.tree_util` with `/`."""
    return "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def map_with_path(function: Callable[[str, Any], Any], params: Params) -> Params:
    """Map a function over a tree, with each box as one leaf.

    Args:
      function: function of a path and an array or box.
      params: tree of arrays and boxes.

    Returns:
      Tree of results.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(path_string(path), leaf), params, is_leaf=is_box
    )


def is_matrix(path: str, leaf: "Weight | np.ndarray") -> bool:
    """Test for a floating weight of a product or an embedding, which transforms can compress.

    Args:
      path: parameter path, whose last component must be in `MATRIX_NAMES`.
      leaf: array or box, which must have two or more axes.

    Returns:
      True for a matrix.
    """
    name = path.rsplit("/", 1)[-1]
    floating = isinstance(leaf, Box) or jnp.issubdtype(leaf.dtype, jnp.floating)
    return name in MATRIX_NAMES and len(leaf.shape) >= 2 and floating


@shared_steps()
def select(params: Params, where: str | None) -> list[str]:
    """List the paths of the matrices that a pattern selects.

    Args:
      params: tree of arrays and boxes.
      where: regular expression searched in each path; None selects every matrix.

    Returns:
      Paths in the tree's order.

    Raises:
      RecipeError: the pattern is malformed or selects nothing.

    Example:
      >>> select(params, r"attention/[qk]_proj")[0]
      'decoder/layers/0/attention/k_proj/weight'
    """
    try:
        pattern = compiled(where)
    except ValueError as error:
        raise RecipeError(f"where={where!r} is not a regular expression: {error}") from error
    matrices = [path for path, leaf in path_items(params) if is_matrix(path, leaf)]
    chosen = [path for path in matrices if pattern.search(path)]
    if not matrices:
        raise RecipeError(
            f"where={where!r} matches none of 0 matrices (floating arrays of two or more axes "
            f"named {', '.join(MATRIX_NAMES)}); is params model.init(...)['params']?"
        )
    if not chosen:
        examples = ", ".join(matrices[:3])
        raise RecipeError(f"where={where!r} matches none of {len(matrices)} matrices ({examples}…)")
    return chosen


def partition(params: Params, scales: bool = False) -> tuple[Params, Params]:
    """Split a tree into trainable and frozen arrays, for `jax.grad` and optimizers.

    Floating arrays and the trainable fields of boxes are trainable. Integers, masks, packed data
    and frozen scales are not. Each tree contains None where the other contains an array.

    Args:
      params: tree of arrays and boxes.
      scales: also trains scales and floating zero points of quantized weights.

    Returns:
      `(trainable, frozen)`, the arguments of `combine`. `glm_edge.params.Masked` has an example.
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
    """Combine the two trees of `partition`.

    Args:
      trainable: first tree, after any number of updates.
      frozen: second tree.

    Returns:
      Tree of arrays and boxes.
    """
    return jax.tree.map(
        lambda first, second: second if first is None else first,
        trainable,
        frozen,
        is_leaf=lambda node: node is None,
    )


def cast(params: Params, dtype: DTypeLike) -> Params:
    """Cast trainable arrays to a floating type.

    Args:
      params: tree of arrays and boxes.
      dtype: floating type.

    Returns:
      The tree; masks, integers and scales keep their types.
    """
    trainable, frozen = partition(params)
    return combine(jax.tree.map(lambda array: array.astype(dtype), trainable), frozen)


def count(params: "Tree") -> int:
    """Count the parameters: entries of the dense arrays, including pruned zeros."""
    return sum(math.prod(leaf.shape) for leaf in tree_leaves(params))


def stored_bytes(params: "Tree") -> int:
    """Sum the bytes of all stored arrays: packed integers, scales, zero points, masks."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def nested(flat: dict[str, Any]) -> Params:
    """Build a nested tree from `{path: leaf}`."""
    return traverse_util.unflatten_dict({tuple(path.split("/")): v for path, v in flat.items()})
