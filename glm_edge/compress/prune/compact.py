"""Removal of units whose weights are all masked."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import numpy as np

from glm_edge import params as boxes
from glm_edge.compress.prune.masks.config import units_left
from glm_edge.compress.prune.masks.shapes import HEAD, LAYER, NEURON, VOCAB, Pool, Shape
from glm_edge.compress.prune.masks.units import keep_by_layer, stack_and_layer, unit_pools
from glm_edge.compress.prune.scores.from_model import extents
from glm_edge.compress.prune.shrink.arrays import shrunk_report
from glm_edge.compress.prune.shrink.heads_neurons import KeepUnits, shrink_units
from glm_edge.compress.prune.shrink.layers import shrink_depth
from glm_edge.compress.prune.shrink.stacks import DECODER
from glm_edge.compress.prune.shrink.tokenizer import named_tokens
from glm_edge.compress.prune.shrink.vocabulary import shrink_vocabulary
from glm_edge.compress.transform import Context, Result, Transform, register
from glm_edge.configs import GLMConfig
from glm_edge.errors import RecipeError
from glm_edge.params.tree import Params

NAME = "prune.compact"


class Unmasked(NamedTuple):
    """Units of a model that are not masked completely; all indices ascend.

    Attributes:
      layers: layers of the decoder that remain, int [kept].
      units: `heads` and `neurons` that remain, by `decoder`, `vision` or `speech` and by layer, as
        `shrink` and `shrink_encoder` take them; only of layers that remain and lose some.
      tokens: ids that remain, int [kept], as `map_tokens` and `shrink_tokenizer` take them.
    """

    layers: np.ndarray
    units: Mapping[str, Mapping[int, KeepUnits]]
    tokens: np.ndarray


@register(NAME)
class Compact(Transform):
    """Removal of the heads, neurons, layers and tokens whose weights are all masked.

    Run after `mask`, with any score and allocation. The smaller model computes the outputs of the
    masked one. The encoders lose heads and neurons, the decoder also layers and tokens. Other masks
    remain, except those that hide nothing any more. Remaining tokens are renumbered as by
    `vocabulary`; `unmasked` gives their ids.

    Raises:
      RecipeError: on call, the model is not a GLM, no unit is masked completely (quantization drops
        masks, so quantize afterwards), no unit of a kind would remain, groups that share a
        key/value head would keep different numbers of heads, or a token is masked that the
        configuration names.

    References:
      LLM-Pruner, https://arxiv.org/abs/2305.11627.
    """

    needs_model: ClassVar[bool] = True

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        remaining = unmasked(model, params)
        decoder = model.config.decoder
        smaller, shrunk, notes = model, params, []
        if remaining.units:
            smaller, shrunk = shrink_units(NAME, smaller, shrunk, remaining.units)
        if len(remaining.layers) < decoder.num_layers:
            smaller, shrunk = shrink_depth(smaller, shrunk, remaining.layers)
            gone = np.setdiff1d(np.arange(decoder.num_layers), remaining.layers)
            notes.append(f"removed layers {', '.join(map(str, gone))} of the decoder")
        if len(remaining.tokens) < decoder.vocab_size:
            smaller, shrunk = shrink_vocabulary(smaller, shrunk, remaining.tokens)
            notes.append(
                f"{len(remaining.tokens):,} of {decoder.vocab_size:,} tokens stay and are "
                "renumbered; prune.unmasked of the masked model gives their ids"
            )
        if smaller is model:
            raise RecipeError(
                f"{NAME}: no head, neuron, layer or vocabulary row is masked as a whole; mask some "
                "first, such as by prune.mask(0.25, shape='head'), and quantize afterwards"
            )
        shrunk = boxes.map_with_path(lambda _, leaf: _without_idle_mask(leaf), shrunk)
        report = shrunk_report(NAME, (model, params), (smaller, shrunk), tuple(notes))
        return smaller, shrunk, report


compact = Compact


def unmasked(model: nn.Module, params: Params) -> Unmasked:
    """List the units that `compact` keeps.

    Args:
      model: a GLM.
      params: its parameters, some of them masked.

    Returns:
      Indices of the units that remain.

    Raises:
      RecipeError: see `compact`; a model without masked units is not an error.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, GLMConfig):
        raise RecipeError(
            f"{NAME}: {type(model).__name__} is no GLM; pass one whose heads, neurons, layers or "
            "vocabulary rows are masked"
        )
    leaves = dict(boxes.path_items(params))
    layers, tokens = np.arange(config.decoder.num_layers), np.arange(config.decoder.vocab_size)
    for pool, remaining in _thinned(model, LAYER, leaves):
        layers = _any_of(pool, LAYER, remaining)
    for pool, remaining in _thinned(model, VOCAB, leaves):
        tokens = _any_of(pool, "token", remaining)
        _check_named(config, tokens)
    marks = []
    for kind in (HEAD, NEURON):
        for pool, remaining in _thinned(model, kind, leaves):
            stack, index = stack_and_layer(pool)
            if stack != DECODER or index in layers:
                _any_of(pool, kind, remaining)
                marks.append((kind, pool, remaining))
    return Unmasked(layers, keep_by_layer(marks), tokens)


def _thinned(
    model: nn.Module, kind: str, leaves: Mapping[str, Any]
) -> list[tuple[Pool, np.ndarray]]:
    """Return the pools of which some units are masked, with marks of the others, bool [g, u]."""
    sizes = extents(leaves)
    pools = unit_pools(NAME, model, Shape(kind), sizes, list(leaves))
    masked_pools = [(pool, units_left(pool, leaves)) for pool in pools]
    return [
        (pool, remaining)
        for pool, remaining in masked_pools
        if remaining is not None and not remaining.all()
    ]


def _any_of(pool: Pool, kind: str, remaining: np.ndarray) -> np.ndarray:
    """Return the indices of the units that remain, checked to form arrays."""
    counts = remaining.sum(axis=1).tolist()
    if not any(counts):
        raise RecipeError(
            f"{NAME}: {pool.name}: all {remaining.size} {kind}s are masked; leave one"
        )
    if len(set(counts)) > 1:
        raise RecipeError(
            f"{NAME}: {pool.name}: groups would keep {counts} {kind}s; keep the same number "
            "for each key/value head, as prune.mask(shape='head') does"
        )
    return np.flatnonzero(remaining)


def _check_named(config: GLMConfig, tokens: np.ndarray) -> None:
    gone = set(range(config.decoder.vocab_size)) - set(tokens.tolist())
    for index, field in named_tokens(config).items():
        if index in gone:
            raise RecipeError(
                f"{NAME}: token {index} is masked and must stay, since it is {field} of the model; "
                "prune.mask(shape='vocab') masks no such token"
            )


def _without_idle_mask(leaf: Any) -> Any:
    idle = isinstance(leaf, boxes.Masked) and bool(leaf.mask.all())
    return leaf.value if idle else leaf
