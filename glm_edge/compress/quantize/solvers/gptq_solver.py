"""Rounding a matrix column by column, each column making up for the errors of those before it.

What is minimised is the squared error at the output, `tr((W - Q) H (W - Q)^T)` with `H` the Gram
matrix of the inputs. With `H = R R^T`, `R` upper triangular, it is a sum over columns of
`R[j, j]^2 (t_j - q_j)^2`, where the target `t_j` of a column follows from the errors of the columns
before it: rounding targets in turn is GPTQ (and Babai's nearest plane), without an inverse.

Arrays inside are transposed, [in, out], so that a column is contiguous. Letters: `g` columns of a
group, `b` columns of a block.

References:
  GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
  https://arxiv.org/abs/2210.17323;
  The Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm,
  https://arxiv.org/abs/2507.18553;
  QuantEase: Optimization-based Quantization for Language Models, https://arxiv.org/abs/2309.01885.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.compress.quantize.solvers import columns, triangular
from glm_edge.compress.quantize.solvers.columns import ColumnBlock
from glm_edge.compress.quantize.solvers.scales import (
    Grid,
    nearest_columns,
    normalized,
    per_group_format,
    search_scale,
)
from glm_edge.errors import BoxError
from glm_edge.kernels import quantization as kernels
from glm_edge.params import Format
from glm_edge.params.formats import PER_TENSOR

# Groups of more columns get their scale before they are rounded, not by rounding them.
SEARCHED = 256
MOST_DAMPING = 1e4
_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Info(NamedTuple):
    """The cost of a solution.

    Attributes:
      damping: fraction of the mean diagonal that was added to it.
      loss: `tr((W - Q) H (W - Q)^T) / tr(W H W^T)`, zero where nothing comes in.
    """

    damping: float
    loss: float


def solve(
    weight: Array,
    gram: Array,
    format: Format,
    scale: str = "max",
    act_order: bool = False,
    damping: float = 0.01,
    block: int = 128,
    mask: Array | None = None,
    refit: bool = False,
    sweeps: int = 0,
) -> tuple[Array, Grid, Info]:
    """Rounds a matrix to least squared error at its output, given the Gram matrix of its inputs.

    Args:
      weight: [out, in].
      gram: float32 [in, in], the sum of `x x^T`.
      format: to round to.
      scale: `max`, as `grid.choose` does on the weights that a group still has when it is reached;
        `mse`, the fraction of it under which rounding the group leaves the least output error;
        `extreme`, that over both signs of the scale (symmetric integers only).
      act_order: takes the groups, and the columns of each, by falling input energy. The storage
        stays as it was.
      damping: fraction of the mean diagonal that is added to it; times ten until a factor exists.
      block: columns that are rounded between two products with the whole matrix.
      mask: bool [out, in], False where a weight stays zero; None keeps all.
      refit: after rounding, fits the scales by least squares, where that lowers the error.
      sweeps: passes of coordinate descent over the codes, each after a `refit` if that is on.

    Returns:
      `(codes, grid, info)`: int8 [out, in] in the order of `weight`.

    Raises:
      BoxError: columns are not whole groups.
      FloatingPointError: the Gram matrix is not finite.
    """
    groups = format.num_groups(weight.shape[1])
    if gram.shape != (weight.shape[1],) * 2:
        raise BoxError(f"gram must be [{weight.shape[1]}, {weight.shape[1]}], not {gram.shape}")
    weight = weight.astype(jnp.float32)
    order = column_order(gram, groups, format.qtype == "ternary34") if act_order else None
    ordered, ordered_mask, gram = _arranged(weight, mask, gram, order)
    # H = R R^T with damping (`percdamp`), then Algorithm 1: one pass over the groups.
    factor, damped, used = damped_factor(gram, damping)
    codes, grid = _by_groups(ordered, factor, ordered_mask, format, scale, block)
    # QuantEase: coordinate descent on the codes, with scales refitted in turns.
    together = refit and groups > 1 and weight.shape[1] // groups <= SEARCHED
    for _ in range(max(sweeps, int(refit))):
        if together and sweeps:
            codes, grid = _descend_by_groups(ordered, damped, codes, grid, ordered_mask, format)
            continue
        if refit:
            grid = _refit(ordered, damped, codes, grid, format)
        if sweeps:
            codes = _descend(ordered, damped, codes, grid, ordered_mask, format, block)
    loss = float(_relative_loss(ordered, gram, codes, grid, format))
    codes, grid = _restored(codes, grid, order, groups)
    return codes, grid, Info(used, loss)


def damped_factor(gram: Array, damping: float) -> tuple[Array, Array, float]:
    """The upper triangular `R` with `R R^T` the damped Gram matrix.

    Args:
      gram: [in, in].
      damping: fraction of the mean diagonal to add to it at first.

    Returns:
      `(R, damped Gram matrix, fraction that was added)`, of the matrix as `scaled` gives it.

    Raises:
      FloatingPointError: the Gram matrix is not finite, or no damping gives it a factor.
    """
    if not bool(_is_finite(gram)):
        raise FloatingPointError("the Gram matrix holds NaN or infinity")
    gram, diagonal_only = scaled(gram), False
    while True:
        factor, damped = _factor(gram, damping)
        if bool(_is_finite(factor)):
            return factor, damped, float(damping)
        if diagonal_only:
            raise FloatingPointError(f"no damping gives it a factor, at last {damping:g}")
        if damping > MOST_DAMPING:
            # Only a matrix that is no Gram matrix comes here; its diagonal alone is used.
            gram, diagonal_only = jnp.diag(jnp.abs(jnp.diagonal(gram))), True
        else:
            damping = max(10.0 * damping, 1e-6)


@jax.jit
def scaled(gram: Array) -> Array:
    """A Gram matrix times the power of two that brings its largest entry near one, in float32.

    Solutions depend on ratios alone, and sums of what is near the end of float32 would leave it.
    """
    gram = gram.astype(jnp.float32)
    return normalized(gram, jnp.max(jnp.abs(gram)))


@jax.jit
def _factor(gram: Array, damping: float) -> tuple[Array, Array]:
    mean = triangular.total(jnp.abs(jnp.diagonal(gram))) / gram.shape[0]
    added = jnp.where(mean > 0, jnp.maximum(damping * mean, 0.0), 1.0)
    damped = gram + added * jnp.eye(gram.shape[0], dtype=gram.dtype)
    return triangular.cholesky(damped[::-1, ::-1])[::-1, ::-1], damped


@functools.partial(jax.jit, static_argnames=("groups", "by_fours"), inline=True)
def column_order(gram: Array, groups: int, by_fours: bool = False) -> Array:
    """Columns by falling input energy, groups of neighbours staying together.

    Args:
      gram: [in, in].
      groups: number of groups.
      by_fours: fours of neighbours stay together, too.

    Returns:
      int [in], the column that comes first, second and so on.
    """
    energy = jnp.diagonal(gram).reshape(groups, -1, 4 if by_fours else 1)
    size = energy.shape[1] * energy.shape[2]
    outer = jnp.argsort(-energy.mean(axis=(1, 2)), stable=True)
    inner = jnp.argsort(-energy.mean(axis=2), axis=1, stable=True)[outer]
    fours = inner[..., None] * energy.shape[2] + jnp.arange(energy.shape[2])
    return (outer[:, None] * size + fours.reshape(groups, size)).reshape(-1)


@jax.jit
def _arranged(
    weight: Array, mask: Array | None, gram: Array, order: Array | None
) -> tuple[Array, Array | None, Array]:
    """The weight and its mask [in, out] and the scaled Gram matrix, columns in their order."""
    gram = scaled(gram)
    if order is not None:
        weight, gram = weight[:, order], gram[order][:, order]
        mask = None if mask is None else mask[:, order]
    return weight.T, None if mask is None else mask.T, gram


@functools.partial(jax.jit, static_argnames="groups")
def _restored(codes: Array, grid: Grid, order: Array | None, groups: int) -> tuple[Array, Grid]:
    """Inverse of `_arranged` for the codes [in, out] and their grid."""
    codes, grid = codes.T, grid.map(jnp.transpose)
    if order is None:
        return codes, grid
    first = order.reshape(groups, -1)[:, 0] // (order.shape[0] // groups)
    back = jnp.argsort(first)
    grid = grid.map(lambda x: x[:, back])
    return codes[:, jnp.argsort(order)], grid


@jax.jit
def _is_finite(matrix: Array) -> Array:
    return jnp.isfinite(matrix).all()


@functools.partial(jax.jit, static_argnames=("format", "scale", "block"))
def _by_groups(
    weight: Array, factor: Array, mask: Array | None, format: Format, scale: str, block: int
) -> tuple[Array, Grid]:
    """Codes [in, out] and grid [groups, out] (or [1, 1]) of one pass over the columns."""
    groups = format.num_groups(weight.shape[0])
    size = weight.shape[0] // groups
    group_format = per_group_format(format)

    def step(errors: Array, group: Array) -> tuple[Array, tuple[Array, Grid]]:
        part = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=group * size, slice_size=size
        )
        # Columns of R that belong to this group: all rows, and the group's own.
        across = part(factor, axis=1)
        within = part(across)
        # R^T (W - Q) of the columns before: what they leave for this group to make up for.
        residual = triangular.across(across, errors)
        scales = jnp.diagonal(within)
        columns_of_block = ColumnBlock(
            target=part(weight) + residual / scales[:, None],
            weight=part(weight),
            coupling=jnp.triu(within, 1) / scales,
            cost=jnp.square(scales),
            mask=None if mask is None else part(mask),
        )
        # Were rounding exact from here on, these weights would leave no further error.
        unrounded = columns_of_block.weight + triangular.solve_upper(
            within, residual, transposed=True
        )
        if mask is not None:
            unrounded = jnp.where(part(mask), unrounded, 0.0)
        if size <= SEARCHED and format.group_size != PER_TENSOR:

            def loss(grid: Grid) -> Array:
                return columns.rounded(columns_of_block, grid, group_format, block)[2]
        else:

            def loss(grid: Grid) -> Array:
                lost = nearest_columns(unrounded, grid, group_format) - unrounded
                by_row = triangular.column_sums(jnp.square(lost) * columns_of_block.cost[:, None])
                per_tensor = format.group_size == PER_TENSOR
                return (
                    jnp.broadcast_to(triangular.total(by_row), by_row.shape)
                    if per_tensor
                    else by_row
                )

        grid = search_scale(unrounded, format, scale, loss)
        codes, group_errors, _ = columns.rounded(columns_of_block, grid, group_format, block)
        errors = jax.lax.dynamic_update_slice_in_dim(errors, group_errors, group * size, 0)
        return errors, (codes, grid)

    _, (codes, grid) = jax.lax.scan(step, jnp.zeros_like(weight), jnp.arange(groups))
    if format.group_size == PER_TENSOR:
        grid = grid.map(lambda x: x[:, :1])
    return codes.reshape(weight.shape), grid


@functools.partial(jax.jit, static_argnames=("format", "block"))
def _descend(
    weight: Array,
    gram: Array,
    codes: Array,
    grid: Grid,
    mask: Array | None,
    format: Format,
    block: int,
) -> Array:
    """One pass of coordinate descent: each code, given all others, becomes the best there is."""
    size = columns.block_of(weight.shape[0], block, format.qtype)
    group_format = per_group_format(format)
    expanded = _widened(grid, weight.shape)
    diagonal = jnp.diagonal(gram)

    def step(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
        errors, codes = carry
        part = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=index * size, slice_size=size
        )
        # The gradient of the output error by this block's columns, all others staying.
        across, old, scales = part(gram, axis=1), part(errors), part(diagonal)
        residual = triangular.across(across, errors)
        columns_of_block = ColumnBlock(
            target=part(weight) + residual / scales[:, None] - old,
            weight=part(weight),
            coupling=(part(across) - jnp.diag(scales)) / scales,
            cost=scales,
            mask=None if mask is None else part(mask),
            errors=old,
        )
        quantized = columns.rounded(
            columns_of_block,
            expanded.map(part),
            group_format,
            size,
        )
        put = functools.partial(
            jax.lax.dynamic_update_slice_in_dim, start_index=index * size, axis=0
        )
        return (put(errors, quantized[1]), put(codes, quantized[0])), None

    start = (weight - _decoded(codes, grid, format), codes)
    steps = jnp.arange(weight.shape[0] // size)
    return jax.lax.scan(step, start, steps)[0][1]


@functools.partial(jax.jit, static_argnames="format")
def _descend_by_groups(
    weight: Array, gram: Array, codes: Array, grid: Grid, mask: Array | None, format: Format
) -> tuple[Array, Grid]:
    """One pass in which each group, given all others, gets its best scale and then its best codes.

    Keeps the old scale of a group where the new one, rounded to its stored type, does not reduce
    the error or would change sign.
    """
    groups = grid.scale.shape[0]
    size = weight.shape[0] // groups
    group_format = per_group_format(format)
    diagonal = jnp.diagonal(gram)

    def step(
        errors: Array, group: tuple[Array, Array, Array, Array | None]
    ) -> tuple[Array, tuple[Array, Array]]:
        index, codes, scale, zero = group
        part = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=index * size, slice_size=size
        )
        across, group_weight, scales = part(gram, axis=1), part(weight), part(diagonal)
        within = part(across)
        residual = triangular.across(across, errors)
        # Scale first: the error is a parabola in it, with its minimum at gain / curvature.
        levels = _decoded(codes, Grid(jnp.ones_like(scale)[None].astype(jnp.float32), zero), format)
        gram_levels = _product(within, levels)
        gain, curvature = (triangular.column_sums(levels * x) for x in (residual, gram_levels))
        old = scale.astype(jnp.float32)
        new = (old + gain / jnp.where(curvature > 0, curvature, jnp.inf)).astype(scale.dtype)
        moved = new.astype(jnp.float32) - old
        better = (moved * (moved * curvature - 2.0 * gain) < 0) & (
            new.astype(jnp.float32) * old > 0
        )
        scale, moved = jnp.where(better, new, scale), jnp.where(better, moved, 0.0)
        residual = residual - gram_levels * moved
        # Then the codes, by coordinate descent within the group.
        before = group_weight - scale.astype(jnp.float32) * levels
        coupled = ColumnBlock(
            target=group_weight + residual / scales[:, None] - before,
            weight=group_weight,
            coupling=(within - jnp.diag(scales)) / scales,
            cost=scales,
            mask=None if mask is None else part(mask),
            errors=before,
        )
        quantized = columns.rounded(
            coupled, Grid(scale, None if zero is None else zero[0]), group_format, size
        )
        errors = jax.lax.dynamic_update_slice_in_dim(errors, quantized[1], index * size, 0)
        return errors, (quantized[0], scale)

    start = weight - _decoded(codes, grid, format)
    zeros = None if grid.zero is None else grid.zero[:, None]
    by_group = (jnp.arange(groups), codes.reshape(groups, size, -1), grid.scale, zeros)
    _, (codes, scale) = jax.lax.scan(step, start, by_group)
    return codes.reshape(weight.shape), Grid(scale, grid.zero)


@functools.partial(jax.jit, static_argnames="format")
def _refit(weight: Array, gram: Array, codes: Array, grid: Grid, format: Format) -> Grid:
    """Scales of least squared error at the output, codes and zero points staying.

    Keeps the old scales of a row where refitted ones, rounded to their stored type, do not reduce
    the error or would change sign.
    """
    per_tensor = grid.scale.shape[1] == 1 and weight.shape[1] != 1
    groups = grid.scale.shape[0]
    ones = Grid(jnp.ones_like(grid.scale, jnp.float32), grid.zero)
    steps = _decoded(codes, ones, format)
    along = _product(gram, weight) * steps
    against = triangular.column_sums(along.reshape(groups, -1, along.shape[1]))
    banded = gram.reshape(gram.shape[0], groups, -1)
    old = jnp.broadcast_to(grid.scale.astype(jnp.float32), against.shape)

    def normal(step: Array) -> Array:
        gram_step = jnp.einsum(
            "nkg,kg->nk", banded, step.reshape(groups, -1), precision=jax.lax.Precision.HIGHEST
        )
        return jnp.sum((gram_step * step[:, None]).reshape(groups, -1, groups), axis=1)

    def fitted(args: tuple[Array, Array, Array]) -> Array:
        step, right, before = args
        matrix = normal(step)
        ridge = 1e-6 * jnp.maximum(jnp.max(jnp.diagonal(matrix)), 1e-30)
        matrix = matrix + ridge * jnp.eye(groups)
        return jnp.linalg.solve(matrix, right + ridge * before)

    if per_tensor:
        power = triangular.total(triangular.column_sums(_product(gram, steps) * steps))
        gain = triangular.total(against[0])
        new = jnp.broadcast_to(gain / jnp.where(power > 0, power, 1.0), old.shape)
    elif groups == 1:
        power = triangular.column_sums(_product(gram, steps) * steps)
        new = against / jnp.where(power > 0, power, 1.0)
    else:
        batch = max(1, (1 << 23) // (gram.shape[0] * groups))
        new = jax.lax.map(fitted, (steps.T, against.T, old.T), batch_size=batch).T
    new = new.astype(grid.scale.dtype)
    usable = jnp.isfinite(new) & (new.astype(jnp.float32) * old > 0)
    tried = Grid(jnp.where(usable, new, old.astype(new.dtype))[:, : grid.scale.shape[1]], grid.zero)
    before, after = (_row_losses(weight, gram, codes, g, format) for g in (grid, tried))
    if per_tensor:
        before, after = (triangular.total(x)[None] for x in (before, after))
    return Grid(jnp.where(after < before, tried.scale, grid.scale), grid.zero)


def _row_losses(weight: Array, gram: Array, codes: Array, grid: Grid, format: Format) -> Array:
    lost = weight - _decoded(codes, grid, format)
    return triangular.column_sums(_product(gram, lost) * lost)


@functools.partial(jax.jit, static_argnames="format")
def _relative_loss(weight: Array, gram: Array, codes: Array, grid: Grid, format: Format) -> Array:
    lost = triangular.total(_row_losses(weight, gram, codes, grid, format))
    power = triangular.total(triangular.column_sums(_product(gram, weight) * weight))
    return jnp.where(power > 0, lost / jnp.where(power > 0, power, 1.0), 0.0)


def _decoded(codes: Array, grid: Grid, format: Format) -> Array:
    scale, zero = _widened(grid, codes.shape)
    steps = kernels.levels(codes, format.qtype).astype(jnp.float32)
    return scale * (steps if zero is None else steps - zero)


def _widened(grid: Grid, shape: tuple[int, ...]) -> Grid:
    """Scales and zero points of every weight, float32 [in, out]."""
    repeats = shape[0] // grid.scale.shape[0]

    def widen(values: Array) -> Array:
        by_row = jnp.broadcast_to(values.astype(jnp.float32), (values.shape[0], shape[1]))
        return jnp.repeat(by_row, repeats, axis=0)

    return grid.map(widen)
