"""Scores of the weights and units of a model on its calibration data.

Letters: `r` rows (out), `c` columns (in), `g`, `u` units as `glm_edge.compress.prune.masks.shapes`
arranges them.
"""

import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress.layerwise.runner import layouts_in
from glm_edge.compress.prune.masks import shapes
from glm_edge.compress.prune.masks.shapes import Pool, Shape
from glm_edge.compress.prune.masks.units import unit_pools
from glm_edge.compress.prune.scores import from_gradients, from_inputs
from glm_edge.compress.prune.scores import from_weights as weight_scores
from glm_edge.compress.prune.scores.from_weights import Score
from glm_edge.compress.readings import Layouts
from glm_edge.compress.transform import Batch, Context
from glm_edge.errors import RecipeError
from glm_edge.params.layouts import Layout
from glm_edge.params.tree import Params

Leaves = Mapping[str, Any]


def scores_of(
    model: nn.Module,
    params: Params,
    score: str = "magnitude",
    shape: str = "unstructured",
    where: str | None = None,
    calibration: Sequence[Batch] | None = None,
    rng: Array | None = None,
    without: Sequence[str] = (),
    stacked: str | None = None,
) -> dict[str, Array]:
    """Compute the scores of the weights or units that a pattern selects, without a mask.

    Args:
      model: Linen module.
      params: its parameters.
      score: see `glm_edge.prune.mask`.
      shape: see `glm_edge.prune.mask`; `N:M` gives scores of single weights.
      where: regular expression searched in each path; None is every matrix.
      calibration: batches, where the score reads them.
      rng: jax key of `random`.
      without: inputs that calibration may lack.
      stacked: see `glm_edge.prune.mask`.

    Returns:
      For single weights an array shaped like the parameter, by its path. For units, [groups, units]
      by path, or by the common prefix of the paths of a head's, neuron's or layer's weights.

    Raises:
      RecipeError: an option has no meaning or does not fit the model.
      DataError: calibration is missing, or inputs or gradients are not finite.
    """
    name = "prune.scores_of"
    parsed, form = weight_scores.parse(name, score), shapes.parse(name, shape)
    parsed.fits(name, form.kind)
    leaves = dict(boxes.path_items(params))
    layouts = layouts_in(name, model, leaves, calibration, stacked)
    pools = pools_of(name, form, model, leaves, boxes.select(params, where), layouts)
    if parsed.reads_inputs or parsed.reads_gradients:
        batches.check(model, calibration, name, without)
    scores, _ = of_units(
        name, parsed, form, pools, model, params, Context(calibration, rng, (model, params))
    )
    if form.kind not in (shapes.SINGLE, "n:m"):
        return {pool.name: values for pool, values in zip(pools, scores, strict=True)}
    return shapes.spread_over(pools, scores, {path: leaf.shape for path, leaf in leaves.items()})


def pools_of(
    transform: str,
    shape: Shape,
    model: nn.Module | None,
    leaves: Leaves,
    chosen: Sequence[str],
    layouts: Mapping[str, Layout] | None = None,
    by_row: bool = False,
) -> list[Pool]:
    """List the units of a shape among the selected weights.

    Args:
      transform: name, for messages.
      shape: of the units.
      model: Linen module; a GLM for shapes that are more than one matrix.
      leaves: all parameters by path.
      chosen: paths that a pattern selects.
      layouts: of the parameters; None takes all to be stored `[..., out, in]`.
      by_row: single weights compete within their row only.

    Raises:
      RecipeError: the shape does not fit the model, or a weight is quantized.
    """
    if shape.of_matrix:
        refuse_quantized(transform, leaves, chosen)
        sizes = {path: tuple(leaves[path].shape) for path in chosen}
        if layouts is None:
            layouts = {path: Layout.of_rows(len(size)) for path, size in sizes.items()}
        elif shape.kind == shapes.SINGLE and not by_row and isinstance(layouts, Layouts):
            # Single weights compete wherever they are.
            layouts = {path: layouts.known(path) for path in sizes}
        return shapes.matrix_pools(shape, sizes, layouts, by_row)
    sizes = extents(leaves)
    pools = unit_pools(transform, model, shape, sizes, chosen)
    refuse_quantized(transform, leaves, [m.path for pool in pools for m in pool.members])
    return pools


