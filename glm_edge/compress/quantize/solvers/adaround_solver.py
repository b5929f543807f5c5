"""Learned rounding of each weight to one of its two adjacent levels.

The error of a layer's output is a quadratic form of the error of its weight. The Gram matrix
therefore replaces the inputs, and every step sees the complete calibration set.
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
# The rectified sigmoid is stretched by 0.1 at both ends, so that it reaches 0 and 1 at finite
# arguments (zeta - gamma of the paper).
_STRETCH = 1.2
_BETA = (20.0, 2.0)
_FREE = 0.2


class Layer(NamedTuple):
    """Weight and input statistics of a layer `y = W x`.

    Attributes:
      weight: weight before rounding, float32 [O, I].
      gram: mean of `x x^T` over the inputs of the quantized model, float32 [I, I].
      drift: mean of `(W x - y) x^T` with the target output `y`, float32 [O, I]; zero if the inputs
        equal those of the original model.
    """

    weight: Array
    gram: Array
    drift: Array


class Rounded(NamedTuple):
    """Codes and their output errors.

    Attributes:
      codes: int8 [O, I].
      error: [O] error per output relative to the original weight, see `output_error`.
      nearest: [O] error per output of rounding to nearest.
    """

    codes: Array
    error: Array
    nearest: Array


def output_error(weight: Array, layer: Layer) -> Array:
    """Compute the mean of `(W' x - y)^2 - (W x - y)^2` per output.

    Args:
      weight: `W'`, float32 [O, I].
      layer: weight `W` and input statistics.

    Returns:
      float32 [O].
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
    """Learn the codes of a layer; outputs without a gain keep rounding to nearest.

    Args:
      layer: weight and input statistics.
      grid: scales and zero points.
      format: format of the codes, except `ternary34`.
      method: `adaround` trains a soft choice between adjacent levels, then runs `descent`, a
        coordinate descent over the codes; `descent` runs alone.
      steps: optimizer steps of `adaround`.
      rate: learning rate of `adaround`.
      regularization: weight of the term that drives the choices of `adaround` to 0 or 1.
      sweeps: passes of `descent` over all columns.

    Returns:
      Codes and their output errors.
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
    """Find the adjacent levels below and above each weight.

    Args:
      layer: weight and input statistics.
      grid: scales and zero points.
      format: format of the codes.

    Returns:
      `(below, low, share)`, each [O, I]: the lower code, so that `below + 1` is the upper code; the
      dense value of the lower code; and the position of the weight between both values, in 0..1.
    """
    lowest, highest = code_range(format.qtype)
    codes = encode(layer.weight, grid, format).astype(jnp.int32)
    over = decode(codes.astype(jnp.int8), grid, format) > layer.weight
    # A negative scale reverses the order of levels.
    falling = _per_weight(grid.scale, layer.weight) < 0
    below = jnp.clip(codes - (over != falling), lowest, highest - 1)
    ends = [decode((below + step).astype(jnp.int8), grid, format) for step in (0, 1)]
    width = jnp.where(ends[1] == ends[0], 1.0, ends[1] - ends[0])
    return below, ends[0], jnp.clip((layer.weight - ends[0]) / width, 0.0, 1.0)


def soft_choice(variable: Array) -> Array:
    """Compute AdaRound's rectified sigmoid `h(V)`, from 0 to 1."""
    return jnp.clip(_STRETCH * jax.nn.sigmoid(variable) - (_STRETCH - 1.0) / 2.0, 0.0, 1.0)


def adaround_loss(
    variable: Array,
    layer: Layer,
    ends: tuple[Array, Array],
    unit: Array,
    beta: Array,
    regularization: Array,
) -> Array:
    """Compute AdaRound's objective: output error plus a regularizer towards 0 and 1.

    Args:
      variable: `V`, [O, I].
      layer: weight and input statistics.
      ends: dense values of the lower and the upper level, [O, I] each.
      unit: unit of the output error, a scalar.
      beta: exponent of the regularizer `1 - |2 h(V) - 1|^beta`.
      regularization: weight of the regularizer; zero during the initial free phase.

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
    """Train AdaRound's soft choices, and round them.

    Args:
      layer: weight and input statistics.
      grid: scales and zero points.
      format: format of the codes.
      steps: optimizer steps.
      rate: learning rate.
      regularization: weight of the regularizer.

    Returns:
      int8 codes [O, I].

    References:
      Up or Down? Adaptive Rounding for Post-Training Quantization,
      https://arxiv.org/abs/2004.10568.
    """
    # Initialize V such that h(V) is the position of the weight between its adjacent levels.
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
        # The regularizer starts after a fraction _FREE of the steps; beta anneals from 20 to 2.
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
    """Run coordinate descent: each column in turn takes its best level given all others.

    Args:
      layer: weight and input statistics.
      codes: int8 [O, I], initial codes.
      grid: scales and zero points.
      format: format of the codes.
      sweeps: passes over all columns.

    Returns:
      int8 codes [O, I].

    References:
      QuantEase: Optimization-based Quantization for Language Models,
      https://arxiv.org/abs/2309.01885.
    """
    scale = _per_weight(grid.scale, layer.weight)
    zero = None if grid.zero is None else _per_weight(grid.zero, layer.weight)
    diagonal = jnp.diagonal(layer.gram)

    def column(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        # QuantEase: the optimum of one column is w - gradient / H[j, j], rounded to its level.
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
    """Expand scales [O, G] or [1, G] to one per weight, float32 [O, I]."""
    wide = jnp.repeat(scales.astype(jnp.float32), weight.shape[1] // scales.shape[1], axis=1)
    return jnp.broadcast_to(wide, weight.shape)
