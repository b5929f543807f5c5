"""GPTQ: column-wise rounding of a matrix, with compensation for the errors of earlier columns.

The objective is the squared error at the output, `tr((W - Q) H (W - Q)^T)`, with the Gram matrix
`H` of the inputs. With `H = R R^T` and an upper triangular `R`, it is the sum over columns of
`R[j, j]^2 (t_j - q_j)^2`. The target `t_j` of a column depends on the errors of earlier columns.
Rounding the targets in turn is GPTQ (and Babai's nearest plane), without an inverse of `H`.

Arrays are transposed internally, [in, out], so that a column is contiguous. Letters: `g` columns of
a group, `b` columns of a block.

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

from glm_edge.compress.quantize.solvers import alignment, columns, descent, triangular
from glm_edge.compress.quantize.solvers.columns import ColumnBlock
from glm_edge.compress.quantize.solvers.products import energy
from glm_edge.compress.quantize.solvers.scales import (
    Grid,
    nearest_columns,
    normalized,
    per_group_format,
    search_scale,
)
from glm_edge.compress.timing import timed
from glm_edge.errors import BoxError
from glm_edge.params import Format
from glm_edge.params.formats import PER_TENSOR

# Scales of larger groups are searched by rounding to nearest, not by running the column loop.
SEARCHED = 256
MOST_DAMPING = 1e4


class Info(NamedTuple):
    """Damping and relative error of a solution.

    Attributes:
      damping: fraction of the mean diagonal that was added to the diagonal.
      loss: `tr((W - Q) H (W - Q)^T) / tr(W H W^T)`, or zero if all inputs are zero.
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
    shrinkage: float = 0.0,
) -> tuple[Array, Grid, Info]:
    """Quantize a matrix to minimize its output error, given the Gram matrix of its inputs.

    Args:
      weight: `W`, [out, in].
      gram: `H`, float32 [in, in], the sum of `x x^T`.
      format: target format.
      scale: `max` and `fit` apply `scales.choose` to the compensated weights of a group when it is
        reached; `mse` searches the fraction of `max` with the least output error; `extreme` also
        searches negative scales (symmetric integers only).
      act_order: processes groups, and columns within each group, by decreasing input energy. The
        storage order is unchanged.
      damping: fraction of the mean diagonal that is added to the diagonal (`percdamp`). It is
        multiplied by ten until `H` has a Cholesky factor.
      block: columns between two products with all columns.
      mask: bool [out, in], False where a weight stays zero; None without a mask.
      refit: fits scales by least squares after rounding, where that reduces the error. Zero points
        between levels are fitted too, already when a group is reached.
      sweeps: passes of coordinate descent over the codes, each after a `refit` if enabled.
      shrinkage: fraction in 0..1 by which `H` moves to its diagonal before the solve.

    Returns:
      `(codes, grid, info)`: int8 [out, in] in the order of `weight`, its scales and zero points,
      and damping and error. The error is that of `H` without shrinkage.

    Raises:
      BoxError: columns do not divide into groups.
      FloatingPointError: the Gram matrix is not finite.

    References:
      GPTQ, https://arxiv.org/abs/2210.17323, algorithm 1; QuantEase,
      https://arxiv.org/abs/2309.01885; PT2-LLM, https://arxiv.org/abs/2510.03267.
    """
    groups = format.num_groups(weight.shape[1])
    if gram.shape != (weight.shape[1],) * 2:
        raise BoxError(f"gram must be [{weight.shape[1]}, {weight.shape[1]}], not {gram.shape}")
    weight = weight.astype(jnp.float32)
    order = column_order(gram, groups, format.qtype == "ternary34") if act_order else None
    ordered, ordered_mask, gram = _arranged(weight, mask, gram, order)
    # H = R R^T with shrinkage and damping (`percdamp`), then Algorithm 1: one pass over the groups.
    factor, damped, used = timed("factor", _damped_factor, shrunk(gram, shrinkage), damping)
    fits_zeros = refit and alignment.fits_zeros(format)
    options = (format, scale, block, fits_zeros)
    codes, grid = timed("rounding", by_groups, ordered, factor, ordered_mask, *options)
    codes, grid = timed(
        "descent",
        _improved,
        ordered,
        damped,
        codes,
        grid,
        ordered_mask,
        format,
        block,
        refit,
        sweeps,
    )
    loss = float(_relative_loss(ordered, gram, codes, grid, format))
    codes, grid = _restored(codes, grid, order, groups)
    return codes, grid, Info(used, loss)


