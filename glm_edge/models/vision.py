"""The GLM vision tower: patches, pre-norm transformer, 2x2 merge and gated projector.

Patches and merges are reshapes followed by a `Linear`, so that they compress and export like any
other matrix.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array

from glm_edge.configs import VisionConfig
from glm_edge.kernels import attention as attention_kernels
from glm_edge.kernels import rotary
from glm_edge.models.layers import GatedMLP, LayerNorm, Linear, RMSNorm, Stack, normal


class VisionAttention(nn.Module):
    """Full attention within each window, with two-dimensional rotary positions."""

    config: VisionConfig
    compute: str = "float32"

    @nn.compact
    def __call__(self, x: Array, angle: Array) -> Array:
        config = self.config

        def project(name: str) -> Array:
            projected = Linear(config.hidden_size, config.attention_bias, self.compute, name=name)(
                x
            )
            return projected.reshape(*x.shape[:2], config.num_heads, -1)

        query = rotary.rotate_half(project("q_proj"), angle)
        key = rotary.rotate_half(project("k_proj"), angle)
        mixed = attention_kernels.attention(query, key, project("v_proj"))
        mixed = mixed.reshape(*x.shape)
        return Linear(config.hidden_size, False, self.compute, name="o_proj")(mixed)


class VisionLayer(nn.Module):
    """One pre-norm layer; `window` patches attend to each other, all of them when it is None."""

    config: VisionConfig
    window: tuple[int, int] | None
    compute: str = "float32"

    @nn.compact
    def __call__(self, x: Array, angle: Array) -> Array:
        config = self.config
        normed = RMSNorm(config.rms_norm_eps, name="input_norm")(x)
        attention = VisionAttention(config, self.compute, name="attention")
        if self.window is None:
            attended = attention(normed, angle)
        else:
            attended = _join_windows(
                attention(
                    _split_windows(normed, config.grid, self.window),
                    _split_windows(
                        jnp.broadcast_to(angle, (x.shape[0], *angle.shape[1:])),
                        config.grid,
                        self.window,
                    ),
                ),
                config.grid,
                self.window,
            )
        x = x + attended
        mlp = GatedMLP(
            config.intermediate_size, config.hidden_size, compute=self.compute, name="mlp"
        )
        return x + mlp(RMSNorm(config.rms_norm_eps, name="post_attention_norm")(x))


class Projector(nn.Module):
    """Projects merged patches into the decoder: linear, norm, GELU, gated feed-forward."""

    features: int
    neurons: int
    compute: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Linear(self.features, False, self.compute, name="proj")(x)
        x = nn.gelu(LayerNorm(1e-5, name="norm")(x), approximate=False)
        return GatedMLP(self.neurons, self.features, compute=self.compute, name="mlp")(x)


class VisionEncoder(nn.Module):
    """Turns images into features for the decoder.

    Attributes:
      config: of the tower.
      out_features: hidden size of the decoder.
      compute: see `glm_edge.params.linear`.
    """

    config: VisionConfig
    out_features: int
    compute: str = "float32"

    def setup(self):
        config = self.config
        self.patch = Linear(config.hidden_size, True, self.compute)
        if config.post_conv_norm:
            self.post_conv_norm = RMSNorm(config.rms_norm_eps)
        rows, columns = config.position_grid
        self.position = self.param("position", normal(0.02), (rows * columns, config.hidden_size))
        windows = [
            None if index in config.global_layers else config.window
            for index in range(config.num_layers)
        ]
        self.layers = Stack(tuple(VisionLayer(config, window, self.compute) for window in windows))
        self.norm = RMSNorm(config.rms_norm_eps)
        self.merge = Linear(self.out_features, True, self.compute)
        self.projector = Projector(self.out_features, config.projector_size, self.compute)
        if config.separable_positions:
            grid = [extent // config.merge_size for extent in config.grid]
            self.row = self.param("row", normal(0.3), (grid[0], self.out_features))
            self.column = self.param("column", normal(0.3), (grid[1], self.out_features))

    def __call__(self, images: Array) -> tuple[Array, dict[str, Any]]:
        """Encodes still images of the configured size.

        Args:
          images: [B, height, width, channels], preprocessed.

        Returns:
          `(features, intermediates)`: [B, num_tokens, out_features], merged cells in row-major
          order, and `hidden`, the input of every layer and the output of the last.
        """
        x = self.embed(images)
        angle = self.angles()
        hidden = [x]
        for index in range(self.config.num_layers):
            x = self.layers[index](x, angle)
            hidden.append(x)
        return self.head(x), {"hidden": hidden}

    def embed(self, images: Array) -> Array:
        """Patches with their position embedding, [B, rows * columns, hidden_size]."""
        config = self.config
        x = self.patch(patches(images, config))
        if config.post_conv_norm:
            x = self.post_conv_norm(x)
        return x + _resize_positions(self.position, config.position_grid, config.grid)

    def angles(self) -> Array:
        """Rotary angles of rows, then columns, [1, rows * columns, head_dim / 2]."""
        config = self.config
        rows, columns = config.grid
        quarter = rotary.inverse_frequencies(
            config.hidden_size // config.num_heads // 2, config.rope_theta
        )
        row, column = np.divmod(np.arange(rows * columns), columns)
        angle = np.concatenate([row[:, None] * quarter, column[:, None] * quarter], axis=-1)
        return jnp.asarray(angle, jnp.float32)[None]

    def head(self, x: Array) -> Array:
        """Final norm, 2x2 merge, projector and, where configured, positions."""
        config = self.config
        rows, columns = config.grid
        merged = rearrange(
            self.norm(x),
            "b (r i c j) d -> b (r c) (i j d)",
            r=rows // config.merge_size,
            i=config.merge_size,
            c=columns // config.merge_size,
            j=config.merge_size,
        )
        features = self.projector(self.merge(merged))
        if config.separable_positions:
            cells = self.row[:, None] + self.column[None]
            features = features + cells.reshape(-1, self.out_features)
        return features


def patches(images: Array, config: VisionConfig) -> Array:
    """Cuts images into (overlapping) windows.

    Args:
      images: [B, height, width, channels].
      config: of the tower.

    Returns:
      [B, rows * columns, temporal * patch_size ** 2 * channels], rows first; edges repeat.
    """
    overlap = config.patch_size - config.patch_stride
    stride, size = config.patch_stride, config.patch_size
    height, width = images.shape[1:3]
    if overlap:
        border = (overlap // 2, overlap // 2)
        images = jnp.pad(images, ((0, 0), border, border, (0, 0)), mode="edge")
    rows, columns = height // stride, width // stride
    strips = jnp.stack(
        [images[:, i : i + (rows - 1) * stride + 1 : stride] for i in range(size)], axis=2
    )
    cut = jnp.stack(
        [strips[:, :, :, j : j + (columns - 1) * stride + 1 : stride] for j in range(size)], axis=3
    )
    flat = rearrange(cut, "b r y x c k -> b (r c) (y x k)")
    return jnp.concatenate([flat] * config.temporal_patch_size, axis=-1)


def _split_windows(x: Array, grid: tuple[int, int], window: tuple[int, int]) -> Array:
    rows, columns = grid[0] // window[0], grid[1] // window[1]
    return rearrange(
        x, "b (r i c j) d -> (b r c) (i j) d", r=rows, c=columns, i=window[0], j=window[1]
    )


def _join_windows(x: Array, grid: tuple[int, int], window: tuple[int, int]) -> Array:
    rows, columns = grid[0] // window[0], grid[1] // window[1]
    return rearrange(
        x, "(b r c) (i j) d -> b (r i c j) d", r=rows, c=columns, i=window[0], j=window[1]
    )


def _resize_positions(table: Array, source: tuple[int, int], target: tuple[int, int]) -> Array:
    """Bicubic, half-pixel resampling of a [rows * columns, D] table, edges repeated."""
    if source == target:
        return table
    weights = [_cubic_weights(source[axis], target[axis]) for axis in (0, 1)]
    grid = table.reshape(*source, -1)
    return jnp.einsum("rs,cu,sud->rcd", *weights, grid).reshape(target[0] * target[1], -1)


def _cubic_weights(source: int, target: int) -> np.ndarray:
    """[target, source] interpolation matrix of the cubic convolution kernel with A = -0.75."""
    a = -0.75
    centre = (np.arange(target) + 0.5) * source / target - 0.5
    base = np.floor(centre).astype(int)
    weights = np.zeros((target, source))
    for tap in range(-1, 3):
        x = np.abs(centre - (base + tap))
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        weight = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
        np.add.at(weights, (np.arange(target), np.clip(base + tap, 0, source - 1)), weight)
    return weights.astype(np.float32)
