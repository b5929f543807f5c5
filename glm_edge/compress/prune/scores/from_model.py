"""Scores of the weights and units of a model on its calibration data.

Letters: `r` rows (out), `c` columns (in), `g`, `u` units as `glm_edge.compress.prune.masks.shapes`
arranges them.
"""

import functools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress import calibration as calibrations
from glm_edge.compress.calibration import Called, called
from glm_edge.compress.layerwise.runner import StageInputs, layouts_in
from glm_edge.compress.layerwise.stages import Statistic, first_states, stages
from glm_edge.compress.prune.masks import shapes
from glm_edge.compress.prune.masks.shapes import CHANNEL, HEAD, NEURON, Pool, Shape
from glm_edge.compress.prune.masks.units import unit_pools
from glm_edge.compress.prune.scores import from_weights as weight_scores
from glm_edge.compress.prune.scores.from_weights import Score
from glm_edge.compress.readings import Layouts
from glm_edge.compress.transform import Batch, Context
from glm_edge.errors import DataError, RecipeError
from glm_edge.params.layouts import Layout
from glm_edge.params.tree import Params, nested

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
    """Scores of all weights, or units, that a pattern selects; nothing is masked.

    Args:
      model: Linen module.
      params: its parameters.
      score: see `glm_edge.prune.mask`.
      shape: see `glm_edge.prune.mask`; `N:M` gives scores of single weights.
      where: regular expression searched in each path; None is every matrix.
      calibration: batches, where the score reads them.
      rng: jax key of `random`.
      without: inputs that calibration is known to lack.
      stacked: see `glm_edge.prune.mask`.

    Returns:
      For single weights an array shaped like the parameter, by its path. For units, [groups, units]
      by path, or by what the paths of a head's, neuron's or layer's weights begin with.

    Raises:
      RecipeError: an option has no meaning or does not fit the model.
      DataError: calibration is missing, or gives what is not finite.
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
    model: nn.Module,
    leaves: Leaves,
    chosen: Sequence[str],
    layouts: Mapping[str, Layout] | None = None,
    by_row: bool = False,
) -> list[Pool]:
    """The units of a shape among the selected weights.

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
    """`(rows, columns)` of every parameter of a GLM by path."""
    return {path: Layout().extent(tuple(leaf.shape)) for path, leaf in leaves.items() if leaf.shape}


def refuse_quantized(transform: str, leaves: Leaves, paths: Sequence[str]) -> None:
    """Raises RecipeError where a path is of a quantized weight."""
    quantized = next((path for path in paths if isinstance(leaves[path], boxes.Quantized)), None)
    if quantized is not None:
        raise RecipeError(f"{transform}: {quantized} is quantized; prune before quantizing")


def finite_matrix(path: str, leaf: Any, layout: Layout) -> Array:
    """The dense weight as float32 `[r, c]`, or `[matrices, r, c]` of a stack.

    Raises:
      RecipeError: it holds NaN or infinity.
    """
    matrix, finite = _matrix(leaf, layout)
    if not finite:
        raise RecipeError(f"{path}: NaN or infinity in the weights")
    return matrix


@functools.partial(jax.jit, static_argnames="layout")
def _matrix(leaf: Any, layout: Layout) -> tuple[Array, Array]:
    """The matrix in float32, and whether it is finite."""
    matrix = layout.matrices(boxes.dense(leaf).astype(jnp.float32))
    return matrix, jnp.isfinite(matrix).all()


@jax.jit
def _all_finite(tree: Any) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def of_units(
    transform: str,
    score: Score,
    shape: Shape,
    pools: Sequence[Pool],
    model: nn.Module,
    params: Params,
    context: Context,
) -> tuple[list[Array], set[str]]:
    """Scores of units of a model that is in memory as a whole.

    Args:
      transform: name, for messages.
      score: which.
      shape: of the units.
      pools: of units.
      model: Linen module; any object where scores come from weights alone.
      params: its parameters.
      context: with calibration or a key where the score needs them.

    Returns:
      `([g, u] of each pool, paths of weights whose inputs were seen)`.

    Raises:
      RecipeError: weights are not finite, or no key or no inputs are there for a score.
      DataError: inputs or gradients are not finite.
    """
    leaves = dict(boxes.path_items(params))
    rows = matrices_of(pools, leaves)
    if score.reads_gradients:
        return by_gradients(score, model, params, pools, context), set()
    statistics_of_inputs = {}
    if score.reads_inputs:
        statistic = statistic_of(score, shape)
        statistics_of_inputs = statistics(model, params, context.calibration, statistic, rows)
        refuse_unmet(transform, score, rows, statistics_of_inputs)
    return from_weights(
        transform, score, shape, pools, rows, statistics_of_inputs, context.rng
    ), set(statistics_of_inputs)


def matrices_of(pools: Sequence[Pool], leaves: Leaves) -> dict[str, Array]:
    """The weights of all units by path; gives and raises what `finite_matrix` does."""
    layouts = {member.path: member.layout for pool in pools for member in pool.members}
    return {path: finite_matrix(path, leaves[path], layout) for path, layout in layouts.items()}


def refuse_unmet(
    transform: str, score: Score, paths: Iterable[str], statistics_of_inputs: Leaves
) -> None:
    """Raises RecipeError where a weight has no inputs and the score is of inputs."""
    unmet = next((path for path in paths if path not in statistics_of_inputs), None)
    if unmet is not None:
        raise RecipeError(
            f"{transform}: score={score.kind!r} is of inputs, and nothing is seen to multiply "
            f"{unmet}; leave it out by where="
        )


