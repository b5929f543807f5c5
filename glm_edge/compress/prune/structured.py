"""Structured pruning of attention heads and neurons: arrays and configuration shrink."""

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Any, ClassVar

import flax.linen as nn
import numpy as np
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress.calibration import evenly_spaced
from glm_edge.compress.prune.masks.allocation import keep_highest
from glm_edge.compress.prune.masks.shapes import HEAD, NEURON, Pool, rounded_up
from glm_edge.compress.prune.masks.units import keep_by_layer, layer_pools, stack_and_layer
from glm_edge.compress.prune.scores.from_gradients import by_gradients
from glm_edge.compress.prune.scores.from_model import extents, matrices_of
from glm_edge.compress.prune.scores.from_weights import Score
from glm_edge.compress.prune.shrink.arrays import shrunk_report
from glm_edge.compress.prune.shrink.heads_neurons import shrink_units
from glm_edge.compress.prune.shrink.stacks import DECODER, READS, Stack, stacks_of
from glm_edge.compress.transform import (
    Context,
    Result,
    Transform,
    check_fraction,
    check_pattern,
    check_whole,
    register,
)
from glm_edge.configs import GLMConfig
from glm_edge.errors import DataError, RecipeError
from glm_edge.params.tree import Params

NAME = "prune.structured"
SCORES = ("taylor", "magnitude")
# A layer this many multiples wide loses little more by rounding down to a multiple.
_WIDE = 4


