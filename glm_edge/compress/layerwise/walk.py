"""Forward passes of a stage that continue from one group of weights to the next.

GPTQ compresses the groups of a stage in turn, each on inputs that the groups before it compute
after compression. A `Walk` cuts the traced stage into segments, one per group. A segment starts
from the arrays that the segments before it stored, so that each product of the stage runs once.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, jaxpr_as_fun

from glm_edge import params as boxes
from glm_edge.compress.layerwise.stages import ROWS, Leaves, Stage, State, measured
from glm_edge.compress.timing import timed
from glm_edge.params import Quantized
from glm_edge.params.tree import nested

Groups = tuple[tuple[str, ...], ...]


class Walk:
    """A pass of all batches through one stage, one group of weights after the other."""

    def __init__(
        self, stage: Stage, states: Sequence[State], groups: Groups, fixed: bool = False
    ) -> None:
        """Start before the first group.

        Args:
          stage: the stage, see `supports_walk`.
          states: state of each batch before the stage.
          groups: paths of the weights that read the same rows, see `StageInputs.readers`.
          fixed: True if no weight changes. A batch then finishes at the last group, so that its
            stored arrays are not kept until `finish`.
        """
        self._stage, self._start, self._groups, self._fixed = stage, states, groups, fixed
        self._group_of = {path: index for index, group in enumerate(groups) for path in group}
        self._prefix = f"{stage.root}/" if stage.root else ""
        self._restart()

    def rows(self, leaves: Leaves, path: str) -> Iterator[dict[str, Array]]:
        """Iterate over the input rows of one weight.

        The pass continues from the previous call if that call was for an earlier group and if no
        weight changed since it was read. Otherwise the pass restarts.

        Args:
          leaves: parameters by full path, including borrowed ones.
          path: path of the weight.

        Yields:
          Rows float32 [N, in] by path, per batch; empty for a batch that skips the stage.
        """
        index = self._group_of[path]
        if index < self._passed or self._is_stale(leaves):
            self._restart()
        while self._passed < index:
            for _ in self._next(leaves):
                pass
        for results in self._next(leaves):
            yield {path: results[0]} if results else {}

    def finish(self, leaves: Leaves) -> list[State]:
        """Run the batches to the end of the stage, and return the states after it.

        Args:
          leaves: parameters by full path, including borrowed ones.
        """
        if self._is_stale(leaves):
            self._restart()
        while self._passed <= len(self._groups):
            for _ in self._next(leaves):
                pass
        return self._states

    def _restart(self) -> None:
        self._states = list(self._start)
        self._stored: list[list[Array]] = [[] for _ in self._start]
        self._passed = 0
        self._read: Leaves = {}

    def _is_stale(self, leaves: Leaves) -> bool:
        return any(leaves[path] is not leaf for path, leaf in self._read.items())

    def _next(self, leaves: Leaves) -> Iterator[list[Array]]:
        """Run the next segment of each batch, and iterate over the rows of its group."""
        index, last = self._passed, len(self._groups)
        self._passed = last + 1 if self._fixed and index + 1 >= last else index + 1
        dense: Leaves = {}
        for batch, state in enumerate(self._states):
            if self._stage.reads not in state:
                yield []
                continue
            segments, build = _traced(self._stage, leaves, state, self._groups)
            results = self._run(segments[index], batch, leaves, dense)
            if self._passed > last:
                end = results if index == last else self._run(segments[last], batch, leaves, dense)
                self._states[batch] = build(end)
            yield [] if index == last else results

    def _run(self, segment: "Segment", batch: int, leaves: Leaves, dense: Leaves) -> list[Array]:
        inputs, arguments = jax.tree.leaves(self._states[batch]), []
        for name, leaf in segment.arguments:
            if name is None:
                arguments.append(inputs[leaf])
                continue
            path = self._prefix + name
            if path not in dense:
                dense[path] = jax.tree.leaves(_dense_of(leaves[path], path in self._group_of))
            if name in segment.settled:
                self._read.setdefault(path, leaves[path])
            arguments.append(dense[path][leaf])
        stored = self._stored[batch]
        outputs = timed("forward", segment.run, *arguments, *(stored[i] for i in segment.reads))
        results, new = outputs[: segment.results], outputs[segment.results :]
        self._stored[batch] = [stored[i] for i in segment.keeps] + new
        return results


def supports_walk(stage: Stage, groups: Groups) -> bool:
    """Test for a stage that can run in segments.

    Args:
      stage: the stage. Its module computes in float32, so that results do not depend on when
        weights are dequantized.
      groups: see `Walk`. No weight is in two groups, as that of a layer that runs twice.
    """
    paths = [path for group in groups for path in group]
    is_float32 = getattr(stage.module, "compute", None) == "float32"
    return is_float32 and len(set(paths)) == len(paths)


def _dense_of(leaf: Any, grouped: bool) -> Any:
    """Return a leaf as segments read it, so that compression does not change its type."""
    if isinstance(leaf, Quantized):
        return leaf.replace(dtype="float32").unbox()
    return boxes.dense(leaf).astype(jnp.float32) if grouped else leaf


class Segment(NamedTuple):
    """The operations between two groups.

    Attributes:
      run: function of the arguments and of the stored arrays that it reads. It returns results,
        then arrays to store.
      arguments: origin of each argument: name of a parameter, or None for the state; and its leaf.
      settled: names of the parameters whose products are final.
      reads: indices of the stored arrays that `run` reads.
      keeps: indices of the stored arrays that later segments read.
      results: count of results: the rows of the group, or the entries of the state after the stage.
    """

    run: Callable[..., list[Array]]
    arguments: tuple[tuple[str | None, int], ...]
    settled: frozenset[str]
    reads: tuple[int, ...]
    keeps: tuple[int, ...]
    results: int


# The segments of a stage, and the function that builds its state after from its entries.
Cut = tuple[tuple[Segment, ...], Callable[[list[Array]], State]]


def _traced(stage: Stage, leaves: Leaves, state: State, groups: Groups) -> Cut:
    """Cut a stage into a segment per group and one to its end; equal stages share them."""
    start = len(stage.root) + 1 if stage.root else 0
    named = tuple(tuple(path[start:] for path in group) for group in groups)
    grouped = {name for group in named for name in group}
    shapes = {}
    for path, leaf in leaves.items():
        if path.startswith(stage.root):
            dense = functools.partial(_dense_of, grouped=path[start:] in grouped)
            shapes[path[start:]] = jax.eval_shape(dense, leaf)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (shapes, state))
    shaped, structure = jax.tree.flatten(abstract)
    return _segments(stage.module, stage.forward, stage.counted, named, structure, tuple(shaped))


@functools.lru_cache(maxsize=16)
def _segments(
    module: nn.Module,
    forward: Callable[..., State],
    counted: Callable[[State], Array | None],
    groups: Groups,
    structure: Any,
    shaped: tuple[jax.ShapeDtypeStruct, ...],
) -> Cut:
    leaves, state = jax.tree.unflatten(structure, shaped)
    first = tuple(group[0] for group in groups)

    def forward_pass(leaves: Leaves, state: State) -> tuple[dict[str, Array], State]:
        after, rows = measured(module, forward, nested(leaves), state, ROWS.measure, first, counted)
        return {name: jnp.concatenate(calls) for name, calls in rows.items()}, after

    closed, (rows, after) = jax.make_jaxpr(forward_pass, return_shape=True)(leaves, state)
    origins: list[tuple[str | None, int]] = [
        (name, leaf)
        for name in sorted(leaves)
        for leaf in range(len(jax.tree.leaves(leaves[name])))
    ]
    origins += [(None, leaf) for leaf in range(len(jax.tree.leaves(state)))]
    outputs = iter(closed.jaxpr.outvars)
    by_name = {name: [next(outputs)] for name in sorted(rows)}
    targets = [by_name.get(name, []) for name in first] + [list(outputs)]
    # The index of the last group of a parameter, plus one; zero for one that does not change.
    last = {name: index + 1 for index, group in enumerate(groups) for name in group}
    levels = [0 if name is None else last.get(name, 0) for name, _ in origins]
    build = functools.partial(jax.tree.unflatten, jax.tree.structure(after))
    return tuple(_cut(closed, targets, levels, origins)), build


def _cut(
    closed: ClosedJaxpr,
    targets: list[list[Any]],
    levels: list[int],
    origins: list[tuple[str | None, int]],
) -> Iterator[Segment]:
    """Cut a traced function where each list of targets is complete.

    Args:
      closed: the traced function.
      targets: results of each segment.
      levels: first segment by input in which its value is final.
      origins: origin of each input, see `Segment`.

    Yields:
      The segments.
    """
    jaxpr = closed.jaxpr
    # A result is final as soon as all values that it depends on are.
    level = dict(zip(jaxpr.invars, levels, strict=True)) | dict.fromkeys(jaxpr.constvars, 0)
    for equation in jaxpr.eqns:
        deepest = max((level[x] for x in equation.invars if not isinstance(x, Literal)), default=0)
        level |= dict.fromkeys(equation.outvars, deepest)
    stored: list[Any] = []
    for index, results in enumerate(targets):
        equations, inputs = _needed(jaxpr.eqns, results, stored)
        final = {x for equation in equations for x in equation.outvars if level[x] <= index}
        known = {*stored, *final}
        later = _needed(jaxpr.eqns, [x for t in targets[index + 1 :] for x in t], known)[1] & known
        new = [x for equation in equations for x in equation.outvars if x in later]
        arguments = [i for i, x in enumerate(jaxpr.invars) if x in inputs]
        reads = tuple(i for i, x in enumerate(stored) if x in inputs)
        keeps = tuple(i for i, x in enumerate(stored) if x in later)
        origin_levels = [(origins[i][0], levels[i]) for i in arguments]
        part = jaxpr.replace(
            invars=[jaxpr.invars[i] for i in arguments] + [stored[i] for i in reads],
            outvars=[*results, *new],
            eqns=equations,
            debug_info=jaxpr.debug_info._replace(arg_names=None, result_paths=None),
        )
        yield Segment(
            jax.jit(jaxpr_as_fun(ClosedJaxpr(part, closed.consts))),
            tuple(origins[i] for i in arguments),
            frozenset(name for name, level in origin_levels if name is not None and level <= index),
            reads,
            keeps,
            len(results),
        )
        stored = [stored[i] for i in keeps] + new


def _needed(
    equations: Sequence[JaxprEqn], results: Iterable[Any], known: Collection[Any]
) -> tuple[list[JaxprEqn], set[Any]]:
    """Return the equations that compute results from known values, and all values they read."""
    wanted = {x for x in results if not isinstance(x, Literal)}
    known, needed = set(known), []
    for equation in reversed(equations):
        if any(x in wanted and x not in known for x in equation.outvars):
            needed.append(equation)
            wanted |= {x for x in equation.invars if not isinstance(x, Literal)}
    return needed[::-1], wanted