def extents(leaves: Leaves) -> dict[str, tuple[int, int]]:
    """Return `(rows, columns)` of every parameter of a GLM by path."""
    return {path: Layout().extent(tuple(leaf.shape)) for path, leaf in leaves.items() if leaf.shape}


def refuse_quantized(transform: str, leaves: Leaves, paths: Sequence[str]) -> None:
    """Raise RecipeError where a path is of a quantized weight."""
    quantized = next((path for path in paths if isinstance(leaves[path], boxes.Quantized)), None)
    if quantized is not None:
        raise RecipeError(f"{transform}: {quantized} is quantized; prune before quantizing")


def finite_matrix(path: str, leaf: Any, layout: Layout) -> Array:
    """Return the dense weight as float32 `[r, c]`, or `[matrices, r, c]` of a stack.

    Raises:
      RecipeError: the weight contains NaN or infinity.
    """
    matrix, finite = _matrix(leaf, layout)
    if not finite:
        raise RecipeError(f"{path}: NaN or infinity in the weights")
    return matrix


@functools.partial(jax.jit, static_argnames="layout")
def _matrix(leaf: Any, layout: Layout) -> tuple[Array, Array]:
    """Return a matrix in float32, and True where it is finite."""
    matrix = layout.matrices(boxes.dense(leaf).astype(jnp.float32))
    return matrix, jnp.isfinite(matrix).all()


def of_units(
    transform: str,
    score: Score,
    shape: Shape,
    pools: Sequence[Pool],
    model: nn.Module,
    params: Params,
    context: Context,
) -> tuple[list[Array], set[str]]:
    """Compute the scores of units of a model that is completely in memory.

    Args:
      transform: name, for messages.
      score: parsed score.
      shape: of the units.
      pools: of units.
      model: Linen module; any object where scores come from weights alone.
      params: its parameters.
      context: with calibration or a key where the score needs them.

    Returns:
      `([g, u] of each pool, paths of weights with inputs)`.

    Raises:
      RecipeError: weights are not finite, or a score lacks its key or inputs.
      DataError: inputs or gradients are not finite.
    """
    leaves = dict(boxes.path_items(params))
    rows = matrices_of(pools, leaves)
    if score.reads_gradients:
        return from_gradients.by_gradients(score, model, params, pools, context), set()
    statistics_of_inputs = {}
    if score.reads_inputs:
        statistic = from_inputs.statistic_of(score, shape)
        statistics_of_inputs = from_inputs.statistics(
            model, params, context.batches, statistic, rows
        )
        from_inputs.refuse_unmet(transform, score, rows, statistics_of_inputs)
    return from_weights(
        transform, score, shape, pools, rows, statistics_of_inputs, context.rng
    ), set(statistics_of_inputs)


def matrices_of(pools: Sequence[Pool], leaves: Leaves) -> dict[str, Array]:
    """Return the weights of all units by path, as `finite_matrix` does."""
    layouts = {member.path: member.layout for pool in pools for member in pool.members}
    return {path: finite_matrix(path, leaves[path], layout) for path, layout in layouts.items()}


def from_weights(
    transform: str,
    score: Score,
    shape: Shape,
    pools: Sequence[Pool],
    rows: Mapping[str, Array],
    statistics_of_inputs: Mapping[str, Any],
    rng: Array | None,
) -> list[Array]:
    """Compute scores that need no gradients, [g, u] of each pool; see `by_inputs`.

    Raises:
      RecipeError: random scores lack a key.
    """
    if score.kind == "random":
        if rng is None:
            raise RecipeError(f"{transform}: score='random' draws; pass rng=")
        return drawn(pools, rng)
    if score.reads_inputs:
        return from_inputs.by_inputs(score, shape, pools, rows, statistics_of_inputs)
    return [pool.reduced(rows, score.order) for pool in pools]


def drawn(pools: Sequence[Pool], rng: Array) -> list[Array]:
    """Draw random scores, which depend only on the key and the name of a pool."""
    return [
        weight_scores.random(
            jax.random.fold_in(rng, zlib.crc32(pool.name.encode())), (pool.groups, pool.units)
        )
        for pool in pools
    ]
