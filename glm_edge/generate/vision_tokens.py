"""Prompts whose images are thinned: the least useful vision tokens leave before decoding.

Letters of shapes: `B` rows, `T` tokens of a prompt, `K` tokens that are left room for, `D` hidden
size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.configs import GLMConfig
from glm_edge.errors import RecipeError
from glm_edge.generate.prompts import Prompt, bucket, prompt_mask
from glm_edge.kernels import vision_tokens as kernels
from glm_edge.models.glm import Cache, LayerCache, init_cache
from glm_edge.models.multimodal import MultimodalGLM

ATTENTION, NORM, NOVELTY = "attention", "norm", "novelty"
SCORES = (ATTENTION, NORM, NOVELTY)
# Of the published method, which reads the attention of its second layer.
LAYER = 2


@dataclass(frozen=True)
class VisionTokens:
    """How prompts are thinned; made by `drop_vision_tokens`.

    Attributes:
      keep: fraction of each row's vision tokens that stay.
      score: `attention`, `norm` or `novelty`.
      layer: layers that read the whole prompt.
    """

    keep: float
    score: str
    layer: int


class Thinning(NamedTuple):
    """What of `VisionTokens` is static when a prompt is read, and `K`."""

    score: str
    layer: int
    room: int


def drop_vision_tokens(
    model: MultimodalGLM, keep: float, score: str = ATTENTION, layer: int | None = None
) -> VisionTokens:
    """Says which vision tokens of a prompt stay, for `generate`.

    The first `layer` layers read the whole prompt; then the vision tokens that score lowest leave
    it, and the cache of these layers too. The other layers, and decoding, run on what is left.
    What stays keeps its rotary position, and the text after an image stands where it stood.

    Args:
      model: a GLM that sees.
      keep: fraction of each row's vision tokens that stay, rounded up; above 0, up to 1.
      score: `attention`, what a token receives from the text in the last layer that read it, mean
        of heads; `norm`, of the token; `novelty`, one less its greatest cosine similarity to an
        earlier vision token.
      layer: layers that read the whole prompt: 0 drops tokens as the encoder gives them (not by
        attention), and the number of layers spares decoding only. None is 2 for attention, or all
        layers of a model that has fewer, and 0 for the others.

    Returns:
      The choice.

    Raises:
      RecipeError: the model does not see, or an option has no meaning.

    References:
      An Image is Worth 1/2 Tokens After Layer 2 (FastV), https://arxiv.org/abs/2403.06764.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, GLMConfig) or config.vision is None:
        raise RecipeError(f"drop_vision_tokens: this {type(model).__name__} reads no images")
    if not 0.0 < keep <= 1.0:
        raise RecipeError(f"drop_vision_tokens: keep must be above 0 and up to 1, not {keep}")
    if score not in SCORES:
        raise RecipeError(
            f"drop_vision_tokens: score must be one of {', '.join(SCORES)}, not {score!r}"
        )
    least, layers = int(score == ATTENTION), config.decoder.num_layers
    if layer is None:
        layer = min(LAYER, layers) if score == ATTENTION else 0
    if not isinstance(layer, int) or not least <= layer <= layers:
        raise RecipeError(
            f"drop_vision_tokens: layer must be in {least}..{layers} to score by {score}, not "
            f"{layer!r}"
        )
    return VisionTokens(float(keep), score, layer)


def thinning(
    config: GLMConfig, prompt: Prompt, vision_tokens: VisionTokens
) -> tuple[Thinning, np.ndarray]:
    """How prompts are thinned, and the vision tokens that each of them keeps, int32 [B]."""
    placeholder = (prompt.tokens == config.image_token_id) & prompt.valid
    found = placeholder.sum(axis=1)
    # The margin keeps 0.3 * 10 = 3.0000000000000004 from keeping four.
    keep = np.array([math.ceil(vision_tokens.keep * count - 1e-9) for count in found], np.int32)
    longest = int((prompt.valid.sum(axis=1) - found + keep).max())
    return Thinning(vision_tokens.score, vision_tokens.layer, bucket(longest)), keep


def read_thinned(
    model: MultimodalGLM,
    params: Any,
    x: Array,
    positions: Array,
    valid: Array,
    placeholder: Array,
    cache_dtype: Any,
    how: Thinning,
    keep: Array,
) -> tuple[Array, Array, Cache]:
    """Runs the decoder on a prompt and drops vision tokens on the way.

    Args:
      model: a GLM.
      params: its parameters.
      x: [B, T, D] embedded tokens, features in their places.
      positions: [B, T] or [3, B, T].
      valid: bool [B, T], False at padding.
      placeholder: bool [B, T], True at vision tokens.
      cache_dtype: as `init_cache` takes it.
      how: from `thinning`, like `keep`.
      keep: int [B].

    Returns:
      `(final, valid, cache)`: [B, K, D] normed outputs of the tokens that stay, in their order;
      bool [B, K], False at padding; and the cache that holds these tokens alone.
    """
    config, layers = model.config.decoder, model.config.decoder.num_layers
    batch, length, _ = x.shape
    whole, short = (init_cache(config, batch, n, cache_dtype)["layers"] for n in (length, how.room))
    first, last = range(how.layer), range(how.layer, layers)
    x, read, weights = _run(model, params, first, x, positions, valid, whole, how.score)
    if how.score == ATTENTION:
        scores = kernels.attention_scores(weights, valid & ~placeholder)
    elif how.score == NORM:
        scores = kernels.norm_scores(x)
    else:
        scores = kernels.novelty_scores(x, placeholder)
    stays = valid & (~placeholder | kernels.highest(scores, placeholder, keep))
    kept = kernels.places(stays, how.room)
    x, stays, read = jax.tree.map(lambda rows: kernels.take(rows, kept), (x, stays, read))
    positions = kernels.take(positions, kept, axis=positions.ndim - 1)
    x, rest, _ = _run(model, params, last, x, positions, stays, short)
    final: Any = model.apply({"params": params}, x, method=lambda module, x: module.decoder.norm(x))
    return final, stays, {"layers": [*read, *rest], "length": jnp.int32(how.room)}


def _run(
    model: MultimodalGLM,
    params: Any,
    layers: range,
    x: Array,
    positions: Array,
    valid: Array,
    empty: Sequence[LayerCache],
    score: str | None = None,
) -> tuple[Array, list[LayerCache], Array | None]:
    """Some layers of the decoder: their output, caches, and the attention of the last if scored."""
    mask, weights, caches = prompt_mask(valid, jnp.arange(x.shape[1])), None, []
    for index in layers:

        def run(module: Any, x: Array, held: LayerCache, index: int = index) -> Any:
            angle, _, slot = module.decoder.prepare(x, positions, mask, None)
            return module.decoder.run_layer(index, x, angle, mask, held, slot)

        scored = score == ATTENTION and index == layers[-1]
        (x, held), sown = model.apply(
            {"params": params},
            x,
            empty[index],
            method=run,
            mutable=["attention"] if scored else [],
        )
        weights = jax.tree.leaves(sown)[0] if scored else None
        caches.append(held)
    return x, caches, weights
