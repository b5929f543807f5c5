"""Rounding columns one after the other, each given the errors of those before it.

Arrays are [columns, out]; letters: `n` columns, `b` of a block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.compress.rounding import triangular
from glm_edge.compress.rounding.grid import Grid
from glm_edge.kernels import quantization as kernels
from glm_edge.params import Format


class Coupled(NamedTuple):
    """Columns to round, and how the error of one moves the target of another.

    Attributes:
      target: [n, out] what to round, were no column of these changed.
      weight: [n, out] whose distance from the result is an error.
      coupling: [n, n]; an error that grows by `e` in column `k` adds `coupling[k, j] e` to the
        target of column `j`.
      cost: [n] of a squared distance from the target.
      kept: bool [n, out], False where the result is zero; None keeps all.
      errors: [n, out] of the columns as they are, which the targets include; None is zero, with
        nothing there yet.
    """

    target: Array
    weight: Array
    coupling: Array
    cost: Array
    kept: Array | None = None
    errors: Array | None = None


def block_of(count: int, block: int, qtype: str) -> int:
    """The largest divisor of `count` up to `block`, whole fours for `ternary34`."""
    unit = 4 if qtype == "ternary34" else 1
    sizes = range(unit, min(count, max(block, unit)) + 1, unit)
    return max(size for size in sizes if count % size == 0)


def rounded(here: Coupled, grid: Grid, format: Format, block: int) -> tuple[Array, Array, Array]:
    """Rounds columns in turn.

    Args:
      here: the columns.
      grid: one scale for each row of the result, [out], or for each weight, [n, out].
      format: of the codes.
      block: columns between two products with all of them.

    Returns:
      `(codes, errors, loss)`: int8 and float32 [n, out], and [out], the sum over columns of
      `cost * (target - result)^2` (less what was there before, where there was something).
    """
    count = here.target.shape[0]
    grid = Grid(*(None if x is None else x.astype(jnp.float32) for x in grid))
    size = block_of(count, block, format.qtype)
    if size == count:
        return _block(here, grid, format)

    def step(targets: Array, index: Array):
        part = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=index * size, slice_size=size
        )
        coupling = part(here.coupling)
        inner = Coupled(
            part(targets),
            part(here.weight),
            part(coupling, axis=1),
            part(here.cost),
            None if here.kept is None else part(here.kept),
        )
        codes, errors, loss = _block(inner, grid, format)
        # The block's own targets change too, and are not read again.
        return targets + triangular.across(coupling, errors), (codes, errors, loss)

    found = jax.lax.scan(step, here.target, jnp.arange(count // size))[1]
    codes, errors = (x.reshape(here.target.shape) for x in found[:2])
    return codes, errors, triangular.column_sums(found[2])


def _block(here: Coupled, grid: Grid, format: Format) -> tuple[Array, Array, Array]:
    unit = 4 if format.qtype == "ternary34" else 1
    before = jnp.zeros_like(here.weight) if here.errors is None else here.errors

    def step(index: Array, carry: tuple[Array, Array, Array]):
        codes, moved, loss = carry
        first = index * unit
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=unit)
        target = part(here.target) + triangular.across(part(here.coupling, axis=1), moved)
        own = Coupled(
            target,
            part(here.weight),
            part(part(here.coupling), axis=1),
            part(here.cost),
            None if here.kept is None else part(here.kept),
            part(before),
        )
        scale, zero = (x if x is None or x.ndim == 1 else part(x) for x in grid)
        if unit == 4:
            code, error, cost = _four(own, scale, here.errors is not None)
        else:
            code, error, cost = _one(own, scale, zero, format, here.errors is not None)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
        return put(codes, code), put(moved, error - own.errors), loss + cost

    shape = here.weight.shape
    start = (
        jnp.zeros(shape, jnp.int8),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(shape[1], jnp.float32),
    )
    codes, moved, loss = jax.lax.fori_loop(0, shape[0] // unit, step, start)
    return codes, before + moved, loss


def _one(
    own: Coupled, scale: Array, zero: Array | None, format: Format, held: bool
) -> tuple[Array, Array, Array]:
    steps = own.target / scale
    if zero is not None:
        steps = steps + zero
    code = kernels.round_to_codes(steps, format.qtype)
    level = kernels.levels(code, format.qtype).astype(jnp.float32)
    if own.kept is not None:
        nothing = _zero_code(zero, format.qtype)
        code = jnp.where(own.kept, code, nothing)
        level = jnp.where(own.kept, level, kernels.levels(nothing, format.qtype))
    value = scale * (level if zero is None else level - zero)
    return code, own.weight - value, (own.cost[:, None] * _distance(own, value, held))[0]


def _zero_code(zero: Array | None, qtype: str) -> Array:
    if zero is None:
        return jnp.int8(7 if qtype == "nf4" else 0)
    return jnp.round(zero).astype(jnp.int8)


def _distance(own: Coupled, value: Array, held: bool) -> Array:
    """Squared distance of a result from the target, less that of what is there already."""
    distance = jnp.square(own.target - value)
    if held:
        distance = distance - jnp.square(own.target - own.weight + own.errors)
    return distance


def _four(own: Coupled, scale: Array, held: bool) -> tuple[Array, Array, Array]:
    """Three signs and a zero: each place of the zero is tried, and the cheapest kept."""
    scales = jnp.broadcast_to(scale, own.weight.shape)
    best = None
    for place in range(4):
        targets, codes, errors = list(own.target), [], []
        cost = jnp.zeros(own.weight.shape[1], jnp.float32)
        for i in range(4):
            sign = jnp.where(targets[i] * scales[i] < 0, -1, 1).astype(jnp.int8)
            code = jnp.zeros_like(sign) if i == place else sign
            value = scales[i] * code
            error = own.weight[i] - value
            distance = jnp.square(targets[i] - value)
            if held:
                distance -= jnp.square(targets[i] - own.weight[i] + own.errors[i])
            cost += own.cost[i] * distance
            if own.kept is not None and i != place:
                # A weight that must be zero lies where the zero is.
                cost = jnp.where(own.kept[i], cost, jnp.inf)
            for k in range(i + 1, 4):
                targets[k] = targets[k] + own.coupling[i, k] * (error - own.errors[i])
            codes.append(code)
            errors.append(error)
        found = (jnp.stack(codes), jnp.stack(errors), cost)
        if best is None:
            best = found
        else:
            less = cost < best[2]
            best = tuple(jnp.where(less, new, old) for new, old in zip(found, best, strict=True))
    return best
