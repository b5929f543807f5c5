"""Moving the spread of activations into weights, so that both fit a coarse grid."""

import collections
from collections.abc import Collection
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
    """Divides channels of activations by `max|X|^alpha / max|W|^(1 - alpha)`; the function stays.

    The factor moves into what produces the channel (see `glm_edge.compress.folding`) and the
    columns that read it are multiplied by it. Weights change and are not rounded: chain a rounding
    transform after this, and run with int8 activations. Matrices that get no factor stay as they
    are; the report counts them and says why.

    Attributes:
      alpha: in 0..1, how much of the spread leaves the activations.
      where: regular expression searched in paths of the matrices that read the channels; None is
        all of them. Matrices that share an input change together or not at all.
      kinds: of folds, `norm`, `value`, `neurons`, `linear`; None is all.

    Raises:
      RecipeError: an option has no meaning; on call, no factor can move in this model.
      DataError: on call, calibration is missing, or gives activations that are not finite.

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
            spread = f"{float(factor.min()):.3g} to {float(factor.max()):.3g}"
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
                f"{NAME}: where={self.where!r} and kinds={self.kinds} name no matrices "
                "between which a factor moves; those that share an input go together (query, key, "
                "value), and none moves through GELU"
            )
        return result


smoothquant = SmoothQuant


def _reasons(
    work: StageContext, kinds: tuple[str, ...] | None, eased: Collection[str]
) -> dict[str, str]:
    """Why a matrix that the pattern names got no factor, by path, but for what `kinds` leaves."""
    folds = folding.folds(getattr(work.model, "config", None))
    by_consumer = {path: fold for fold in folds for path in fold.consumers}
    reasons: dict[str, str] = {}
    for path in work.named:
        fold = by_consumer.get(path)
        if path in eased or (fold is not None and kinds is not None and fold.kind not in kinds):
            continue
        if fold is None:
            reasons[path] = "nothing before it can be divided"
        elif not fold.within(work.leaves):
            reasons[path] = "it, what shares its input or what comes before it is quantized already"
        elif not set(fold.consumers) <= set(work.selected):
            reasons[path] = "where= leaves out what shares its input"
        else:
            reasons[path] = work.unseen(path)
    return reasons


def selected_folds(name: str, work: StageContext) -> list[Fold]:
    """Folds of a stage whose consumers are all selected.

    Args:
      name: of the transform, for messages.
      work: the stage.

    Raises:
      RecipeError: the model is of a kind in which no factor is known to move.
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
        raise DataError(f"{NAME}: calibration gives {fold.consumers[0]} inputs that are not finite")
    weights = jnp.max(jnp.stack([_columns(boxes.dense(leaves[p])) for p in fold.consumers]), axis=0)
    if not np.isfinite(np.asarray(weights)).all():
        raise RecipeError(f"{NAME}: {fold.consumers[0]}: NaN or infinity in the weights")
    return smooth_factor(
        jnp.max(fold.repeated(largest), axis=0), jnp.max(fold.repeated(weights), axis=0), alpha
    )


@jax.jit
def smooth_factor(activations: Array, weights: Array, alpha: float) -> Array:
    """`activations ** alpha / weights ** (1 - alpha)`, one where either is zero.

    Args:
      activations: [channels] largest magnitude of each.
      weights: [channels] largest magnitude of the columns that read it.
      alpha: in 0..1.

    Returns:
      float32 [channels], what activations are divided by.
    """
    alive = (activations > 0) & (weights > 0)
    activations, weights = (jnp.where(alive, x, 1.0) for x in (activations, weights))
    return activations**alpha / weights ** (1 - alpha)


@jax.jit
def _columns(matrix: Array) -> Array:
    return jnp.max(jnp.abs(matrix.astype(jnp.float32)), axis=0)
