"""Taking rows and columns out of arrays and boxes, and telling what that saved."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from glm_edge import params as boxes
from glm_edge.compress import cost
from glm_edge.compress.report import Report, Row
from glm_edge.errors import RecipeError
from glm_edge.params.tree import Params


def rows_of(linear: Params, index: np.ndarray, path: str, transform: str) -> Params:
    """Keeps rows of a weight, and these entries of its bias.

    Args:
      linear: parameters of a `Linear`.
      index: ascending.
      path: of the parameters, for the message.
      transform: name, for the message.

    Raises:
      RecipeError: the weight is rounded.
    """
    return {name: take(leaf, index, 0, path, transform) for name, leaf in linear.items()}


def columns_of(linear: Params, index: np.ndarray, path: str, transform: str) -> Params:
    """Keeps columns of a weight; arguments and error as in `rows_of`."""
    return {**linear, "weight": take(linear["weight"], index, -1, path, transform)}


def take(leaf: Any, index: np.ndarray, axis: int, path: str, transform: str) -> Any:
    """Keeps entries of one axis of an array or of a mask with its values."""
    value = leaf.value if isinstance(leaf, boxes.Masked) else leaf
    if isinstance(value, boxes.Quantized | boxes.FakeQuantized):
        raise RecipeError(f"{transform}: {path} is quantized; prune before quantizing")
    return jax.tree.map(lambda array: jnp.take(array, index, axis=axis), leaf)


def one_or_each(values: Sequence[int]) -> int | tuple[int, ...]:
    """One number where all are equal, as configurations say it."""
    return values[0] if len(set(values)) == 1 else tuple(values)


def highest(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` highest scores, ascending; the first of equals stay."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def removed(size: int, fraction: float) -> int:
    """Number that a fraction removes, rounded up."""
    # The margin keeps 0.3 * 10 = 3.0000000000000004 from removing four.
    return math.ceil(fraction * size - 1e-9)


def check_kept(index: Any, size: int, label: str) -> np.ndarray:
    """Checks indices of what stays.

    Args:
      index: of what stays.
      size: how many there are.
      label: for the message, such as `decoder layer 3: neurons`.

    Returns:
      int [kept].

    Raises:
      RecipeError: there are none, one is out of range, or they do not ascend.
    """
    index = np.asarray(index)
    if index.ndim != 1 or not index.size:
        raise RecipeError(f"{label}: nothing of {size} would remain; keep at least one")
    is_integer = np.issubdtype(index.dtype, np.integer)
    if not is_integer or index[0] < 0 or index[-1] >= size or (np.diff(index) <= 0).any():
        raise RecipeError(f"{label} to keep must be ascending whole numbers in 0..{size - 1}")
    return index


def shrunk_report(
    transform: str,
    before: tuple[nn.Module, Params],
    after: tuple[nn.Module, Params],
    notes: tuple[str, ...] = (),
) -> Report:
    """Report of a model and a smaller one: rows of what changed, and FLOPs where they are known.

    Args:
      transform: name of what acted.
      before: model and parameters.
      after: and those that are left; a parameter that is gone has a row that keeps nothing.
      notes: what the reader should know.

    Raises:
      RecipeError: what is left holds NaN or infinity, which no score may have met.
    """
    new_leaves = dict(boxes.path_items(after[1]))
    for path, leaf in new_leaves.items():
        arrays = [x for x in jax.tree.leaves(leaf) if jnp.issubdtype(x.dtype, jnp.floating)]
        if not all(np.isfinite(np.asarray(array)).all() for array in arrays):
            raise RecipeError(f"{transform}: {path}: NaN or infinity in the weights")
    rows = []
    for path, old in boxes.path_items(before[1]):
        new = new_leaves.get(path)
        if new is not None and old.shape == new.shape:
            continue
        before_bytes = boxes.stored_bytes(old)
        if new is None:
            rows.append(Row(transform, path, "removed", 0.0, 0.0, before_bytes, 0))
            continue
        stored, size = boxes.stored_bytes(new), math.prod(new.shape)
        action = f"shrunk {list(old.shape)} -> {list(new.shape)}"
        fraction, bits = size / math.prod(old.shape), 8 * stored / size
        rows.append(Row(transform, path, action, fraction, bits, before_bytes, stored))
    flops = {"flops_before": cost.flops(before[0]), "flops_after": cost.flops(after[0])}
    return Report.of(rows, before[1], after[1], notes=notes, **flops)
