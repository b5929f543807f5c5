"""Taking out of the arrays what is masked as a whole."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import numpy as np

from glm_edge import params as boxes
from glm_edge.compress.prune.depth import shrink_depth
from glm_edge.compress.prune.encoders import shrink_encoder
from glm_edge.compress.prune.masks.config import units_left
from glm_edge.compress.prune.masks.shapes import HEAD, LAYER, NEURON, VOCAB, Pool, Shape
from glm_edge.compress.prune.masks.units import unit_pools
from glm_edge.compress.prune.scores.from_model import extents
from glm_edge.compress.prune.shrink.arrays import shrunk_report
from glm_edge.compress.prune.shrink.tokenizer import named_tokens
from glm_edge.compress.prune.structured import KeepUnits, shrink
from glm_edge.compress.prune.vocabulary import shrink_vocabulary
from glm_edge.compress.transform import Context, Result, Transform, register
from glm_edge.configs import GLMConfig
from glm_edge.errors import RecipeError
from glm_edge.params.tree import Params

NAME = "prune.compact"
_DECODER, _ENCODERS = "decoder", ("vision", "speech")


class Unmasked(NamedTuple):
    """The units of a model that are not masked completely; all indices ascend.

    Attributes:
      layers: of the decoder that stay, int [kept].
      units: `heads` and `neurons` that stay, by `decoder`, `vision` or `speech` and by layer, as
        `shrink` and `shrink_encoder` take them; only of layers that stay and lose some.
      tokens: ids that stay, int [kept], as `map_tokens` and `shrink_tokenizer` take them.
    """

    layers: np.ndarray
    units: Mapping[str, dict[int, KeepUnits]]
    tokens: np.ndarray


@register(NAME)
class Compact(Transform):
    """Takes out of the arrays the heads, neurons, layers and tokens that are masked as a whole.

    It follows `mask`, of whatever score and allocation, and what is left computes what the masked
    model computes. A unit goes where all weights are masked that `mask` takes with it: of the
    decoder and, heads and neurons, of the encoders. Masks within what stays remain, those that hide
    nothing any more are dropped. Tokens that stay are numbered anew, as by `vocabulary`: `unmasked`
    says which they are.

    Returns:
      The transform.

    Raises:
      RecipeError: on call, the model is no GLM, nothing is masked as a whole (rounding drops masks,
        so quantize afterwards), nothing of something would stay, the groups that share a key/value
        head would keep different numbers of heads, or a token is masked that the configuration
        names.

    References:
      LLM-Pruner, https://arxiv.org/abs/2305.11627.
    """

    needs_model: ClassVar[bool] = True

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        remaining = unmasked(model, params)
        decoder = model.config.decoder
        smaller, shrunk, notes = model, params, []
        if _DECODER in remaining.units:
            smaller, shrunk = shrink(smaller, shrunk, remaining.units[_DECODER])
        for part in _ENCODERS:
            if part in remaining.units:
                smaller, shrunk = shrink_encoder(smaller, shrunk, remaining.units[part], part)
        if len(remaining.layers) < decoder.num_layers:
            smaller, shrunk = shrink_depth(smaller, shrunk, remaining.layers)
            gone = np.setdiff1d(np.arange(decoder.num_layers), remaining.layers)
            notes.append(f"removed layers {', '.join(map(str, gone))} of the decoder")
        if len(remaining.tokens) < decoder.vocab_size:
            smaller, shrunk = shrink_vocabulary(smaller, shrunk, remaining.tokens)
            notes.append(
                f"{len(remaining.tokens):,} of {decoder.vocab_size:,} tokens stay and are numbered "
                "anew; prune.unmasked of the masked model gives their ids"
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
    """Finds what `compact` leaves of a model.

    Args:
      model: a GLM.
      params: its parameters, some of them masked.

    Returns:
      Indices of what stays.

    Raises:
      RecipeError: see `compact`; a model of which all stays is none.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, GLMConfig):
        raise RecipeError(
            f"{NAME}: {type(model).__name__} is no GLM; heads, neurons, layers and vocabulary are "
            "masked and taken out of one"
        )
    leaves = dict(boxes.path_items(params))
    layers, tokens = np.arange(config.decoder.num_layers), np.arange(config.decoder.vocab_size)
    for pool, remaining in _thinned(model, LAYER, leaves):
        layers = _any_of(pool, LAYER, remaining)
    for pool, remaining in _thinned(model, VOCAB, leaves):
        tokens = _any_of(pool, "token", remaining)
        _check_named(config, tokens)
    units: dict[str, dict[int, KeepUnits]] = {}
    for kind in (HEAD, NEURON):
        for pool, remaining in _thinned(model, kind, leaves):
            stack, _, index = pool.name.split("/")[:3]
            if stack == _DECODER and int(index) not in layers:
                continue
            kinds = units.setdefault(stack, {}).setdefault(int(index), {})
            kinds[f"{kind}s"] = _any_of(pool, kind, remaining)
    return Unmasked(layers, units, tokens)


def _thinned(
    model: nn.Module, kind: str, leaves: Mapping[str, Any]
) -> list[tuple[Pool, np.ndarray]]:
    """Pools of which some units are masked, with those that are left, bool [g, u]."""
    sizes = extents(leaves)
    pools = unit_pools(NAME, model, Shape(kind), sizes, list(leaves))
    masked_pools = [(pool, units_left(pool, leaves)) for pool in pools]
    return [
        (pool, remaining)
        for pool, remaining in masked_pools
        if remaining is not None and not remaining.all()
    ]


def _any_of(pool: Pool, kind: str, remaining: np.ndarray) -> np.ndarray:
    """Indices of the units that are left, checked to make arrays."""
    counts = remaining.sum(axis=1).tolist()
    if not any(counts):
        raise RecipeError(
            f"{NAME}: {pool.name}: all {remaining.size} {kind}s are masked; leave one"
        )
    if len(set(counts)) > 1:
        raise RecipeError(
            f"{NAME}: {pool.name}: groups would keep {counts} {kind}s; those that share a "
            "key/value head must keep as many as others, as prune.mask(shape='head') leaves them"
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
