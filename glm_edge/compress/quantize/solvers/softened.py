"""Weights in a transition from floats to three levels, with a learned grid.

Letters: `G` groups of a row.
"""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta
from jax import Array

from glm_edge.compress.quantize.solvers.scales import Grid, stored
from glm_edge.kernels.quantization import straight_through
from glm_edge.params import Format
from glm_edge.params.boxes import as_kernel

SHARPNESS = 30.0


class Softened(struct.PyTreeNode, meta.AxisMetadata):
    """A weight in training that hardens from its floats to `scale * T + offset`.

    Three factors per group modulate the initial grid: `scale = 2 sigmoid(a) scale_0`, `offset =
    offset_0 + (2 sigmoid(b) - 1) scale_0` and the threshold `2 sigmoid(c) / 2` in units of the
    scale. All factors start at zero, where they leave the grid unchanged.

    Attributes:
      value: float32 [..., out, in].
      scale: initial scales, float32 [..., out, G] or [..., 1, 1].
      offset: initial offsets in the shape of `scale`; zero for a symmetric format.
      scale_factor: `a`, in the shape of `scale`.
      offset_factor: `b`, in the shape of `scale`.
      threshold_factor: `c`, in the shape of `scale`.
      hardness: 0 for floats to 1 for three levels, [...].
      format: target format.
      weights: True trains `value` too.
      sharpness: steepness of the transition at hardness 1.
      kernel_shape: as in `glm_edge.params.Quantized`.
      kernel_axes: as in `glm_edge.params.Quantized`.
      dtype: type of the dense weight.

    References:
      CAT-Q, https://arxiv.org/abs/2606.26650.
    """

    value: Array
    scale: Array
    offset: Array
    scale_factor: Array
    offset_factor: Array
    threshold_factor: Array
    hardness: Array
    format: Format = struct.field(pytree_node=False)
    weights: bool = struct.field(pytree_node=False, default=False)
    sharpness: float = struct.field(pytree_node=False, default=SHARPNESS)
    kernel_shape: tuple[int, ...] = struct.field(pytree_node=False, default=())
    kernel_axes: tuple[int, ...] = struct.field(pytree_node=False, default=())
    dtype: str = struct.field(pytree_node=False, default="float32")

    @classmethod
    def of(
        cls, value: Array, grid: Grid, format: Format, weights: bool, sharpness: float, dtype: str
    ) -> Self:
        """Box a weight [..., out, in] with its initial grid."""
        scale = grid.scale.astype(jnp.float32)
        zeros = jnp.zeros_like(scale)
        offset = zeros if grid.zero is None else -scale * grid.zero.astype(jnp.float32)
        hardness = jnp.zeros(value.shape[:-2])
        return cls(
            value, scale, offset, *(zeros,) * 3, hardness, format, weights, sharpness, dtype=dtype
        )

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the fields that train."""
        factors = ("scale_factor", "offset_factor", "threshold_factor")
        return (*factors, "value") if self.weights else factors

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the dense weight."""
        if self.kernel_shape:
            return (*self.value.shape[:-2], *self.kernel_shape)
        return self.value.shape

    def add_axis(self, index: int, params: dict[Any, Any]) -> Self:
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Self:
        return self

    def replace_boxed(self, val: Array) -> Array:  # type: ignore[override]
        """Return `val` unboxed."""
        return val

    def unbox(self) -> Array:
        """Return the dense weight at its hardness."""
        x, scale, offset, threshold = self._modulated()
        hardness = self.hardness[..., None, None, None]
        soft = transition(x, threshold, hardness, self.sharpness)
        levels = jnp.where(hardness < 1, soft, straight_through(soft, _hard(x, threshold)))
        grid = self._grid(scale, offset)
        dense = straight_through(scale, grid.scale[..., None].astype(jnp.float32)) * levels
        if grid.zero is not None:
            stored_offset = -(grid.scale.astype(jnp.float32) * grid.zero.astype(jnp.float32))
            dense = dense + straight_through(offset, stored_offset[..., None])
        dense = dense.reshape(self.value.shape).astype(self.dtype)
        return as_kernel(dense, self.kernel_shape, self.kernel_axes)

    @jax.jit
    def hardened(self, mask: Array | None = None) -> tuple[Array, Grid]:
        """Return codes and grid at hardness 1.

        Args:
          mask: bool [..., out, in], False for codes of zero; None without a mask.

        Returns:
          `(codes, grid)`: int8 [..., out, in], and scales and zero points in their stored types.
        """
        x, scale, offset, threshold = self._modulated()
        codes = _hard(x, threshold).reshape(self.value.shape).astype(jnp.int8)
        return codes if mask is None else jnp.where(mask, codes, 0), self._grid(scale, offset)

    def _modulated(self) -> tuple[Array, Array, Array, Array]:
        """Return `(W - offset) / scale` and the modulated grid, [..., out, G, columns or 1]."""
        initial = self.scale[..., None]
        scale = 2.0 * jax.nn.sigmoid(self.scale_factor)[..., None] * initial
        moved = 2.0 * jax.nn.sigmoid(self.offset_factor)[..., None] - 1.0
        offset = self.offset[..., None] + moved * initial
        threshold = jax.nn.sigmoid(self.threshold_factor)[..., None]
        groups = self.value.reshape(*self.value.shape[:-1], self.scale.shape[-1], -1)
        return (groups - offset) / scale, scale, offset, threshold

    def _grid(self, scale: Array, offset: Array) -> Grid:
        """Round the grid to its stored types; a symmetric format drops the offset."""
        scale, offset = scale[..., 0], offset[..., 0]
        first = stored(Grid(scale), self.format)
        if self.format.symmetric:
            return first
        return stored(Grid(scale, -offset / first.scale.astype(jnp.float32)), self.format)


def transition(x: Array, threshold: Array, hardness: Array, sharpness: float) -> Array:
    """Move from the identity to two steep steps at `-threshold` and `threshold`.

    The paper describes a function of a steepness that rises to `s_0`; this one is a mixture of the
    identity and of two hyperbolic tangents.

    Args:
      x: weights in units of their scale.
      threshold: threshold of the levels, broadcastable to `x`.
      hardness: 0 to 1, broadcastable to `x`.
      sharpness: steepness at hardness 1.

    Returns:
      Softened levels in the shape of `x`.

    References:
      CAT-Q, https://arxiv.org/abs/2606.26650.
    """
    slope = sharpness * hardness
    steps = 0.5 * (jnp.tanh(slope * (x - threshold)) + jnp.tanh(slope * (x + threshold)))
    return (1.0 - hardness) * x + hardness * steps


def _hard(x: Array, threshold: Array) -> Array:
    return jnp.where(jnp.abs(x) > threshold, jnp.sign(x), 0.0)
