"""Removal of layers from a decoder or an encoder."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from glm_edge.compress.prune.shrink.arrays import check_kept, one_or_each
from glm_edge.compress.prune.shrink.stacks import DECODER, stack_of
from glm_edge.configs import VisionConfig
from glm_edge.params.tree import Params

NAME = "prune.depth"
_WIDTHS = ("num_heads", "num_kv_heads", "intermediate_size")


def shrink_depth(
    model: nn.Module, params: Params, keep: Sequence[int] | np.ndarray, part: str = DECODER
) -> tuple[nn.Module, Params]:
    """Keep some layers and renumber them.

    Args:
      model: a GLM, or an encoder on its own.
      params: its parameters; boxes of any kind.
      keep: ascending indices of the layers that remain.
      part: `decoder`, `vision` or `speech` of a GLM.

    Returns:
      `(model, params)`, equal to the model whose other layers pass their input on unchanged.

    Raises:
      RecipeError: the model has no such part, or a layer does not exist.
    """
    stack = stack_of(NAME, model, part)
    config = stack.config
    keep = check_kept(keep, config.num_layers, f"{NAME}: {part} layers").tolist()
    fields: dict[str, Any] = {"num_layers": len(keep)}
    for name in _WIDTHS:
        value = getattr(config, name, 0)
        if isinstance(value, tuple):
            # A pooling head's width comes after those of the layers.
            after = value[config.num_layers :]
            fields[name] = one_or_each([*(value[index] for index in keep), *after])
    if isinstance(config, VisionConfig):
        fields["global_layers"] = tuple(
            new for new, old in enumerate(keep) if old in config.global_layers
        )
    tree = params[stack.name] if stack.name else params
    tree = {**tree, "layers": {str(new): tree["layers"][str(old)] for new, old in enumerate(keep)}}
    smaller = stack.replaced(model, dataclasses.replace(config, **fields))
    return smaller, {**params, stack.name: tree} if stack.name else tree
