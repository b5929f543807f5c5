"""Coordinate descent on the codes of a matrix, and refits of its scales by least squares.

Arrays are [in, out], as in `gptq_solver`.

References:
  QuantEase: Optimization-based Quantization for Language Models, https://arxiv.org/abs/2309.01885.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.compress.quantize.solvers import alignment, columns, triangular
from glm_edge.compress.quantize.solvers.columns import ColumnBlock
from glm_edge.compress.quantize.solvers.scales import Grid, per_group_format
from glm_edge.params import Format

_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=("format", "block"))
def descend(
    weight: Array,
    gram: Array,
    codes: Array,
    grid: Grid,
    mask: Array | None,
    format: Format,
    block: int,
) -> Array:
    """Run one pass of coordinate descent: set each code to its optimum given all others."""
    size = columns.block_of(weight.shape[0], block, format.qtype)
    group_format = per_group_format(format)
    expanded = columns.widened(grid, weight.shape)
    diagonal = jnp.diagonal(gram)

    def step(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
        errors, codes = carry
        part = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=index * size, slice_size=size
        )
        # Gradient of the output error with respect to this block, H[:, block]^T (W - Q).
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

    start = (weight - columns.decoded(codes, grid, format), codes)
    steps = jnp.arange(weight.shape[0] // size)
    return jax.lax.scan(step, start, steps)[0][1]


@functools.partial(jax.jit, static_argnames="format")
def descend_by_groups(
    weight: Array, gram: Array, codes: Array, grid: Grid, mask: Array | None, format: Format
) -> tuple[Array, Grid]:
    """Run one pass over groups: fit the grid of a group, then its codes, given all others.

    Keeps the old grid of a group if the new one, rounded to its stored type, does not reduce the
    error or changes the sign of its scale.
    """
    groups = grid.scale.shape[0]
    size = weight.shape[0] // groups
    group_format = per_group_format(format)
    diagonal = jnp.diagonal(gram)

    def step(errors: Array, group: tuple[Array, Array, Grid]) -> tuple[Array, tuple[Array, Grid]]:
        index, codes, grid = group
        part = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=index * size, slice_size=size
        )
        # Gradient of the output error with respect to this group, H[:, group]^T (W - Q).
        across, group_weight, scales = part(gram, axis=1), part(weight), part(diagonal)
        within = part(across)
        residual = triangular.across(across, errors)
        # The grid first, then the codes, by coordinate descent within the group.
        fit = alignment.refit_group if alignment.fits_zeros(format) else _refit_group
        grid, residual = fit(within, residual, codes, grid, group_format)
        before = group_weight - columns.decoded(codes, grid.map(lambda x: x[None]), format)
        coupled = ColumnBlock(
            target=group_weight + residual / scales[:, None] - before,
            weight=group_weight,
            coupling=(within - jnp.diag(scales)) / scales,
            cost=scales,
            mask=None if mask is None else part(mask),
            errors=before,
        )
        quantized = columns.rounded(coupled, grid, group_format, size)
        errors = jax.lax.dynamic_update_slice_in_dim(errors, quantized[1], index * size, 0)
        return errors, (quantized[0], grid)

    start = weight - columns.decoded(codes, grid, format)
    by_group = (jnp.arange(groups), codes.reshape(groups, size, -1), grid)
    _, (codes, grid) = jax.lax.scan(step, start, by_group)
    return codes.reshape(weight.shape), grid


def _refit_group(
    gram: Array, residual: Array, codes: Array, grid: Grid, format: Format
) -> tuple[Grid, Array]:
    """Fit the scale of one group, as `alignment.refit_group` fits scale and zero point."""
    ones = Grid(jnp.ones_like(grid.scale, jnp.float32), grid.zero)
    levels = columns.decoded(codes, ones.map(lambda x: x[None]), format)
    # The error is a parabola in the scale, with its minimum at gain / curvature.
    gram_levels = _product(gram, levels)
    gain, curvature = (triangular.column_sums(levels * x) for x in (residual, gram_levels))
    old = grid.scale.astype(jnp.float32)
    new = (old + gain / jnp.where(curvature > 0, curvature, jnp.inf)).astype(grid.scale.dtype)
    moved = new.astype(jnp.float32) - old
    better = (moved * (moved * curvature - 2.0 * gain) < 0) & (new.astype(jnp.float32) * old > 0)
    scale, moved = jnp.where(better, new, grid.scale), jnp.where(better, moved, 0.0)
    return Grid(scale, grid.zero), residual - gram_levels * moved


@functools.partial(jax.jit, static_argnames="format")
def refit(weight: Array, gram: Array, codes: Array, grid: Grid, format: Format) -> Grid:
    """Fit scales to the least squared output error, with fixed codes and zero points.

    Keeps the old scales of a row if refitted ones, rounded to their stored type, do not reduce the
    error or change sign.
    """
    # Normal equations per row: (S^T H S) scale = S^T H w, with the levels S of each group.
    per_tensor = grid.scale.shape[1] == 1 and weight.shape[1] != 1
    groups = grid.scale.shape[0]
    ones = Grid(jnp.ones_like(grid.scale, jnp.float32), grid.zero)
    steps = columns.decoded(codes, ones, format)
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

    # One scale per matrix or per row has a closed form; groups need one linear system per row.
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
    # Accept the stored scales of a row only if they reduce its error.
    new = new.astype(grid.scale.dtype)
    usable = jnp.isfinite(new) & (new.astype(jnp.float32) * old > 0)
    tried = Grid(jnp.where(usable, new, old.astype(new.dtype))[:, : grid.scale.shape[1]], grid.zero)
    before, after = (row_losses(weight, gram, codes, g, format) for g in (grid, tried))
    if per_tensor:
        before, after = (triangular.total(x)[None] for x in (before, after))
    return Grid(jnp.where(after < before, tried.scale, grid.scale), grid.zero)


def row_losses(weight: Array, gram: Array, codes: Array, grid: Grid, format: Format) -> Array:
    """Compute `(W - Q) H (W - Q)^T` per output, [out], with `W` and `Q` [in, out]."""
    lost = weight - columns.decoded(codes, grid, format)
    return triangular.column_sums(_product(gram, lost) * lost)
