"""Vision towers of GLM-4.1V, GLM-OCR and SigLIP: patches, transformer, merge, gated projector.

Patches and merges are reshapes followed by a `Linear`, so that they compress and export like any
other matrix. Letters of shapes: `B` images, `P` frames per temporal patch, `L` patches.
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
from glm_edge.models.layers import MLP, GatedMLP, LayerNorm, Linear, RMSNorm, Stack, gated, normal
from glm_edge.params.sharding import constrain

Grid = tuple[int, int]
PROJECTOR_EPS = 1e-5


class VisionAttention(nn.Module):
    """Full attention within each window, with two-dimensional rotary positions."""

    config: VisionConfig
    layer: int
    compute: str = "float32"

    @nn.compact
    def __call__(self, x: Array, angle: Array) -> Array:
        config = self.config
        count, width = config.heads(self.layer), config.head_size

        def project(name: str) -> Array:
            linear = Linear(count * width, config.attention_bias, self.compute, name=name)
            heads = linear(x).reshape(*x.shape[:2], count, width)
            return constrain(heads, "batch", "length", "heads", "head_dim")

        query, key = project("q_proj"), project("k_proj")
        if config.qk_norm:
            query = RMSNorm(config.norm_eps, name="q_norm")(query)
            key = RMSNorm(config.norm_eps, name="k_norm")(key)
        if config.rotary:
            query, key = rotary.rotate_half(query, angle), rotary.rotate_half(key, angle)
        mixed = gated(self, "heads", attention_kernels.attention(query, key, project("v_proj")))
        o_proj = Linear(config.hidden_size, config.projection_bias, self.compute, name="o_proj")
        return o_proj(mixed.reshape(*x.shape[:2], count * width))


class VisionLayer(nn.Module):
    """A pre-norm layer with attention within windows, or global attention if `window` is None."""

    config: VisionConfig
    window: Grid | None
    layer: int
    compute: str = "float32"

    @nn.compact
    def __call__(self, x: Array, angle: Array, grid: Grid) -> Array:
        config = self.config
        normed = _norm(config, "input_norm")(x)
        attention = VisionAttention(config, self.layer, self.compute, name="attention")
        if self.window is None:
            attended = attention(normed, angle)
        else:
            angle = jnp.broadcast_to(angle, (x.shape[0], *angle.shape[1:]))
            attended = _join_windows(
                attention(
                    _split_windows(normed, grid, self.window),
                    _split_windows(angle, grid, self.window),
                ),
                grid,
                self.window,
            )
        x = constrain(x + attended, "batch", "length", "embed")
        kind = GatedMLP if config.gated_mlp else MLP
        mlp = kind(
            config.neurons(self.layer),
            config.hidden_size,
            config.projection_bias,
            self.compute,
            name="mlp",
        )
        mixed = mlp(_norm(config, "post_attention_norm")(x))
        return constrain(x + mixed, "batch", "length", "embed")


class Projector(nn.Module):
    """The projector from merged patches to the decoder: linear, norm, GELU, gated feed-forward."""

    features: int
    neurons: int
    compute: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Linear(self.features, False, self.compute, name="proj")(x)
        x = constrain(x, "batch", "length", "projected")
        x = nn.gelu(LayerNorm(PROJECTOR_EPS, name="norm")(x), approximate=False)
        return GatedMLP(self.neurons, self.features, compute=self.compute, name="mlp")(x)


class PoolingHead(nn.Module):
    """A head with one learned query that attends to all patches (SigLIP)."""

    config: VisionConfig
    compute: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        # The widths of the pooling head come after those of the layers.
        count, neurons = config.heads(config.num_layers), config.neurons(config.num_layers)

        def linear(name: str, x: Array, features: int) -> Array:
            return Linear(features, True, self.compute, name=name)(x)

        def heads(name: str, x: Array) -> Array:
            projected = linear(name, x, count * config.head_size)
            projected = projected.reshape(*x.shape[:2], count, config.head_size)
            return constrain(projected, "batch", "length", "heads", "head_dim")

        # A probe stored in bfloat16 must not turn the activations into bfloat16.
        probe = self.param("probe", normal(0.02), (config.hidden_size,)).astype(jnp.float32)
        query = jnp.broadcast_to(probe, (x.shape[0], 1, config.hidden_size))
        mixed = attention_kernels.attention(
            heads("q_proj", query), heads("k_proj", x), heads("v_proj", x)
        )
        pooled = linear("o_proj", mixed.reshape(*query.shape[:2], -1), config.hidden_size)
        mlp = MLP(neurons, config.hidden_size, True, self.compute, name="mlp")
        return (pooled + mlp(LayerNorm(config.norm_eps, name="norm")(pooled)))[:, 0]


class VisionEncoder(nn.Module):
    """The vision encoder, from images to features for the decoder.

    Attributes:
      config: configuration of the tower.
      out_features: hidden size of the decoder; unused without a projector.
      compute: arithmetic of products, see `glm_edge.params.linear`.

    References:
      GLM-4.1V-Thinking, https://arxiv.org/abs/2507.01006; SigLIP,
      https://arxiv.org/abs/2303.15343.
    """

    config: VisionConfig
    out_features: int = 0
    compute: str = "float32"

    def setup(self) -> None:
        config = self.config
        self.patch = Linear(config.hidden_size, True, self.compute)
        if config.post_conv_norm:
            self.post_conv_norm = _norm(config, None)
        if config.learned_positions:
            table = (config.position_grid[0] * config.position_grid[1], config.hidden_size)
            self.position = self.param("position", normal(0.02), table)
        windows = [
            None if index in config.global_layers else config.window
            for index in range(config.num_layers)
        ]
        self.layers = Stack(
            tuple(VisionLayer(config, w, i, self.compute) for i, w in enumerate(windows))
        )
        self.norm = _norm(config, None)
        if config.pooling_head:
            self.pool = PoolingHead(config, self.compute)
        if not config.projector_size:
            return
        self.merge = Linear(self.out_features, True, self.compute)
        self.projector = Projector(self.out_features, config.projector_size, self.compute)
        if config.boundary_embeddings:
            self.begin = self.param("begin", normal(0.02), (self.out_features,))
            self.end = self.param("end", normal(0.02), (self.out_features,))
        if config.separable_positions:
            grid = [extent // config.merge_size for extent in config.grid]
            self.row = self.param("row", normal(0.3), (grid[0], self.out_features))
            self.column = self.param("column", normal(0.3), (grid[1], self.out_features))

    def __call__(self, images: Array) -> tuple[Array, dict[str, Any]]:
        """Encode still images, or groups of frames, of one size.

        Args:
          images: preprocessed images [B, height, width, channels], or temporal patches of videos
            [B, P, height, width, channels] with `P = temporal_patch_size` frames each.

        Returns:
          `(features, intermediates)`: features [B, tokens, out_features] of merged cells in
          row-major order, or normed patches [B, L, hidden_size] without a projector.
          Intermediates are `patches` (projected, before norm and positions), `hidden` (the input
          of every layer and the output of the last), `final` (normed) and, with a pooling head,
          `pooled` [B, hidden_size].

        Raises:
          ConfigError: `merge_size` or `window` does not divide the patches of this image size.
        """
        grid = self.config.grid_of((images.shape[-3], images.shape[-2]))
        x, projected = self.embed(images)
        angle = self.angles(grid)
        hidden = [x]
        for index in range(self.config.num_layers):
            x = self.layers[index](x, angle, grid)
            hidden.append(x)
        final = self.norm(x)
        intermediates = {"patches": projected, "hidden": hidden, "final": final}
        if self.config.pooling_head:
            intermediates["pooled"] = self.pool(final)
        return self.head(final, grid), intermediates

    def embed(self, images: Array) -> tuple[Array, Array]:
        """Project patches to [B, L, hidden_size]; return them with and without positions."""
        config = self.config
        grid = config.grid_of((images.shape[-3], images.shape[-2]))
        projected = self.patch(patches(images, config))
        x = self.post_conv_norm(projected) if config.post_conv_norm else projected
        if config.learned_positions:
            x = x + _resize_positions(self.position, config.position_grid, grid)
        return constrain(x, "batch", "length", "embed"), projected

    def angles(self, grid: Grid) -> Array:
        """Compute rotary angles of rows, then columns, [1, rows * columns, head_dim / 2]."""
        config = self.config
        quarter = rotary.inverse_frequencies(config.head_size // 2, config.rope_theta)
        row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
        angle = np.concatenate([row[:, None] * quarter, column[:, None] * quarter], axis=-1)
        return jnp.asarray(angle, jnp.float32)[None]

    def head(self, final: Array, grid: Grid) -> Array:
        """Merge and project normed patches, with positions and boundaries where configured."""
        config = self.config
        if not config.projector_size:
            return final
        merged = rearrange(
            final,
            "b (r i c j) d -> b (r c) (i j d)",
            r=grid[0] // config.merge_size,
            i=config.merge_size,
            c=grid[1] // config.merge_size,
            j=config.merge_size,
        )
        features = self.projector(self.merge(merged))
        if config.separable_positions:
            cells = self.row[:, None] + self.column[None]
            features = features + cells.reshape(-1, self.out_features)
        if config.boundary_embeddings:
            edge = (features.shape[0], 1, self.out_features)
            begin, end = jnp.broadcast_to(self.begin, edge), jnp.broadcast_to(self.end, edge)
            features = jnp.concatenate([begin, features, end], axis=1)
        return features


def _norm(config: VisionConfig, name: str | None) -> nn.Module:
    return (RMSNorm if config.norm == "rms" else LayerNorm)(config.norm_eps, name=name)


def patches(images: Array, config: VisionConfig) -> Array:
    """Extract (overlapping) patches from images; drop pixels beyond the last complete patch.

    Args:
      images: [B, height, width, channels], or [B, P, height, width, channels].
      config: configuration of the tower.

    Returns:
      [B, rows * columns, P * patch_size ** 2 * channels] in row-major order. Overlapping patches
      at the border repeat edge pixels, and a still image fills all `P` frames.
    """
    if images.ndim == 4:
        return jnp.concatenate([_windows(images, config)] * config.temporal_patch_size, axis=-1)
    frames = [_windows(images[:, frame], config) for frame in range(images.shape[1])]
    return jnp.concatenate(frames, axis=-1)


def _windows(images: Array, config: VisionConfig) -> Array:
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
    return rearrange(cut, "b r y x c k -> b (r c) (y x k)")


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
    """Resample a [rows * columns, D] table: bicubic, half-pixel centers, repeated edges."""
    if source == target:
        return table
    weights = [_cubic_weights(source[axis], target[axis]) for axis in (0, 1)]
    grid = table.reshape(*source, -1)
    return jnp.einsum("rs,cu,sud->rcd", *weights, grid).reshape(target[0] * target[1], -1)


def _cubic_weights(source: int, target: int) -> np.ndarray:
    """Compute the [target, source] matrix of cubic convolution with A = -0.75."""
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
