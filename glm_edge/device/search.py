"""Search of recipes by two or more objectives, such as loss and seconds per token.

Where objectives are sums over groups, `exact_front` finds the front; `nsga2` is for those that are
not, such as speed after throttling. A candidate is an integer per variable. Letters: `n`
candidates, `V` variables, `M` objectives, all of which are minimized.

References:
  A fast and elitist multiobjective genetic algorithm: NSGA-II, https://doi.org/10.1109/4235.996017.
"""

from collections.abc import Callable, Sequence

import numpy as np

from glm_edge.compress.allocate.knapsack import Option, frontier
from glm_edge.errors import DataError

Evaluate = Callable[[np.ndarray], np.ndarray]
# A child changes about this many variables by one step.
MUTATIONS = 1.5


def dominates(objectives: np.ndarray) -> np.ndarray:
    """Compare every pair of candidates.

    Args:
      objectives: [n, M].

    Returns:
      bool [n, n]: the row is nowhere worse and somewhere better than the column.
    """
    first, second = objectives[:, None], objectives[None]
    return np.logical_and((first <= second).all(axis=2), (first < second).any(axis=2))


def pareto_front(objectives: np.ndarray) -> np.ndarray:
    """Find the candidates that no other one dominates.

    Args:
      objectives: [n, M].

    Returns:
      Their indices, by ascending first objective.
    """
    indices = np.flatnonzero(~dominates(objectives).any(axis=0))
    return indices[np.argsort(objectives[indices, 0], kind="stable")]


def hypervolume(objectives: np.ndarray, reference: Sequence[float]) -> float:
    """Compute the area between the front of two objectives and a reference point.

    Args:
      objectives: [n, 2].
      reference: a point that useful candidates dominate.

    Returns:
      The area; 0 if no candidate is below the reference in both objectives.
    """
    right, top = reference
    area, height = 0.0, top
    inside = objectives[(objectives < np.asarray(reference)).all(axis=1)]
    # From the left, each candidate adds the part below all before it.
    for x, y in inside[np.lexsort((inside[:, 1], inside[:, 0]))]:
        if y < height:
            area += (right - x) * (height - y)
            height = y
    return float(area)


def exact_front(
    losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], fixed_cost: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Find the front of sums over groups by dynamic programming.

    Args:
      losses: loss of each option, per group.
      costs: cost of each option in whole units, such as nanoseconds or bytes, per group.
      fixed_cost: cost outside of all groups.

    Returns:
      `(choices, objectives)`: the option per group [n, V], and sums of loss and cost [n, 2], by
      ascending cost. Above 2^17 states, states of similar cost are merged.

    Raises:
      DataError: the groups of losses and costs differ.
    """
    if [len(group) for group in losses] != [len(group) for group in costs] or not len(losses):
        raise DataError("exact_front: losses and costs must have the same groups and options")
    groups = [
        [
            Option(str(i), int(c), {"loss": float(x)})
            for i, (x, c) in enumerate(zip(*g, strict=True))
        ]
        for g in zip(losses, costs, strict=True)
    ]
    points = frontier(groups, fixed_cost)
    choices = np.array([point.choice for point in points])
    return choices, np.array([(point.cost, point.bytes) for point in points], float)


def ranks(objectives: np.ndarray) -> np.ndarray:
    """Count the fronts before that of each candidate [n]."""
    beaten = dominates(objectives)
    rank = np.full(len(objectives), -1)
    front = 0
    while (rank < 0).any():
        waiting = rank < 0
        rank[waiting & ~(beaten & waiting[:, None]).any(axis=0)] = front
        front += 1
    return rank


def crowding(objectives: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Compute the distance between the neighbours of each candidate in its front [n]."""
    distance = np.zeros(len(objectives))
    for front in np.unique(rank):
        members = np.flatnonzero(rank == front)
        for objective in objectives[members].T:
            order = members[np.argsort(objective, kind="stable")]
            values = np.sort(objective)
            distance[order[[0, -1]]] = np.inf
            spread = max(values[-1] - values[0], 1e-12)
            distance[order[1:-1]] += (values[2:] - values[:-2]) / spread
    return distance


def nsga2(
    evaluate: Evaluate,
    sizes: Sequence[int],
    start: np.ndarray,
    evaluations: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Search by NSGA-II: tournaments, uniform crossover, and mutations by one step.

    Args:
      evaluate: function from candidates [n, V] to objectives [n, M].
      sizes: count of options of each variable [V].
      start: first candidates [n, V], an even count of at least 4; uniform recipes and an exact
        front are better than random ones.
      evaluations: count of evaluated candidates, those of the start included.
      seed: seed of the draws.

    Returns:
      `(candidates, objectives)` of the front of all that were evaluated.

    Raises:
      DataError: the start is too small or outside of the options, or objectives are not finite.
    """
    highest = np.asarray(sizes) - 1
    population = np.array(start, int)
    if population.ndim != 2 or len(population) < 4 or population.shape[1] != len(highest):
        raise DataError(
            f"nsga2: start has shape {list(population.shape)}; it must be [at least 4, "
            f"{len(highest)}]"
        )
    if (population < 0).any() or (population > highest).any():
        raise DataError("nsga2: start has an option outside of sizes")
    rng = np.random.default_rng(seed)
    size = len(population)
    objectives = _checked(evaluate(population), size)
    archive, archived = [population], [objectives]
    for begin in range(size, evaluations, size):
        count = min(size, evaluations - begin)
        rank = ranks(objectives)
        distance = crowding(objectives, rank)

        def winners(
            count: int = count, rank: np.ndarray = rank, distance: np.ndarray = distance
        ) -> np.ndarray:
            first, second = rng.integers(0, size, (2, count))
            closer = (rank[first] == rank[second]) & (distance[first] > distance[second])
            return np.where((rank[first] < rank[second]) | closer, first, second)

        mothers, fathers = population[winners()], population[winners()]
        children = np.where(rng.random(mothers.shape) < 0.5, mothers, fathers)
        mutated = rng.random(children.shape) < MUTATIONS / len(highest)
        steps = rng.integers(-1, 2, children.shape)
        children = np.clip(children + mutated * steps, 0, highest)
        results = _checked(evaluate(children), count)
        archive.append(children)
        archived.append(results)
        population = np.concatenate([population, children])
        objectives = np.concatenate([objectives, results])
        rank = ranks(objectives)
        best = np.lexsort((-crowding(objectives, rank), rank))[:size]
        population, objectives = population[best], objectives[best]
    candidates, values = np.concatenate(archive), np.concatenate(archived)
    values, unique = np.unique(values, axis=0, return_index=True)
    front = pareto_front(values)
    return candidates[unique][front], values[front]


def _checked(objectives: np.ndarray, count: int) -> np.ndarray:
    values = np.asarray(objectives, float)
    if values.ndim != 2 or len(values) != count or not np.isfinite(values).all():
        raise DataError(
            f"nsga2: evaluate returned {list(values.shape)}; it must return finite values of shape "
            f"[{count}, objectives]"
        )
    return values
