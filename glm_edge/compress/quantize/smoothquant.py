"""SmoothQuant: migration of activation outliers into weights."""

import collections
import functools
from collections.abc import Collection, Sequence
from dataclasses import field
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import folding
from glm_edge.compress.folding import Fold
from glm_edge.compress.layerwise.runner import (
    LayerwiseTransform,
    Replaced,
    StageContext,
    apply_layerwise,
)
from glm_edge.compress.layerwise.stages import ABS_MAX, Leaves
from glm_edge.compress.quantize.parameter import row
from glm_edge.compress.transform import Context, Result, check_pattern, register
from glm_edge.errors import DataError, RecipeError
from glm_edge.params.tree import Params

NAME = "quantize.smoothquant"


@register(NAME)
class SmoothQuant(LayerwiseTransform):
    """Divides activation channels by `max|X|^alpha / max|W|^(1 - alpha)`, and scales up weights.

    The producer of a channel is divided by the factor (see `glm_edge.compress.folding`), and the
    columns that read it are multiplied, so the model's function is unchanged. Weights are not
    quantized: chain a quantizing transform afterwards, and run with int8 activations. The report
    counts matrices without a factor, with the reason.

        recipe = ge.chain(ge.quantize.smoothquant(0.5), ge.quantize.rtn("int8"))
        model, params, report = recipe(model, params, calibration=batches)

    Attributes:
      alpha: in 0..1, migration strength from activations to weights.
      where: regular expression searched in paths of the matrices that read the channels; None
        selects all. Matrices that share an input change together or not at all.
      kinds: kinds of folds, `norm`, `value`, `neurons`, `linear`; None selects all.

    Raises:
      RecipeError: an option is invalid; on call, no factor can move in this model.
      DataError: on call, calibration is missing, or activations are not finite.

    References:
      SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models,
      https://arxiv.org/abs/2211.10438.
    """

    exact: ClassVar[bool] = True
    rounds: ClassVar[bool] = False
    needs: ClassVar[str] = "inputs"
    needs_model: ClassVar[bool] = True

    alpha: float = field(default=0.5, kw_only=False)
    where: str | None = None
    kinds: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pattern(NAME, "where", self.where)
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"{NAME}: alpha must be a number in 0..1, not {self.alpha!r}")
        if self.kinds is None:
            return
        if isinstance(self.kinds, str) or not self.kinds or {*self.kinds} - {*folding.KINDS}:
            known = ", ".join(folding.KINDS)
            raise RecipeError(f"{NAME}: kinds must be some of {known}, not {list(self.kinds)}")

    def compress_stage(self, work: StageContext) -> Replaced:
        folds = [
            fold
            for fold in selected_folds(NAME, work)
            if self.kinds is None or fold.kind in self.kinds
        ]
        leaves, notes = dict(work.leaves), collections.defaultdict(list)
        largest = work.collect(ABS_MAX) if folds else {}
        folds = [fold for fold in folds if fold.consumers[0] in largest]
        for fold in folds:
            factor = _factor(fold, leaves, largest[fold.consumers[0]], self.alpha)
            leaves |= folding.move(fold, leaves, factor)
            values = np.asarray(factor)
            spread = f"{float(values.min()):.3g} to {float(values.max()):.3g}"
            for path in fold.producers:
                notes[path].append(f"rows divided by {spread}")
            for path in fold.consumers:
                notes[path].append(f"columns times {spread}")
        for path in work.selected:
            work.advance(path)
        replaced = {path: leaves[path] for path in notes}
        eased = {path for fold in folds for path in fold.consumers}
        for path, why in _reasons(work, self.kinds, eased).items():
            notes[path].append(f"without a factor: {why}")
        return replaced, [
            row(NAME, path, work.leaves[path], leaves[path], None, ", ".join(parts))
            for path, parts in notes.items()
        ]

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        result = apply_layerwise(self, model, params, context)
        if all("without a factor: " in row.action for row in result[2].rows):
            raise RecipeError(
                f"{NAME}: where={self.where!r} and kinds={self.kinds} select no matrices "
                "between which a factor can move; select matrices that share an input together "
                "(query, key, value); a factor cannot move through GELU"
            )
        return result


smoothquant = SmoothQuant


def _reasons(
    work: StageContext, kinds: tuple[str, ...] | None, eased: Collection[str]
) -> dict[str, str]:
    """Return the reason per selected matrix without a factor, unless `kinds` excludes it."""
    folds = folding.folds(getattr(work.model, "config", None))
    by_consumer = {path: fold for fold in folds for path in fold.consumers}
    reasons: dict[str, str] = {}
    for path in work.named:
        fold = by_consumer.get(path)
        if path in eased or (fold is not None and kinds is not None and fold.kind not in kinds):
            continue
        if fold is None:
            reasons[path] = "the operation before it cannot be divided"
        elif not fold.within(work.leaves):
            reasons[path] = "it, its producer or a matrix with the same input is quantized already"
        elif not set(fold.consumers) <= set(work.selected):
            reasons[path] = "where= excludes a matrix with the same input"
        else:
            reasons[path] = work.unseen(path)
    return reasons


def selected_folds(name: str, work: StageContext) -> list[Fold]:
    """List the folds of a stage whose consumers are all selected.

    Args:
      name: name of the transform for messages.
      work: context of the stage.

    Returns:
      Folds with producers and consumers in this stage.

    Raises:
      RecipeError: no folds are known for this class of model.
    """
    selected = set(work.selected)
    known = folding.folds(
        getattr(work.model, "config", None), f"{name}: {type(work.model).__name__}"
    )
    return [
        fold for fold in known if selected.issuperset(fold.consumers) and fold.within(work.leaves)
    ]


def _factor(fold: Fold, leaves: Leaves, largest: Array, alpha: float) -> Array:
    if not np.isfinite(np.asarray(largest)).all():
        raise DataError(f"{NAME}: {fold.consumers[0]}: calibration inputs are not finite")
    weights = _columns([boxes.dense(leaves[p]) for p in fold.consumers])
    if not np.isfinite(np.asarray(weights)).all():
        raise RecipeError(f"{NAME}: {fold.consumers[0]}: NaN or infinity in the weights")
    return smooth_factor(
        jnp.max(fold.repeated(largest), axis=0), jnp.max(fold.repeated(weights), axis=0), alpha
    )


@jax.jit
def smooth_factor(activations: Array, weights: Array, alpha: float) -> Array:
    """Compute `activations ** alpha / weights ** (1 - alpha)`, or one if either is zero.

    Args:
      activations: [channels] largest magnitude per channel.
      weights: [channels] largest magnitude of the columns that read the channel.
      alpha: migration strength, in 0..1.

    Returns:
      float32 [channels], divisors of the activations.

    References:
      SmoothQuant, https://arxiv.org/abs/2211.10438, equation 4.
    """
    alive = (activations > 0) & (weights > 0)
    activations, weights = (jnp.where(alive, x, 1.0) for x in (activations, weights))
    return activations**alpha / weights ** (1 - alpha)


@jax.jit
def _columns(matrices: Sequence[Array]) -> Array:
    """Compute the largest magnitude of each column in matrices that read the same channels."""
    largest = [jnp.max(jnp.abs(matrix.astype(jnp.float32)), axis=0) for matrix in matrices]
    return functools.reduce(jnp.maximum, largest)
