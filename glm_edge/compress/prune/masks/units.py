"""Heads, neurons, layers and vocabulary rows of a model, and the weights that belong to each."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

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
from glm_edge.compress.prune.shrink.stacks import DECODER, Stack, stacks_of
from glm_edge.compress.prune.shrink.tokenizer import named_tokens
from glm_edge.errors import RecipeError

_LAYER = re.compile(r"(?:(\w+)/)?layers/(\d+)\b")
Sizes = Mapping[str, tuple[int, int]]


def unit_pools(
    transform: str, model: Any, shape: Shape, sizes: Sizes, chosen: Collection[str]
) -> list[Pool]:
    """Return the units of a model that are more than one matrix.

    Args:
      transform: name, for messages.
      model: a GLM; for heads and neurons also an encoder on its own.
      shape: `head`, `neuron`, `layer` or `vocab`.
      sizes: `(rows, columns)` of every parameter by path.
      chosen: paths that the transform's pattern selects; a layer takes part where any of its
        weights of this kind is among them.

    Returns:
      One pool per layer for heads and neurons, else a single pool.

    Raises:
      RecipeError: the model has no such units, or the pattern selects none.
    """
    stacks = stacks_of(model)
    if not stacks or (DECODER not in stacks and shape.kind not in (HEAD, NEURON)):
        raise RecipeError(
            f"{transform}: {type(model).__name__} has no GLM decoder, so shape={shape.kind!r} "
            "means nothing; channel and block are for any model"
        )
    if shape.kind in (HEAD, NEURON):
        pools = layer_pools(shape.kind, stacks.values(), sizes, chosen)
    else:
        build = {LAYER: _layers, VOCAB: _vocabulary}[shape.kind]
        pools = build(model.config, sizes, chosen)
    if not pools:
        raise RecipeError(f"{transform}: where= selects no matrix of a {shape.kind}")
    return pools


def layer_pools(
    kind: str, stacks: Iterable[Stack], sizes: Sizes, chosen: Collection[str]
) -> list[Pool]:
    """Return the heads or neurons of the layers that a pattern selects, one pool per layer.

    Args:
      kind: `head` or `neuron`.
      stacks: decoder and encoders to look at.
      sizes: `(rows, columns)` of every parameter by path.
      chosen: paths that the transform's pattern selects.
    """
    build, chosen = {HEAD: _heads, NEURON: _neurons}[kind], frozenset(chosen)
    pools = []
    for stack in stacks:
        paths_of = stack.attention_paths if kind == HEAD else stack.mlp_paths
        for index in range(stack.config.num_layers):
            if any(f"{path}/weight" in chosen for path in paths_of(index)):
                pools.append(build(stack, index, sizes))
    return pools


def keep_by_layer(
    marks: Iterable[tuple[str, Pool, np.ndarray]],
) -> dict[str, dict[int, dict[str, np.ndarray]]]:
    """Return the units that remain as `shrink_units` takes them.

    Args:
      marks: `(kind, pool, bool [g, u])`, with the pools of `layer_pools`; True remains.
    """
    keep: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    for kind, pool, remaining in marks:
        stack, index = stack_and_layer(pool)
        layer = keep.setdefault(stack, {}).setdefault(index, {})
        layer[f"{kind}s"] = np.flatnonzero(remaining)
    return keep


def stack_and_layer(pool: Pool) -> tuple[str, int]:
    """Return the stack's name and the layer's index of a pool of `layer_pools`."""
    matched = _LAYER.match(pool.name)
    if matched is None:
        raise ValueError(f"{pool.name}: not a pool of a layer")
    stack, index = matched.groups()
    return stack or "", int(index)


def _heads(stack: Stack, index: int, sizes: Sizes) -> Pool:
    """Return the query heads by the key/value head they share; where each has its own, both go."""
    heads, kv_heads = stack.config.heads(index), stack.config.kv_heads(index)
    groups = 1 if heads == kv_heads else kv_heads
    inputs, output = stack.head_paths(index)
    rows, columns = sizes[f"{inputs[0]}/weight"]
    inner = {"g": groups, "n": heads // groups, "h": rows // heads, "d": columns}
    read = [
        Member(f"{path}/weight", "(g n h) d -> g n (h d)", tuple(inner.items())) for path in inputs
    ]
    inner["d"] = sizes[f"{output}/weight"][0]
    written = Member(f"{output}/weight", "d (g n h) -> g n (d h)", tuple(inner.items()))
    part = Part((*read, written), (written,))
    name = output.removesuffix("/o_proj")
    return Pool(name, (part,), groups, heads // groups, at_least=1, upward=True)


def _neurons(stack: Stack, index: int, sizes: Sizes) -> Pool:
    first, second = (f"{path}/weight" for path in stack.mlp_paths(index))
    features, neurons = sizes[second]
    halves = sizes[first][0] // neurons
    inner = (("s", halves), ("f", neurons), ("d", sizes[first][1]))
    up = Member(first, "(s f) d -> 1 f (s d)", inner)
    down = Member(second, "d f -> 1 f d", (("d", features), ("f", neurons)))
    name = second.removesuffix(f"/{stack.second}/weight")
    return Pool(name, (Part((up, down), (down,)),), 1, neurons, at_least=1)


def _layers(config: Any, sizes: Sizes, chosen: Collection[str]) -> list[Pool]:
    decoder, parts = config.decoder, []
    for index in range(decoder.num_layers):
        prefix = f"decoder/layers/{index}"
        if not any(path.startswith(f"{prefix}/") for path in chosen):
            continue
        matrices = [f"{prefix}/attention/{name}/weight" for name in ("q_proj", "k_proj", "v_proj")]
        matrices += [f"{prefix}/attention/o_proj/weight"]
        matrices += [f"{prefix}/mlp/{name}/weight" for name in ("gate_up_proj", "down_proj")]
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