@register(NAME)
class Structured(Transform):
    """Structured pruning of the decoder's attention heads and neurons.

    Arrays and configuration shrink. Every group that shares a key/value head loses the same number
    of query heads, the lowest scores of the group. Where each query head has its own key/value
    head, both go. The encoders remain unchanged. At least the requested fraction goes.

        recipe = ge.prune.structured(heads=0.25, neurons=0.3)
        model, params, report = recipe(model, params, calibration=batches)

    Attributes:
      heads: fraction of query heads to remove, in 0..1, below 1.
      neurons: fraction of neurons to remove, in 0..1, below 1.
      score: `taylor`, from gradients of the calibration loss, or `magnitude`, from weights alone.
      where: regular expression searched in the decoder's paths; layers whose attention (or
        feed-forward) weights it matches lose heads (or neurons). None is all layers.
      neuron_multiple: the number of remaining neurons is rounded down to a multiple of this in
        layers at least four times as wide, for kernels and quantization groups.
      max_batches: calibration batches to score on, evenly spaced among all.

    Raises:
      RecipeError: an option has no meaning; on call, the model has no GLM decoder, nothing would
        remain, a pattern matches none of its layers, or a weight is quantized.
      DataError: `taylor` without calibration.

    References:
      LLM-Pruner, https://arxiv.org/abs/2305.11627; Compact Language Models via Pruning and
      Knowledge Distillation, https://arxiv.org/abs/2407.14679.
    """

    needs_model: ClassVar[bool] = True
    layers_of: ClassVar[str] = "decoder layer"

    heads: float = field(default=0.0, kw_only=False)
    neurons: float = 0.0
    score: str = "taylor"
    where: str | None = None
    neuron_multiple: int = 32
    max_batches: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.name, heads=self.heads, neurons=self.neurons)
        if self.score not in SCORES:
            raise RecipeError(f"{self.name}: score must be taylor or magnitude, not {self.score!r}")
        check_pattern(self.name, "where", self.where)
        check_whole(self.name, neuron_multiple=self.neuron_multiple, max_batches=self.max_batches)

    def stacks(self, model: nn.Module) -> dict[str, Stack]:
        """Select the stacks of a model that lose units.

        Raises:
          RecipeError: the model has none.
        """
        stacks = {name: stack for name, stack in stacks_of(model).items() if name == DECODER}
        if not stacks:
            raise RecipeError(
                f"{self.name}: {type(model).__name__} has no GLM decoder to shrink; "
                "prune.magnitude masks the weights of any module"
            )
        return stacks

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        stacks, leaves = self.stacks(model), dict(boxes.path_items(params))
        chosen, sizes = boxes.select(params, self.where), extents(leaves)
        fractions = {HEAD: self.heads, NEURON: self.neurons}
        candidates = [
            (kind, pool)
            for kind in fractions
            for pool in layer_pools(kind, stacks.values(), sizes, chosen)
        ]
        if not candidates:
            layers = " or ".join(stack.layer("<i>") for stack in stacks.values())
            raise RecipeError(
                f"{self.name}: where={self.where!r} matches no {self.layers_of}; their weights are "
                f"at {layers}"
            )
        notes: tuple[str, ...] = ()
        if self.score == "taylor":
            parts = list(dict.fromkeys(stack_and_layer(pool)[0] for _, pool in candidates))
            calibration = self._calibration(model, context, parts)
            keys = set().union(*map(batches.keys_of, calibration))
            notes = batches.missing_modalities(model, keys)
            context = replace(context, calibration=calibration)
        candidates = [(kind, pool) for kind, pool in candidates if fractions[kind]]
        scores = self._scores(model, params, leaves, [pool for _, pool in candidates], context)
        marks = [
            (kind, pool, self._marked(kind, pool, np.asarray(values)))
            for (kind, pool), values in zip(candidates, scores, strict=True)
        ]
        smaller, shrunk = shrink_units(self.name, model, params, keep_by_layer(marks))
        report = shrunk_report(self.name, (model, params), (smaller, shrunk), notes)
        return smaller, shrunk, report

    def _calibration(self, model: nn.Module, context: Context, parts: Sequence[str]) -> list[Any]:
        """Return the batches to score on, of which some hold the input of each part."""
        if not isinstance(model.config, GLMConfig):
            raise RecipeError(
                f"{self.name}: score='taylor' needs the next-token loss of a GLM, which "
                f"{type(model).__name__} does not have; score by magnitude"
            )
        calibration = evenly_spaced(context.calibration, self.max_batches)
        if DECODER in parts and calibration:
            return calibration
        read = {
            name: [b for b in calibration if READS[name] in batches.keys_of(b)] for name in parts
        }
        missing = next((name for name in parts if not read[name]), None)
        if missing is not None:
            raise DataError(
                f"{self.name}: score='taylor' needs calibration= batches with {READS[missing]}, "
                "and there are none; add some, restrict where=, or score by magnitude"
            )
        inputs = {READS[name] for name in parts}
        return [batch for batch in calibration if inputs & batches.keys_of(batch)]

    def _scores(
        self,
        model: nn.Module,
        params: Params,
        leaves: Mapping[str, Any],
        pools: Sequence[Pool],
        context: Context,
    ) -> list[Array]:
        if self.score == "taylor":
            return by_gradients(Score("taylor"), model, params, pools, context) if pools else []
        matrices = matrices_of(pools, leaves)
        return [_without_keys(pool).reduced(matrices, Score("norm").order) for pool in pools]

    def _marked(self, kind: str, pool: Pool, scores: np.ndarray) -> np.ndarray:
        """Return the marks of the units that remain, bool [g, u]."""
        if kind == HEAD:
            count = heads_to_keep(pool.units, self.heads, self.name)
        else:
            count = neurons_to_keep(pool.units, self.neurons, self.neuron_multiple, self.name)
        return keep_highest(scores, count)


structured = Structured


def heads_to_keep(size: int, fraction: float, transform: str = NAME) -> int:
    """Count the query heads that remain of a group, see `structured`.

    Args:
      size: query heads that share a key/value head; all heads where each has its own.
      fraction: of heads to remove, rounded up.
      transform: name, for the message.

    Raises:
      RecipeError: none would remain.
    """
    count = size - rounded_up(size, fraction)
    if count < 1:
        raise RecipeError(f"{transform}: heads={fraction} leaves no query head in groups of {size}")
    return count


def neurons_to_keep(width: int, fraction: float, multiple: int, transform: str = NAME) -> int:
    """Count the neurons that remain of a layer, see `structured`.

    Raises:
      RecipeError: none would remain.
    """
    count = width - rounded_up(width, fraction)
    if width >= _WIDE * multiple:
        count -= count % multiple
    if count < 1:
        raise RecipeError(f"{transform}: neurons={fraction} leaves none of {width}")
    return count


def _without_keys(pool: Pool) -> Pool:
    """Return the pool for norms; keys and values of a decoder's heads do not count in it."""
    if stack_and_layer(pool)[0] != DECODER:
        return pool
    parts = [
        part._replace(
            owned=tuple(
                m for m in part.owned if "/k_proj/" not in m.path and "/v_proj/" not in m.path
            )
        )
        for part in pool.parts
    ]
    return replace(pool, parts=tuple(parts))
