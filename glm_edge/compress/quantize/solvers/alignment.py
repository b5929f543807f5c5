"""Scales and zero points between levels, fitted together to the output error of a group.

The weights of a group are `scale * T + offset` with levels `T` and `offset = -scale * zero`. With
fixed levels, the output error is a quadratic form of both, and its minimum is a system of two
equations per output. This is the activation-aware grid alignment of PT2-LLM. Within GPTQ, the
quadratic form of a group also counts the compensation by later columns.

Arrays are [columns, out], as in `gptq_solver`.

References:
  PT2-LLM: Post-Training Ternarization for Large Language Models,
  https://arxiv.org/abs/2510.03267.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.compress.quantize.solvers import columns, triangular
from glm_edge.compress.quantize.solvers.columns import ColumnBlock
from glm_edge.compress.quantize.solvers.scales import Grid, fit_pair, per_group_format
from glm_edge.kernels import quantization as kernels
from glm_edge.params import Format
from glm_edge.params.formats import PER_TENSOR

# Alternations of codes and grid when a group is reached. The first ones gain most.
_ALIGNED = 4


def fits_zeros(format: Format) -> bool:
    """Test for zero points between levels, one per group, which least squares can fit."""
    between = not format.symmetric and format.zero_dtype != "int8"
    return between and format.group_size != PER_TENSOR


def align(
    block: ColumnBlock, factor: Array, unrounded: Array, grid: Grid, format: Format, size: int
) -> Grid:
    """Alternate the rounding of a group with the fit of its grid, and keep the best grid.

    Args:
      block: columns of the group.
      factor: `R`, upper triangular [n, n]; the error of the group is `|R^T (W - Q)|^2`.
      unrounded: `W`, [n, out], weights that would cancel the error of earlier columns.
      grid: initial grid, [out].
      format: format of the group.
      size: columns per block of the column loop.

    Returns:
      The grid, [out], whose codes have the least loss.
    """
    gram = triangular.across(factor.T, factor.T)
    along = triangular.across(gram, unrounded)

    def step(carry: tuple[Array, Grid, Grid], _: None) -> tuple[tuple[Array, Grid, Grid], None]:
        least, best, grid = carry
        codes, loss = columns.rounded(block, grid, format, size)[::2]
        less = loss < least
        fitted = _fitted(_sums(gram, _levels(codes, format)), along, grid, format)
        return (jnp.where(less, loss, least), grid.where(less, best), fitted), None

    start = (jnp.full(unrounded.shape[1:], jnp.inf), grid, grid)
    return jax.lax.scan(step, start, None, length=_ALIGNED)[0][1]


def refit_group(
    gram: Array, residual: Array, codes: Array, grid: Grid, format: Format
) -> tuple[Grid, Array]:
    """Fit the grid of one group with fixed codes, given the errors of all other groups.

    Args:
      gram: `H`, [n, n], rows and columns of the group.
      residual: `H^T (W - Q)`, [n, out], with the errors of all columns.
      codes: int8 [n, out].
      grid: grid of the codes, [out].
      format: format of the group.

    Returns:
      `(grid, residual)` of the fitted grid where it lowers the error as stored, else the old ones.
    """
    levels = _levels(codes, format)
    gram_levels, ones = triangular.across(gram, levels), triangular.column_sums(gram)[:, None]

    def products(grid: Grid) -> tuple[Array, Array]:
        """Return `Q` and `H Q` of a grid."""
        scale, zero = (jnp.float32(x) for x in grid)
        return scale * (levels - zero), scale * (gram_levels - zero * ones)

    old, gram_old = products(grid)
    fitted = _fitted((levels, gram_levels, ones), residual + gram_old, grid, format)
    new, gram_new = products(fitted)
    moved, gram_moved = new - old, gram_new - gram_old
    better = triangular.column_sums(moved * (gram_moved - 2.0 * residual)) < 0
    return fitted.where(better, grid), residual - jnp.where(better, gram_moved, 0.0)


@functools.partial(jax.jit, static_argnames="format")
def refit(weight: Array, gram: Array, codes: Array, grid: Grid, format: Format) -> Grid:
    """Run one pass over groups, each fitted to the output error with fixed codes.

    Args:
      weight: `W`, [in, out].
      gram: `H`, [in, in].
      codes: int8 [in, out].
      grid: grid of the codes, [groups, out].
      format: target format.

    Returns:
      The grid, [groups, out].
    """
    groups = grid.scale.shape[0]
    size = weight.shape[0] // groups
    group_format = per_group_format(format)

    def step(errors: Array, group: tuple[Array, Array, Grid]) -> tuple[Array, Grid]:
        index, codes, grid = group
        part = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=index * size, slice_size=size
        )
        across = part(gram, axis=1)
        residual = triangular.across(across, errors)
        grid, _ = refit_group(part(across), residual, codes, grid, group_format)
        lost = part(weight) - _dense(codes, grid, format)
        return jax.lax.dynamic_update_slice_in_dim(errors, lost, index * size, 0), grid

    by_group = codes.reshape(groups, size, -1)
    dense = jax.vmap(lambda codes, grid: _dense(codes, grid, format))(by_group, grid)
    errors = weight - dense.reshape(weight.shape)
    return jax.lax.scan(step, errors, (jnp.arange(groups), by_group, grid))[1]


def _levels(codes: Array, format: Format) -> Array:
    return kernels.levels(codes, format.qtype).astype(jnp.float32)


def _dense(codes: Array, grid: Grid, format: Format) -> Array:
    scale, zero = (jnp.float32(x) for x in grid)
    return scale * (_levels(codes, format) - zero)


def _sums(gram: Array, levels: Array) -> tuple[Array, Array, Array]:
    """Return `T`, `H T` and `H 1`."""
    return levels, triangular.across(gram, levels), triangular.column_sums(gram)[:, None]


def _fitted(products: tuple[Array, Array, Array], along: Array, grid: Grid, format: Format) -> Grid:
    """Fit the pair to the target `w` with `along = H w`."""
    levels, gram_levels, ones = products
    sums = (
        triangular.column_sums(levels * gram_levels),
        triangular.column_sums(gram_levels),
        triangular.total(ones[:, 0]),
    )
    right = triangular.column_sums(levels * along), triangular.column_sums(along)
    return fit_pair(sums, right, grid.scale, format)
