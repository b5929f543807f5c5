"""SparseGPT: masks and, where asked, rounding in one pass, against the inputs that meet weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax import Array

from glm_edge import params as boxes
from glm_edge.compress.layerwise.runner import Replaced, StageContext, register_layerwise
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
from glm_edge.compress.quantize.gptq import MOST_SWEEPS, LinearInputs, matrices, needs
from glm_edge.compress.quantize.options import QuantizeConfig, check_groups, spelled_out
from glm_edge.compress.quantize.parameter import (
    box_of,
    leaf_dtype,
    quantize_leaf,
    relative_error,
    row,
)
from glm_edge.compress.quantize.solvers import gptq_solver as gptq
from glm_edge.compress.report import Row
from glm_edge.compress.transform import Transform, check_whole
from glm_edge.errors import RecipeError
from glm_edge.params.formats import PLAIN

NAME = "prune.sparsegpt"
# Of its own, since what is masked may be rounded later and what is rounded may not.
ROUNDING_NAME = "prune.sparsegpt_quantize"
_TERNARY34 = "ternary34"


def sparsegpt(
    sparsity: float | None = None,
    shape: str = "unstructured",
    where: str | None = None,
    bits: int | None = None,
    group_size: int | str | None = None,
    symmetric: bool = True,
    scale: str = "mse",
    scale_dtype: str | None = None,
    qtype: str | None = None,
    fallback_bits: int | None = None,
    damping: float = 0.01,
    sequential: bool = True,
    propagate: float = 0.5,
    block: int = 128,
    refine: int = 20,
    act_order: bool = True,
    refit: bool = True,
    sweeps: int = 3,
    stacked: str | None = None,
) -> Transform:
    """Prunes columns in turn, each making up for the errors of those before it, and rounds.

    Without `bits` and `qtype`, the result is masks around weights that make up for what went. With
    them, the weights that stay are rounded by `glm_edge.quantize.gptq` against the same inputs,
    making up for pruning and rounding together; zeros stay zeros and no mask is stored. `ternary34`
    is both by itself: of each four weights one is zero and the others have a sign. Matrices whose
    inputs calibration cannot see, such as embeddings, are masked by magnitude and rounded to
    nearest; the report counts them and says why.

    Args:
      sparsity: fraction of zeros, in 0..1, below 1; None where the shape says it.
      shape: `unstructured`, or `N:M`: of M neighbours along the inputs N stay.
      where: regular expression searched in each path; None is every matrix.
      bits: 8, 6, 5, 4, 3 or 2; None rounds nothing, unless `qtype` does.
      group_size: see `glm_edge.quantize.gptq`, as are the next five.
      symmetric: False for affine.
      scale: `mse`, `max` or `extreme`.
      scale_dtype: of the scales.
      qtype: another format than integers.
      fallback_bits: width for a matrix whose columns are not whole groups.
      damping: fraction of the mean diagonal of the Gram matrix that is added to it.
      sequential: within a layer, collects the inputs of a matrix again when those before it are
        pruned.
      propagate: in 0..1, how much of the error of the inputs the weights make up for first.
      block: columns whose weights compete.
      refine: steps of conjugate gradients that fit the weights that stay; with `propagate=0`,
        `refine=0` is SparseGPT as published. Not used when rounding.
      act_order: see `glm_edge.quantize.gptq`, as are the next two.
      refit: fits scales after rounding.
      sweeps: passes of coordinate descent over the codes.
      stacked: see `glm_edge.prune.mask`.

    Returns:
      The transform; it needs calibration.

    Raises:
      RecipeError: an option has no meaning; on call, a pattern matches nothing or a quantized
        weight, columns are not whole groups, or weights or inputs are not finite.
      DataError: on call, calibration is missing.

    References:
      SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot,
      https://arxiv.org/abs/2301.00774;
      Sherry: Hardware-Efficient 1.25-Bit Ternary Quantization, https://arxiv.org/abs/2601.07892.
    """
    options = spelled_out(locals())
    name = ROUNDING_NAME if _rounds(options) else NAME
    _masking(name, options)
    if _rounds(options):
        QuantizeConfig.of(name, options, without=PLAIN)
    check_whole(name, block=block)
    for option in ("sequential", "act_order", "refit"):
        if not isinstance(options[option], bool):
            raise RecipeError(f"{name}: {option} must be True or False, not {options[option]!r}")
    for option, low, high in (("damping", 0, gptq.MOST_DAMPING), ("propagate", 0, 1)):
        value = options[option]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            raise RecipeError(
                f"{name}: {option} must be a number of {low} to {high:g}, not {value!r}"
            )
    for option in ("refine", "sweeps"):
        value = options[option]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_SWEEPS:
            raise RecipeError(
                f"{name}: {option} must be a whole number of 0 to {MOST_SWEEPS}, not {value!r}"
            )
    return Transform(name, options)


def _rounds(options: Mapping[str, Any]) -> bool:
    return options["bits"] is not None or options["qtype"] is not None


def _masking(name: str, options: Mapping[str, Any]) -> MaskConfig | None:
    """The mask that is asked for; None where the format is its own."""
    shape = shapes.parse(name, options["shape"])
    if shape.kind not in (shapes.SINGLE, "n:m"):
        raise RecipeError(f"{name}: shape must be unstructured or N:M, not {options['shape']!r}")
    if options["qtype"] == _TERNARY34:
        if options["sparsity"] is not None or shape not in ((shapes.SINGLE, ()), ("n:m", (3, 4))):
            raise RecipeError(
                f"{name}: {_TERNARY34} has one zero in four; leave out sparsity and shape"
            )
        return None
    masking = MaskConfig.of(
        name,
        {
            "sparsity": options["sparsity"],
            "score": "magnitude",
            "shape": options["shape"],
            "allocation": allocations.UNIFORM,
            "where": options["where"],
            "stacked": options["stacked"],
            "ties": allocations.FIRST,
            "levels": (0.0,),
        },
    )
    return dataclasses.replace(masking, label=options["shape"])


def _prune_stage(work: StageContext, **options: Any) -> Replaced:
    options = {"where": None, **options}
    name = ROUNDING_NAME if _rounds(options) else NAME
    refuse_quantized(name, work.leaves, [] if _rounds(options) else work.named)
    if not work.selected:
        return {}, []
    masking = _masking(name, options)
    rounding = QuantizeConfig.of(name, options) if _rounds(options) else None
    replaced: Leaves = {}
    rows: dict[str, Row] = {}
    inputs = (options["sequential"], options["propagate"], options["damping"])
    for met in matrices(name, work, replaced, *inputs):
        before = work.leaves[met.path]
        replaced[met.path], rows[met.path] = _one(name, met, before, masking, rounding, options)
        work.advance(met.path)
    for path in work.selected:
        if path not in replaced:
            before = work.leaves[path]
            replaced[path], rows[path] = _unmet(name, work, path, masking, rounding)
            work.advance(path)
    return replaced, [rows[path] for path in work.selected]


def _one(
    name: str,
    met: LinearInputs,
    before: Any,
    masking: MaskConfig | None,
    rounding: QuantizeConfig | None,
    options: Mapping[str, Any],
) -> tuple[Any, Row]:
    keep, said = met.mask, ""
    if masking is not None:
        weight, keep, info = sparse_columns.solve(
            met.weight,
            met.gram,
            masking.sparsity,
            masking.shape.sizes or None,
            options["damping"],
            options["block"],
            met.mask,
            options["refine"] if rounding is None else 0,
        )
        said = f"{options['shape']}, "
        if rounding is None:
            value = _as_leaf(met, weight, before).astype(leaf_dtype(before))
            after = boxes.mask(value, _as_leaf(met, keep, before))
            masked = mask_row(masking, met.path, before, after, _cost(info, options))
            return after, dataclasses.replace(masked, output_error=info.loss)
    format = rounding.format_of(met.path, met.weight.shape[1])
    codes, grid, info = gptq.solve(
        met.weight,
        met.gram,
        format,
        rounding.scale,
        options["act_order"],
        options["damping"],
        mask=keep,
        refit=options["refit"],
        sweeps=options["sweeps"],
    )
    held = before if keep is None else boxes.mask(_bare(before), _as_leaf(met, keep, before))
    box = box_of(met.path, held, codes, grid, format, met.layout)
    rounded = _rounded_row(name, met.path, before, held, box, said + _cost(info, options))
    return box, dataclasses.replace(rounded, output_error=info.loss)


def _unmet(
    name: str,
    work: StageContext,
    path: str,
    masking: MaskConfig | None,
    rounding: QuantizeConfig | None,
) -> tuple[Any, Row]:
    """Masks by magnitude and rounds to nearest a weight whose inputs calibration cannot see."""
    held = before = work.leaves[path]
    note, layout = work.unseen(path), work.layouts[path]
    if masking is not None:
        rows = {path: finite_matrix(path, before, layout)}
        sizes = {path: tuple(before.shape)}
        pools = shapes.matrix_pools(masking.shape, sizes, {path: layout})
        scores = [pool.reduced(rows, 2.0) for pool in pools]
        scores = without_masked(pools, {path: before}, scores)
        counts = allocations.uniform(pools, masking.sparsity)
        held = masked_leaves(masking, {path: before}, pools, scores, counts)[path]
    if rounding is None:
        return held, mask_row(masking, path, before, held, f"by magnitude: {note}")
    format = rounding.format_of(path, work.columns(path))
    box = quantize_leaf(path, held, format, rounding.scale, layout)[0]
    return box, _rounded_row(name, path, before, held, box, f"to nearest: {note}")


def _cost(info: Any, options: Mapping[str, Any]) -> str:
    damped = "" if info.damping == options["damping"] else f", damping {info.damping:g}"
    return f"output error {info.loss:.3g}{damped}"


def _rounded_row(name: str, path: str, before: Any, held: Any, box: Any, note: str) -> Row:
    found = row(name, path, before, box, relative_error(before, box), note)
    if box.format.qtype == _TERNARY34:
        return dataclasses.replace(found, kept=0.75)
    return dataclasses.replace(found, kept=float(held.mask.mean())) if held is not before else found


def _bare(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, boxes.Masked) else leaf


def _as_leaf(met: LinearInputs, matrix: Array, leaf: Any) -> Array:
    return met.layout.restored(matrix, leaf.shape)


def _check(name: str, sizes: Mapping[str, tuple[int, int]], options: Mapping[str, Any]) -> None:
    options = {"where": None, **options}
    masking = _masking(name, options)
    if masking is not None:
        shapes.matrix_pools(masking.shape, sizes)
    if _rounds(options):
        check_groups(name, sizes, options)


for _name, _whole in ((NAME, False), (ROUNDING_NAME, True)):
    register_layerwise(_name, sparsegpt, _prune_stage, needs=needs, rounds=_whole, check=_check)
