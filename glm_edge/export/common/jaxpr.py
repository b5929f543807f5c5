"""Rewriting of traced functions, one operation at a time."""

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
# Most axes of an array in Core ML, the only format with such a limit.
COREML_MAX_RANK = 5
# For larger arguments, `erfc` is 0 in float32.
ERFC_ZERO = 10.0

Replace = Callable[[JaxprEqn, list[Array]], list[Array] | None]


def rewrite(function: Callable[..., Any], replace: Replace) -> Callable[..., Any]:
    """Replace some operations of a function.

    Args:
      function: traceable function; its arguments and results are trees of arrays.
      replace: function of an operation and its inputs. It returns the new outputs, or None to keep
        the operation. Operations that call a function are traversed, not replaced.

    Returns:
      The rewritten function, with the same arguments and results.
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
    """Return the shape and type of a variable, which jax declares as any abstract value."""
    return variable.aval


def _bind(equation: JaxprEqn, inputs: list[Array]) -> list[Array]:
    outputs = equation.primitive.bind(*inputs, **equation.params)
    return outputs if equation.primitive.multiple_results else [outputs]


def expand_erf(function: Callable[..., Any]) -> Callable[..., Any]:
    """Rewrite `erf` and `erfc` in a function as arithmetic, accurate to 1e-6.

    TFLite has no operator for them. Some versions of jax and TensorFlow expand them during
    conversion, others raise; arithmetic converts with every version.

    Args:
      function: traceable function; its arguments and results are trees of arrays.

    Returns:
      The rewritten function, with the same arguments and results.
    """
    return rewrite(function, _expand_erf)


def _expand_erf(equation: JaxprEqn, inputs: list[Array]) -> list[Array] | None:
    if equation.primitive is lax.erfc_p:
        return [erfc(*inputs)]
    return [1.0 - erfc(*inputs)] if equation.primitive is lax.erf_p else None


def erfc(x: Array) -> Array:
    """Compute erfc: `1 - x P(x^2)` near zero, `exp(-x^2) t Q(t)` elsewhere."""
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
    """Return the least-squares fits at Chebyshev nodes of `|x| <= 1` and of `0 <= x <= 10`."""
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
    """Rewrite a function so that every array has at most five axes, the limit of Core ML.

    Arrays with more axes lose their axes of extent one.

    Args:
      function: traceable function; its arguments and results are trees of arrays.

    Returns:
      The rewritten function, with the same arguments and results.
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
        raise ExportError(f"Core ML: {name} has {rank} axes; the maximum is {COREML_MAX_RANK}")
    extents = after.shape
    if after.ndim > COREML_MAX_RANK:
        extents = tuple(extent for extent in extents if extent > 1)
        if len(extents) > COREML_MAX_RANK:
            raise ExportError(
                f"Core ML: an array has shape {after.shape}; the maximum is {COREML_MAX_RANK} axes"
            )
    return result.reshape(extents)
