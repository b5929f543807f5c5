"""Learned rounding: which of its two neighbouring levels each weight goes to.

The error of a layer's output is a quadratic form of the error of its weight, so that the Gram
matrix of the inputs stands for all of them, and every step sees the whole calibration set.
Letters: `O` outputs, `I` inputs, `G` groups.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from glm_edge.compress.quantize.solvers.scales import Grid, decode, encode
from glm_edge.kernels.quantization import code_range
from glm_edge.params import Format

METHODS = ("adaround", "descent")
# The rectified sigmoid reaches 0 and 1 at finite arguments: it is stretched by a tenth each way.
_STRETCH = 1.2
_BETA = (20.0, 2.0)
_FREE = 0.2


class Layer(NamedTuple):
    """Statistics that learned rounding reads of a layer `y = W x`.

    Attributes:
      weight: before rounding, float32 [O, I].
      gram: mean of `x x^T` over the inputs that the rounded layer gets, float32 [I, I].
      drift: mean of `(W x - y) x^T`, where `y` is what the layer ought to give, float32 [O, I];
        zero where its inputs are still those of the original.
    """

    weight: Array
    gram: Array
    drift: Array


class Rounded(NamedTuple):
    """Codes, and what they cost.

    Attributes:
      codes: int8 [O, I].
      error: of each output against that of the weights before, see `output_error`, [O].
      nearest: the same of rounding to nearest, [O].
    """

    codes: Array
    error: Array
    nearest: Array


def output_error(weight: Array, layer: Layer) -> Array:
    """Mean of `(W' x - y)^2 - (W x - y)^2` of each output, [O].

    Args:
      weight: `W'`, float32 [O, I].
      layer: the layer.
    """
    error = weight - layer.weight
    return jnp.sum((error @ layer.gram + 2.0 * layer.drift) * error, axis=-1)


@functools.partial(jax.jit, static_argnames=("format", "method", "steps", "sweeps"))
def learn_rounding(
    layer: Layer,
    grid: Grid,
    format: Format,
    method: str = "adaround",
    steps: int = 500,
    rate: float = 0.03,
    regularization: float = 5.0,
    sweeps: int = 4,
) -> Rounded:
    """Learns the codes of a layer on its grid; an output that does not gain keeps nearest rounding.

    Args:
      layer: the layer.
      grid: of the codes.
      format: of the codes; not `ternary34`.
      method: `adaround`, a soft choice between neighbours that hardens, then `descent`, which
        gives one weight after the other its best level; or `descent` alone.
      steps: of `adaround`.
      rate: learning rate of `adaround`.
      regularization: weight of what drives the choices of `adaround` to 0 or 1.
      sweeps: of `descent` over all columns.

    Returns:
      The result.
    """
    nearest = encode(layer.weight, grid, format)
    first = output_error(decode(nearest, grid, format), layer)
    start = nearest
    if method == "adaround":
        start = adaround(layer, grid, format, steps, rate, regularization)
    codes = descend(layer, start, grid, format, sweeps)
    error = output_error(decode(codes, grid, format), layer)
    codes = jnp.where((error < first)[:, None], codes, nearest)
    return Rounded(codes, jnp.minimum(error, first), first)


def neighbours(layer: Layer, grid: Grid, format: Format) -> tuple[Array, Array, Array]:
    """The levels just below and above each weight.

    Returns:
      `(low, high, share)`: dense values [O, I] of both, and how far between them the weight lies,
      in 0..1; codes `low` and `low + 1` where the grid goes on.
    """
    lowest, highest = code_range(format.qtype)
    codes = encode(layer.weight, grid, format).astype(jnp.int32)
    over = decode(codes.astype(jnp.int8), grid, format) > layer.weight
    # A negative scale turns the order of levels around.
    falling = _per_weight(grid.scale, layer.weight) < 0
    below = jnp.clip(codes - (over != falling), lowest, highest - 1)
    ends = [decode((below + step).astype(jnp.int8), grid, format) for step in (0, 1)]
    width = jnp.where(ends[1] == ends[0], 1.0, ends[1] - ends[0])
    return below, ends[0], jnp.clip((layer.weight - ends[0]) / width, 0.0, 1.0)


def soft_choice(variable: Array) -> Array:
    """The rectified sigmoid of AdaRound, from 0 to 1."""
    return jnp.clip(_STRETCH * jax.nn.sigmoid(variable) - (_STRETCH - 1.0) / 2.0, 0.0, 1.0)


def adaround_loss(
    variable: Array,
    layer: Layer,
    ends: tuple[Array, Array],
    unit: Array,
    beta: Array,
    regularization: Array,
) -> Array:
    """AdaRound's objective: output error, and a pull of the choices towards 0 and 1.

    Args:
      variable: [O, I].
      layer: the layer.
      ends: dense values of the lower and the upper level, [O, I] each.
      unit: output error that counts as one for each weight.
      beta: power of the pull.
      regularization: its weight; zero while the choices are free.

    Returns:
      A scalar.
    """
    choice = soft_choice(variable)
    error = jnp.sum(output_error(ends[0] + choice * (ends[1] - ends[0]), layer))
    pull = jnp.sum(1.0 - jnp.abs(2.0 * choice - 1.0) ** beta)
    return error / unit + regularization * pull


def adaround(
    layer: Layer, grid: Grid, format: Format, steps: int, rate: float, regularization: float
) -> Array:
    """Codes that AdaRound chooses, int8 [O, I].

    References:
      Up or Down? Adaptive Rounding for Post-Training Quantization,
      https://arxiv.org/abs/2004.10568.
    """
    below, low, share = neighbours(layer, grid, format)
    high = decode((below + 1).astype(jnp.int8), grid, format)
    margin = (_STRETCH - 1.0) / 2.0
    inner = jnp.clip((share + margin) / _STRETCH, 1e-4, 1.0 - 1e-4)
    variable = jnp.log(inner) - jnp.log1p(-inner)
    nearest = output_error(decode(encode(layer.weight, grid, format), grid, format), layer)
    unit = jnp.maximum(jnp.sum(jnp.abs(nearest)), 1e-30) / layer.weight.size
    optimizer = optax.adam(rate)

    def step(
        carry: tuple[Array, optax.OptState], index: Array
    ) -> tuple[tuple[Array, optax.OptState], None]:
        variable, state = carry
        done = jnp.maximum(index / steps - _FREE, 0.0) / (1.0 - _FREE)
        beta = _BETA[1] + 0.5 * (_BETA[0] - _BETA[1]) * (1.0 + jnp.cos(jnp.pi * done))
        weight = jnp.where(index < _FREE * steps, 0.0, regularization)
        gradient = jax.grad(adaround_loss)(variable, layer, (low, high), unit, beta, weight)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(variable, updates), state), None

    start = (variable, optimizer.init(variable))
    (variable, _), _ = jax.lax.scan(step, start, jnp.arange(steps))
    return (below + (soft_choice(variable) >= 0.5)).astype(jnp.int8)


def descend(layer: Layer, codes: Array, grid: Grid, format: Format, sweeps: int) -> Array:
    """Codes after sweeps in which each column in turn takes its best level given the others.

    References:
      QuantEase: Optimization-based Quantization for Language Models,
      https://arxiv.org/abs/2309.01885.
    """
    scale = _per_weight(grid.scale, layer.weight)
    zero = None if grid.zero is None else _per_weight(grid.zero, layer.weight)
    diagonal = jnp.diagonal(layer.gram)

    def column(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dense, slope = carry
        curvature = diagonal[index]
        column_slope = jax.lax.dynamic_slice_in_dim(slope, index, 1, axis=1)
        now = jax.lax.dynamic_slice_in_dim(dense, index, 1, axis=1)
        wanted = now - column_slope / jnp.where(curvature > 0, curvature, 1.0)
        column_grid = Grid(
            jax.lax.dynamic_slice_in_dim(scale, index, 1, axis=1),
            None if zero is None else jax.lax.dynamic_slice_in_dim(zero, index, 1, axis=1),
        )
        new = decode(encode(wanted, column_grid, format), column_grid, format)
        new = jnp.where(curvature > 0, new, now)
        slope = slope + (new - now) * layer.gram[index]
        return jax.lax.dynamic_update_slice_in_dim(dense, new, index, axis=1), slope

    def sweep(_: Array, dense: Array) -> Array:
        slope = (dense - layer.weight) @ layer.gram + layer.drift
        return jax.lax.fori_loop(0, dense.shape[1], column, (dense, slope))[0]

    dense = jax.lax.fori_loop(0, sweeps, sweep, decode(codes, grid, format))
    return encode(dense, grid, format)


def _per_weight(scales: Array, weight: Array) -> Array:
    """Scales [O or 1, G] in float32 at each weight, [O, I]."""
    wide = jnp.repeat(scales.astype(jnp.float32), weight.shape[1] // scales.shape[1], axis=1)
    return jnp.broadcast_to(wide, weight.shape)
