"""The gradient step that all trainings of the experiments share."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import Array

Loss = Callable[..., tuple[Array, Any]]


def gradient_step(
    loss: Loss, optimizer: optax.GradientTransformation, params: Any, state: Any, *inputs: Any
) -> tuple[Any, Any, Array, Any]:
    """Take one step of an optimizer.

    Args:
      loss: gives `(loss, more)` of `(params, *inputs)`.
      optimizer: whose updates are added.
      params: what trains.
      state: of the optimizer.
      *inputs: further arguments of the loss.

    Returns:
      `(params, state, loss, more)`.
    """
    (value, more), gradient = jax.value_and_grad(loss, has_aux=True)(params, *inputs)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value, more
