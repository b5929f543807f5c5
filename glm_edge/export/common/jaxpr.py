"""Rewriting of a traced function, one operation after the other."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from glm_edge.errors import ExportError

CALLS = {"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint"}
"""Operations that only call another function."""
# Of arrays in Core ML, the one format with such a limit.
COREML_MAX_RANK = 5
# From here on, `erfc` is 0 in float32.
ERFC_ZERO = 10.0

Replace = Callable[[JaxprEqn, list[Array]], list[Array] | None]


def rewrite(function: Callable[..., Any], replace: Replace) -> Callable[..., Any]:
    """Replaces some operations of a function.

    Args:
      function: traceable; its arguments and results are trees of arrays.
      replace: called with an operation and its inputs; gives its outputs, or None where the
        operation stays. Calls are followed, not replaced.

    Returns:
      The function, of the same arguments and result.
    """

    def run(*arguments: Any) -> Any:
        closed, result = jax.make_jaxpr(function, return_shape=True)(*arguments)
        outputs = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(arguments), replace)
        return jax.tree.unflatten(jax.tree.structure(result), outputs)

    return run


def _evaluate(
    jaxpr: Jaxpr, constants: list[Array], arguments: list[Array], replace: Replace
) -> list[Array]:
    values = dict(zip(jaxpr.constvars, constants, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(variable: Any) -> Array:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        inputs = [read(variable) for variable in equation.invars]
        if equation.primitive.name in CALLS:
            inner = next(v for v in equation.params.values() if isinstance(v, ClosedJaxpr | Jaxpr))
            body, consts = (inner, []) if isinstance(inner, Jaxpr) else (inner.jaxpr, inner.consts)
            outputs = _evaluate(body, consts, inputs, replace)
        else:
            replaced = replace(equation, inputs)
            outputs = _bind(equation, inputs) if replaced is None else replaced
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def aval(variable: Any) -> ShapedArray:
    """Returns the shape and type of a variable, which jax declares as any abstract value."""
    return variable.aval


def _bind(equation: JaxprEqn, inputs: list[Array]) -> list[Array]:
    outputs = equation.primitive.bind(*inputs, **equation.params)
    return outputs if equation.primitive.multiple_results else [outputs]


def expand_erf(function: Callable[..., Any]) -> Callable[..., Any]:
    """Rewrites a function so that `erf` and `erfc` in it are arithmetic, to within 1e-6.

    TFLite has no operator for them. Whether its converter expands or refuses them depends on the
    versions of jax and TensorFlow; arithmetic converts with all of them.

    Args:
      function: traceable; its arguments and results are trees of arrays.

    Returns:
      The rewritten function, of the same arguments and result.
    """
    return rewrite(function, _expand_erf)


def _expand_erf(equation: JaxprEqn, inputs: list[Array]) -> list[Array] | None:
    if equation.primitive is lax.erfc_p:
        return [erfc(*inputs)]
    return [1.0 - erfc(*inputs)] if equation.primitive is lax.erf_p else None


def erfc(x: Array) -> Array:
    """Computes erfc: `1 - x P(x^2)` near zero, `exp(-x^2) t Q(t)` farther out."""
    near_zero, far_out = _erfc_coefficients()
    square = x * x
    t = 1.0 / (1.0 + 0.5 * jnp.abs(x))
    tail = _polynomial(far_out, t) * t * jnp.exp(-square)
    tail = jnp.where(x < 0.0, 2.0 - tail, tail)
    return jnp.where(square < 1.0, 1.0 - x * _polynomial(near_zero, square), tail)


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    total: Any
    *lower, total = coefficients
    for coefficient in reversed(lower):
        total = total * x + coefficient
    return total


@functools.cache
def _erfc_coefficients() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Least-squares fits at Chebyshev nodes of `|x| <= 1` and of `0 <= x <= 10`."""
    nodes = np.cos(np.pi * (np.arange(200) + 0.5) / 200)
    square = (1.0 + nodes) / 2.0
    near_zero = np.array([math.erf(math.sqrt(u)) / math.sqrt(u) for u in square])
    least = 1.0 / (1.0 + 0.5 * ERFC_ZERO)
    t = (least + 1.0) / 2.0 + (1.0 - least) / 2.0 * nodes
    far_out = np.array([math.erfc(x) * math.exp(x * x) for x in 2.0 * (1.0 / t - 1.0)]) / t
    return _fit(square, near_zero, 6), _fit(t, far_out, 8)


def _fit(x: np.ndarray, y: np.ndarray, degree: int) -> tuple[float, ...]:
    fitted = np.polynomial.Polynomial.fit(x, y, degree, w=1.0 / np.asarray(y)).convert()
    return tuple(float(coefficient) for coefficient in fitted.coef)


def limit_rank(function: Callable[..., Any]) -> Callable[..., Any]:
    """Rewrites a function so that no array has more than five axes, the limit of Core ML.

    Arrays of more axes lose those of extent one.

    Args:
      function: traceable; its arguments and results are trees of arrays.

    Returns:
      The rewritten function, of the same arguments and result.
    """
    return rewrite(function, _limit_rank)


def _limit_rank(equation: JaxprEqn, inputs: list[Array]) -> list[Array] | None:
    if all(aval(v).ndim <= COREML_MAX_RANK for v in (*equation.invars, *equation.outvars)):
        return None
    return [_squeeze(equation, inputs)]


def _squeeze(equation: JaxprEqn, inputs: list[Array]) -> Array:
    name, before, after = (
        equation.primitive.name,
        aval(equation.invars[0]),
        aval(equation.outvars[0]),
    )
    if name in ("reshape", "squeeze", "expand_dims") or (
        name == "broadcast_in_dim" and before.size == after.size
    ):
        result = inputs[0]
    elif name == "transpose":
        order = [axis for axis in equation.params["permutation"] if before.shape[axis] > 1]
        axes = sorted(order)
        result = inputs[0].reshape([before.shape[axis] for axis in axes])
        result = jnp.transpose(result, [axes.index(axis) for axis in order])
    elif name == "stack":
        axis = equation.params["axis"]
        shape = [1 if a == axis else e for a, e in enumerate(after.shape) if a == axis or e > 1]
        position = sum(extent > 1 for extent in after.shape[:axis])
        result = jnp.concatenate([part.reshape(shape) for part in inputs], axis=position)
    else:
        rank = max(before.ndim, after.ndim)
        raise ExportError(f"Core ML: {name} of {rank} axes; it has {COREML_MAX_RANK}")
    extents = after.shape
    if after.ndim > COREML_MAX_RANK:
        extents = tuple(extent for extent in extents if extent > 1)
        if len(extents) > COREML_MAX_RANK:
            raise ExportError(
                f"Core ML: an array of shape {after.shape}; it has {COREML_MAX_RANK} axes"
            )
    return result.reshape(extents)
