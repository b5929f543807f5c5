"""Scores as functions of arrays, which every pruning transform calls.

Letters: `r` rows (out), `c` columns (in), `s` samples (rows of batches).
"""

import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.errors import RecipeError

_BY_INPUT = ("wanda", "activation")
_BY_GRADIENT = ("sensitivity", "taylor", "taylor2")
_NEITHER = ("activation", "layer")
_OTHER = (*_BY_GRADIENT, *_BY_INPUT, "random")


def magnitude(weight: Array) -> Array:
    """Compute `|w|`.

    References:
      Learning both Weights and Connections for Efficient Neural Networks,
      https://arxiv.org/abs/1506.02626.
    """
    return jnp.abs(weight)


@functools.partial(jax.jit, static_argnames=("order", "axis"), inline=True)
def l_norm(
    weights: Array | list[Array] | tuple[Array, ...],
    order: float,
    axis: int | tuple[int, ...] | None = None,
) -> Array:
    """Compute the L_n norm, `(sum |w|^n)^(1/n)`, over some axes.

    Args:
      weights: of any shape; several arrays are parts of one, along these axes.
      order: `n` above zero, or infinity for the largest magnitude.
      axis: axes of the sum; None is all.

    Returns:
      An array of the weights' shape without these axes.

    References:
      Pruning Filters for Efficient ConvNets, https://arxiv.org/abs/1608.08710.
    """
    parts: Sequence[Array]
    parts = weights if isinstance(weights, list | tuple) else [weights]
    if len(parts) == 1 and axis == -1 and parts[0].shape[-1] == 1:
        # The norm of one weight of any order; the root of its square would be rounded.
        return magnitude(parts[0][..., 0])
    if math.isinf(order):
        return functools.reduce(jnp.maximum, (jnp.max(magnitude(w), axis=axis) for w in parts))
    if order == 1.0:
        return added(jnp.sum(magnitude(w), axis=axis) for w in parts)
    if order == 2.0:
        return jnp.sqrt(added(jnp.sum(jnp.square(w), axis=axis) for w in parts))
    return added(jnp.sum(magnitude(w) ** order, axis=axis) for w in parts) ** (1.0 / order)


def added(terms: Iterable[Array]) -> Array:
    """Add arrays, at least one, from the first to the last."""
    return functools.reduce(jnp.add, terms)


@functools.partial(jax.jit, inline=True)
def sensitivity(weight: Array, gradient: Array) -> Array:
    """Compute `|g w|` with `g` the gradient of the mean loss.

    References:
      SNIP: Single-shot Network Pruning based on Connection Sensitivity,
      https://arxiv.org/abs/1810.02340.
    """
    return jnp.abs(gradient * weight)


def taylor(magnitudes: Array, samples: int) -> Array:
    """Estimate the first-order change of the loss without a unit, `mean_s |t_s|`.

    The term of a sample is `t_s = sum g_s w` over the weights that multiply all of the unit's
    outputs: the derivative of the sample's loss by a factor on the unit. Each term enters by its
    absolute value, so that samples of opposite signs do not cancel.

    Args:
      magnitudes: sum of `|t_s|` over samples, of any shape.
      samples: number of samples.

    References:
      Importance Estimation for Neural Network Pruning, https://arxiv.org/abs/1906.10771.
    """
    return magnitudes / samples


def second_order_taylor(sums: Array, squares: Array, samples: int) -> Array:
    """Estimate the second-order change of the loss, `|mean_s t_s - 1/2 mean_s t_s^2|`.

    The empirical Fisher information `mean_s t_s^2` approximates the second derivative by a factor
    on the unit. For a single weight this is its diagonal, `mean_s (g_s w)^2`.

    Args:
      sums: sum over samples of the terms `t_s` of `taylor`, of any shape.
      squares: sum of `t_s^2`.
      samples: number of samples.

    References:
      Optimal Brain Damage, https://papers.nips.cc/paper/250-optimal-brain-damage;
      LLM-Pruner, https://arxiv.org/abs/2305.11627.
    """
    return jnp.abs(sums - 0.5 * squares) / samples


@functools.partial(jax.jit, inline=True)
def wanda(weight: Array, squares: Array) -> Array:
    """Compute `|w| ||x||_2`, the magnitude times the norm of the weight's inputs.

    Args:
      weight: [r, c].
      squares: [c], the sum of `x^2` over all rows of the inputs.

    References:
      A Simple and Effective Pruning Approach for Large Language Models,
      https://arxiv.org/abs/2306.11695.
    """
    return jnp.abs(weight) * activation_norm(squares)


def activation_norm(squares: Array) -> Array:
    """Compute `||x||_2` of each activation, from its sum of squares [c]."""
    return jnp.sqrt(squares)


@functools.partial(jax.jit, inline=True)
def output_norm(weight: Array, gram: Array) -> Array:
    """Compute `||W x||_2` of each row over all inputs.

    Args:
      weight: [r, c].
      gram: [c, c], the sum of `x x^T`.

    Returns:
      [r].
    """
    products = jnp.matmul(weight, gram, precision="highest")
    return jnp.sqrt(jnp.maximum(jnp.sum(products * weight, axis=1), 0.0))


def random(rng: Array, shape: tuple[int, ...]) -> Array:
    """Draw uniform values in 0..1, the same for the same key."""
    return jax.random.uniform(rng, shape)


class Score(NamedTuple):
    """A parsed score.

    Attributes:
      kind: `norm`, `sensitivity`, `taylor`, `taylor2`, `wanda`, `activation` or `random`.
      order: order of the norm that combines the scores of a unit's weights.
    """

    kind: str
    order: float = 2.0

    @property
    def reads_inputs(self) -> bool:
        """True where the score needs the inputs of the weights."""
        return self.kind in _BY_INPUT

    @property
    def reads_gradients(self) -> bool:
        """True where the score needs gradients of the loss."""
        return self.kind in _BY_GRADIENT

    def fits(self, transform: str, shape_kind: str) -> None:
        """Raise RecipeError where the score does not apply to a kind of shape."""
        if (shape_kind == "vocab" and self.reads_inputs) or (self.kind, shape_kind) == _NEITHER:
            raise RecipeError(
                f"{transform}: score={self.kind!r} is not for shape={shape_kind!r}; taylor and "
                "norms are"
            )


def parse(transform: str, text: Any) -> Score:
    """Parse the name of a score.

    Raises:
      RecipeError: no score has this name.
    """
    if text == "magnitude":
        return Score("norm")
    norm = re.fullmatch(r"l(inf|\d+(?:\.\d+)?)", text) if isinstance(text, str) else None
    if norm and float(norm.group(1)) > 0:
        return Score("norm", float(norm.group(1)))
    if text in _OTHER:
        return Score(text, 1.0 if text == "sensitivity" else 2.0)
    known = ", ".join(("magnitude", "l<n>", *_OTHER))
    raise RecipeError(f"{transform}: score must be one of {known}, not {text!r}")
