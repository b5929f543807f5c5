"""Units that a mask prunes or keeps together: a weight, a block, a channel, a head, a layer.

A shape arranges each weight as `[g, u, w]`: the `u` units of a group compete with one another,
every group loses the same number, and `w` weights form a unit. Letters elsewhere:
`r` rows (out), `c` columns (in).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array

from glm_edge.compress.prune.scores.from_weights import added, l_norm
from glm_edge.errors import RecipeError
from glm_edge.params.layouts import AS_ROWS, Layout

SINGLE = "unstructured"
CHANNEL, HEAD, NEURON, LAYER, VOCAB = "channel", "head", "neuron", "layer", "vocab"
# Units that `compact` removes from the arrays.
REMOVABLE = (HEAD, NEURON, LAYER, VOCAB)
_KNOWN = "unstructured, N:M, block:RxC, channel, head, neuron, layer or vocab"


class Shape(NamedTuple):
    """A parsed shape.

    Attributes:
      kind: `unstructured`, `n:m`, `block`, `channel`, `head`, `neuron`, `layer` or `vocab`.
      sizes: `(n, m)`, or the rows and columns of a block; empty elsewhere.
    """

    kind: str
    sizes: tuple[int, ...] = ()

    @property
    def pattern(self) -> tuple[int, int] | None:
        """`(n, m)`, or the extents of a block, None for single weights."""
        return (self.sizes[0], self.sizes[1]) if self.sizes else None

    @property
    def of_matrix(self) -> bool:
        """True where a unit is part of one matrix, in any model."""
        return self.kind not in REMOVABLE

    @property
    def sparsity(self) -> float | None:
        """The fraction that N:M fixes, None elsewhere."""
        return 1.0 - self.sizes[0] / self.sizes[1] if self.kind == "n:m" else None


def parse(transform: str, text: Any) -> Shape:
    """Parse a shape such as `2:4` or `block:4x4`.

    Args:
      transform: name, for messages.
      text: see `glm_edge.prune.mask`.

    Returns:
      The shape.

    Raises:
      RecipeError: no shape has this name.
    """
    if text in (SINGLE, CHANNEL, *REMOVABLE):
        return Shape(text)
    match = re.fullmatch(r"(\d+):(\d+)", text) if isinstance(text, str) else None
    if match:
        size, of = map(int, match.groups())
        if not 1 <= size < of:
            raise RecipeError(f"{transform}: shape {text!r} must keep N of M with 1 <= N < M")
        return Shape("n:m", (size, of))
    match = re.fullmatch(r"block:(\d+)x(\d+)", text) if isinstance(text, str) else None
    if match and min(map(int, match.groups())) >= 1:
        return Shape("block", tuple(map(int, match.groups())))
    raise RecipeError(f"{transform}: shape must be {_KNOWN}, not {text!r}")


@dataclass(frozen=True)
class Member:
    """Assignment of the weights of one matrix to units.

    Attributes:
      path: of the parameter.
      pattern: for einops, from its rows `[r, c]` to `[g, u, w]`.
      sizes: size of every axis that the pattern names.
      layout: of the parameter.
      index: of the matrix where the parameter is a stack of them, else None.
    """

    path: str
    pattern: str
    sizes: tuple[tuple[str, int], ...]
    layout: Layout = AS_ROWS
    index: int | None = None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(size for _, size in self.sizes)

    def matrix_of(self, rows: Array) -> Array:
        """Return the matrix `[r, c]`, of a stack `[matrices, r, c]` the one at the index."""
        return rows if self.index is None else rows[self.index]

    def spread(self, units: Array | np.ndarray) -> Array | np.ndarray:
        """Repeat values of units, `[g, u]`, for each of their weights, `[r, c]`."""
        pattern_before, pattern_after = self.pattern.split(" -> ")
        module = jnp if isinstance(units, Array) else np
        each_weight = module.broadcast_to(
            units[..., None], (*units.shape, self.weights // units.size)
        )
        return rearrange(each_weight, f"{pattern_after} -> {pattern_before}", **dict(self.sizes))


def rounded_up(size: int, fraction: float) -> int:
    """Compute a fraction of a size, rounded up."""
    # The margin keeps 0.3 * 10 = 3.0000000000000004 from removing four.
    return math.ceil(fraction * size - 1e-9)


class Part(NamedTuple):
    """Some of the units of a pool.

    Attributes:
      owned: weights that are removed with a unit.
      gates: weights that multiply all outputs of a unit: scaling them scales the unit.
    """

    owned: tuple[Member, ...]
    gates: tuple[Member, ...]


@dataclass(frozen=True)
class Pool:
    """Units that compete, `groups` times `units` of them.

    Attributes:
      name: path, or common prefix of several.
      parts: parts in their order along `u`.
      groups: `g`.
      units: `u`.
      at_least: units of each group that remain at any sparsity.
      upward: rounds the number of removed units up, else to nearest.
      needed: units that remain at any score, at most `at_least`.
    """

    name: str
    parts: tuple[Part, ...]
    groups: int
    units: int
    at_least: int = 0
    upward: bool = False
    needed: tuple[int, ...] = ()

    @property
    def members(self) -> tuple[Member, ...]:
        """Weights of all units."""
        return tuple(member for part in self.parts for member in part.owned)

    @property
    def weights(self) -> int:
        """Number of weights of all units."""
        return sum(member.weights for member in self.members)

    def count(self, sparsity: float) -> int:
        """Count the units that each group loses.

        Raises:
          RecipeError: units that must remain would be removed.
        """
        count = rounded_up(self.units, sparsity) if self.upward else round(sparsity * self.units)
        if count > self.units - self.at_least:
            few = "none" if self.at_least == 1 else f"too few, below {self.at_least},"
            raise RecipeError(
                f"{self.name}: sparsity={sparsity:g} leaves {few} of {self.units}; ask for less"
            )
        return count

    def reduced(
        self, rows: Mapping[str, Array], order: float | None = None, gates: bool = False
    ) -> Array:
        """Reduce values of weights to values of units.

        Args:
          rows: `[r, c]` by path, or `[matrices, r, c]` of a stack.
          order: order of the norm over the weights of a unit; None sums them with their signs.
          gates: reduces a unit's gates instead of the weights that go with it.

        Returns:
          [g, u].
        """
        parts_reduced = [
            _norm(
                [member.matrix_of(rows[member.path]) for member in part[int(gates)]],
                tuple((member.pattern, member.sizes) for member in part[int(gates)]),
                order,
            )
            for part in self.parts
        ]
        return (
            parts_reduced[0] if len(parts_reduced) == 1 else jnp.concatenate(parts_reduced, axis=1)
        )

    def spread(self, units: Array | np.ndarray) -> dict[str, Any]:
        """Repeat values of units, [g, u], for each of their weights: `[r, c]` by path."""
        parts = [units] if len(self.parts) == 1 else np.split(units, len(self.parts), axis=1)
        return {
            member.path: member.spread(part_units)
            for part, part_units in zip(self.parts, parts, strict=True)
            for member in part.owned
        }

    @property
    def index(self) -> int | None:
        """Index of the units' matrix where a parameter is a stack of matrices, else None."""
        return self.parts[0].owned[0].index