def _improved(
    weight: Array,
    gram: Array,
    codes: Array,
    grid: Grid,
    mask: Array | None,
    format: Format,
    block: int,
    refit: bool,
    sweeps: int,
) -> tuple[Array, Grid]:
    """Alternate coordinate descent on the codes (QuantEase) with refits of the grid."""
    groups = grid.scale.shape[0]
    together = refit and groups > 1 and weight.shape[0] // groups <= SEARCHED
    for _ in range(max(sweeps, int(refit))):
        if together and sweeps:
            codes, grid = descent.descend_by_groups(weight, gram, codes, grid, mask, format)
            continue
        if refit and alignment.fits_zeros(format):
            grid = alignment.refit(weight, gram, codes, grid, format)
        elif refit:
            grid = descent.refit(weight, gram, codes, grid, format)
        if sweeps:
            codes = descent.descend(weight, gram, codes, grid, mask, format, block)
    return codes, grid


def damped_factor(gram: Array, damping: float) -> tuple[Array, Array, float]:
    """Compute the upper triangular `R` with `R R^T = H + damping * mean(diag(H)) I`.

    Args:
      gram: `H`, [in, in].
      damping: initial fraction of the mean diagonal.

    Returns:
      `(R, damped Gram matrix, final fraction)` of the result of `scaled`.

    Raises:
      FloatingPointError: the Gram matrix is not finite, or has no factor with any damping.
    """
    return _damped_factor(scaled(gram), damping)


def _damped_factor(gram: Array, damping: float) -> tuple[Array, Array, float]:
    """Compute the result of `damped_factor` for a result of `scaled`, without a copy of it."""
    if not bool(_is_finite(gram)):
        raise FloatingPointError("the Gram matrix contains NaN or infinity")
    diagonal_only = False
    while True:
        factor, damped = factored(gram, damping)
        if bool(_is_finite(factor)):
            return factor, damped, float(damping)
        if diagonal_only:
            raise FloatingPointError(f"the Gram matrix has no factor with damping {damping:g}")
        if damping > MOST_DAMPING:
            # Only a matrix that is not a Gram matrix reaches this line; its diagonal is used.
            gram, diagonal_only = jnp.diag(jnp.abs(jnp.diagonal(gram))), True
        else:
            damping = max(10.0 * damping, 1e-6)


@jax.jit
def scaled(gram: Array) -> Array:
    """Scale a Gram matrix by a power of two, such that its largest entry is near one, in float32.

    Solutions do not depend on this factor. Without it, sums of large entries could overflow.
    """
    gram = gram.astype(jnp.float32)
    return normalized(gram, jnp.max(jnp.abs(gram)))


def shrunk(gram: Array, gamma: float | Array) -> Array:
    """Return `(1 - gamma) H + gamma diag(H)`, [in, in]; `H` itself for a gamma of zero."""
    if isinstance(gamma, float) and not gamma:
        return gram
    return _off_diagonal_times(gram, 1.0 - gamma)


@jax.jit
def _off_diagonal_times(gram: Array, fraction: float | Array) -> Array:
    return jnp.where(jnp.eye(gram.shape[0], dtype=bool), gram, fraction * gram)


