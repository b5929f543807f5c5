"""Reordering of neurons and value channels, so that similar columns share a group."""

import functools
from dataclasses import field
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress.folding import Fold
from glm_edge.compress.layerwise.runner import (
    LayerwiseTransform,
    Replaced,
    StageContext,
    apply_layerwise,
)
from glm_edge.compress.quantize.parameter import row
from glm_edge.compress.quantize.smoothquant import selected_folds
from glm_edge.compress.quantize.solvers import triangular
from glm_edge.compress.transform import Context, Result, check_pattern, check_whole, register
from glm_edge.errors import RecipeError
from glm_edge.params.tree import Params

NAME = "quantize.reorder"
# Channels between two matrices without another reader; a norm's channels have many.
_KINDS = {"neurons": "neurons", "value": "values of each head"}


@register(NAME)
class Reorder(LayerwiseTransform):
    """Orders neurons and values of heads by similarity; the function is unchanged.

    The columns of a down or output projection are the rows of the matrix before it. Permuting both
    costs nothing at run time. Each group receives the columns that are most similar to the mean of
    all columns without a group, as published. Affine formats gain from groups of similar columns,
    symmetric ones hardly. Inputs of other matrices are channels of the residual stream, whose order
    is unchanged. Reorder before quantizing.

        recipe = ge.chain(ge.quantize.reorder(32), ge.quantize.gptq("ternary-g32-affine"))
        model, params, report = recipe(model, params, calibration=batches)

    Attributes:
      group_size: columns per group of the format. Values are ordered only if a head is wider, since
        they stay within their head.
      where: regular expression searched in the paths of matrices with ordered columns; None selects
        all.

    Raises:
      RecipeError: an option is invalid; on call, nothing can be ordered, or weights are not finite.

    References:
      PT2-LLM: Post-Training Ternarization for Large Language Models (structural similarity-based
      reordering), https://arxiv.org/abs/2510.03267.
    """

    exact: ClassVar[bool] = True
    rounds: ClassVar[bool] = False
    needs_model: ClassVar[bool] = True

    group_size: int = field(default=32, kw_only=False)
    where: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(NAME, group_size=self.group_size)
        check_pattern(NAME, "where", self.where)

    def compress_stage(self, work: StageContext) -> Replaced:
        leaves, notes = dict(work.leaves), {}
        for fold in selected_folds(NAME, work):
            if fold.kind not in _KINDS or fold.blocks[2] <= self.group_size:
                continue
            order = _order(fold, leaves, self.group_size)
            rows = _rows_of(fold, order)
            for path in fold.producers:
                leaves[path] = _taken(leaves[path], rows, 0)
                notes[path] = f"rows in the order of {_KINDS[fold.kind]}"
            columns = _columns_of(fold, order)
            for path in fold.consumers:
                leaves[path] = _taken(leaves[path], columns, 1)
                notes[path] = f"{_KINDS[fold.kind]} ordered by similarity"
        for path in work.selected:
            work.advance(path)
        return {path: leaves[path] for path in notes}, [
            row(NAME, path, work.leaves[path], leaves[path], None, note)
            for path, note in notes.items()
        ]

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        result = apply_layerwise(self, model, params, context)
        if not result[2].rows:
            raise RecipeError(
                f"{NAME}: where={self.where!r} selects no down projection of a gated network and "
                f"no output projection of heads wider than {self.group_size} columns"
            )
        return result


reorder = Reorder


@functools.partial(jax.jit, static_argnames="size")
def similar_columns(weight: Array, size: int) -> Array:
    """Order columns such that each group has the columns most similar to the mean of the rest.

    Args:
      weight: [rows, columns].
      size: columns per group.

    Returns:
      int32 [columns], column indices in their new order.

    References:
      PT2-LLM, https://arxiv.org/abs/2510.03267.
    """
    weight = weight.astype(jnp.float32)
    count = weight.shape[1]
    length = jnp.sqrt(triangular.column_sums(jnp.square(weight)))

    def step(available: Array, _: None) -> tuple[Array, Array]:
        # Cosines with the mean of the available columns, up to a factor that all share.
        mean = triangular.across(weight.T, available[:, None].astype(jnp.float32))
        cosine = triangular.across(weight, mean)[:, 0] / jnp.where(length > 0, length, 1.0)
        group = jnp.argsort(-jnp.where(available, cosine, -jnp.inf), stable=True)[:size]
        return available.at[group].set(False), group.astype(jnp.int32)

    groups = jax.lax.scan(step, jnp.ones(count, bool), None, length=-(-count // size))[1]
    return groups.reshape(-1)[:count]


def _order(fold: Fold, leaves: dict[str, Any], size: int) -> np.ndarray:
    """Order the channels of each block of a fold, int [blocks, width]."""
    count, repeats, width = fold.blocks
    matrices = [boxes.dense(leaves[path]) for path in fold.consumers]
    weight = jnp.concatenate(matrices)
    if not np.isfinite(np.asarray(weight)).all():
        raise RecipeError(f"{NAME}: {fold.consumers[0]}: NaN or infinity in the weights")
    # A channel that several query heads read has one column per head.
    by_block = jnp.moveaxis(weight.reshape(-1, count, repeats, width), 1, 0)
    columns = by_block.reshape(count, -1, width)
    return np.stack([np.asarray(similar_columns(part, size)) for part in columns])


def _rows_of(fold: Fold, order: np.ndarray) -> np.ndarray:
    """Return the order of the producers' rows; gate rows, before `start`, follow the up rows."""
    count, _, width = fold.blocks
    rows = (order + width * np.arange(count)[:, None]).reshape(-1)
    return np.concatenate([rows + first for first in range(0, fold.start + 1, fold.channels)])


def _columns_of(fold: Fold, order: np.ndarray) -> np.ndarray:
    """Return the order of the consumers' columns."""
    count, repeats, width = fold.blocks
    first = width * np.arange(count * repeats).reshape(count, repeats, 1)
    return (first + order[:, None]).reshape(-1)


@functools.partial(jax.jit, static_argnames="axis")
def _taken(leaf: Any, order: Array, axis: int) -> Any:
    return jax.tree.map(lambda array: jnp.take(array, order, axis=axis), leaf)
