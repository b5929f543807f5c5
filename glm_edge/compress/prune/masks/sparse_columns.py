"""SparseGPT of one matrix: column by column, each compensating the errors of those before it.

It minimizes the squared error at the output, as `glm_edge.compress.quantize.solvers.gptq_solver`
does, with the same factor `H = R R^T`. Pruning a weight costs `R[j, j]^2` times the square of its
value after compensation so far, which is SparseGPT's `w^2 / [H^-1]_jj` of the remaining columns.

Arrays inside are transposed, [in, out]. Letters: `b` columns of a block, `m` columns of a group of
`N:M`.

References:
  SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot,
  https://arxiv.org/abs/2301.00774.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.compress.quantize.solvers import triangular
from glm_edge.compress.quantize.solvers.gptq_solver import (
    Info,
    damped_factor,
    factored,
    scaled,
    shrunk,
)
from glm_edge.compress.quantize.solvers.shrinkage import PlainRounding

_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def solve(
    weight: Array,
    gram: Array,
    sparsity: float = 0.0,
    n_m: tuple[int, int] | None = None,
    damping: float = 0.01,
    block: int = 128,
    mask: Array | None = None,
    refine: int = 0,
    shrinkage: float = 0.0,
) -> tuple[Array, Array, Info]:
    """Prune a matrix to least squared error at its output, from the Gram matrix of its inputs.

    Args:
      weight: [out, in].
      gram: float32 [in, in], the sum of `x x^T`.
      sparsity: fraction of each block of columns to prune, where `n_m` is None.
      n_m: `(N, M)`: of M neighbours along the inputs N remain.
      damping: fraction of the mean diagonal that is added to it; times ten until a factor exists.
      block: columns whose weights compete, or the largest smaller divisor of their number.
      mask: bool [out, in], False where a weight is zero already; None keeps all.
      refine: steps of conjugate gradients that then fit the remaining weights; 0 is SparseGPT as
        published.
      shrinkage: fraction in 0..1 by which the Gram matrix moves to its diagonal before the solve.

    Returns:
      `(weight, keep, info)`: float32 and bool [out, in], and damping and error. The error is that
      of the Gram matrix without shrinkage.

    Raises:
      FloatingPointError: the Gram matrix is not finite.
    """
    weight, gram = weight.astype(jnp.float32).T, scaled(gram)
    factor, damped, used = damped_factor(shrunk(gram, shrinkage), damping)
    errors, keep = _pruned(
        weight, factor, mask.T if mask is not None else None, sparsity, n_m, block
    )
    if refine:
        errors = _refined(weight, damped, errors, keep, refine)
    power, lost = (
        float(np.sum(np.asarray(triangular.column_sums(_product(gram, x) * x), np.float64)))
        for x in (weight, errors)
    )
    pruned = jnp.where(keep, weight - errors, 0.0)
    return pruned.T, keep.T, Info(used, lost / power if power > 0 else 0.0)


@dataclass(frozen=True)
class PlainPruning:
    """The solve of a trial of `shrinkage.choose`: one pass, without conjugate gradients.

    Attributes:
      sparsity: see `solve`.
      n_m: see `solve`.
      block: see `solve`.
      rounding: rounding of the remaining weights, or None.
    """

    sparsity: float
    n_m: tuple[int, int] | None
    block: int
    rounding: PlainRounding | None

    def __call__(
        self, weight: Array, gram: Array, damping: float | Array, mask: Array | None
    ) -> Array:
        """Return the errors of a weight [in, out]."""
        factor, _ = factored(gram, damping)
        errors, keep = _pruned(weight, factor, mask, self.sparsity, self.n_m, self.block)
        return errors if self.rounding is None else self.rounding(weight, gram, damping, keep)


def _pruned(
    weight: Array,
    factor: Array,
    mask: Array | None,
    sparsity: float,
    n_m: tuple[int, int] | None,
    block: int,
) -> tuple[Array, Array]:
    """Return the errors `W - Q` and the mask, [in, out], of an optional earlier mask."""
    unmasked = jnp.ones(weight.shape, bool) if mask is None else mask
    size = _block_of(weight.shape[0], block, 1 if n_m is None else n_m[1])
    return _by_blocks(weight, factor, unmasked, sparsity, n_m, size)


def _block_of(count: int, block: int, unit: int) -> int:
    """Return the largest divisor of `count` up to `block` that is a multiple of `unit`."""
    sizes = range(unit, min(count, max(block, unit)) + 1, unit)
    return max(size for size in sizes if count % size == 0)


@functools.partial(jax.jit, static_argnames=("sparsity", "n_m", "size"))
def _by_blocks(
    weight: Array,
    factor: Array,
    unmasked: Array,
    sparsity: float,
    n_m: tuple[int, int] | None,
    size: int,
) -> tuple[Array, Array]:
    """Return the errors `W - Q` and the mask, [in, out]."""

    def step(errors: Array, index: Array) -> tuple[Array, Array]:
        part = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=index * size, slice_size=size
        )
        across = part(factor, axis=1)
        within, block, keep = part(across), part(weight), part(unmasked)
        # Compensation that the errors of all blocks before this one ask of its columns.
        residual = triangular.across(across, errors)
        if n_m is None:
            keep = _kept_of_block(_worth(within, block, residual), keep, sparsity)
        block_errors, keep = _columns(within, block, residual, keep, n_m)
        return jax.lax.dynamic_update_slice_in_dim(errors, block_errors, index * size, 0), keep

    steps = jnp.arange(weight.shape[0] // size)
    errors, keep = jax.lax.scan(step, jnp.zeros_like(weight), steps)
    return errors, keep.reshape(weight.shape)


def _worth(within: Array, weight: Array, residual: Array) -> Array:
    """Compute the cost of pruning each weight, [b, out], after compensation so far."""
    # SparseGPT, Algorithm 1: w^2 / [H^-1]_jj.
    compensated = weight + triangular.solve_upper(within, residual, transposed=True)
    return jnp.square(compensated * jnp.diagonal(within)[:, None])


def _kept_of_block(worth: Array, unmasked: Array, sparsity: float) -> Array:
    worth = jnp.where(unmasked, worth, -jnp.inf).reshape(-1)
    lowest = jnp.argsort(worth, stable=True)[: round(sparsity * worth.size)]
    return unmasked & jnp.ones(worth.size, bool).at[lowest].set(False).reshape(unmasked.shape)


def _columns(
    within: Array, weight: Array, residual: Array, unmasked: Array, n_m: tuple[int, int] | None
) -> tuple[Array, Array]:
    """Prune the columns of a block in turn; errors and mask, [b, out]."""
    unit = 1 if n_m is None else n_m[1]
    scales = jnp.diagonal(within)

    def step(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        errors, keep = carry
        first = index * unit
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=unit)
        across = part(within, axis=1)
        factor_part, part_residual = (
            part(across),
            part(residual) + triangular.across(across, errors),
        )
        weights, stays = part(weight), part(keep)
        if n_m is not None:
            worth = jnp.where(stays, _worth(factor_part, weights, part_residual), -jnp.inf)
            rank = jnp.argsort(jnp.argsort(worth, axis=0, stable=True), axis=0)
            stays = stays & (rank >= n_m[1] - n_m[0])
        errors_of_unit: list[Array] = []
        # The columns of a group of N:M lose their weights together and compensate in turn.
        for i in range(unit):
            moved = part_residual[i] + sum(factor_part[k, i] * errors_of_unit[k] for k in range(i))
            target = weights[i] + moved / part(scales)[i]
            errors_of_unit.append(weights[i] - jnp.where(stays[i], target, 0.0))
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
        return put(errors, jnp.stack(errors_of_unit)), put(keep, stays)

    start = (jnp.zeros_like(weight), unmasked)
    return jax.lax.fori_loop(0, weight.shape[0] // unit, step, start)


@functools.partial(jax.jit, static_argnames="steps")
def _refined(weight: Array, gram: Array, errors: Array, keep: Array, steps: int) -> Array:
    """Return errors after conjugate gradients on the remaining weights, per output."""
    # Jacobi preconditioner.
    scale = jnp.diagonal(gram)[:, None]

    def inner(a: Array, b: Array) -> Array:
        return triangular.column_sums(a * b)

    def step(_: int, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        errors, residual, direction, power = carry
        along = jnp.where(keep, _product(gram, direction), 0.0)
        curvature = inner(direction, along)
        length = jnp.where(curvature > 0, power / jnp.where(curvature > 0, curvature, 1.0), 0.0)
        errors, residual = errors - length * direction, residual - length * along
        eased = residual / scale
        new = inner(residual, eased)
        ratio = jnp.where(power > 0, new / jnp.where(power > 0, power, 1.0), 0.0)
        return errors, residual, eased + ratio * direction, new

    residual = jnp.where(keep, _product(gram, errors), 0.0)
    eased = residual / scale
    start = (errors, residual, eased, inner(residual, eased))
    return jax.lax.fori_loop(0, steps, step, start)[0]
