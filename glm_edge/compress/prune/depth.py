"""Depth pruning: removal of layers of a decoder or an encoder."""

from collections.abc import Sequence
from dataclasses import field
from typing import ClassVar

import flax.linen as nn
import jax
import numpy as np

from glm_edge.compress import batches
from glm_edge.compress.calibration import evenly_spaced
from glm_edge.compress.prune.masks.allocation import mark_kept
from glm_edge.compress.prune.scores.influence import influence, input_of
from glm_edge.compress.prune.shrink.arrays import shrunk_report
from glm_edge.compress.prune.shrink.layers import NAME, shrink_depth
from glm_edge.compress.prune.shrink.stacks import READS, stack_of
from glm_edge.compress.transform import (
    Context,
    Result,
    Transform,
    check_whole,
    register,
)
from glm_edge.configs import GLMConfig
from glm_edge.errors import DataError, RecipeError
from glm_edge.params.tree import Params

SCORES = ("influence", "block", "loss")


@register(NAME)
class Depth(Transform):
    """Depth pruning: removes layers, whose input then goes to the next layer unchanged.

    Attributes:
      layers: how many to remove, chosen by `score`; or the indices of those to remove, in which
        case nothing is scored.
      part: `decoder`, `vision` or `speech` of a GLM; an encoder on its own has a single part.
      score: `influence`, one minus the cosine between the input and the output of a layer, the
        lowest go; `block`, the same of neighbouring layers taken together, which go as one; or
        `loss`, which removes one layer after the other, each time the one without which the
        calibration loss rises least.
      max_batches: calibration batches to score on, evenly spaced among all.

    Raises:
      RecipeError: an option has no meaning; on call, the model has no such part, a layer does not
        exist, or none would remain.
      DataError: a score without calibration, or without batches that the part reads.

    References:
      ShortGPT (influence), https://arxiv.org/abs/2403.03853; The Unreasonable Ineffectiveness of
      the Deeper Layers (blocks), https://arxiv.org/abs/2403.17887; Shortened LLaMA (loss),
      https://arxiv.org/abs/2402.02834.
    """

    needs_model: ClassVar[bool] = True

    layers: int | Sequence[int] = field(kw_only=False)
    part: str = "decoder"
    score: str = "influence"
    max_batches: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in SCORES:
            raise RecipeError(f"{NAME}: score must be influence, block or loss, not {self.score!r}")
        if self.part not in READS:
            raise RecipeError(f"{NAME}: part must be decoder, vision or speech, not {self.part!r}")
        check_whole(NAME, max_batches=self.max_batches)
        if isinstance(self.layers, int):
            check_whole(NAME, layers=self.layers)
            return
        self._set(layers=tuple(self.layers))
        if not self.layers or not all(type(index) is int and index >= 0 for index in self.layers):
            raise RecipeError(
                f"{NAME}: layers must be a number or indices, not {self.layers!r:.60}"
            )

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        total = stack_of(NAME, model, self.part).config.num_layers
        scored = isinstance(self.layers, int)
        named = () if isinstance(self.layers, int) else tuple(self.layers)
        count = self.layers if isinstance(self.layers, int) else len(set(named))
        if count >= total:
            raise RecipeError(
                f"{NAME}: removing {count} of {total} layers leaves none of the {self.part}"
            )
        if scored:
            keep = self._scored(model, params, total, context)
        else:
            keep = np.ones(total, bool)
            if max(named) >= total:
                raise RecipeError(
                    f"{NAME}: the {self.part} has no layer {max(named)}, only 0..{total - 1}"
                )
            keep[list(named)] = False
        smaller, shrunk = shrink_depth(model, params, np.flatnonzero(keep), self.part)
        # Layers are renumbered, so that the report's rows do not show which ones went.
        reason = f" by {self.score}" if scored else ""
        removed = ", ".join(map(str, np.flatnonzero(~keep)))
        note = f"removed layers {removed} of the {self.part}{reason}"
        report = shrunk_report(NAME, (model, params), (smaller, shrunk), (note,))
        return smaller, shrunk, report

    def _scored(self, model: nn.Module, params: Params, total: int, context: Context) -> np.ndarray:
        """Return the marks of the layers that remain, bool [layers]."""
        calibration = self._calibration(model, context)
        if self.score == "loss":
            return self._by_loss(model, params, total, calibration, context)
        count = self.layers if isinstance(self.layers, int) else len(self.layers)
        span = count if self.score == "block" else 1
        scores = influence(model, params, calibration, self.part, span)
        context.advance("score", 1, 1)
        if self.score == "influence":
            return mark_kept(scores[None], count)[0]
        keep = np.ones(total, bool)
        first = int(np.argmin(scores))
        keep[first : first + span] = False
        return keep

    def _by_loss(
        self,
        model: nn.Module,
        params: Params,
        total: int,
        calibration: Sequence[batches.Batch],
        context: Context,
    ) -> np.ndarray:
        """Choose greedily, since the loss without a layer depends on earlier removals."""
        if not isinstance(model.config, GLMConfig):
            raise RecipeError(
                f"{NAME}: score='loss' needs the next-token loss of a GLM, which "
                f"{type(model).__name__} does not have; score by influence"
            )
        keep, done = np.ones(total, bool), 0
        count = self.layers if isinstance(self.layers, int) else len(self.layers)
        steps = sum(total - removed for removed in range(count))
        for _ in range(count):
            losses = {}
            for candidate in np.flatnonzero(keep).tolist():
                others = np.setdiff1d(np.flatnonzero(keep), candidate)
                losses[candidate] = _loss(
                    *shrink_depth(model, params, others, self.part), calibration
                )
                done += 1
                context.advance("score", done, steps)
            keep[min(losses, key=lambda index: (losses[index], index))] = False
        return keep

    def _calibration(self, model: nn.Module, context: Context) -> list[batches.Batch]:
        """Return the batches that the part reads."""
        calibration = evenly_spaced(context.calibration, self.max_batches)
        if not calibration:
            raise DataError(f"{NAME}: a score needs calibration= batches, and there are none")
        name = input_of(model, self.part)
        readable = [batch for batch in calibration if batch.get(name) is not None]
        if not readable:
            raise DataError(f"{NAME}: the {self.part} reads {name}, which no calibration batch has")
        return readable


depth = Depth


def _loss(model: nn.Module, params: Params, calibration: Sequence[batches.Batch]) -> float:
    losses = [
        float(_batch_loss(model, params, batches.to_device(model, batch, f"{NAME}: batch {index}")))
        for index, batch in enumerate(calibration)
    ]
    if not np.isfinite(losses).all():
        raise DataError(f"{NAME}: the loss of a calibration batch is not finite")
    return float(np.mean(losses))


# Models with the same number of layers of one width are equal, so that candidates share a program.
_batch_loss = jax.jit(batches.mean_loss, static_argnums=0)
