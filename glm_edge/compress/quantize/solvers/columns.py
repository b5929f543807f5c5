"""Sequential rounding of columns with error compensation.

Arrays are [columns, out]. Letters: `n` columns, `b` columns of a block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.compress.quantize.solvers import triangular
from glm_edge.compress.quantize.solvers.scales import Grid
from glm_edge.kernels import quantization as kernels
from glm_edge.params import Format


class ColumnBlock(NamedTuple):
    """Columns to round, and the coupling between their errors and targets.

    Attributes:
      target: [n, out], values to round before compensation within these columns.
      weight: [n, out], original weights; the error of a column is `weight - result`.
      coupling: [n, n]; an increase `e` of the error of column `k` adds `coupling[k, j] e` to the
        target of column `j`.
      cost: [n], weight of the squared distance to the target.
      mask: bool [n, out], False where the result stays zero; None without a mask.
      errors: [n, out], errors of the current codes, which the targets include; None for columns
        without codes.
    """

    target: Array
    weight: Array
    coupling: Array
    cost: Array
    mask: Array | None = None
    errors: Array | None = None


def decoded(codes: Array, grid: Grid, format: Format) -> Array:
    """Dequantize codes [in, out] with the grid of `by_groups`, float32."""
    scale, zero = widened(grid, codes.shape)
    steps = kernels.levels(codes, format.qtype).astype(jnp.float32)
    return scale * (steps if zero is None else steps - zero)


def widened(grid: Grid, shape: tuple[int, ...]) -> Grid:
    """Expand scales and zero points to one per weight, float32 [in, out]."""
    repeats = shape[0] // grid.scale.shape[0]

    def widen(values: Array) -> Array:
        by_row = jnp.broadcast_to(values.astype(jnp.float32), (values.shape[0], shape[1]))
        return jnp.repeat(by_row, repeats, axis=0)

    return grid.map(widen)


def block_of(count: int, block: int, qtype: str) -> int:
    """Choose a block size.

    Args:
      count: count of columns.
      block: maximum of columns per block.
      qtype: type of the codes.

    Returns:
      The largest divisor of `count` up to `block`, a multiple of 4 for `ternary34`.
    """
    unit = 4 if qtype == "ternary34" else 1
    sizes = range(unit, min(count, max(block, unit)) + 1, unit)
    return max(size for size in sizes if count % size == 0)


def rounded(
    block: ColumnBlock, grid: Grid, format: Format, size: int
) -> tuple[Array, Array, Array]:
    """Round columns in turn.

    Args:
      block: columns with their coupling.
      grid: one scale per output, [out], or per weight, [n, out].
      format: format of the codes.
      size: columns per block; the errors of a block reach all columns by one product.

    Returns:
      `(codes, errors, loss)`: int8 and float32 [n, out], and [out], the sum over columns of
      `cost * (target - result)^2`. With initial `errors`, the loss is the change of this sum.
    """
    count = block.target.shape[0]
    grid = grid.map(lambda x: x.astype(jnp.float32))
    size = block_of(count, size, format.qtype)
    if size == count:
        return _block(block, grid, format)

    # GPTQ's lazy batch updates: the errors of a block reach the targets of all columns by one
    # product.
    def step(targets: Array, index: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        part = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=index * size, slice_size=size
        )
        coupling = part(block.coupling)
        inner = ColumnBlock(
            part(targets),
            part(block.weight),
            part(coupling, axis=1),
            part(block.cost),
            None if block.mask is None else part(block.mask),
        )
        codes, errors, loss = _block(inner, grid, format)
        # This also changes the targets of the block itself, which are not read again.
        return targets + triangular.across(coupling, errors), (codes, errors, loss)

    codes, errors, losses = jax.lax.scan(step, block.target, jnp.arange(count // size))[1]
    codes, errors = (x.reshape(block.target.shape) for x in (codes, errors))
    return codes, errors, triangular.column_sums(losses)


def _block(block: ColumnBlock, grid: Grid, format: Format) -> tuple[Array, Array, Array]:
    unit = 4 if format.qtype == "ternary34" else 1
    before = jnp.zeros_like(block.weight) if block.errors is None else block.errors

    # The inner loop of GPTQ, one column (four for ternary34) per step: add the compensation for
    # earlier errors of the block to the target, round it, and store the new error.
    def step(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        codes, moved, loss = carry
        first = index * unit
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=unit)
        target = part(block.target) + triangular.across(part(block.coupling, axis=1), moved)
        column = ColumnBlock(
            target,
            part(block.weight),
            part(part(block.coupling), axis=1),
            part(block.cost),
            None if block.mask is None else part(block.mask),
            part(before),
        )
        scale, zero = grid.map(lambda x: x if x.ndim == 1 else part(x))
        if unit == 4:
            code, error, cost = _four(column, scale, block.errors is not None)
        else:
            code, error, cost = _one(column, scale, zero, format, block.errors is not None)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
        return put(codes, code), put(moved, error - part(before)), loss + cost

    shape = block.weight.shape
    start = (
        jnp.zeros(shape, jnp.int8),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(shape[1], jnp.float32),
    )
    codes, moved, loss = jax.lax.fori_loop(0, shape[0] // unit, step, start)
    return codes, before + moved, loss


def _one(
    column: ColumnBlock, scale: Array, zero: Array | None, format: Format, relative: bool
) -> tuple[Array, Array, Array]:
    steps = column.target / scale
    if zero is not None:
        steps = steps + zero
    code = kernels.round_to_codes(steps, format.qtype)
    level = kernels.levels(code, format.qtype).astype(jnp.float32)
    if column.mask is not None:
        zero_code = _zero_code(zero, format.qtype)
        code = jnp.where(column.mask, code, zero_code)
        level = jnp.where(column.mask, level, kernels.levels(zero_code, format.qtype))
    value = scale * (level if zero is None else level - zero)
    return (
        code,
        column.weight - value,
        (column.cost[:, None] * _distance(column, value, relative))[0],
    )


def _zero_code(zero: Array | None, qtype: str) -> Array:
    if zero is None:
        return jnp.int8(7 if qtype == "nf4" else 0)
    return jnp.round(zero).astype(jnp.int8)


def _distance(column: ColumnBlock, value: Array, relative: bool) -> Array:
    """Compute the squared distance to the target, relative to the current codes if any."""
    distance = jnp.square(column.target - value)
    if relative and column.errors is not None:
        distance = distance - jnp.square(column.target - column.weight + column.errors)
    return distance


def _four(column: ColumnBlock, scale: Array, relative: bool) -> tuple[Array, Array, Array]:
    """Round four columns to three signs and a zero, trying each position of the zero."""
    # For each position of the zero, run the four columns in turn, as in `step`, and keep the
    # cheapest codes per output.
    scales = jnp.broadcast_to(scale, column.weight.shape)
    present = jnp.zeros_like(column.weight) if column.errors is None else column.errors
    results = []
    for zero_index in range(4):
        targets, codes, errors = list(column.target), [], []
        cost = jnp.zeros(column.weight.shape[1], jnp.float32)
        for i in range(4):
            sign = jnp.where(targets[i] * scales[i] < 0, -1, 1).astype(jnp.int8)
            code = jnp.zeros_like(sign) if i == zero_index else sign
            value = scales[i] * code
            error = column.weight[i] - value
            distance = jnp.square(targets[i] - value)
            if relative:
                distance -= jnp.square(targets[i] - column.weight[i] + present[i])
            cost += column.cost[i] * distance
            if column.mask is not None and i != zero_index:
                # A masked weight must be at the position of the zero.
                cost = jnp.where(column.mask[i], cost, jnp.inf)
            for k in range(i + 1, 4):
                targets[k] = targets[k] + column.coupling[i, k] * (error - present[i])
            codes.append(code)
            errors.append(error)
        results.append((jnp.stack(codes), jnp.stack(errors), cost))
    return functools.reduce(_cheaper, results)


def _cheaper(
    best: tuple[Array, Array, Array], other: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    less = other[2] < best[2]
    codes, errors, cost = (jnp.where(less, new, old) for new, old in zip(other, best, strict=True))
    return codes, errors, cost
