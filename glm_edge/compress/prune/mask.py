"""Masks: a score, a shape, and an allocation."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, ClassVar

import flax.linen as nn

from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress.calibration import called
from glm_edge.compress.layerwise.runner import (
    LayerwiseTransform,
    Replaced,
    StageContext,
    apply_layerwise,
    fallback_notes,
    layouts_in,
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
from glm_edge.compress.prune.scores import from_inputs
from glm_edge.compress.prune.scores import from_model as model_scores
from glm_edge.compress.readings import UNWATCHED
from glm_edge.compress.report import Report, Row
from glm_edge.compress.transform import Context, Result, check_pattern, register
from glm_edge.errors import RecipeError
from glm_edge.params.tree import Params

NAME = "prune.mask"
LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@register(NAME)
class Mask(LayerwiseTransform):
    """Mask of the weights or units that score lowest; arrays keep their shapes.

    A score rates weights, a shape groups them into units, an allocation sets the sparsity of each
    matrix. Exactly the rounded number of units goes, of equal scores the first. Units masked before
    go first. A mask is stored beside its values and counted, so bytes grow until the weight is
    quantized: unstructured zeros save none by themselves. `compact` then removes masked heads,
    neurons, layers and vocabulary rows from the arrays, as a budget assumes:

        ge.chain(
            ge.prune.mask(
                score="taylor", shape="head", allocation="measured", budget_bytes=10_000_000
            ),
            ge.prune.compact(),
        )

        recipe = ge.prune.mask(0.5, score="wanda", shape="2:4")
        model, params, report = recipe(model, params, calibration=batches)

    `glm_edge.params.partition` splits masked parameters for training, as `glm_edge.params.Masked`
    shows.

    Attributes:
      sparsity: fraction to mask, in 0..1, below 1. None where `N:M` or a budget sets it.
      score: `magnitude` (`|w|`); `l<n>`, an L_n norm such as `l1`, `l2` or `linf`; `sensitivity`
        (`|g w|`), `taylor` or `taylor2` (first and second order), from gradients of the calibration
        loss; `wanda` (`|w| ||x||_2`) or `activation`, from calibration; `random`. `activation` is
        the norm of a weight's inputs, of a head's or neuron's outputs, or of an output channel. The
        score of a unit is the L_2 norm of its weights' scores (the L_n norm for `l<n>`, the sum for
        `sensitivity`); Taylor scores sum signed terms first.
      shape: `unstructured`; `N:M`, N of M neighbours along the inputs remain, such as `2:4`;
        `block:RxC`; `channel`, a row of a matrix; `head`, query heads, the same number of each
        group that shares a key/value head; `neuron` of a feed-forward network; `layer` of the
        decoder; `vocab`, rows of the embedding and of the head, except tokens that the
        configuration names.
      allocation: `uniform`, the same fraction of each matrix (or layer); `global`, one threshold
        for all; `measured`, which masks each group of matrices alone at each of `levels`, and
        minimizes the sum of the divergences of the logits on held-out batches by dynamic
        programming.
      where: regular expression searched in each path; None is every matrix. Heads, neurons and
        layers take part where it selects any of their weights.
      within: `tensor` or `row`, in which unstructured weights compete; None is `row` with `wanda`
        under uniform allocation, else `tensor`.
      levels: sparsities that `measured` chooses from.
      budget_bytes: in place of `sparsity` with `measured`, for shapes that `compact` removes:
        stored bytes of all parameters after `compact`.
      budget_flops: in place of `sparsity` with `measured`, for shapes that `compact` removes:
        floating-point operations of the products with the remaining selected weights, for one row
        of inputs each, two per weight.
      stacked: regular expression of stock weights whose first axis is a layer axis (`nn.scan`),
        where the model itself does not show it; each layer is masked as a separate matrix.

    Raises:
      RecipeError: an option has no meaning; on call, a pattern matches nothing or a quantized
        weight, rows or columns do not divide into groups, weights are not finite, no unit would
        remain, or `levels` do not reach the budget.
      DataError: on call, calibration is missing, or inputs or gradients are not finite.

    References:
      Learning both Weights and Connections for Efficient Neural Networks,
      https://arxiv.org/abs/1506.02626; A Simple and Effective Pruning Approach for Large Language
      Models, https://arxiv.org/abs/2306.11695; Importance Estimation for Neural Network Pruning,
      https://arxiv.org/abs/1906.10771; Accelerating Sparse Deep Neural Networks,
      https://arxiv.org/abs/2104.08378.
    """

    rounds: ClassVar[bool] = False

    sparsity: float | None = field(default=None, kw_only=False)
    score: str = "magnitude"
    shape: str = "unstructured"
    allocation: str = "uniform"
    where: str | None = None
    within: str | None = None
    levels: Sequence[float] = LEVELS
    budget_bytes: int | None = None
    budget_flops: int | None = None
    stacked: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.levels, list | tuple):
            raise RecipeError(f"{NAME}: levels must be a list of sparsities, not {self.levels!r}")
        super().__post_init__()
        check_pattern(NAME, "where", self.where)
        check_pattern(NAME, "stacked", self.stacked)
        _ = self.config

    @functools.cached_property
    def config(self) -> MaskConfig:
        """Options, parsed and checked."""
        return MaskConfig.of(
            NAME,
            score=self.score,
            shape=self.shape,
            allocation=self.allocation,
            within=self.within,
            levels=self.levels,
            sparsity=self.sparsity,
            budget_bytes=self.budget_bytes,
            budget_flops=self.budget_flops,
        )

    @property
    def needs(self) -> str:  # type: ignore[override]  # the score decides
        """Needs of the score: `inputs` or `nothing`."""
        return "inputs" if self.config.score.reads_inputs else "nothing"

    def check(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        masking = self.config
        if not masking.by_stage:
            raise RecipeError(
                f"{NAME}: {masking.label} under {masking.allocation} allocation needs the whole "
                "model in memory; load the checkpoint and call the recipe"
            )
        if masking.shape.kind != shapes.SINGLE:
            shapes.matrix_pools(masking.shape, sizes)

    def compress_stage(self, work: StageContext) -> Replaced:
        masking = self.config
        model_scores.refuse_quantized(NAME, work.leaves, work.named)
        if not work.selected:
            return {}, []
        score, shape = masking.score, masking.shape
        by_row = masking.within == ROW
        pools = model_scores.pools_of(
            NAME, shape, work.model, work.leaves, work.selected, work.layouts, by_row
        )
        rows = model_scores.matrices_of(pools, work.leaves)
        statistics = {}
        if score.reads_inputs:
            statistics = work.collect(from_inputs.statistic_of(score, shape), paths=work.selected)
        # Weights without inputs in calibration, such as an embedding, are scored by magnitude.
        if score.kind == "activation":
            from_inputs.refuse_unmet(NAME, score, rows, statistics)
        scores = model_scores.from_weights(NAME, score, shape, pools, rows, statistics, work.rng)
        host_scores = without_masked(pools, work.leaves, scores)
        counts = allocations.uniform(pools, masking.fraction)
        masked = masked_leaves(masking, work.leaves, pools, host_scores, counts)
        for path in masked:
            work.advance(path)
        reasons = {path: work.unseen(path) for path in masked if path not in statistics}
        return masked, _table(masking, work.leaves, masked, reasons)

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        masking = self.config
        if not masking.by_stage:
            return mask_model(masking, self.where, model, params, context, self.stacked)
        model, masked, report = apply_layerwise(self, model, params, context)
        paths = {row.path for row in report.rows}
        leaves = [leaf for path, leaf in boxes.path_items(masked) if path in paths]
        notes = (*report.notes, *mask_notes(masking.shape, leaves))
        return model, masked, dataclasses.replace(report, notes=notes)


mask = Mask


def mask_model(
    masking: MaskConfig,
    where: str | None,
    model: nn.Module,
    params: Params,
    context: Context,
    stacked: str | None = None,
) -> Result:
    """Mask a model that is completely in memory.

    Args:
      masking: options of the mask.
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
    notes: tuple[str, ...] = ()
    held_out: dict[str, Any] = {}
    reader = called(model, context.calibration)
    if masking.reads:
        notes = batches.check(model, context.calibration, name, context.without)
        read = set().union(*map(batches.keys_of, context.batches))
        notes += batches.missing_modalities(reader, read)
    if masking.allocation == allocations.MEASURED:
        calibrating, held_out = measured.split(masking, context.batches)
        context = dataclasses.replace(context, calibration=calibrating)
    result = model_scores.of_units(name, score, masking.shape, pools, model, params, context)
    scores, statistics = without_masked(pools, leaves, result[0]), result[1]
    if masking.allocation == allocations.UNIFORM:
        counts = allocations.uniform(pools, masking.fraction)
    elif masking.allocation == allocations.GLOBAL:
        counts = allocations.over_all(pools, scores, masking.fraction)
    else:
        counts, allocation_notes = measured.allocate(
            masking, reader, leaves, pools, scores, held_out, context
        )
        notes = (*notes, *allocation_notes)
    masked = masked_leaves(masking, leaves, pools, scores, counts)
    for index, path in enumerate(masked):
        context.advance(f"{name}: {path}", index + 1, len(masked))
    pruned = boxes.map_with_path(lambda path, leaf: masked.get(path, leaf), params)
    notes = (*notes, *mask_notes(masking.shape, masked.values()))
    reasons = {path: UNWATCHED for path in masked if path not in statistics}
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