def spread_over(
    pools: Sequence[Pool], units: Sequence[Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Repeat values of the units of all pools for each of their weights.

    Args:
      pools: of units.
      units: [g, u] of each pool.
      shapes: of the parameters by path.

    Returns:
      Arrays shaped like the parameters, by path.
    """
    matrices: dict[str, list[Any]] = {}
    layouts = {member.path: member.layout for pool in pools for member in pool.members}
    for pool, values in zip(pools, units, strict=True):
        for path, matrix in pool.spread(values).items():
            matrices.setdefault(path, []).append(matrix)

    def stacked(parts: list[Any]) -> Any:
        # The pools of a stack follow one another in its order.
        return (jnp if isinstance(parts[0], Array) else np).stack(parts)

    return {
        path: layouts[path].restored(stacked(parts), shapes[path])
        for path, parts in matrices.items()
    }


@functools.partial(jax.jit, static_argnames=("arrangements", "order"), inline=True)
def _norm(
    matrices: list[Array],
    arrangements: tuple[tuple[str, tuple[tuple[str, int], ...]], ...],
    order: float | None,
) -> Array:
    """Return the norms over the weights of units; matrices `[r, c]` are arranged as `[g, u, w]`."""
    weights = [
        rearrange(matrix, pattern, **dict(sizes))
        for matrix, (pattern, sizes) in zip(matrices, arrangements, strict=True)
    ]
    if order is None:
        return added(jnp.sum(values, axis=-1) for values in weights)
    return l_norm(weights, order, axis=-1)


def matrix_pools(
    shape: Shape,
    sizes: Mapping[str, tuple[int, ...]],
    layouts: Mapping[str, Layout] | None = None,
    by_row: bool = False,
) -> list[Pool]:
    """List the units of shapes that are part of one matrix.

    Args:
      shape: one for which `of_matrix` holds.
      sizes: shape of each parameter by path.
      layouts: of each parameter; None takes each to be one matrix, stored `[..., in]`.
      by_row: single weights compete within their row only.

    Returns:
      One pool per matrix, those of a stack in its order.

    Raises:
      RecipeError: rows or columns do not divide into groups or blocks.
    """
    return [
        pool
        for path, size in sizes.items()
        for pool in _pools_of_parameter(
            shape, path, size, layouts[path] if layouts else AS_ROWS, by_row
        )
    ]


def _pools_of_parameter(
    shape: Shape, path: str, size: tuple[int, ...], layout: Layout, by_row: bool
) -> list[Pool]:
    pool = _matrix_pool(shape, path, *layout.extent(size), by_row, layout.inputs is not None)
    (member,) = pool.members
    return [
        dataclasses.replace(
            pool,
            name=path if index is None else f"{path}[{index}]",
            parts=(Part((each,), (each,)),),
        )
        for index in (range(layout.count(size)) if layout.stack else (None,))
        for each in (dataclasses.replace(member, layout=layout, index=index),)
    ]


def pool_of(
    path: str, pattern: str, groups: int, units: int, at_least: int = 0, **sizes: int
) -> Pool:
    """Make the pool of one matrix, whose units are their own gates."""
    member = Member(path, pattern, tuple(sizes.items()))
    return Pool(path, (Part((member,), (member,)),), groups, units, at_least)


def _matrix_pool(
    shape: Shape, path: str, rows: int, columns: int, by_row: bool, inputs_first: bool
) -> Pool:
    if shape.kind == CHANNEL:
        return pool_of(path, "r c -> 1 r c", 1, rows, 1, r=rows, c=columns)
    if shape.kind == "n:m":
        of = shape.sizes[1]
        if columns % of:
            raise RecipeError(f"{path}: {columns} columns do not divide into groups of {of}")
        groups = columns // of
        return pool_of(path, "r (g m) -> (r g) m 1", rows * groups, of, r=rows, g=groups, m=of)
    if shape.kind == "block":
        high, wide = shape.sizes
        if rows % high or columns % wide:
            raise RecipeError(f"{path}: {rows} x {columns} are not whole blocks of {high}x{wide}")
        down, across = rows // high, columns // wide
        pattern = "(r h) (c w) -> 1 (r c) (h w)"
        return pool_of(path, pattern, 1, down * across, r=down, h=high, c=across, w=wide)
    if by_row:
        return pool_of(path, "r c -> r c 1", rows, columns, r=rows, c=columns)
    # Of equal scores the first go, in the order of the parameter's own layout.
    order = "(c r)" if inputs_first else "(r c)"
    return pool_of(path, f"r c -> 1 {order} 1", 1, rows * columns, r=rows, c=columns)
