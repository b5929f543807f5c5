"""Half-quadratic quantization: scales and zero points with a sparse error.

The error `|W - Q|_p^p` with `p < 1` tolerates few large errors. An auxiliary variable `E` for the
error splits the problem into two closed-form steps, repeated with a growing weight `beta`: shrink
the residual `r = W - Q` to `E = sign(r) max(|r| - |r|^(p - 1) / beta, 0)`, then fit scales or zero
points to `W - E`.

References:
  Half-Quadratic Quantization of Large Machine Learning Models,
  https://mobiusml.github.io/hqq_blog/.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.compress.quantize.solvers import scales as grids
from glm_edge.compress.quantize.solvers.scales import Grid
from glm_edge.kernels import quantization as kernels
from glm_edge.params import Format
from glm_edge.params.formats import PER_TENSOR


@functools.partial(
    jax.jit, static_argnames=("format", "scale", "exponent", "beta", "growth", "steps")
)
def solve(
    weight: Array,
    format: Format,
    scale: str = "max",
    exponent: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
    steps: int = 20,
) -> tuple[Array, Grid]:
    """Fit scales or zero points by half-quadratic steps, and round to nearest.

    Affine formats keep the scale and fit the zero point, as published. Symmetric formats fit the
    scale by least squares. Each group keeps the iterate with the smallest `sum |W - Q|^p`.

    Args:
      weight: [out, in].
      format: target format; the method is designed for zero points of a floating type.
      scale: method of the initial scales, see `scales.choose`.
      exponent: exponent `p` of the norm, in (0, 1].
      beta: initial weight of the quadratic term, for errors in units of the scale.
      growth: factor of `beta` per step.
      steps: count of half-quadratic steps.

    Returns:
      `(codes, grid)`: int8 [out, in], and scales and zero points.

    References:
      Half-Quadratic Quantization of Large Machine Learning Models,
      https://mobiusml.github.io/hqq_blog/.
    """
    weight = weight.astype(jnp.float32)
    rows = format.scale_shape(weight.shape)
    per_tensor = format.group_size == PER_TENSOR
    groups = weight.reshape(*rows, -1) if per_tensor else weight.reshape(len(weight), rows[-1], -1)
    first = grids.choose(weight, format, scale)

    def rounded(grid: Grid) -> tuple[Array, Array]:
        """Compute `level - zero` and residuals in scale units, [rows, groups, columns]."""
        wide = grid.map(lambda x: x[..., None])
        codes = kernels.quantize(groups, *wide, format.qtype)
        steps = kernels.levels(codes, format.qtype).astype(jnp.float32)
        steps = steps if wide.zero is None else steps - wide.zero.astype(jnp.float32)
        scale = wide.scale.astype(jnp.float32)
        return steps, groups / jnp.where(scale == 0, 1.0, scale) - steps

    def loss(grid: Grid) -> Array:
        residual = rounded(grid)[1] * grid.scale.astype(jnp.float32)[..., None]
        return jnp.sum(jnp.abs(residual) ** exponent, axis=-1)

    def step(
        carry: tuple[Grid, Grid, Array], weight_of_quadratic: Array
    ) -> tuple[tuple[Grid, Grid, Array], None]:
        # Step 1: E is the generalized soft threshold of r = W - Q.
        grid, best, lowest = carry
        steps, residual = rounded(grid)
        size = jnp.abs(residual)
        shrunk = size - jnp.where(size > 0, size, 1.0) ** (exponent - 1) / weight_of_quadratic
        error = jnp.sign(residual) * jnp.maximum(shrunk, 0.0)
        # Step 2: fit zero point or scale to W - E. Keep the best iterate, as stored, per group.
        grid = _fitted(grid, steps, residual - error)
        grid_loss = loss(grids.stored(grid, format))
        less = grid_loss < lowest
        return (grid, grid.where(less, best), jnp.where(less, grid_loss, lowest)), None

    wide = first.map(lambda x: x.astype(jnp.float32))
    betas = beta * growth ** jnp.arange(steps, dtype=jnp.float32)
    best = jax.lax.scan(step, (wide, wide, loss(first)), betas)[0][1]
    stored_grid = grids.stored(best, format)
    return grids.encode(weight, stored_grid, format), stored_grid


def _fitted(grid: Grid, steps: Array, residual: Array) -> Grid:
    """Fit zero points, or scales without zero points, to `steps + residual` in scale units."""
    # z' = z - mean(r) minimizes the squared residual.
    if grid.zero is not None:
        return Grid(grid.scale, grid.zero - jnp.mean(residual, axis=-1))
    # s' = s <q, q + r> / <q, q>, the least-squares scale of the codes q.
    power = jnp.sum(jnp.square(steps), axis=-1)
    along = jnp.sum(steps * (steps + residual), axis=-1)
    ratio = along / jnp.where(power > 0, power, 1.0)
    return Grid(jnp.where((power > 0) & (ratio > 0), grid.scale * ratio, grid.scale), None)
