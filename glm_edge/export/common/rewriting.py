"""Rewriting of a traced function, one operation after the other."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

CALLS = {"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint"}
"""Operations that only call another function."""

Replace = Callable[[JaxprEqn, list[Array]], list[Array] | None]


def rewritten(function: Callable[..., Any], replace: Replace) -> Callable[..., Any]:
    """A function in which other operations stand for some.

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
            body, held = (inner, []) if isinstance(inner, Jaxpr) else (inner.jaxpr, inner.consts)
            outputs = _evaluate(body, held, inputs, replace)
        else:
            outputs = replace(equation, inputs)
            outputs = _bound(equation, inputs) if outputs is None else outputs
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _bound(equation: JaxprEqn, inputs: list[Array]) -> list[Array]:
    outputs = equation.primitive.bind(*inputs, **equation.params)
    return outputs if equation.primitive.multiple_results else [outputs]
