"""Masks: what is scored, in which shape it goes, and how much of it where."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn

from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress.calibration import called
from glm_edge.compress.layerwise.runner import (
    Replaced,
    StageContext,
    apply_layerwise,
    fallback_notes,
    layouts_in,
    register_layerwise,
)
from glm_edge.compress.prune.masks import allocation as allocations
from glm_edge.compress.prune.masks import measured_allocation as measured
from glm_edge.compress.prune.masks import shapes
from glm_edge.compress.prune.masks.config import (
    ROW,
    MaskConfig,
    mask_notes,
    mask_row,
    masked_leaves,
    without_masked,
)
from glm_edge.compress.prune.scores import from_model as model_scores
from glm_edge.compress.quantize.options import spelled_out
from glm_edge.compress.readings import UNWATCHED
from glm_edge.compress.report import Report, Row
from glm_edge.compress.transform import Context, Result, Transform
from glm_edge.errors import RecipeError
from glm_edge.params.tree import Params

NAME = "prune.mask"
LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def mask(
    sparsity: float | None = None,
    score: str = "magnitude",
    shape: str = "unstructured",
    allocation: str = "uniform",
    where: str | None = None,
    within: str | None = None,
    ties: str = "first",
    levels: Sequence[float] = LEVELS,
    budget_bytes: int | None = None,
    budget_flops: int | None = None,
    stacked: str | None = None,
) -> Transform:
    """Masks what scores lowest; arrays keep their shapes.

    A score says how much a weight matters, a shape what goes as one, an allocation how much of
    which matrix. Exactly the rounded number of units goes, the first of equals; what is masked
    before goes first. A mask is stored beside its values and counted, so bytes grow until the
    weight is quantized: unstructured zeros save none by themselves. What `head`, `neuron`, `layer`
    and `vocab` mask is taken out of the arrays by `compact`, with which a budget is spent:

        ge.chain(
            ge.prune.mask(
                score="taylor", shape="head", allocation="measured", budget_bytes=10_000_000
            ),
            ge.prune.compact(),
        )

        recipe = ge.prune.mask(0.5, score="wanda", shape="2:4")
        model, params, report = recipe(model, params, calibration=batches)

    Masked parameters train in the two parts that `glm_edge.params.partition` makes of them, as
    `glm_edge.params.Masked` shows.

    Args:
      sparsity: fraction that goes, in 0..1, below 1. None where `N:M` or a budget says it.
      score: `magnitude` (`|w|`); `l<n>`, an L_n norm such as `l1`, `l2` or `linf`; `sensitivity`
        (`|g w|`), `taylor` or `taylor2` (first and second order), from gradients of the calibration
        loss; `wanda` (`|w| ||x||_2`) or `activation` (the norm of the activations that a weight
        meets, a head or neuron gives, or an output channel is), from calibration; `random`. The
        score of a unit is the L_2 norm of its weights' (the L_n norm of `l<n>`, the sum of
        `sensitivity`); Taylor scores add up signed terms first. See `prune.weight_scores`.
      shape: `unstructured`; `N:M`, N of M neighbours along the inputs stay, such as `2:4`;
        `block:RxC`; `channel`, a row of a matrix; `head`, query heads, as many of each group that
        shares a key/value head; `neuron` of a feed-forward network; `layer` of the decoder;
        `vocab`, rows of the embedding and of the head, save tokens that the configuration names.
      allocation: `uniform`, the same fraction of each matrix (or layer); `global`, one threshold
        for all; `measured`, each group of matrices is masked alone at each of `levels`, and the sum
        of the divergences of the logits on held-out batches is made least by dynamic programming.
      where: regular expression searched in each path; None is every matrix. Of heads, neurons and
        layers, those take part of which it selects any weight.
      within: whether unstructured weights compete in their `tensor` or in their `row`; None is
        `row` with `wanda` under uniform allocation, else `tensor`.
      ties: of equal scores the `first` go; `torch` takes those that torch.nn.utils.prune takes on a
        CPU (unstructured and channel only).
      levels: sparsities that `measured` chooses from.
      budget_bytes: in place of `sparsity` with `measured`, for what can be taken out of the arrays:
        stored bytes of all parameters once it is, by `compact`.
      budget_flops: likewise, floating-point operations of the products with what is left of the
        selected weights, for one row of inputs each: two a weight.
      stacked: regular expression of stock weights whose first axis is a layer axis (`nn.scan`),
        where the model itself does not show it; each layer is masked as a matrix of its own.

    Returns:
      The transform.

    Raises:
      RecipeError: an option has no meaning; on call, a pattern matches nothing or a quantized
        weight, rows or columns are not whole groups, weights are not finite, all of something would
        go, or the budget is below what `levels` reach.
      DataError: on call, calibration is missing, or gives what is not finite.

    References:
      Learning both Weights and Connections for Efficient Neural Networks,
      https://arxiv.org/abs/1506.02626; A Simple and Effective Pruning Approach for Large Language
      Models, https://arxiv.org/abs/2306.11695; Importance Estimation for Neural Network Pruning,
      https://arxiv.org/abs/1906.10771; Accelerating Sparse Deep Neural Networks,
      https://arxiv.org/abs/2104.08378.
    """
    if not isinstance(levels, list | tuple):
        raise RecipeError(f"{NAME}: levels must be a list of sparsities, not {levels!r}")
    levels = tuple(levels)
    options = spelled_out(locals())
    MaskConfig.of(NAME, options)
    return Transform(NAME, options)


def _mask_stage(work: StageContext, **options: Any) -> Replaced:
    masking = MaskConfig.of(NAME, options)
    model_scores.refuse_quantized(NAME, work.leaves, work.named)
    if not work.selected:
        return {}, []
    score, shape = masking.score, masking.shape
    by_row = masking.within == ROW
    pools = model_scores.pools_of(
        NAME, shape, work.model, work.leaves, work.selected, work.layouts, by_row
    )
    rows = model_scores.matrices_of(pools, work.leaves)
    met = {}
    if score.reads_inputs:
        met = work.collect(model_scores.statistic_of(score, shape), paths=work.selected)
    # Where calibration sees no inputs, such as those of an embedding, weights go by magnitude.
    if score.kind == "activation":
        model_scores.refuse_unmet(NAME, score, rows, met)
    scores = model_scores.from_weights(NAME, score, shape, pools, rows, met, work.rng)
    scores = without_masked(pools, work.leaves, scores)
    counts = allocations.uniform(pools, masking.sparsity)
    masked = masked_leaves(masking, work.leaves, pools, scores, counts)
    for path in masked:
        work.advance(path)
    reasons = {path: work.unseen(path) for path in masked if path not in met}
    return masked, _table(masking, work.leaves, masked, reasons)


def _needs(options: Mapping[str, Any]) -> str:
    return "inputs" if MaskConfig.of(NAME, options).score.reads_inputs else "nothing"


def _check(name: str, sizes: Mapping[str, tuple[int, int]], options: Mapping[str, Any]) -> None:
    masking = MaskConfig.of(name, options)
    if not masking.by_stage:
        raise RecipeError(
            f"{name}: {masking.label} under {masking.allocation} allocation needs the whole model "
            "in memory; load the checkpoint and call the recipe"
        )
    if masking.shape.kind != shapes.SINGLE:
        shapes.matrix_pools(masking.shape, sizes)


def _apply_mask(model: nn.Module, params: Params, context: Context, **options: Any) -> Result:
    masking = MaskConfig.of(NAME, options)
    if not masking.by_stage:
        return mask_model(masking, options["where"], model, params, context, options.get("stacked"))
    model, masked, report = apply_layerwise(NAME, model, params, context, **options)
    paths = {row.path for row in report.rows}
    found = [leaf for path, leaf in boxes.path_items(masked) if path in paths]
    notes = (*report.notes, *mask_notes(masking.shape, found))
    return model, masked, dataclasses.replace(report, notes=notes)


register_layerwise(
    NAME, mask, _mask_stage, needs=_needs, rounds=False, check=_check, apply=_apply_mask
)


def mask_model(
    masking: MaskConfig,
    where: str | None,
    model: nn.Module,
    params: Params,
    context: Context,
    stacked: str | None = None,
) -> Result:
    """Masks a model that is in memory as a whole.

    Args:
      masking: how.
      where: regular expression, see `mask`.
      model: Linen module; any object where scores come from weights alone.
      params: its parameters.
      context: with calibration where the score or the allocation reads it.
      stacked: regular expression, see `mask`.

    Returns:
      `(model, params, report)`.

    Raises:
      RecipeError: see `mask`.
      DataError: see `mask`.
    """
    name, score, leaves = masking.name, masking.score, dict(boxes.path_items(params))
    chosen, by_row = boxes.select(params, where), masking.within == ROW
    layouts = layouts_in(name, model, leaves, context.calibration, stacked)
    pools = model_scores.pools_of(name, masking.shape, model, leaves, chosen, layouts, by_row)
    notes, held_out = (), {}
    reader = called(model, context.calibration)
    if masking.reads:
        notes = batches.check(model, context.calibration, name, context.without)
        read = set().union(*map(batches.keys_of, context.calibration))
        notes += batches.missing_modalities(reader, read)
    if masking.allocation == allocations.MEASURED:
        seen, held_out = measured.split(masking, context.calibration)
        context = dataclasses.replace(context, calibration=seen)
    found = model_scores.of_units(name, score, masking.shape, pools, model, params, context)
    scores, met = without_masked(pools, leaves, found[0]), found[1]
    if masking.allocation == allocations.UNIFORM:
        counts = allocations.uniform(pools, masking.sparsity)
    elif masking.allocation == allocations.GLOBAL:
        counts = allocations.over_all(pools, scores, masking.sparsity)
    else:
        counts, said = measured.allocate(masking, reader, leaves, pools, scores, held_out, context)
        notes = (*notes, *said)
    masked = masked_leaves(masking, leaves, pools, scores, counts)
    for index, path in enumerate(masked):
        context.advance(f"{name}: {path}", index + 1, len(masked))
    pruned = boxes.map_with_path(lambda path, leaf: masked.get(path, leaf), params)
    notes = (*notes, *mask_notes(masking.shape, masked.values()))
    reasons = {path: UNWATCHED for path in masked if path not in met}
    table = _table(masking, leaves, masked, reasons)
    notes = (*notes, *fallback_notes(table))
    return model, pruned, Report.of(table, params, pruned, notes=notes)


def _table(
    masking: MaskConfig,
    before: Mapping[str, Any],
    after: Mapping[str, boxes.Masked],
    reasons: Mapping[str, str],
) -> list[Row]:
    return [
        mask_row(
            masking,
            path,
            before[path],
            leaf,
            f"by magnitude: {reasons[path]}"
            if masking.score.reads_inputs and path in reasons
            else "",
        )
        for path, leaf in after.items()
    ]
