"""Cholesky factors and triangular systems with the same bits for any number of cores.

LAPACK splits its work by threads, which changes the last bits. This module processes blocks of a
fixed size in a fixed order: a loop over columns within a block, and products between blocks. XLA
multiplies plain matrices on CPU in an order that depends only on shapes. A product with a
transposed first operand, or a sum along another axis than the last, depends on threads. Therefore
`across` transposes explicitly, and `column_sums` and `total` are products with ones.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

_BLOCK = 64
# Maximum of panels, and minimum of blocks per panel: more panels save products but compile longer.
_PANELS, _LEAST = 8, 4
_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def column_sums(matrix: Array) -> Array:
    """Sum [..., rows, in] along the axis of rows, [..., in]."""
    ones = jnp.ones((*matrix.shape[:-2], 1, matrix.shape[-2]), matrix.dtype)
    return _product(ones, matrix)[..., 0, :]


def across(matrix: Array, right: Array) -> Array:
    """Compute `A^T B` [k, m] of `A` [n, k] and `B` [n, m]."""
    return _product(jax.lax.optimization_barrier(matrix.T), right)


def total(vector: Array) -> Array:
    """Sum a vector to a scalar."""
    return column_sums(vector[:, None])[0]


def cholesky(matrix: Array) -> Array:
    """Compute the lower triangular `L` with `L L^T = A`, for a symmetric `A`.

    Args:
      matrix: `A`, float32 [n, n]; only its lower triangle is read.

    Returns:
      `L`, float32 [n, n]; contains NaN if the matrix is not positive definite.
    """
    size = matrix.shape[0]
    if size <= _BLOCK:
        return _small_cholesky(matrix)
    padded = _padded(matrix)
    blocks = padded.shape[0] // _BLOCK
    panel = max(-(-blocks // _PANELS), _LEAST) * _BLOCK
    done: list[Array] = []
    for start in range(0, padded.shape[0], panel):
        # Left-looking factorization: update a panel of columns by all earlier ones, then factor it.
        # Updating all later columns after each panel takes twice the operations.
        stop = min(start + panel, padded.shape[0])
        columns = padded[start:, start:stop]
        if done:
            earlier = jnp.concatenate(done, axis=1)[start:]
            columns = columns - _product(earlier, earlier[: stop - start].T)
        done.append(jnp.pad(_panel(columns), ((start, 0), (0, 0))))
    return jnp.concatenate(done, axis=1)[:size, :size]


def solve_lower(factor: Array, right: Array, transposed: bool = False) -> Array:
    """Solve `L X = B`, or `L^T X = B`.

    Args:
      factor: `L`, lower triangular, float32 [n, n].
      right: `B`, float32 [n, m].
      transposed: solves with `L^T`.

    Returns:
      `X`, float32 [n, m].
    """
    size = factor.shape[0]
    if size <= _BLOCK:
        inverse = _small_inverse(factor)
        return across(inverse, right) if transposed else _product(inverse, right)
    factor = _padded(factor)
    blocks = factor.shape[0] // _BLOCK
    right = jnp.pad(right, ((0, factor.shape[0] - size), (0, 0)))
    part = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=_BLOCK)

    def step(index: Array, right: Array) -> Array:
        start = (blocks - 1 - index if transposed else index) * _BLOCK
        inverse = _small_inverse(part(part(factor, start), start, axis=1))
        # Substitute the solved block into the others. Solved rows stay, since L is zero there.
        if transposed:
            solution = across(inverse, part(right, start))
            right = right - across(part(factor, start), solution)
        else:
            solution = _product(inverse, part(right, start))
            right = right - _product(part(factor, start, axis=1), solution)
        return jax.lax.dynamic_update_slice_in_dim(right, solution, start, 0)

    return jax.lax.fori_loop(0, blocks, step, right)[:size]


def solve_upper(factor: Array, right: Array, transposed: bool = False) -> Array:
    """Solve `R X = B`, or `R^T X = B`, with an upper triangular `R`; shapes as `solve_lower`."""
    return solve_lower(factor[::-1, ::-1], right[::-1], transposed)[::-1]


def _padded(matrix: Array) -> Array:
    """Extend the matrix with ones on the diagonal to a multiple of the block size."""
    missing = -matrix.shape[0] % _BLOCK
    grown = jnp.pad(matrix, (0, missing))
    return grown.at[jnp.arange(missing) + len(matrix), jnp.arange(missing) + len(matrix)].set(1.0)


def _panel(columns: Array) -> Array:
    """Compute the first columns of the factor, [n, width], from those of the matrix."""
    height, width = columns.shape
    row, column = jnp.arange(height)[:, None], jnp.arange(width)
    part = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=_BLOCK)

    def step(index: Array, columns: Array) -> Array:
        start = index * _BLOCK
        panel = part(columns, start, axis=1)
        factor = _small_cholesky(part(panel, start))
        below = jnp.where(row >= start + _BLOCK, _product(panel, _small_inverse(factor).T), 0.0)
        later = jnp.where(column >= start + _BLOCK, _product(below, below[:width].T), 0.0)
        columns = columns - later
        panel = jax.lax.dynamic_update_slice_in_dim(below, factor, start, 0)
        return jax.lax.dynamic_update_slice_in_dim(columns, panel, start, 1)

    return jax.lax.fori_loop(0, width // _BLOCK, step, columns)


def _small_cholesky(matrix: Array) -> Array:
    size = matrix.shape[0]
    row = jnp.arange(size)

    def step(index: Array, factor: Array) -> Array:
        # A[:, j] - L L[j]^T, where columns of L from j on are still zero; then scale by the pivot.
        before = jax.lax.dynamic_index_in_dim(factor, index, keepdims=False)
        column = jax.lax.dynamic_index_in_dim(matrix, index, 1, keepdims=False)
        column = column - _product(factor, before[:, None])[:, 0]
        pivot = jnp.sqrt(jax.lax.dynamic_index_in_dim(column, index, keepdims=False))
        column = jnp.where(row >= index, column / pivot, 0.0)
        return jax.lax.dynamic_update_index_in_dim(factor, column, index, 1)

    return jax.lax.fori_loop(0, size, step, jnp.zeros_like(matrix))


def _small_inverse(factor: Array) -> Array:
    size = factor.shape[0]
    identity = jnp.eye(size, dtype=factor.dtype)

    def step(index: Array, inverse: Array) -> Array:
        factor_row = jax.lax.dynamic_slice_in_dim(factor, index, 1)
        row = jax.lax.dynamic_slice_in_dim(identity, index, 1) - _product(factor_row, inverse)
        row = row / jax.lax.dynamic_slice_in_dim(factor_row, index, 1, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(inverse, row, index, 0)

    return jax.lax.fori_loop(0, size, step, jnp.zeros_like(factor))
