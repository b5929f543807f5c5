"""Random orthogonal transforms of any size, in nearly the time of reading the array.

`Q = diag(signs) (H / sqrt(2^k) ⊗ O)` for a size `2^k m` with odd `m`, Sylvester's Hadamard matrix
`H`, random signs, and a random orthogonal `O` [m, m].

References:
  QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, https://arxiv.org/abs/2404.00456.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# Side of the Hadamard factors: smaller ones need fewer operations, larger ones fewer products.
_SIDE = 64


class Rotation(NamedTuple):
    """A random orthogonal matrix of `signs.size` rows, stored as factors.

    Attributes:
      signs: [n], each 1 or -1.
      odd: orthogonal [m, m], with `m` the largest odd divisor of `n`.
    """

    signs: Array
    odd: Array


def random_rotation(key: Array, size: int) -> Rotation:
    """Draw a rotation.

    Args:
      key: jax key.
      size: rows of the matrix, `n`.

    Returns:
      The rotation.
    """
    for_signs, for_odd = jax.random.split(key)
    signs = jax.random.rademacher(for_signs, (size,), jnp.float32)
    odd = size // (size & -size)
    if odd == 1:
        return Rotation(signs, jnp.ones((1, 1), jnp.float32))
    gaussian = np.asarray(jax.random.normal(for_odd, (odd, odd)), np.float64)
    orthogonal, triangle = np.linalg.qr(gaussian)
    # Positive diagonal entries of R make the draw uniform over orthogonal matrices.
    orthogonal = orthogonal * np.where(np.diag(triangle) < 0, -1.0, 1.0)
    return Rotation(signs, jnp.asarray(orthogonal, jnp.float32))


@functools.partial(jax.jit, static_argnames="inverse")
def rotate(x: Array, rotation: Rotation, inverse: bool = False) -> Array:
    """Multiply rows by the rotation, `x Q`, or by its transpose.

    Args:
      x: [..., n].
      rotation: `Q`.
      inverse: multiplies by `Q^T` instead.

    Returns:
      float32 [..., n].
    """
    x = x.astype(jnp.float32)
    if inverse:
        return _kronecker(x, rotation.odd.T) * rotation.signs
    return _kronecker(x * rotation.signs, rotation.odd)


def _kronecker(x: Array, odd: Array) -> Array:
    """Compute `x (H / sqrt(2^k) ⊗ odd)`, with `H` factored as a Kronecker product."""
    size = x.shape[-1]
    power, lead = size // odd.shape[0], x.shape[:-1]
    after = odd.shape[0]
    x = x.reshape(-1, power, after)
    if after > 1:
        x = jnp.einsum("npo,oq->npq", x, odd, precision="highest")
    while power > 1:
        side = min(power, _SIDE)
        sylvester = jnp.asarray(_sylvester(side), jnp.float32)
        power //= side
        x = x.reshape(-1, power, side, after)
        x = jnp.einsum("npso,st->npto", x, sylvester, precision="highest")
        after *= side
    return x.reshape(*lead, size)


def _sylvester(side: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < side:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(side)


@jax.jit
def kurtosis(weight: Array) -> Array:
    """Compute the kurtosis of all entries: 3 for a normal distribution, more with outliers.

    Args:
      weight: array of any shape.

    Returns:
      A scalar; 0 if all entries are equal.
    """
    wide = weight.astype(jnp.float32)
    centred = wide - jnp.mean(wide)
    variance = jnp.mean(jnp.square(centred))
    fourth = jnp.mean(jnp.square(jnp.square(centred / jnp.sqrt(jnp.maximum(variance, 1e-30)))))
    return jnp.where(variance > 0, fourth, 0.0)
