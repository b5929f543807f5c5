"""Scores from gradients of the calibration loss, first and second order.

Letters: `g`, `u` units as `glm_edge.compress.prune.masks.shapes` arranges them.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress import calibration as calibrations
from glm_edge.compress.calibration import Called, called
from glm_edge.compress.prune.masks.shapes import Pool
from glm_edge.compress.prune.scores import from_weights as weight_scores
from glm_edge.compress.prune.scores.from_inputs import add, all_finite
from glm_edge.compress.prune.scores.from_weights import Score
from glm_edge.compress.transform import Context
from glm_edge.errors import DataError
from glm_edge.params.layouts import Layout
from glm_edge.params.tree import Params, nested


def by_gradients(
    score: Score, model: nn.Module, params: Params, pools: Sequence[Pool], context: Context
) -> list[Array]:
    """Compute scores from gradients of the calibration loss; each row of a batch is a sample.

    Args:
      score: one that reads gradients.
      model: Linen module.
      params: its parameters.
      pools: units.
      context: with calibration.

    Returns:
      [g, u] of each pool.

    Raises:
      DataError: the loss or its gradient is not finite.
    """
    leaves = dict(boxes.path_items(params))
    gates = score.kind != "sensitivity"
    members = [m for pool in pools for part in pool.parts for m in part[int(gates)]]
    layouts = tuple(sorted({(member.path, member.layout) for member in members}, key=str))
    measure = _terms if gates else _gradients
    model = called(model, context.calibration)
    total: Any = None
    count = 0
    for index, batch in enumerate(context.batches):
        batch = batches.to_device(model, batch, f"calibration batch {index}")
        measured_terms = measure(model, leaves, batch, layouts, tuple(pools) if gates else ())
        if not all_finite(measured_terms):
            raise DataError(f"calibration batch {index}: the loss or its gradient is not finite")
        total = measured_terms if total is None else add(total, measured_terms)
        count += batches.count_rows(batch)
        known = calibrations.has_length(context.calibration)
        context.advance("score", index + 1, len(context.batches) if known else index + 1)
    if score.kind == "taylor":
        return [weight_scores.taylor(terms, count) for terms in total["magnitude"]]
    if score.kind == "taylor2":
        pairs = zip(total["sum"], total["square"], strict=True)
        return [weight_scores.second_order_taylor(*sums, count) for sums in pairs]
    dense = _dense(leaves, layouts)
    weighed = {
        path: weight_scores.sensitivity(layout.matrices(dense[path]), total[path] / count)
        for path, layout in layouts
    }
    return [pool.reduced(weighed, score.order) for pool in pools]


def _dense(leaves: Mapping[str, Any], layouts: tuple[tuple[str, Layout], ...]) -> dict[str, Array]:
    return {path: boxes.dense(leaves[path]).astype(jnp.float32) for path, _ in layouts}


def _loss(
    model: nn.Module | Called,
    leaves: Mapping[str, Any],
    batch: batches.Batch,
    dense: Mapping[str, Array],
) -> Array:
    return jnp.sum(batches.row_losses(model, nested({**leaves, **dense}), batch))


@functools.partial(jax.jit, static_argnames=("model", "layouts", "pools"))
def _gradients(
    model: nn.Module | Called,
    leaves: Mapping[str, Any],
    batch: batches.Batch,
    layouts: tuple[tuple[str, Layout], ...],
    pools: tuple[Pool, ...],
) -> dict[str, Array]:
    """Return the gradient of the losses of all rows of a batch, by path, arranged as matrices."""
    gradient = jax.grad(functools.partial(_loss, model, leaves, batch))(_dense(leaves, layouts))
    return {path: layout.matrices(gradient[path]) for path, layout in layouts}


def _terms(
    model: nn.Module | Called,
    leaves: Mapping[str, Any],
    batch: batches.Batch,
    layouts: tuple[tuple[str, Layout], ...],
    pools: tuple[Pool, ...],
) -> dict[str, list[Array]]:
    """Sum each unit's term, its magnitude and its square over the rows of a batch."""
    if isinstance(model, Called):
        rows = calibrations.single_rows(batch)
        rows = jax.tree.map(lambda array: array[None], batch["batch"]) if rows is None else rows
        wrapped = {"batch": rows, "variables": batch["variables"]}
        return _row_terms(model, leaves, wrapped, layouts, pools)
    apart = batches.single_rows(model, batch)
    if apart is None:
        return _row_terms(model, leaves, _single_rows(batch), layouts, pools)
    # Rows with images of their own sizes share no array.
    terms = [_one_row_terms(model, leaves, row, layouts, pools) for row in apart]
    return functools.reduce(add, terms)


@functools.partial(jax.jit, static_argnames=("model", "layouts", "pools"))
def _one_row_terms(
    model: nn.Module,
    leaves: Mapping[str, Any],
    row: batches.Batch,
    layouts: tuple[tuple[str, Layout], ...],
    pools: tuple[Pool, ...],
) -> dict[str, list[Array]]:
    return _terms_of(model, leaves, row, layouts, pools, _dense(leaves, layouts))


def _terms_of(
    model: nn.Module | Called,
    leaves: Mapping[str, Any],
    row: batches.Batch,
    layouts: tuple[tuple[str, Layout], ...],
    pools: tuple[Pool, ...],
    dense: Mapping[str, Array],
) -> dict[str, list[Array]]:
    """Return each unit's term in one row, its magnitude and its square."""
    gradient = jax.grad(functools.partial(_loss, model, leaves, row))(dense)
    products = {path: layout.matrices(gradient[path] * dense[path]) for path, layout in layouts}
    terms = [pool.reduced(products, gates=True) for pool in pools]
    return {
        "sum": terms,
        "magnitude": [jnp.abs(term) for term in terms],
        "square": [jnp.square(term) for term in terms],
    }


@functools.partial(jax.jit, static_argnames=("model", "layouts", "pools"))
def _row_terms(
    model: nn.Module | Called,
    leaves: Mapping[str, Any],
    rows: batches.Batch,
    layouts: tuple[tuple[str, Layout], ...],
    pools: tuple[Pool, ...],
) -> dict[str, list[Array]]:
    """Return the terms of `_terms` for stacked rows."""
    dense = _dense(leaves, layouts)
    shared = {}
    if isinstance(model, Called):
        rows, shared = rows["batch"], {"variables": rows["variables"]}

    def step(total: Any, row: Any) -> tuple[Any, None]:
        row = {**shared, "batch": row} if shared else row
        return add(total, _terms_of(model, leaves, row, layouts, pools, dense)), None

    nothing = [jnp.zeros((pool.groups, pool.units)) for pool in pools]
    start = dict.fromkeys(("sum", "magnitude", "square"), nothing)
    return jax.lax.scan(step, start, rows)[0]


def _single_rows(batch: batches.Batch) -> batches.Batch:
    """Return the batch as batches of one row, stacked: [B, 1, ...]."""
    rows = batch["tokens"].shape[0]
    single = {}
    for name, value in batch.items():
        if name == "positions" and value.ndim == 3:
            single[name] = jnp.moveaxis(value, 1, 0)[:, :, None]
        elif name == "mask":
            value = value.reshape((1,) * (4 - value.ndim) + value.shape)
            single[name] = jnp.broadcast_to(value, (rows, *value.shape[1:]))[:, None]
        else:
            single[name] = value[:, None]
    return single