def from_weights(
    transform: str,
    score: Score,
    shape: Shape,
    pools: Sequence[Pool],
    rows: Mapping[str, Array],
    statistics_of_inputs: Mapping[str, Any],
    rng: Array | None,
) -> list[Array]:
    """Scores of all kinds but those of gradients, [g, u] of each pool; see `by_inputs`.

    Raises:
      RecipeError: random scores lack a key.
    """
    if score.kind == "random":
        if rng is None:
            raise RecipeError(f"{transform}: score='random' draws; pass rng=")
        return drawn(pools, rng)
    if score.reads_inputs:
        return by_inputs(score, shape, pools, rows, statistics_of_inputs)
    return [pool.reduced(rows, score.order) for pool in pools]


def _squares(rows: Array, valid: Array | None) -> Array:
    return jnp.sum(jnp.square(rows), axis=0)


def _gram(rows: Array, valid: Array | None) -> Array:
    return jnp.matmul(rows.T, rows, precision="highest")


@jax.jit
def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


SQUARES = Statistic(_squares, _add)
"""Sum of `x^2` of each column, [c]."""
GRAM = Statistic(_gram, _add)
"""Sum of `x x^T`, [c, c]."""


def statistic_of(score: Score, shape: Shape) -> Statistic:
    """Statistics of inputs that a score reads."""
    outputs = score.kind == "activation" and shape.kind == CHANNEL
    return GRAM if outputs else SQUARES


def statistics(
    model: nn.Module,
    params: Params,
    calibration: Sequence[batches.Batch],
    statistic: Statistic,
    paths: Iterable[str],
) -> dict[str, Any]:
    """Reduces the inputs that meet each weight, one stage of the model in memory at a time.

    Args:
      model: Linen module.
      params: its parameters.
      calibration: batches.
      statistic: the reduction.
      paths: of the weights.

    Returns:
      The joined result by path; weights that nothing is seen to meet are absent.
    """
    leaves, wanted, collected = dict(boxes.path_items(params)), set(paths), {}
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
    """Scores from weights and the statistics of their inputs.

    Args:
      score: one that reads inputs.
      shape: of the mask.
      pools: units.
      rows: weights `[r, c]` by path.
      statistics_of_inputs: by path, see `statistic_of`; a norm stands in where there is none.

    Returns:
      [g, u] of each pool.

    Raises:
      DataError: calibration gives inputs that are not finite.
    """
    for path, value in statistics_of_inputs.items():
        if not _all_finite(value):
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
        # A head's or neuron's weights repeat each of its activations once a row.
        repeats = rows[path].shape[0] if shape.kind in (HEAD, NEURON) else 1
        passed[path] = norms / repeats**0.5
    return [pool.reduced(passed, score.order, gates=True) for pool in pools]


def by_gradients(
    score: Score, model: nn.Module, params: Params, pools: Sequence[Pool], context: Context
) -> list[Array]:
    """Scores from gradients of the calibration loss, each row of a batch being a sample.

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
    total, count = None, 0
    for index, batch in enumerate(context.calibration):
        batch = batches.to_device(model, batch, f"calibration batch {index}")
        measured_terms = measure(model, leaves, batch, layouts, tuple(pools) if gates else ())
        if not _all_finite(measured_terms):
            raise DataError(f"calibration batch {index}: the loss or its gradient is not finite")
        total = measured_terms if total is None else _add(total, measured_terms)
        count += batches.count_rows(batch)
        known = calibrations.has_length(context.calibration)
        context.advance("score", index + 1, len(context.calibration) if known else index + 1)
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
    """Gradient of the losses of all rows of the batch, by path, arranged as matrices."""
    gradient = jax.grad(functools.partial(_loss, model, leaves, batch))(_dense(leaves, layouts))
    return {path: layout.matrices(gradient[path]) for path, layout in layouts}


def _terms(
    model: nn.Module | Called,
    leaves: Mapping[str, Any],
    batch: batches.Batch,
    layouts: tuple[tuple[str, Layout], ...],
    pools: tuple[Pool, ...],
) -> dict[str, list[Array]]:
    """Sums over the rows of a batch of each unit's term, its magnitude and its square."""
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
    return functools.reduce(_add, terms)


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
    """Each unit's term in one row, its magnitude and its square."""
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
    """As `_terms`, of rows that are stacked."""
    dense = _dense(leaves, layouts)
    shared = {}
    if isinstance(model, Called):
        rows, shared = rows["batch"], {"variables": rows["variables"]}

    def step(total: Any, row: Any) -> tuple[Any, None]:
        row = {**shared, "batch": row} if shared else row
        return _add(total, _terms_of(model, leaves, row, layouts, pools, dense)), None

    nothing = [jnp.zeros((pool.groups, pool.units)) for pool in pools]
    start = dict.fromkeys(("sum", "magnitude", "square"), nothing)
    return jax.lax.scan(step, start, rows)[0]


def _single_rows(batch: batches.Batch) -> batches.Batch:
    """The batch as batches of one row, stacked: [B, 1, ...]."""
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


def drawn(pools: Sequence[Pool], rng: Array) -> list[Array]:
    """Random scores, which depend on the key and the name of a pool only."""
    return [
        weight_scores.random(
            jax.random.fold_in(rng, zlib.crc32(pool.name.encode())), (pool.groups, pool.units)
        )
        for pool in pools
    ]
