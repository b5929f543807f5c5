"""Masking the smallest weights."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress.report import Report, Row
from glm_edge.compress.transform import Context, Result, Transform, check_pattern, register
from glm_edge.errors import RecipeError
from glm_edge.params.tree import Params

SCOPES = ("tensor", "global")


def magnitude(sparsity: float, where: str | None = None, scope: str = "tensor") -> Transform:
    """Masks the weights of least magnitude in any Linen module's parameters.

    Exactly `round(sparsity * size)` weights are masked, the first of equals; weights masked before
    count. A mask is stored beside its values, so bytes grow until the weight is quantized.

    Args:
      sparsity: fraction of zeros, in 0..1.
      where: regular expression searched in each path; None masks every matrix.
      scope: `tensor` prunes this fraction of each matrix, `global` of all of them together.

    Returns:
      The transform.

    Raises:
      RecipeError: an option has no meaning; on call, a pattern matches nothing or a quantized
        weight.

    References:
      Learning both Weights and Connections for Efficient Neural Networks,
      https://arxiv.org/abs/1506.02626.
    """
    check_pattern("prune.magnitude", "where", where)
    if not 0.0 <= sparsity <= 1.0:
        raise RecipeError(f"prune.magnitude: sparsity must be in 0..1, not {sparsity}")
    if scope not in SCOPES:
        raise RecipeError(f"prune.magnitude: scope must be tensor or global, not {scope!r}")
    return Transform("prune.magnitude", {"sparsity": sparsity, "where": where, "scope": scope})


def _apply_magnitude(
    model: nn.Module,
    params: Params,
    context: Context,
    sparsity: float,
    where: str | None,
    scope: str,
) -> Result:
    leaves = dict(boxes.path_items(params))
    chosen = boxes.select(params, where)
    for path in chosen:
        if isinstance(leaves[path], boxes.Quantized):
            raise RecipeError(f"prune.magnitude: {path} is quantized; prune before quantizing")
    if scope == "global":
        keeps = _keep_together([boxes.dense(leaves[path]) for path in chosen], sparsity)
    else:
        keeps = (keep_largest(boxes.dense(leaves[path]), sparsity) for path in chosen)
    masked, rows = {}, []
    for path, keep in zip(chosen, keeps, strict=True):
        masked[path] = boxes.mask(leaves[path], keep)
        rows.append(_row(path, leaves[path], masked[path]))
        context.advance("prune", len(rows), len(chosen))
    pruned = boxes.map_with_path(lambda path, leaf: masked.get(path, leaf), params)
    return model, pruned, Report.of(rows, params, pruned)


register("prune.magnitude", magnitude, _apply_magnitude)


@functools.partial(jax.jit, static_argnames="sparsity")
def keep_largest(weight: Array, sparsity: float) -> Array:
    """Marks what remains when the smallest weights go.

    Args:
      weight: of any shape.
      sparsity: fraction to prune.

    Returns:
      bool of the same shape, False at exactly `round(sparsity * size)` places.
    """
    order = jnp.argsort(jnp.abs(weight).reshape(-1), stable=True)
    keep = jnp.ones(weight.size, bool).at[order[: round(sparsity * weight.size)]].set(False)
    return keep.reshape(weight.shape)


def _keep_together(weights: list[Array], sparsity: float) -> list[Array]:
    flat = jnp.concatenate([weight.reshape(-1) for weight in weights])
    keep, keeps = keep_largest(flat, sparsity), []
    for weight in weights:
        keeps.append(keep[: weight.size].reshape(weight.shape))
        keep = keep[weight.size :]
    return keeps


def _row(path: str, before: Any, after: boxes.Masked) -> Row:
    old, new = boxes.dense(before), boxes.dense(after)
    norm = float(jnp.linalg.norm(old.astype(jnp.float32)))
    lost = float(jnp.linalg.norm((new - old).astype(jnp.float32)))
    stored = boxes.stored_bytes(after)
    return Row(
        "prune.magnitude",
        path,
        "masked",
        float(after.mask.mean()),
        8 * stored / old.size,
        boxes.stored_bytes(before),
        stored,
        lost / norm if norm else 0.0,
    )
