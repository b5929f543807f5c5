"""Number and choice of the units that each pool loses."""

from collections.abc import Sequence

import numpy as np

from glm_edge.compress.prune.masks.shapes import Pool

UNIFORM, GLOBAL, MEASURED = "uniform", "global", "measured"


def uniform(pools: Sequence[Pool], sparsity: float) -> list[int]:
    """Count the units that each pool loses at one sparsity.

    Args:
      pools: of units.
      sparsity: fraction to remove.

    Returns:
      Units that each group of each pool loses.

    Raises:
      RecipeError: a pool would lose units that must remain.
    """
    return [pool.count(sparsity) for pool in pools]


def over_all(pools: Sequence[Pool], scores: Sequence[np.ndarray], sparsity: float) -> list[int]:
    """Count the units that each pool loses under one threshold for all pools.

    The groups of a pool lose the same number: their lowest units go together, then their second
    lowest. Each such set is ranked by the mean of its scores.

    Args:
      pools: of units.
      scores: [g, u] of each pool.
      sparsity: fraction of all weights of the pools to remove.

    Returns:
      As `uniform`.
    """
    ranked, sizes, owners = [], [], []
    for index, (pool, values) in enumerate(zip(pools, scores, strict=True)):
        means = np.sort(values, axis=1)[:, : pool.units - pool.at_least].mean(axis=0)
        ranked.append(means)
        sizes.append(np.full(len(means), pool.weights // pool.units, np.int64))
        owners.append(np.full(len(means), index))
    order = np.argsort(np.concatenate(ranked), kind="stable")
    removed = np.cumsum(np.concatenate(sizes)[order])
    count = np.searchsorted(removed, round(sparsity * sum(pool.weights for pool in pools)), "right")
    return np.bincount(np.concatenate(owners)[order[:count]], minlength=len(pools)).tolist()


def mark_kept(scores: np.ndarray, count: int) -> np.ndarray:
    """Mark the units that remain after the lowest scores of each group, of equal ones the first.

    Args:
      scores: [g, u].
      count: units that each group loses.

    Returns:
      bool [g, u].
    """
    keep = np.ones(scores.shape, bool)
    if len(scores) == 1 and 0 < count < scores.shape[1]:
        # Sorting all to find the first few of millions would take most of the time.
        edge = np.partition(scores[0], count - 1)[count - 1]
        keep[0] = scores[0] >= edge
        equal = np.flatnonzero(scores[0] == edge)
        keep[0, equal[: count - np.count_nonzero(~keep)]] = False
    elif count:
        lowest = np.argsort(scores, axis=1, kind="stable")[:, :count]
        np.put_along_axis(keep, lowest, False, axis=1)
    return keep


def keep_highest(scores: np.ndarray, count: int) -> np.ndarray:
    """Mark the highest scores of each group, of equal scores the first.

    Args:
      scores: [g, u].
      count: units of each group that remain.

    Returns:
      bool [g, u].
    """
    return mark_kept(scores[:, ::-1], scores.shape[1] - count)[:, ::-1]
