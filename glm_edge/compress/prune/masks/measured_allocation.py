"""Sparsities by measurement: the divergence after masking each group of matrices alone."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from glm_edge import params as boxes
from glm_edge.compress.allocate import divergence, knapsack
from glm_edge.compress.batches import Batch
from glm_edge.compress.calibration import Called
from glm_edge.compress.prune.masks.config import MaskConfig, masked_leaves
from glm_edge.compress.prune.masks.shapes import Pool
from glm_edge.compress.transform import Context
from glm_edge.errors import DataError, RecipeError
from glm_edge.params.patterns import compiled
from glm_edge.params.tree import nested


def split(
    masking: MaskConfig, calibration: Sequence[Batch]
) -> tuple[list[Batch] | None, dict[str, list[Batch]]]:
    """Split batches into those for the score and those held out, every second of each kind.

    Raises:
      DataError: a kind has a single batch and the score needs one too.
    """
    reads = masking.score.reads_inputs or masking.score.reads_gradients
    counts = Counter(divergence.kind_of(batch, calibration) for batch in calibration)
    lone = next((kind for kind, count in counts.items() if count < 2), None)
    if reads and lone is not None:
        raise DataError(
            f"{masking.name}: calibration holds one batch of {lone}; give two or more, since every "
            "second is held out from the score to measure on"
        )
    return divergence.split(calibration, reads)


def allocate(
    masking: MaskConfig,
    model: nn.Module | Called,
    leaves: Mapping[str, Any],
    pools: Sequence[Pool],
    scores: Sequence[np.ndarray],
    held_out: Mapping[str, Sequence[Batch]],
    context: Context,
) -> tuple[list[int], tuple[str, ...]]:
    """Choose the sparsity of each group of matrices by the divergence after masking it alone.

    Divergences of the logits are assumed to add up over groups. Dynamic programming finds the
    sparsities of least sum within the budget.

    Args:
      masking: options of the mask: `levels` to choose from, and a sparsity or a budget.
      model: Linen module, or `Called`.
      leaves: parameters by path.
      pools: of units.
      scores: [g, u] of each pool.
      held_out: batches by kind.
      context: for progress.

    Returns:
      `(units that each group of each pool loses, notes for the report)`.

    Raises:
      RecipeError: the levels do not reach the budget.
    """
    measure = divergence.Divergence(model, nested(dict(leaves)), held_out)
    groups = _groups(pools, divergence.GROUPS)
    options: list[list[knapsack.Option]] = []
    choices: list[list[tuple[int, ...]]] = []

    def masked(members: Sequence[int], counts: Sequence[int]) -> dict[str, Any]:
        pools_and_scores = ([pools[i] for i in members], [scores[i] for i in members])
        return masked_leaves(masking, leaves, *pools_and_scores, counts)

    for number, members in enumerate(groups.values()):
        tried = _tried([pools[i] for i in members], masking.levels)
        group_options = []
        for level, counts in tried.items():
            loss = dict.fromkeys(measure.kinds, 0.0)
            if any(counts):
                loss = measure({**leaves, **masked(members, counts)})
            size = sum(
                _size(masking, pools[i], count, leaves)
                for i, count in zip(members, counts, strict=True)
            )
            group_options.append(knapsack.Option(f"{level:g}", size, loss))
        options.append(group_options)
        choices.append(list(tried.values()))
        context.advance(f"{masking.name}: measure", number + 1, len(groups))
    points = knapsack.frontier(options, _fixed(masking, pools, leaves))
    point = _within(masking, points, _budget(masking, pools))
    removed = [0] * len(pools)
    for members, levels_of_group, chosen in zip(
        groups.values(), choices, point.choice, strict=True
    ):
        for index, count in zip(members, levels_of_group[chosen], strict=True):
            removed[index] = count
    everything = masked(range(len(pools)), removed)
    together = measure({**leaves, **everything})
    levels = ", ".join(
        f"{name} {options[i][point.choice[i]].format}" for i, name in enumerate(groups)
    )
    return removed, (
        f"measured allocation: divergence {point.cost:.4g} nats a token predicted, "
        f"{np.mean(list(together.values())):.4g} measured on held-out batches",
        f"sparsities: {levels}",
    )


def _groups(pools: Sequence[Pool], patterns: Sequence[str]) -> dict[str, list[int]]:
    """Return the pools by the match of the first pattern that matches their path."""
    groups: dict[str, list[int]] = {}
    for index, pool in enumerate(pools):
        path = pool.members[0].path
        matches = (compiled(pattern).match(path) for pattern in patterns)
        name = next(filter(None, matches), path)
        groups.setdefault(name, []).append(index)
    return groups


def _tried(pools: Sequence[Pool], levels: Sequence[float]) -> dict[float, tuple[int, ...]]:
    """Count of each level that leaves a unit, without repetitions of a lower level's."""
    counts_by_level: dict[float, tuple[int, ...]] = {}
    for level in levels:
        try:
            counts = tuple(pool.count(level) for pool in pools)
        except RecipeError:
            break
        if counts not in counts_by_level.values():
            counts_by_level[level] = counts
    if not counts_by_level:
        raise RecipeError(f"{pools[0].name}: levels={list(levels)} all leave nothing; add 0.0")
    return counts_by_level


def _size(masking: MaskConfig, pool: Pool, count: int, leaves: Mapping[str, Any]) -> int:
    """Return the cost of a pool after `count` units of each group are removed."""
    return sum(
        math.ceil(_cost(masking, member.path, leaves) * member.weights)
        * (pool.units - count)
        // pool.units
        for member in pool.members
    )


def _cost(masking: MaskConfig, path: str, leaves: Mapping[str, Any]) -> float:
    """Return the cost of one weight: bytes, operations, or one."""
    if masking.budget_bytes is not None:
        return boxes.stored_bytes(leaves[path]) / math.prod(leaves[path].shape)
    if masking.budget_flops is not None:
        looked_up = path == "embed/weight" and "head/weight" in leaves
        return 0.0 if looked_up else 2.0
    return 1.0


def _fixed(masking: MaskConfig, pools: Sequence[Pool], leaves: Mapping[str, Any]) -> int:
    if masking.budget_bytes is None:
        return 0
    owned = {member.path for pool in pools for member in pool.members}
    return boxes.stored_bytes([leaf for path, leaf in leaves.items() if path not in owned])


def _budget(masking: MaskConfig, pools: Sequence[Pool]) -> int:
    if masking.sparsity is not None:
        total = sum(pool.weights for pool in pools)
        return total - round(masking.sparsity * total)
    return masking.budget_bytes or masking.budget_flops or 0


def _within(masking: MaskConfig, points: Sequence[Any], budget: int) -> Any:
    fitting = [point for point in points if point.bytes <= budget]
    if not fitting:
        asked = "budget_bytes" if masking.budget_bytes else "budget_flops"
        asked = "sparsity" if masking.sparsity is not None else asked
        raise RecipeError(
            f"{masking.name}: {asked} leaves {budget:,} and the highest of levels leave "
            f"{points[0].bytes:,}; add higher levels, or ask for less"
        )
    return fitting[-1]
