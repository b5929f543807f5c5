"""Vision token pruning of a prompt before its first layer."""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from glm_edge.generate.token_pruning import NORM, VisionTokens
from glm_edge.kernels import token_pruning as kernels
from glm_edge.serve.backend import ReadyPrompt


def pruned_prompt(
    prompt: ReadyPrompt, encoded: Sequence[np.ndarray], options: VisionTokens
) -> ReadyPrompt:
    """Remove the vision tokens with the lowest scores; the others keep their positions.

    Args:
      prompt: a complete prompt.
      encoded: features [M, D] of each of its media.
      options: with layer 0.

    Returns:
      The shorter prompt.
    """
    items = [index for index, media in enumerate(prompt.media) if media.kind == "image"]
    if not items:
        return prompt
    features = jnp.asarray(np.concatenate([encoded[index] for index in items])[None])
    everything = jnp.ones(features.shape[:2], bool)
    if options.score == NORM:
        scores = kernels.norm_scores(features)
    else:
        scores = kernels.novelty_scores(features, everything)
    # The margin of `pruning_plan`.
    count = jnp.array([math.ceil(options.keep * features.shape[1] - 1e-9)])
    keep = np.asarray(kernels.top_scores(scores, everything, count))[0]
    remaining = np.ones(len(prompt.tokens), bool)
    places = np.concatenate([prompt.media[index].places for index in items])
    remaining[places] = keep
    new_index = np.cumsum(remaining) - 1
    media = []
    for item in prompt.media:
        inside = remaining[item.places]
        places, offsets = new_index[item.places[inside]], item.offsets[inside]
        media.append(dataclasses.replace(item, places=places, offsets=offsets))
    return dataclasses.replace(
        prompt,
        tokens=prompt.tokens[remaining],
        positions=prompt.positions[:, remaining],
        media=tuple(media),
    )
