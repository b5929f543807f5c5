"""Scores from the inputs of weights.

Letters: `r` rows (out), `c` columns (in), `g`, `u` units as `glm_edge.compress.prune.masks.shapes`
arranges them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress.calibration import called
from glm_edge.compress.layerwise.runner import StageInputs
from glm_edge.compress.layerwise.stages import Statistic, first_states, stages
from glm_edge.compress.prune.masks.shapes import CHANNEL, HEAD, NEURON, Pool, Shape
from glm_edge.compress.prune.scores import from_weights as weight_scores
from glm_edge.compress.prune.scores.from_weights import Score
from glm_edge.errors import DataError, RecipeError
from glm_edge.params.tree import Params

Leaves = Mapping[str, Any]


@jax.jit
def all_finite(tree: Any) -> Array:
    """Test whether all arrays of a tree are finite, bool []."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def refuse_unmet(
    transform: str, score: Score, paths: Iterable[str], statistics_of_inputs: Leaves
) -> None:
    """Raise RecipeError where a score reads inputs and a weight has none."""
    unmet = next((path for path in paths if path not in statistics_of_inputs), None)
    if unmet is not None:
        raise RecipeError(
            f"{transform}: score={score.kind!r} needs inputs, and calibration has none of {unmet}; "
            "exclude it by where="
        )


def _squares(rows: Array, valid: Array | None) -> Array:
    return jnp.sum(jnp.square(rows), axis=0)


def _gram(rows: Array, valid: Array | None) -> Array:
    return jnp.matmul(rows.T, rows, precision="highest")


@jax.jit
def add(a: Any, b: Any) -> Any:
    """Add two trees."""
    return jax.tree.map(jnp.add, a, b)


SQUARES = Statistic(_squares, add)
"""Sum of `x^2` of each column, [c]."""
GRAM = Statistic(_gram, add)
"""Sum of `x x^T`, [c, c]."""


def statistic_of(score: Score, shape: Shape) -> Statistic:
    """Choose the statistics of inputs that a score reads."""
    outputs = score.kind == "activation" and shape.kind == CHANNEL
    return GRAM if outputs else SQUARES


def statistics(
    model: nn.Module,
    params: Params,
    calibration: Sequence[batches.Batch],
    statistic: Statistic,
    paths: Iterable[str],
) -> dict[str, Any]:
    """Reduce the inputs of each weight, one stage of the model in memory at a time.

    Args:
      model: Linen module.
      params: its parameters.
      calibration: batches.
      statistic: the reduction.
      paths: of the weights.

    Returns:
      The joined result by path; weights without inputs are absent.
    """
    leaves, wanted = dict(boxes.path_items(params)), set(paths)
    collected: dict[str, Any] = {}
    model = called(model, calibration)
    states = first_states(model, calibration)
    for stage in stages(model):
        stage_leaves = {path: leaf for path, leaf in leaves.items() if stage.holds(path)}
        lent = {path: leaves[path] for path in stage.borrows if path in leaves}
        view = StageInputs(stage, stage_leaves, states, lent)
        if wanted & set(stage_leaves):
            collected |= view.collect(statistic, paths=wanted & set(stage_leaves))
        states = view.run()
    return collected


def by_inputs(
    score: Score,
    shape: Shape,
    pools: Sequence[Pool],
    rows: Mapping[str, Array],
    statistics_of_inputs: Any,
) -> list[Array]:
    """Compute scores from weights and the statistics of their inputs.

    Args:
      score: one that reads inputs.
      shape: of the mask.
      pools: units.
      rows: weights `[r, c]` by path.
      statistics_of_inputs: by path, see `statistic_of`; `wanda` falls back to the magnitude.

    Returns:
      [g, u] of each pool.

    Raises:
      DataError: calibration gives inputs that are not finite.
    """
    for path, value in statistics_of_inputs.items():
        if not all_finite(value):
            raise DataError(f"calibration gives {path} inputs that are not finite")
    if score.kind == "wanda":
        weighed = {
            path: weight_scores.wanda(weight, statistics_of_inputs[path])
            if path in statistics_of_inputs
            else weight_scores.magnitude(weight)
            for path, weight in rows.items()
        }
        return [pool.reduced(weighed, score.order) for pool in pools]
    if shape.kind == CHANNEL:
        return [
            weight_scores.output_norm(rows[pool.name], statistics_of_inputs[pool.name])[None]
            for pool in pools
        ]
    passed = {}
    for path in statistics_of_inputs:
        norms = jnp.broadcast_to(
            weight_scores.activation_norm(statistics_of_inputs[path]), rows[path].shape
        )
        # A head's or neuron's weights repeat each of its activations once per row.
        repeats = rows[path].shape[0] if shape.kind in (HEAD, NEURON) else 1
        passed[path] = norms / repeats**0.5
    return [pool.reduced(passed, score.order, gates=True) for pool in pools]
