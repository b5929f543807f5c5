"""Search of AWQ's channel factors and clipping ranges by output error.

The error of a quantized matrix on calibration rows `X` needs only their Gram matrix `H = X^T X`:
`|X (W' - W)^T|^2 = sum(((W' - W) H) * (W' - W))`.

References:
  AWQ: Activation-aware Weight Quantization, https://arxiv.org/abs/2306.00978.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.compress.quantize.solvers import scales as grids
from glm_edge.params import Format
from glm_edge.params.formats import PER_TENSOR

# Lower limit of factors, before normalization.
_LEAST = 1e-4
_FEW_LEVELS = ("int3", "int2", "ternary", "ternary34")


def factor_of(magnitude: Array, ratio: Array) -> Array:
    """Compute `magnitude ** ratio`, normalized by the geometric mean of its extremes.

    Args:
      magnitude: [channels] mean absolute input.
      ratio: exponent, a scalar in 0..1.

    Returns:
      float32 [channels], positive factors; one for channels without input.
    """
    power = jnp.maximum(jnp.where(magnitude > 0, magnitude, 1.0) ** ratio, _LEAST)
    known = magnitude > 0
    highest = jnp.max(jnp.where(known, power, 0.0))
    lowest = jnp.min(jnp.where(known, power, jnp.inf))
    middle = jnp.sqrt(highest * lowest)
    return jnp.where(known & jnp.isfinite(middle), power / jnp.where(known, middle, 1.0), 1.0)


@functools.partial(jax.jit, static_argnames=("formats", "blocks", "steps", "scale"))
def search_factor(
    weights: tuple[Array, ...],
    gram: Array,
    magnitude: Array,
    formats: tuple[Format, ...],
    blocks: tuple[int, int, int],
    steps: int = 20,
    scale: str = "max",
) -> tuple[Array, Array]:
    """Search the ratio of the channel factors of matrices that share an input.

    Args:
      weights: float32 [out, columns] matrices that read the same rows.
      gram: float32 [columns, columns], Gram matrix `H` of those rows.
      magnitude: [columns] mean absolute input.
      formats: one format per matrix.
      blocks: repetition of channels in columns, see `glm_edge.compress.folding.Fold`.
      steps: count of ratios `0, 1 / steps, …, (steps - 1) / steps`.
      scale: see `glm_edge.compress.quantize.solvers.scales.choose`.

    Returns:
      `(factor, errors)`: [channels] factors of the best ratio, and [steps] summed squared output
      errors per ratio. The first error is that of rounding without factors.
    """
    # Query heads that share a value head share its channels: average their magnitudes.
    count, _, width = blocks
    by_channel = magnitude.reshape(blocks).mean(axis=1).reshape(-1)

    def error(ratio: Array) -> Array:
        # AWQ equation 4: error of Q(W s) s^-1 X, summed over the matrices that read X.
        factor = factor_of(by_channel, ratio).reshape(count, 1, width)
        columns = jnp.broadcast_to(factor, blocks).reshape(-1)
        errors = [
            output_error(_rounded(weight * columns, format, scale) / columns - weight, gram)
            for weight, format in zip(weights, formats, strict=True)
        ]
        return functools.reduce(jnp.add, errors)

    ratios = jnp.arange(steps, dtype=jnp.float32) / steps
    errors = jax.lax.map(error, ratios)
    best = jnp.argmin(jnp.where(jnp.isfinite(errors), errors, jnp.inf))
    return factor_of(by_channel, ratios[best]), errors


@functools.partial(jax.jit, static_argnames=("format", "steps", "scale"))
def search_clip(
    weight: Array, gram: Array, format: Format, steps: int = 20, scale: str = "max"
) -> Array:
    """Search a clipping range per scale, by the output error of the group's columns.

    Args:
      weight: float32 [out, in].
      gram: float32 [in, in], Gram matrix `H` of the input rows.
      format: target format.
      steps: steps of the fractions `1, 1 - 1 / steps, …` of the largest magnitude, down to 1/2, or
        to 1/5 for types with few levels.
      scale: see `glm_edge.compress.quantize.solvers.scales.choose`.

    Returns:
      float32 [out, in], the weight clipped to the best range.
    """
    # Diagonal blocks of H, [groups, size, size]: errors between groups are ignored.
    rows, groups = format.scale_shape(weight.shape)
    grouped = weight.reshape(weight.shape[0], groups, -1)
    size = grouped.shape[-1]
    group_index = jnp.arange(groups)
    within = gram.reshape(groups, size, groups, size)[group_index, :, group_index]

    def clipped(fraction: Array) -> Array:
        largest = jnp.max(jnp.abs(grouped), axis=-1, keepdims=True)
        if format.group_size == PER_TENSOR:
            largest = jnp.max(largest)
        return jnp.clip(grouped, -fraction * largest, fraction * largest)

    def error(fraction: Array) -> Array:
        candidate = clipped(fraction).reshape(weight.shape)
        lost = (_rounded(candidate, format, scale) - weight).reshape(grouped.shape)
        gram_lost = jnp.einsum("ogi,gij->ogj", lost, within, precision="highest")
        output_error = jnp.sum(gram_lost * lost, axis=-1)
        return (
            jnp.broadcast_to(output_error.sum(), output_error.shape)
            if rows != weight.shape[0]
            else output_error
        )

    # Keep the fraction with the smallest error per group.
    def better(best: tuple[Array, Array], fraction: Array) -> tuple[tuple[Array, Array], None]:
        errors = error(fraction)
        less = errors < best[0]
        return (jnp.where(less, errors, best[0]), jnp.where(less, fraction, best[1])), None

    shrink = 0.8 if format.qtype in _FEW_LEVELS else 0.5
    fractions = 1.0 - jnp.arange(round(shrink * steps), dtype=jnp.float32) / steps
    start = (jnp.full(grouped.shape[:2], jnp.inf), jnp.ones(grouped.shape[:2], jnp.float32))
    best = jax.lax.scan(better, start, fractions)[0][1]
    return clipped(best[..., None]).reshape(weight.shape)


def output_error(lost: Array, gram: Array) -> Array:
    """Compute `|X lost^T|^2` from `gram = X^T X`, a scalar."""
    return jnp.sum(jnp.matmul(lost, gram, precision="highest") * lost)


def _rounded(weight: Array, format: Format, scale: str) -> Array:
    grid = grids.choose(weight, format, scale)
    return grids.decode(grids.encode(weight, grid, format), grid, format)
