"""Rewriting of a traced function without the error function, which TFLite has no operator for.

Whether the converter expands `erf` and `erfc`, or refuses them, depends on the versions of jax and
TensorFlow; arithmetic converts with all of them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import JaxprEqn

from glm_edge.export.common.rewriting import rewritten

LARGEST = 10.0


def without_erf(function: Callable[..., Any]) -> Callable[..., Any]:
    """Rewrites a function so that `erf` and `erfc` in it are arithmetic, to within 1e-6.

    Args:
      function: traceable; its arguments and results are trees of arrays.

    Returns:
      The rewritten function, of the same arguments and result.
    """
    return rewritten(function, _without_erf)


def erfc(x: Array) -> Array:
    """Complementary error function: `1 - x P(x^2)` near zero, `exp(-x^2) t Q(t)` farther out."""
    near_zero, far_out = _coefficients()
    square = x * x
    t = 1.0 / (1.0 + 0.5 * jnp.abs(x))
    tail = _polynomial(far_out, t) * t * jnp.exp(-square)
    tail = jnp.where(x < 0.0, 2.0 - tail, tail)
    return jnp.where(square < 1.0, 1.0 - x * _polynomial(near_zero, square), tail)


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    *lower, total = coefficients
    for coefficient in reversed(lower):
        total = total * x + coefficient
    return total


@functools.cache
def _coefficients() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Least-squares fits at Chebyshev nodes of `|x| <= 1` and of `0 <= x <= 10`."""
    nodes = np.cos(np.pi * (np.arange(200) + 0.5) / 200)
    square = (1.0 + nodes) / 2.0
    near_zero = [math.erf(math.sqrt(u)) / math.sqrt(u) for u in square]
    least = 1.0 / (1.0 + 0.5 * LARGEST)
    t = (least + 1.0) / 2.0 + (1.0 - least) / 2.0 * nodes
    far_out = [math.erfc(x) * math.exp(x * x) for x in 2.0 * (1.0 / t - 1.0)] / t
    return _fit(square, near_zero, 6), _fit(t, far_out, 8)


def _fit(x: np.ndarray, y: np.ndarray, degree: int) -> tuple[float, ...]:
    fitted = np.polynomial.Polynomial.fit(x, y, degree, w=1.0 / np.asarray(y)).convert()
    return tuple(float(coefficient) for coefficient in fitted.coef)


def _without_erf(equation: JaxprEqn, inputs: list[Array]) -> list[Array] | None:
    if equation.primitive is lax.erfc_p:
        return [erfc(*inputs)]
    return [1.0 - erfc(*inputs)] if equation.primitive is lax.erf_p else None
