"""Heads, neurons, layers and vocabulary rows of a GLM: which weights belong to each."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn

from glm_edge.compress.prune.masks.shapes import (
    HEAD,
    LAYER,
    NEURON,
    VOCAB,
    Member,
    Part,
    Pool,
    Shape,
)
from glm_edge.compress.prune.shrink.tokenizer import named_tokens
from glm_edge.errors import RecipeError

_STACKS = ("decoder", "vision", "speech")
_FUSED, _PLAIN = ("gate_up_proj", "down_proj"), ("fc1", "fc2")
Sizes = Mapping[str, tuple[int, int]]


def unit_pools(
    transform: str, model: nn.Module, shape: Shape, sizes: Sizes, chosen: Collection[str]
) -> list[Pool]:
    """The units of a model that are more than one matrix.

    Args:
      transform: name, for messages.
      model: a GLM.
      shape: `head`, `neuron`, `layer` or `vocab`.
      sizes: `(rows, columns)` of every parameter by path.
      chosen: paths that the transform's pattern selects; a layer takes part where any of its
        weights of this kind is among them.

    Returns:
      For heads and neurons a pool for each layer, else one.

    Raises:
      RecipeError: the model has no such units, or the pattern selects none.
    """
    config = getattr(model, "config", None)
    if getattr(config, "decoder", None) is None:
        raise RecipeError(
            f"{transform}: {type(model).__name__} has no GLM decoder, so shape={shape.kind!r} "
            "means nothing; channel and block are for any model"
        )
    build = {HEAD: _heads, NEURON: _neurons, LAYER: _layers, VOCAB: _vocabulary}[shape.kind]
    pools = build(config, sizes, chosen)
    if not pools:
        raise RecipeError(f"{transform}: where= selects no matrix of a {shape.kind}")
    return pools


def _heads(config: Any, sizes: Sizes, chosen: Collection[str]) -> list[Pool]:
    pools = []
    for stack in _STACKS:
        stack_config = getattr(config, stack, None)
        for index in range(0 if stack_config is None else stack_config.num_layers):
            prefix = f"{stack}/layers/{index}/attention"
            if _any_below(prefix, chosen):
                pools.append(
                    _heads_of(
                        prefix, stack_config.heads(index), stack_config.kv_heads(index), sizes
                    )
                )
    return pools


def _heads_of(prefix: str, heads: int, kv_heads: int, sizes: Sizes) -> Pool:
    """Query heads by the key/value head they share; where each has its own, both go."""
    alone = heads == kv_heads
    groups = 1 if alone else kv_heads
    rows, columns = sizes[f"{prefix}/q_proj/weight"]
    within = {"g": groups, "n": heads // groups, "h": rows // heads, "d": columns}
    names = ("q_proj", "k_proj", "v_proj") if alone else ("q_proj",)
    owned = [
        Member(f"{prefix}/{name}/weight", "(g n h) d -> g n (h d)", tuple(within.items()))
        for name in names
    ]
    within["d"] = sizes[f"{prefix}/o_proj/weight"][0]
    path = f"{prefix}/o_proj/weight"
    output = Member(path, "d (g n h) -> g n (d h)", tuple(within.items()))
    part = Part((*owned, output), (output,))
    return Pool(prefix, (part,), groups, heads // groups, at_least=1, upward=True)


def _neurons(config: Any, sizes: Sizes, chosen: Collection[str]) -> list[Pool]:
    prefixes = dict.fromkeys(
        matched.group(1) for path in sizes if (matched := re.search(r"^(.*layers/\d+/mlp)/", path))
    )
    # The feed-forward network of some encoders lies in the layer itself.
    prefixes |= dict.fromkeys(
        matched.group(1) for path in sizes if (matched := re.search(r"^(.*layers/\d+)/fc1/", path))
    )
    matched = []
    for prefix in prefixes:
        names = _FUSED if f"{prefix}/{_FUSED[0]}/weight" in sizes else _PLAIN
        paths = [f"{prefix}/{name}/weight" for name in names]
        if not set(paths) & set(chosen):
            continue
        features, neurons = sizes[paths[1]]
        halves = sizes[paths[0]][0] // neurons
        inner = (("s", halves), ("f", neurons), ("d", sizes[paths[0]][1]))
        up = Member(paths[0], "(s f) d -> 1 f (s d)", inner)
        down = Member(paths[1], "d f -> 1 f d", (("d", features), ("f", neurons)))
        matched.append(Pool(prefix, (Part((up, down), (down,)),), 1, neurons, at_least=1))
    return matched


def _layers(config: Any, sizes: Sizes, chosen: Collection[str]) -> list[Pool]:
    decoder, parts = config.decoder, []
    for index in range(decoder.num_layers):
        prefix = f"decoder/layers/{index}"
        if not _any_below(prefix, chosen):
            continue
        matrices = [f"{prefix}/attention/{name}/weight" for name in ("q_proj", "k_proj", "v_proj")]
        matrices += [f"{prefix}/attention/o_proj/weight"]
        matrices += [f"{prefix}/mlp/{name}/weight" for name in _FUSED]
        # A norm after a branch undoes any scale before it.
        gates = [matrices[3], matrices[5]]
        if decoder.sandwich_norm:
            norms = ("post_self_attention_norm", "post_mlp_norm")
            gates = [f"{prefix}/{name}/weight" for name in norms]
        parts.append(
            Part(
                tuple(_matrix_member(path, sizes) for path in matrices),
                tuple(_matrix_member(path, sizes) for path in gates),
            )
        )
    if not parts:
        return []
    return [Pool("decoder/layers", tuple(parts), 1, len(parts), at_least=1)]


def _vocabulary(config: Any, sizes: Sizes, chosen: Collection[str]) -> list[Pool]:
    paths = [path for path in ("embed/weight", "head/weight") if path in sizes]
    if not set(paths) & set(chosen):
        return []
    rows = sizes[paths[0]][0]
    members = tuple(
        Member(path, "v d -> 1 v d", (("v", rows), ("d", sizes[path][1]))) for path in paths
    )
    needed = tuple(index for index in sorted(named_tokens(config)) if index < rows)
    part = Part(members, members)
    return [Pool("vocabulary", (part,), 1, rows, at_least=max(1, len(needed)), needed=needed)]


def _matrix_member(path: str, sizes: Sizes) -> Member:
    rows, columns = sizes[path]
    return Member(path, "r c -> 1 1 (r c)", (("r", rows), ("c", columns)))


def _any_below(prefix: str, chosen: Collection[str]) -> bool:
    return any(path.startswith(f"{prefix}/") for path in chosen)
