"""Rounding weights after scaling up the channels that carry the largest activations."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import folding
from glm_edge.compress.folding import Fold
from glm_edge.compress.layerwise.runner import Replaced, StageContext, register_layerwise
from glm_edge.compress.layerwise.stages import Leaves, Statistic, count_valid
from glm_edge.compress.quantize.options import QuantizeConfig, spelled_out
from glm_edge.compress.quantize.parameter import (
    box_of,
    dense_rows,
    leaf_dtype,
    quantize_leaf,
    relative_error,
    row,
)
from glm_edge.compress.quantize.smoothquant import selected_folds
from glm_edge.compress.quantize.solvers import awq_search as search
from glm_edge.compress.quantize.solvers import scales as grids
from glm_edge.compress.transform import Transform, check_whole
from glm_edge.errors import DataError, RecipeError
from glm_edge.params import Format, Masked
from glm_edge.params.formats import PLAIN

NAME = "quantize.awq"


def awq(
    bits: int = 4,
    group_size: int | str | None = None,
    symmetric: bool = True,
    where: str | None = None,
    scale: str = "max",
    scale_dtype: str | None = None,
    qtype: str | None = None,
    fallback_bits: int | None = None,
    steps: int = 20,
    clip: bool = True,
    stacked: str | None = None,
) -> Transform:
    """Scales up the channels that matter most, clips, and rounds to the nearest level.

    Channels are multiplied by a power of their mean absolute activation, `0, 1 / steps, …`: the one
    that leaves the least squared error at the output of the rounded matrices that share the input.
    What produces the channel is divided by it (see `glm_edge.compress.folding`). Then a smaller
    range is tried for everything that shares a scale, and the weights are rounded. Matrices whose
    inputs nothing can divide are clipped and rounded; embeddings are rounded.

        recipe = ge.quantize.awq(bits=4, group_size=32)
        model, params, report = recipe(model, params, calibration=batches)

    Args:
      bits: 8, 6, 5, 4, 3 or 2.
      group_size: columns that share a scale; None per channel, `tensor` for one scale a matrix.
      symmetric: False for affine, with an integer zero point.
      where: regular expression searched in each path; None is every matrix not yet quantized.
        Factors move only where all matrices that share an input are selected.
      scale: `max`, `mse` or `extreme`, see `rtn`.
      scale_dtype: `float32`, `float16` or `bfloat16`; None is float32 per channel and bfloat16 for
        groups.
      qtype: another format than integers, such as `nf4` or `ternary`.
      fallback_bits: per-channel width for a matrix whose columns are not whole groups; None raises
        there.
      steps: powers tried, and twentieths of the range (at 20) that clipping takes off.
      clip: tries smaller ranges.
      stacked: regular expression of stock weights whose first axis is a layer axis (`nn.scan`),
        where the model itself does not show it.

    Returns:
      The transform; it needs calibration.

    Raises:
      RecipeError: an option has no meaning; on call, a pattern matches nothing or a quantized
        weight, columns are not whole groups, or weights are not finite.
      DataError: on call, calibration is missing, or gives activations that are not finite.

    References:
      AWQ: Activation-aware Weight Quantization, https://arxiv.org/abs/2306.00978.
    """
    options = spelled_out(locals())
    QuantizeConfig.of(NAME, options, without=PLAIN)
    check_whole(NAME, steps=steps)
    if not isinstance(clip, bool):
        raise RecipeError(f"{NAME}: clip must be True or False, not {clip!r}")
    return Transform(NAME, options)


def _measure(rows: Array, valid: Array | None) -> dict[str, Array]:
    product = jnp.matmul(rows.T, rows, precision="highest")
    magnitude = jnp.sum(jnp.abs(rows), axis=0)
    return {"gram": product, "magnitude": magnitude, "count": count_valid(rows, valid)}


def _join(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
    return {name: a[name] + b[name] for name in a}


STATISTIC = Statistic(_measure, _join)
"""`{"gram": sum of x x^T [in, in], "magnitude": sum of |x| [in], "count": rows}`."""


def _round_stage(work: StageContext, steps: int, clip: bool, **shared: Any) -> Replaced:
    if not work.selected:
        return {}, []
    rounding = QuantizeConfig.of(NAME, shared)
    scale = rounding.scale
    formats = {p: rounding.format_of(p, work.columns(p)) for p in work.selected}
    measured = work.collect(STATISTIC)
    # Float32 until rounded: a factor costs no bits of a narrow type.
    leaves = {path: _widened(leaf, path in formats) for path, leaf in work.leaves.items()}
    grams, notes = {}, {}
    for path in formats:
        if path in measured:
            grams[path] = measured[path]["gram"] / measured[path]["count"]
            _check_finite(path, grams[path])
    for fold in selected_folds(NAME, work):
        if fold.consumers[0] not in grams:
            continue
        factor, note = _search(fold, work, leaves, grams, measured, formats, steps, scale)
        leaves |= folding.move(fold, leaves, factor)
        columns = fold.spread(factor)
        for path in fold.consumers:
            grams[path] = grams[path] / columns / columns[:, None]
            notes[path] = note
    replaced, rows = {}, []
    for path, leaf in leaves.items():
        before = work.leaves[path]
        if path in formats:
            after = _rounded(work, path, leaf, grams.get(path), formats[path], steps, scale, clip)
            note = notes.get(path) if path in grams else f"to nearest: {work.unseen(path)}"
            note = _joined(note, formats[path] is not rounding.format)
            error = _error(leaf, after)
            work.advance(path)
        elif leaf is not before:
            after, note, error = leaf, "divided by factors", None
        else:
            continue
        replaced[path] = after
        rows.append(row(NAME, path, before, after, error, note))
    return replaced, rows


register_layerwise(NAME, awq, _round_stage, needs="inputs")


def _search(
    fold: Fold,
    work: StageContext,
    leaves: Leaves,
    grams: Mapping[str, Array],
    measured: Mapping[str, Any],
    formats: Mapping[str, Format],
    steps: int,
    scale: str,
) -> tuple[Array, str]:
    first = fold.consumers[0]
    factor, errors = search.search_factor(
        tuple(dense_rows(path, leaves[path], work.layouts[path]) for path in fold.consumers),
        grams[first],
        measured[first]["magnitude"] / measured[first]["count"],
        tuple(formats[path] for path in fold.consumers),
        fold.blocks,
        steps,
        scale,
    )
    best = int(jnp.argmin(errors))
    kept = float(errors[best] / jnp.maximum(errors[0], jnp.finfo(jnp.float32).tiny))
    return factor, f"ratio {best / steps:g}, error x {kept:.3f}"


def _rounded(
    work: StageContext,
    path: str,
    leaf: Any,
    gram: Array | None,
    format: Format,
    steps: int,
    scale: str,
    clip: bool,
) -> Any:
    before, layout = work.leaves[path], work.layouts[path]
    if gram is None:
        return quantize_leaf(path, before, format, scale, layout)[0]
    matrix = dense_rows(path, leaf, layout)
    if clip:
        matrix = search.search_clip(matrix, gram, format, steps, scale)
    grid = grids.choose(matrix, format, scale)
    return box_of(path, before, grids.encode(matrix, grid, format), grid, format, layout)


def _widened(leaf: Any, selected: bool) -> Any:
    if not selected or leaf_dtype(leaf) == jnp.float32:
        return leaf
    if isinstance(leaf, Masked):
        return leaf.replace(value=leaf.value.astype(jnp.float32))
    return leaf.astype(jnp.float32)


def _check_finite(path: str, gram: Array) -> None:
    if not bool(jnp.isfinite(gram).all()):
        raise DataError(f"{NAME}: calibration gives {path} inputs that are not finite")


def _joined(note: str | None, fell_back: bool) -> str:
    return ", ".join(part for part in ("fallback" if fell_back else None, note) if part)


def _error(leaf: Any, after: Any) -> float:
    return relative_error(boxes.dense(leaf), after)
