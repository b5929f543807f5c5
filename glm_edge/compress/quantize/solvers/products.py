"""Products of calibration inputs: Gram matrices, and drifts from the inputs of the original model.

Letters: `X` rows of inputs [N, in], `X0` those of the original model, `W` weights [out, in]. Sums
have the same bits for any number of cores, see `triangular`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.compress.quantize.solvers import triangular
from glm_edge.kernels import matmul

# Rows of a Gram matrix per product, and the width from which skipping the rest of it is faster.
_STRIP, _WIDE = 512, 2048


class Products(NamedTuple):
    """Products of rows; those of several sets of rows add up.

    Attributes:
      strips: `X^T X` by strips of rows, each from its diagonal on, see `symmetric`.
      drift: `(X0 - X)^T X` [in, in], or its product with weights `W (X0 - X)^T X` [out, in]; None
        without `X0`.
    """

    strips: tuple[Array, ...]
    drift: Array | None


@functools.partial(jax.jit, static_argnames="compute")
def products(
    rows: Array,
    original: Array | None = None,
    weight: Array | None = None,
    *,
    compute: str = "float32",
) -> Products:
    """Compute the products of rows.

    Args:
      rows: `X`, float32 [N, in].
      original: `X0`, float32 [N, in], or None.
      weight: `W`, float32 [out, in], for the product of the drift with it; None for the drift.
      compute: `float32`, or `bfloat16` with float32 sums.

    Returns:
      The products.
    """
    product = _bf16 if compute == "bfloat16" else _float32
    # An explicit transpose, since contracting the first axes takes twice the time on CPU.
    columns = jax.lax.optimization_barrier(rows.T)
    width = rows.shape[1]
    step = _STRIP if width >= _WIDE else width
    strips = tuple(product(columns[i : i + step], rows[:, i:]) for i in range(0, width, step))
    if original is None:
        return Products(strips, None)
    moved = (original - rows).T
    if weight is not None:
        moved = product(weight, moved)
    return Products(strips, product(jax.lax.optimization_barrier(moved), rows))


@jax.jit
def added(first: Products, second: Products) -> Products:
    """Add the products of two sets of rows."""
    return jax.tree.map(jnp.add, first, second)


def symmetric(strips: tuple[Array, ...]) -> Array:
    """Join the strips of a Gram matrix to the complete matrix, [in, in]."""
    if len(strips) == 1:
        return strips[0]
    return _mirrored(strips)


@jax.jit
def _mirrored(strips: tuple[Array, ...]) -> Array:
    lines = []
    for index, strip in enumerate(strips):
        # Left of the diagonal are the transposed entries of the strips above.
        start = index * _STRIP
        transposed = [
            above[:, start - i * _STRIP :][:, : strip.shape[0]].T
            for i, above in enumerate(strips[:index])
        ]
        lines.append(jnp.concatenate([*transposed, strip], axis=1))
    return jnp.concatenate(lines)


def energy(gram: Array, matrix: Array) -> Array:
    """Compute `tr(M^T H M)` of a symmetric `H` [in, in] and `M` [in, out], float32."""
    width = gram.shape[0]
    step = _STRIP if width >= _WIDE else width
    by_column = jnp.zeros(matrix.shape[1:], jnp.float32)
    for start in range(0, width, step):
        stop = start + step
        part = matrix[start:stop]
        product = _float32(gram[start:stop, start:stop], part)
        if stop < width:
            # Products right of the diagonal count for those left of it too.
            product = product + 2.0 * _float32(gram[start:stop, stop:], matrix[stop:])
        by_column = by_column + triangular.column_sums(product * part)
    return triangular.total(by_column)


def is_shorter(outputs: int, width: int, compute: str) -> bool:
    """Test if the product of a drift with weights needs fewer operations than the drift.

    Args:
      outputs: count of outputs of all weights that read the rows.
      width: count of inputs.
      compute: see `products`; rounding twice to bfloat16 would lose accuracy.
    """
    return compute == "float32" and 2 * outputs < width


def _float32(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _bf16(a: Array, b: Array) -> Array:
    return matmul.dense_bf16(a, b.T)