@jax.jit
def factored(gram: Array, damping: float | Array) -> tuple[Array, Array]:
    """Compute `(R, damped Gram matrix)` of `damped_factor`, with NaN if there is no factor."""
    mean = triangular.total(jnp.abs(jnp.diagonal(gram))) / gram.shape[0]
    added = jnp.where(mean > 0, jnp.maximum(damping * mean, 0.0), 1.0)
    damped = gram + added * jnp.eye(gram.shape[0], dtype=gram.dtype)
    return triangular.cholesky(damped[::-1, ::-1])[::-1, ::-1], damped


@functools.partial(jax.jit, static_argnames=("groups", "by_fours"), inline=True)
def column_order(gram: Array, groups: int, by_fours: bool = False) -> Array:
    """Order columns by decreasing input energy; columns of a group stay together.

    Args:
      gram: `H`, [in, in].
      groups: count of groups of adjacent columns.
      by_fours: also keeps each four adjacent columns together.

    Returns:
      int [in], column indices in order of processing.
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
    """Transpose weight and mask to [in, out], scale the Gram matrix, and permute columns."""
    gram = scaled(gram)
    if order is not None:
        weight, gram = weight[:, order], gram[order][:, order]
        mask = None if mask is None else mask[:, order]
    return weight.T, None if mask is None else mask.T, gram


@functools.partial(jax.jit, static_argnames="groups")
def _restored(codes: Array, grid: Grid, order: Array | None, groups: int) -> tuple[Array, Grid]:
    """Invert `_arranged` for codes [in, out] and their scales and zero points."""
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


@functools.partial(jax.jit, static_argnames=("format", "scale", "block", "fits_zeros"))
def by_groups(
    weight: Array,
    factor: Array,
    mask: Array | None,
    format: Format,
    scale: str,
    block: int = 128,
    fits_zeros: bool = False,
) -> tuple[Array, Grid]:
    """Run one pass of GPTQ over all groups.

    Args:
      weight: `W`, [in, out].
      factor: `R`, upper triangular, [in, in].
      mask: bool [in, out], False where a weight stays zero; None without a mask.
      format: target format.
      scale: see `solve`.
      block: see `solve`.
      fits_zeros: fits scale and zero point of a group to its output error when it is reached.

    Returns:
      Codes [in, out] and a grid [groups, out] or [1, 1].
    """
    groups = format.num_groups(weight.shape[0])
    size = weight.shape[0] // groups
    group_format = per_group_format(format)

    def step(errors: Array, group: Array) -> tuple[Array, tuple[Array, Grid]]:
        part = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=group * size, slice_size=size
        )
        # Columns of R of this group: with all rows, and with the rows of this group.
        across = part(factor, axis=1)
        within = part(across)
        # R^T (W - Q) of earlier columns: the error that this group compensates for.
        residual = triangular.across(across, errors)
        scales = jnp.diagonal(within)
        columns_of_block = ColumnBlock(
            target=part(weight) + residual / scales[:, None],
            weight=part(weight),
            coupling=jnp.triu(within, 1) / scales,
            cost=jnp.square(scales),
            mask=None if mask is None else part(mask),
        )
        # Weights that would cancel the error of earlier columns if they were not rounded.
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
        if fits_zeros:
            grid = alignment.align(columns_of_block, within, unrounded, grid, group_format, block)
        codes, group_errors, _ = columns.rounded(columns_of_block, grid, group_format, block)
        errors = jax.lax.dynamic_update_slice_in_dim(errors, group_errors, group * size, 0)
        return errors, (codes, grid)

    _, (codes, grid) = jax.lax.scan(step, jnp.zeros_like(weight), jnp.arange(groups))
    if format.group_size == PER_TENSOR:
        grid = grid.map(lambda x: x[:, :1])
    return codes.reshape(weight.shape), grid


@functools.partial(jax.jit, static_argnames="format")
def _relative_loss(weight: Array, gram: Array, codes: Array, grid: Grid, format: Format) -> Array:
    lost = energy(gram, weight - columns.decoded(codes, grid, format))
    power = energy(gram, weight)
    return jnp.where(power > 0, lost / jnp.where(power > 0, power, 1.0), 0.0)
