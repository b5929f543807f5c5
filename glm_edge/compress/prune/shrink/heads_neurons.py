"""Removal of attention heads and neurons from arrays and configurations."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from glm_edge import params as boxes
from glm_edge.compress.prune.shrink.arrays import check_kept, one_or_each, take
from glm_edge.compress.prune.shrink.stacks import DECODER, Stack, stacks_of
from glm_edge.configs import DecoderConfig
from glm_edge.errors import RecipeError
from glm_edge.params.tree import Params

KeepUnits = Mapping[str, Any]
"""Ascending indices under `heads` and `neurons`; an absent kind remains complete."""


def shrink(
    model: nn.Module, params: Params, keep: Mapping[int, KeepUnits]
) -> tuple[nn.Module, Params]:
    """Remove heads and neurons of a decoder from arrays and configuration.

    Args:
      model: a GLM.
      params: its parameters.
      keep: per layer, ascending indices under `heads` and `neurons`; an absent kind remains
        complete. Every group that shares a key/value head keeps the same number of query heads.

    Returns:
      `(model, params)`, equal to the model with the gates of removed units at zero.

    Raises:
      RecipeError: the model has no decoder, a layer or an index does not exist, nothing of a layer
        or a group would remain, groups keep different numbers of heads, or a weight that must
        shrink is quantized.
    """
    return shrink_units("prune.structured", model, params, {DECODER: keep})


def shrink_encoder(
    model: nn.Module, params: Params, keep: Mapping[int, KeepUnits], part: str = ""
) -> tuple[nn.Module, Params]:
    """Remove heads and neurons of an encoder from arrays and configuration.

    Args:
      model: a GLM, or an encoder on its own.
      params: its parameters.
      keep: as for `shrink`.
      part: `vision` or `speech` of a GLM; empty for an encoder on its own.

    Returns:
      `(model, params)`, equal to the model with the gates of removed units at zero.

    Raises:
      RecipeError: the model has no such encoder; otherwise see `shrink`.
    """
    return shrink_units("prune.encoders", model, params, {part: keep})


def shrink_units(
    transform: str,
    model: nn.Module,
    params: Params,
    keep: Mapping[str, Mapping[int, KeepUnits]],
) -> tuple[nn.Module, Params]:
    """Remove heads and neurons of any stacks of a model.

    Args:
      transform: name, for messages.
      model: a GLM, or an encoder on its own.
      params: its parameters.
      keep: by stack (see `Stack.name`) and layer, as for `shrink`.

    Returns:
      `(model, params)`.

    Raises:
      RecipeError: see `shrink`.
    """
    stacks, leaves = stacks_of(model), dict(boxes.path_items(params))
    cuts: dict[str, tuple[np.ndarray, int]] = {}
    smaller = model
    for name, layers in keep.items():
        if name not in stacks:
            kind = "decoder" if name == DECODER else f"encoder {name!r}"
            raise RecipeError(f"{transform}: the model has no {kind}; it has {list(stacks)}")
        stack = stacks[name]
        indices = _checked(transform, stack, layers)
        for index, keep_units in indices.items():
            cuts |= _cuts(stack, index, keep_units, leaves)
        smaller = stack.replaced(smaller, _narrowed(stack, indices))

    def cut(path: str, leaf: Any) -> Any:
        linear, _, field = path.rpartition("/")
        if linear not in cuts:
            return leaf
        index, axis = cuts[linear]
        # The bias of a matrix that loses columns remains complete.
        return leaf if axis and field != "weight" else take(leaf, index, axis, linear, transform)

    return smaller, boxes.map_with_path(cut, params)


def _checked(
    transform: str, stack: Stack, layers: Mapping[int, KeepUnits]
) -> dict[int, dict[str, np.ndarray]]:
    """Return the indices that make layers, as arrays."""
    config, checked = stack.config, {}
    unknown = sorted(set(layers) - set(range(config.num_layers)))
    if unknown:
        label = stack.name or "encoder"
        raise RecipeError(
            f"{transform}: the {label} has no layer {unknown[0]!r} of {config.num_layers}"
        )
    for index, keep_units in layers.items():
        label = f"{transform}: {stack.layer(index)}"
        sizes = {"heads": config.heads(index), "neurons": config.neurons(index)}
        others = sorted(set(keep_units) - set(sizes))
        if others:
            raise RecipeError(f"{label}: {others[0]!r} is unknown; use heads and neurons")
        checked[index] = {
            name: check_kept(indices, sizes[name], f"{label}: {name}")
            for name, indices in keep_units.items()
        }
        if "heads" in keep_units:
            _check_groups(checked[index]["heads"], sizes["heads"], config.kv_heads(index), label)
    return checked


def _check_groups(keep: np.ndarray, heads: int, groups: int, label: str) -> None:
    """Raise RecipeError where groups that share a key/value head keep different numbers."""
    if groups == heads:
        return
    size = heads // groups
    counts = np.bincount(keep // size, minlength=groups)
    if not counts.all():
        raise RecipeError(
            f"{label}: group {int(np.argmin(counts))} would lose all {size} query heads that "
            "share its key/value head; keep at least one of each group"
        )
    if len(set(counts.tolist())) > 1:
        raise RecipeError(
            f"{label}: groups would keep {counts.tolist()} query heads; keep equally many of each"
        )


def _cuts(
    stack: Stack, index: int, keep_units: Mapping[str, np.ndarray], leaves: Mapping[str, Any]
) -> dict[str, tuple[np.ndarray, int]]:
    """Return the indices and axis that each linear layer keeps, by path."""
    cuts: dict[str, tuple[np.ndarray, int]] = {}
    if "heads" in keep_units:
        channels = (
            keep_units["heads"][:, None] * stack.head_size + np.arange(stack.head_size)
        ).ravel()
        inputs, output = stack.head_paths(index)
        cuts |= dict.fromkeys(inputs, (channels, 0)) | {output: (channels, -1)}
    if "neurons" in keep_units:
        first, second = stack.mlp_paths(index)
        neurons, width = keep_units["neurons"], stack.config.neurons(index)
        # Gate and up projection follow one another in fused rows.
        starts = range(0, leaves[f"{first}/weight"].shape[0], width)
        cuts[first] = np.concatenate([neurons + start for start in starts]), 0
        cuts[second] = neurons, -1
    return cuts


def _narrowed(stack: Stack, layers: Mapping[int, Mapping[str, np.ndarray]]) -> Any:
    """Return the configuration of a stack with the widths that remain."""
    config = stack.config
    # A pooling head comes after the layers and remains complete.
    indices = range(config.num_layers + getattr(config, "pooling_head", False))

    def remaining(index: int, kind: str, size: int) -> int:
        return len(layers.get(index, {}).get(kind, range(size)))

    heads = [remaining(i, "heads", config.heads(i)) for i in indices]
    neurons = [remaining(i, "neurons", config.neurons(i)) for i in indices]
    fields = {"num_heads": one_or_each(heads), "intermediate_size": one_or_each(neurons)}
    if isinstance(config, DecoderConfig):
        shared = [config.kv_heads(i) for i in indices]
        own_keys = [config.heads(i) == shared[i] for i in indices]
        fields["num_kv_heads"] = one_or_each(
            [heads[i] if own_keys[i] else shared[i] for i in indices]
        )
    elif fields["num_heads"] != config.num_heads:
        fields["head_dim"] = config.head_size
    return dataclasses.replace(config, **fields)
