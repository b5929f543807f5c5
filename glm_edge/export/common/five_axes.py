"""Rewriting of a traced function so that no array has more than five axes, all that Core ML has."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.extend.core import JaxprEqn

from glm_edge.errors import ExportError
from glm_edge.export.common.rewriting import rewritten

MOST = 5


def within_five_axes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Rewrites a function so that arrays of more than five axes go without those of extent one.

    Args:
      function: traceable; its arguments and results are trees of arrays.

    Returns:
      The rewritten function, of the same arguments and result.
    """
    return rewritten(function, _within)


def _within(equation: JaxprEqn, inputs: list[Array]) -> list[Array] | None:
    if all(v.aval.ndim <= MOST for v in (*equation.invars, *equation.outvars)):
        return None
    return [_narrow(equation, inputs)]


def _narrow(equation: JaxprEqn, inputs: list[Array]) -> Array:
    name, before, after = equation.primitive.name, equation.invars[0].aval, equation.outvars[0].aval
    if name in ("reshape", "squeeze", "expand_dims") or (
        name == "broadcast_in_dim" and before.size == after.size
    ):
        found = inputs[0]
    elif name == "transpose":
        order = [axis for axis in equation.params["permutation"] if before.shape[axis] > 1]
        kept = sorted(order)
        found = inputs[0].reshape([before.shape[axis] for axis in kept])
        found = jnp.transpose(found, [kept.index(axis) for axis in order])
    elif name == "stack":
        axis = equation.params["axis"]
        shape = [1 if a == axis else e for a, e in enumerate(after.shape) if a == axis or e > 1]
        place = sum(extent > 1 for extent in after.shape[:axis])
        found = jnp.concatenate([part.reshape(shape) for part in inputs], axis=place)
    else:
        raise ExportError(f"Core ML: {name} of {max(before.ndim, after.ndim)} axes; it has {MOST}")
    shape = after.shape
    if after.ndim > MOST:
        shape = tuple(extent for extent in shape if extent > 1)
        if len(shape) > MOST:
            raise ExportError(f"Core ML: an array of shape {after.shape}; it has {MOST} axes")
    return found.reshape(shape)
