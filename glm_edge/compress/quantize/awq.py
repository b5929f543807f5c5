"""AWQ: quantization after scaling up the channels with the largest activations."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import folding
from glm_edge.compress.folding import Fold
from glm_edge.compress.layerwise.runner import Replaced, StageContext
from glm_edge.compress.layerwise.stages import Leaves, Statistic, count_valid
from glm_edge.compress.quantize.options import Quantizer
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
from glm_edge.compress.transform import check_whole, register
from glm_edge.errors import DataError
from glm_edge.params import Format, Masked
from glm_edge.params.formats import PLAIN

NAME = "quantize.awq"


@register(NAME)
class AWQ(Quantizer):
    """Scales up salient channels, clips, and rounds to the nearest level.

    Channels are multiplied by a power of their mean absolute activation. The power, of
    `0, 1 / steps, …`, minimizes the squared output error of the quantized matrices that share the
    input. The producer of the channel is divided by the factor (see `glm_edge.compress.folding`).
    Then clipping ranges are searched per scale, and weights are rounded. Matrices whose input
    cannot be divided are only clipped and rounded; embeddings are only rounded.

        recipe = ge.quantize.awq("int4-g32")
        model, params, report = recipe(model, params, calibration=batches)

    Attributes:
      format: format of the weights, such as `int4-g32`, see `glm_edge.params.Format`.
      where: see `glm_edge.quantize.rtn`, also for `scale`, `fallback_bits` and `stacked`. Channels
        are scaled only if all matrices that share an input are selected.
      steps: count of tried powers; clipping shrinks ranges in steps of `1 / steps`.
      clip: searches clipping ranges.

    Raises:
      RecipeError: an option is invalid; on call, a pattern matches nothing or a quantized weight,
        columns do not divide into groups, or weights are not finite.
      DataError: on call, calibration is missing, or activations are not finite.

    References:
      AWQ: Activation-aware Weight Quantization, https://arxiv.org/abs/2306.00978.
    """

    needs: ClassVar[str] = "inputs"
    needs_model: ClassVar[bool] = True
    unsupported: ClassVar[tuple[str, ...]] = PLAIN

    scale: str = "max"
    steps: int = 20
    clip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(NAME, steps=self.steps)

    def compress_stage(self, work: StageContext) -> Replaced:
        if not work.selected:
            return {}, []
        rounding = self.config
        scale = rounding.scale
        formats = {p: rounding.format_of(p, work.columns(p)) for p in work.selected}
        measured = work.collect(STATISTIC)
        # Weights stay in float32 until they are rounded, so that factors lose no precision.
        leaves = {path: _widened(leaf, path in formats) for path, leaf in work.leaves.items()}
        grams, notes = {}, {}
        for path in formats:
            if path in measured:
                grams[path] = measured[path]["gram"] / measured[path]["count"]
                _check_finite(path, grams[path])
        for fold in selected_folds(NAME, work):
            if fold.consumers[0] not in grams:
                continue
            factor, note = _search(fold, work, leaves, grams, measured, formats, self.steps, scale)
            leaves |= folding.move(fold, leaves, factor)
            columns = fold.spread(factor)
            for path in fold.consumers:
                grams[path] = grams[path] / columns / columns[:, None]
                notes[path] = note
        replaced, rows = {}, []
        for path, leaf in leaves.items():
            before = work.leaves[path]
            if path in formats:
                after = _rounded(
                    work, path, leaf, grams.get(path), formats[path], self.steps, scale, self.clip
                )
                note = notes.get(path, "") if path in grams else f"to nearest: {work.unseen(path)}"
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


awq = AWQ


def _measure(rows: Array, valid: Array | None) -> dict[str, Array]:
    product = jnp.matmul(rows.T, rows, precision="highest")
    magnitude = jnp.sum(jnp.abs(rows), axis=0)
    return {"gram": product, "magnitude": magnitude, "count": count_valid(rows, valid)}


def _join(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
    return {name: a[name] + b[name] for name in a}


STATISTIC = Statistic(_measure, _join)
"""`{"gram": sum of x x^T [in, in], "magnitude": sum of |x| [in], "count": rows}`."""


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
    losses = np.asarray(errors)
    best = int(np.argmin(losses))
    error_ratio = losses[best] / np.maximum(losses[0], np.finfo(np.float32).tiny)
    return factor, f"ratio {best / steps:g}, error x {error_ratio:.3f}"


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


@jax.jit
def _all_finite(gram: Array) -> Array:
    return jnp.isfinite(gram).all()


def _check_finite(path: str, gram: Array) -> None:
    if not bool(_all_finite(gram)):
        raise DataError(f"{NAME}: {path}: calibration inputs are not finite")


def _joined(note: str | None, fell_back: bool) -> str:
    return ", ".join(part for part in ("fallback" if fell_back else None, note) if part)


def _error(leaf: Any, after: Any) -> float:
    return relative_error(boxes.dense(leaf), after)
