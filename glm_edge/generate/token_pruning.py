"""Vision token pruning: removal of the least important vision tokens of a prompt.

Letters of shapes: `B` rows, `T` tokens of a prompt, `K` the capacity of a pruned prompt, `D` hidden
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
from glm_edge.generate.prompts import bucket, prompt_mask
from glm_edge.kernels import token_pruning as kernels
from glm_edge.models.glm import Cache, LayerCache, init_cache
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params
from glm_edge.preprocess.inputs import Inputs

ATTENTION, NORM, NOVELTY = "attention", "norm", "novelty"
SCORES = (ATTENTION, NORM, NOVELTY)
# FastV reads the attention of the second layer.
LAYER = 2


@dataclass(frozen=True)
class VisionTokens:
    """Options of vision token pruning, made by `drop_vision_tokens`.

    Attributes:
      keep: fraction of each row's vision tokens that remain.
      score: `attention`, `norm` or `novelty`.
      layer: number of layers that read the complete prompt.
    """

    keep: float
    score: str
    layer: int


class PruningPlan(NamedTuple):
    """Static options of a pruned prefill, with `K` as `capacity`."""

    score: str
    layer: int
    capacity: int


def drop_vision_tokens(
    model: MultimodalGLM, keep: float, score: str = ATTENTION, layer: int | None = None
) -> VisionTokens:
    """Set the pruning of vision tokens for `generate`.

    The first `layer` layers read the complete prompt. Then the vision tokens with the lowest scores
    are removed, from the cache of these layers too. The other layers and decoding run on the
    remaining tokens, which keep their rotary positions.

    Args:
      model: a GLM with a vision encoder.
      keep: fraction of each row's vision tokens that remain, rounded up; above 0, up to 1.
      score: `attention`, mean attention that a token receives from the text in the last layer that
        reads all tokens; `norm`, of the token; `novelty`, one minus its greatest cosine similarity
        to an earlier vision token.
      layer: number of layers that read the complete prompt. 0 prunes the encoder's output (not by
        attention). All layers speed up decoding only. None is 2 for attention (or all layers of a
        smaller model), and 0 for the other scores.

    Returns:
      The options.

    Raises:
      RecipeError: the model has no vision encoder, or an option is out of range.

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


def pruning_plan(
    config: GLMConfig, inputs: Inputs, vision_tokens: VisionTokens
) -> tuple[PruningPlan, np.ndarray]:
    """Plan the pruning of prompts.

    Args:
      config: of the model.
      inputs: of the prompts.
      vision_tokens: options.

    Returns:
      `(plan, keep)`, where `keep` is int32 [B], vision tokens that remain per row.
    """
    placeholder = (inputs.tokens == config.image_token_id) & inputs.valid
    counts = placeholder.sum(axis=1)
    # Without the margin, 0.3 * 10 = 3.0000000000000004 would keep four.
    keep = np.array([math.ceil(vision_tokens.keep * count - 1e-9) for count in counts], np.int32)
    longest = int((inputs.valid.sum(axis=1) - counts + keep).max())
    return PruningPlan(vision_tokens.score, vision_tokens.layer, bucket(longest)), keep


def prefill_pruned(
    model: MultimodalGLM,
    params: Params,
    x: Array,
    positions: Array,
    valid: Array,
    placeholder: Array,
    cache_dtype: Any,
    plan: PruningPlan,
    keep: Array,
) -> tuple[Array, Array, Cache]:
    """Run the decoder on a prompt and prune its vision tokens between two layers.

    Args:
      model: a GLM.
      params: its parameters.
      x: [B, T, D] embedded tokens, with features at placeholders.
      positions: [B, T] or [3, B, T].
      valid: bool [B, T], False at padding.
      placeholder: bool [B, T], True at vision tokens.
      cache_dtype: as `init_cache` takes it.
      plan: from `pruning_plan`.
      keep: int [B] from `pruning_plan`, vision tokens that remain per row.

    Returns:
      `(final, valid, cache)`: [B, K, D] normed outputs of the remaining tokens, in their order;
      bool [B, K], False at padding; and the cache of these tokens.
    """
    config, layers = model.config.decoder, model.config.decoder.num_layers
    batch, length, _ = x.shape
    full, short = (
        init_cache(config, batch, slots, cache_dtype)["layers"] for slots in (length, plan.capacity)
    )
    first, last = range(plan.layer), range(plan.layer, layers)
    # The first layers read the complete prompt.
    x, first_caches, weights = _run(model, params, first, x, positions, valid, full, plan.score)
    if plan.score == ATTENTION:
        scores = kernels.attention_scores(weights, valid & ~placeholder)
    elif plan.score == NORM:
        scores = kernels.norm_scores(x)
    else:
        scores = kernels.novelty_scores(x, placeholder)
    # Text always remains; of the vision tokens, those with the highest scores.
    keep_mask = valid & (~placeholder | kernels.top_scores(scores, placeholder, keep))
    indices = kernels.kept_indices(keep_mask, plan.capacity)
    # All caches have one length, so the first layers' caches lose the same tokens.
    x, valid, first_caches = jax.tree.map(
        lambda rows: kernels.gather_tokens(rows, indices), (x, keep_mask, first_caches)
    )
    positions = kernels.gather_tokens(positions, indices, axis=positions.ndim - 1)
    x, last_caches, _ = _run(model, params, last, x, positions, valid, short)
    final: Any = model.apply({"params": params}, x, method=lambda module, x: module.decoder.norm(x))
    caches = [*first_caches, *last_caches]
    return final, valid, {"layers": caches, "length": jnp.int32(plan.capacity)}


def _run(
    model: MultimodalGLM,
    params: Params,
    layers: range,
    x: Array,
    positions: Array,
    valid: Array,
    empty: Sequence[LayerCache],
    score: str | None = None,
) -> tuple[Array, list[LayerCache], Any]:
    """Run some layers; return output, caches, and attention of the last one for its score."""
    mask, weights, caches = prompt_mask(valid, jnp.arange(x.shape[1])), None, []
    for index in layers:

        def run(module: Any, x: Array, cache: LayerCache, index: int = index) -> Any:
            angle, _, slot = module.decoder.prepare(x, positions, mask, None)
            return module.decoder.run_layer(index, x, angle, mask, cache, slot)

        scored = score == ATTENTION and index == layers[-1]
        (x, cache), sown = model.apply(
            {"params": params},
            x,
            empty[index],
            method=run,
            mutable=["attention"] if scored else [],
        )
        weights = jax.tree.leaves(sown)[0] if scored else None
        caches.append(cache)
    return x, caches, weights
