"""SparseGPT: masks and, on request, quantization in one pass, from the inputs of the weights."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import field
from typing import Any, ClassVar

from jax import Array

from glm_edge import params as boxes
from glm_edge.compress.layerwise.runner import LayerwiseTransform, Replaced, StageContext
from glm_edge.compress.layerwise.stages import Leaves
from glm_edge.compress.prune.masks import allocation as allocations
from glm_edge.compress.prune.masks import shapes, sparse_columns
from glm_edge.compress.prune.masks.config import (
    MaskConfig,
    mask_row,
    masked_leaves,
    without_masked,
)
from glm_edge.compress.prune.scores.from_model import finite_matrix, refuse_quantized
from glm_edge.compress.quantize.gptq import LinearInputs, matrices
from glm_edge.compress.quantize.options import (
    QuantizeConfig,
    SolverOptions,
    check_passes,
    parse_format,
)
from glm_edge.compress.quantize.parameter import (
    box_of,
    leaf_dtype,
    quantize_leaf,
    relative_error,
    row,
)
from glm_edge.compress.quantize.solvers import gptq_solver as gptq
from glm_edge.compress.quantize.solvers.shrinkage import PlainRounding, Trial
from glm_edge.compress.report import Row
from glm_edge.compress.transform import check_pattern, check_whole, register
from glm_edge.errors import RecipeError
from glm_edge.params import Format

NAME = "prune.sparsegpt"
# A separate name, since a masked weight may be quantized later and a quantized one may not.
ROUNDING_NAME = "prune.sparsegpt_quantize"
_TERNARY34 = "ternary34"


@register(NAME, ROUNDING_NAME)
class SparseGPT(LayerwiseTransform):
    """SparseGPT: prunes columns in turn, each compensating the errors of those before it.

    Without `format`, the result is masks around weights that compensate for the pruned ones. With
    it, `glm_edge.quantize.gptq` quantizes the remaining weights on the same inputs and compensates
    for pruning and rounding together; zeros remain zero and no mask is stored. `ternary34` does
    both: of each four weights one is zero and the others have a sign. Matrices without inputs in
    calibration, such as embeddings, are masked by magnitude and rounded to nearest; the report
    counts them with the reason.

    Attributes:
      sparsity: fraction of zeros, in 0..1, below 1; None where the shape sets it.
      shape: `unstructured`, or `N:M`: of M neighbours along the inputs N remain.
      where: regular expression searched in each path; None is every matrix.
      format: format of the remaining weights, such as `int4-g32`, see `glm_edge.params.Format`;
        None quantizes nothing.
      scale: choice of scales: `mse`, `max` or `extreme`, see `glm_edge.quantize.gptq`.
      fallback_bits: width for a matrix whose columns do not divide into groups.
      block: columns whose weights compete.
      refine: steps of conjugate gradients that fit the remaining weights. SparseGPT as published is
        `refine=0` with `propagate=0` of the solver. Not used when quantizing.
      solver: see `glm_edge.compress.SolverOptions`; three of its options (`act_order`, `refit`,
        `sweeps`) are for quantizing. `shrinkage` applies to the choice of weights to prune, their
        compensation and the rounding.
      stacked: see `glm_edge.prune.mask`.

    Raises:
      RecipeError: an option has no meaning; on call, a pattern matches nothing or a quantized
        weight, columns do not divide into groups, or weights or inputs are not finite.
      DataError: on call, calibration is missing.

    References:
      SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot,
      https://arxiv.org/abs/2301.00774;
      Sherry: Hardware-Efficient 1.25-Bit Ternary Quantization, https://arxiv.org/abs/2601.07892.
    """

    needs_model: ClassVar[bool] = True

    sparsity: float | None = field(default=None, kw_only=False)
    shape: str = "unstructured"
    where: str | None = None
    format: Format | str | None = None
    scale: str = "mse"
    fallback_bits: int | None = None
    block: int = 128
    refine: int = 20
    solver: SolverOptions = SolverOptions()
    stacked: str | None = None

    def __post_init__(self) -> None:
        if self.format is not None:
            self._set(format=parse_format(ROUNDING_NAME, self.format))
        self._set(solver=SolverOptions.of(self.name, "solver", self.solver))
        super().__post_init__()
        check_pattern(self.name, "where", self.where)
        check_pattern(self.name, "stacked", self.stacked)
        _ = self.masking
        if self.rounding is not None:
            if self.rounding.format.plain:
                raise RecipeError(f"{self.name} cannot round to {self.format}; quantize.rtn can")
            self.rounding.check(self.name)
        check_whole(self.name, block=self.block)
        check_passes(self.name, refine=self.refine)

    @property
    def name(self) -> str:  # type: ignore[override]  # options decide
        """Name, another one with a format: a masked weight may be quantized later."""
        return NAME if self.format is None else ROUNDING_NAME

    @property
    def rounds(self) -> bool:  # type: ignore[override]
        """True with a format."""
        return self.format is not None

    @property
    def needs(self) -> str:  # type: ignore[override]
        """Models whose inputs are collected."""
        return self.solver.needs

    @property
    def in_turn(self) -> bool:  # type: ignore[override]  # options decide
        """True if inputs are collected again after earlier matrices."""
        return self.solver.sequential

    @functools.cached_property
    def rounding(self) -> QuantizeConfig | None:
        """Format of the remaining weights and choice of its scales."""
        if self.format is None:
            return None
        return QuantizeConfig(
            parse_format(ROUNDING_NAME, self.format), self.scale, self.fallback_bits
        )

    @functools.cached_property
    def masking(self) -> MaskConfig | None:
        """Options of the mask; None where the format contains one."""
        shape = shapes.parse(self.name, self.shape)
        if shape.kind not in (shapes.SINGLE, "n:m"):
            raise RecipeError(f"{self.name}: shape must be unstructured or N:M, not {self.shape!r}")
        if self.rounding is not None and self.rounding.format.qtype == _TERNARY34:
            own_shape = shape in ((shapes.SINGLE, ()), ("n:m", (3, 4)))
            if self.sparsity is not None or not own_shape:
                raise RecipeError(
                    f"{self.name}: {_TERNARY34} has one zero in four; leave out sparsity and shape"
                )
            return None
        masking = MaskConfig.of(
            self.name, score="magnitude", shape=self.shape, sparsity=self.sparsity
        )
        return dataclasses.replace(masking, label=self.shape)

    def check(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        if self.masking is not None:
            shapes.matrix_pools(self.masking.shape, sizes)
        if self.rounding is not None:
            self.rounding.check_groups(sizes)

    def compress_stage(self, work: StageContext) -> Replaced:
        name, masking, rounding = self.name, self.masking, self.rounding
        refuse_quantized(name, work.leaves, [] if self.rounds else work.named)
        if not work.selected:
            return {}, []
        replaced: Leaves = {}
        rows: dict[str, Row] = {}
        for inputs in matrices(name, work, replaced, self.solver):
            before, path = work.leaves[inputs.path], inputs.path
            replaced[path], rows[path] = _one(name, inputs, before, self)
            work.advance(path)
        for path in work.selected:
            if path not in replaced:
                before = work.leaves[path]
                replaced[path], rows[path] = _without_inputs(name, work, path, masking, rounding)
                work.advance(path)
        return replaced, [rows[path] for path in work.selected]


sparsegpt = SparseGPT


def _one(
    name: str,
    inputs: LinearInputs,
    before: Any,
    options: "SparseGPT",
) -> tuple[Any, Row]:
    masking, rounding, solver = options.masking, options.rounding, options.solver
    keep, note = inputs.mask, ""
    shrinkage = inputs.shrinkage(solver, _trial(inputs, options))
    if masking is not None:
        weight, keep, info = sparse_columns.solve(
            inputs.weight,
            inputs.gram,
            masking.fraction,
            masking.shape.pattern,
            solver.damping,
            options.block,
            inputs.mask,
            options.refine if rounding is None else 0,
            shrinkage.gamma,
        )
        note = f"{options.shape}, "
        if rounding is None:
            value = _as_leaf(inputs, weight, before).astype(leaf_dtype(before))
            after = boxes.mask(value, _as_leaf(inputs, keep, before))
            cost = _cost(info, options) + shrinkage.note
            masked = mask_row(masking, inputs.path, before, after, cost)
            return after, dataclasses.replace(masked, output_error=info.loss)
    if rounding is None:
        raise RecipeError(f"{name}: {inputs.path} has neither a mask nor a format")
    format = rounding.format_of(inputs.path, inputs.weight.shape[1])
    codes, grid, info = gptq.solve(
        inputs.weight,
        inputs.gram,
        format,
        rounding.scale,
        solver.act_order,
        solver.damping,
        mask=keep,
        refit=solver.refit,
        sweeps=solver.sweeps,
        shrinkage=shrinkage.gamma,
    )
    masked_leaf = (
        before if keep is None else boxes.mask(_bare(before), _as_leaf(inputs, keep, before))
    )
    box = box_of(inputs.path, masked_leaf, codes, grid, format, inputs.layout)
    note += _cost(info, options) + shrinkage.note
    rounded = _rounded_row(name, inputs.path, before, masked_leaf, box, note)
    return box, dataclasses.replace(rounded, output_error=info.loss)


def _trial(inputs: LinearInputs, options: "SparseGPT") -> Trial:
    """Return the solve that cross-validation compares: the same pruning and rounding, one pass."""
    masking, rounding, plain = options.masking, options.rounding, None
    if rounding is not None:
        format = rounding.format_of(inputs.path, inputs.weight.shape[1])
        plain = PlainRounding(format, rounding.scale, options.solver.act_order)
    if masking is not None:
        pattern = masking.shape.pattern
        return sparse_columns.PlainPruning(masking.fraction, pattern, options.block, plain)
    if plain is None:
        raise RecipeError(f"{options.name}: {inputs.path} has neither a mask nor a format")
    return plain


def _without_inputs(
    name: str,
    work: StageContext,
    path: str,
    masking: MaskConfig | None,
    rounding: QuantizeConfig | None,
) -> tuple[Any, Row]:
    """Mask by magnitude and round to nearest a weight without inputs in calibration."""
    masked = before = work.leaves[path]
    note, layout = work.unseen(path), work.layouts[path]
    if masking is not None:
        rows = {path: finite_matrix(path, before, layout)}
        sizes = {path: tuple(before.shape)}
        pools = shapes.matrix_pools(masking.shape, sizes, {path: layout})
        scores = [pool.reduced(rows, 2.0) for pool in pools]
        host_scores = without_masked(pools, {path: before}, scores)
        counts = allocations.uniform(pools, masking.fraction)
        masked = masked_leaves(masking, {path: before}, pools, host_scores, counts)[path]
        if rounding is None:
            note = f"by magnitude: {note}"
            return masked, mask_row(masking, path, before, masked, note)
    if rounding is None:
        raise RecipeError(f"{name}: {path} has neither a mask nor a format")
    format = rounding.format_of(path, work.columns(path))
    box = quantize_leaf(path, masked, format, rounding.scale, layout)[0]
    return box, _rounded_row(name, path, before, masked, box, f"to nearest: {note}")


def _cost(info: Any, options: "SparseGPT") -> str:
    damped = "" if info.damping == options.solver.damping else f", damping {info.damping:g}"
    return f"output error {info.loss:.3g}{damped}"


def _rounded_row(name: str, path: str, before: Any, masked: Any, box: Any, note: str) -> Row:
    report_row = row(name, path, before, box, relative_error(before, box), note)
    if box.format.qtype == _TERNARY34:
        return dataclasses.replace(report_row, keep_ratio=0.75)
    return (
        dataclasses.replace(report_row, keep_ratio=float(masked.mask.mean()))
        if masked is not before
        else report_row
    )


def _bare(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, boxes.Masked) else leaf


def _as_leaf(inputs: LinearInputs, matrix: Array, leaf: Any) -> Array:
    return inputs.layout.restored(matrix, leaf.shape)
