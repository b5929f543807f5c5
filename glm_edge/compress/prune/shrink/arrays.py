"""Rows and columns of arrays and boxes, and the report of a smaller model."""

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


def take(leaf: Any, index: np.ndarray, axis: int, path: str, transform: str) -> Any:
    """Keep entries of one axis of an array, or of a mask and its values.

    Args:
      leaf: array or box.
      index: ascending.
      axis: of the array.
      path: for the message.
      transform: name, for the message.

    Raises:
      RecipeError: the weight is quantized.
    """
    value = leaf.value if isinstance(leaf, boxes.Masked) else leaf
    if isinstance(value, boxes.Quantized | boxes.FakeQuantized):
        raise RecipeError(f"{transform}: {path} is quantized; prune before quantizing")
    return jax.tree.map(lambda array: jnp.take(array, index, axis=axis), leaf)


def one_or_each(values: Sequence[int]) -> int | tuple[int, ...]:
    """Return one number where all are equal, else a tuple, as configurations take them."""
    return values[0] if len(set(values)) == 1 else tuple(values)


def check_kept(index: Any, size: int, label: str) -> np.ndarray:
    """Check indices of the entries to keep.

    Args:
      index: indices to keep.
      size: number of entries.
      label: for the message, such as `decoder layer 3: neurons`.

    Returns:
      int [kept].

    Raises:
      RecipeError: there is no index, one is out of range, or they do not ascend.
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
    """Report a model and a smaller one: a row per changed parameter, and FLOPs where known.

    Args:
      transform: name of the transform.
      before: model and parameters.
      after: the smaller model and its parameters; a removed parameter has a row of keep ratio 0.
      notes: notes for the reader.

    Raises:
      RecipeError: the smaller parameters contain NaN or infinity.
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
