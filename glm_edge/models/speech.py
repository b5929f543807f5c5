"""The speech encoders of GLM-ASR and Whisper: convolutions, transformer, merge and projector."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.configs import SpeechConfig
from glm_edge.kernels import attention as attention_kernels
from glm_edge.kernels import rotary
from glm_edge.models.layers import LayerNorm, Linear, Stack, gated, normal
from glm_edge.params.sharding import constrain


class SpeechAttention(nn.Module):
    """Full grouped-query attention with half-split partial rotary positions; keys have no bias."""

    config: SpeechConfig
    layer: int
    compute: str = "float32"

    @nn.compact
    def __call__(self, x: Array, angle: Array) -> Array:
        config = self.config

        count, shared = config.heads(self.layer), config.kv_heads(self.layer)
        width = config.head_size

        def project(name: str, heads: int, axis: str, use_bias: bool) -> Array:
            projected = Linear(heads * width, use_bias, self.compute, name=name)(x)
            projected = projected.reshape(*x.shape[:2], heads, width)
            return constrain(projected, "batch", "length", axis, "head_dim")

        query = rotary.rotate_half(project("q_proj", count, "heads", True), angle)
        key = rotary.rotate_half(project("k_proj", shared, "kv_heads", False), angle)
        value = project("v_proj", shared, "kv_heads", True)
        mixed = attention_kernels.attention(query, key, value)
        mixed = gated(self, "heads", mixed).reshape(*x.shape[:2], count * width)
        return Linear(config.hidden_size, True, self.compute, name="o_proj")(mixed)


class SpeechLayer(nn.Module):
    """A pre-norm layer with a GELU feed-forward network."""

    config: SpeechConfig
    layer: int
    compute: str = "float32"

    @nn.compact
    def __call__(self, x: Array, angle: Array) -> Array:
        config = self.config
        normed = LayerNorm(config.layer_norm_eps, name="input_norm")(x)
        x = x + SpeechAttention(config, self.layer, self.compute, name="attention")(normed, angle)
        x = constrain(x, "batch", "length", "embed")
        hidden = LayerNorm(config.layer_norm_eps, name="post_attention_norm")(x)
        hidden = Linear(config.neurons(self.layer), True, self.compute, name="fc1")(hidden)
        hidden = gated(self, "neurons", nn.gelu(hidden, approximate=False))
        hidden = constrain(hidden, "batch", "length", "neurons")
        x = x + Linear(config.hidden_size, True, self.compute, name="fc2")(hidden)
        return constrain(x, "batch", "length", "embed")


class SpeechEncoder(nn.Module):
    """The speech encoder, from log-mel frames to features for the decoder.

    Attributes:
      config: configuration of the encoder.
      out_features: hidden size of the decoder; unused without a projector.
      compute: arithmetic of products, see `glm_edge.params.linear`.

    References:
      Whisper, https://arxiv.org/abs/2212.04356.
    """

    config: SpeechConfig
    out_features: int = 0
    compute: str = "float32"

    def setup(self) -> None:
        config = self.config
        self.conv1 = Linear(config.hidden_size, True, self.compute)
        self.conv2 = Linear(config.hidden_size, True, self.compute)
        if config.learned_positions:
            table = (config.num_frames // 2, config.hidden_size)
            self.position = self.param("position", normal(0.02), table)
        self.layers = Stack(
            tuple(SpeechLayer(config, i, self.compute) for i in range(config.num_layers))
        )
        self.norm = LayerNorm(config.layer_norm_eps)
        if config.projector_size:
            self.linear_1 = Linear(config.projector_size, True, self.compute)
            self.linear_2 = Linear(self.out_features, True, self.compute)

    def __call__(self, mel: Array) -> tuple[Array, dict[str, Any]]:
        """Encode log-mel spectrograms.

        Args:
          mel: [B, frames, mel_bins]; `frames` must be `num_frames` with learned positions.

        Returns:
          `(features, intermediates)`: features [B, frames / (2 merge_size), out_features], or
          normed frames [B, frames / 2, hidden_size] without a projector. Intermediates are `conv1`
          and `conv2` before GELU, `hidden` (the input of every layer and the output of the last)
          and `final` (normed).
        """
        x, conv1, conv2 = self.embed(mel)
        angle = self.angles(x.shape[1])
        hidden = [x]
        for index in range(self.config.num_layers):
            x = self.layers[index](x, angle)
            hidden.append(x)
        final = self.norm(x)
        intermediates = {"conv1": conv1, "conv2": conv2, "hidden": hidden, "final": final}
        return self.head(final), intermediates

    def embed(self, mel: Array) -> tuple[Array, Array, Array]:
        """Compute the input of the first layer, [B, frames / 2, D], and both convolutions."""
        conv1 = self.conv1(_neighbours(mel))
        conv2 = self.conv2(_neighbours(nn.gelu(conv1, approximate=False))[:, ::2])
        x = nn.gelu(conv2, approximate=False)
        if self.config.learned_positions:
            x = x + self.position
        return constrain(x, "batch", "length", "embed"), conv1, conv2

    def angles(self, length: int) -> Array:
        """Compute rotary angles, [1, length, rotary_dim / 2]."""
        frequencies = rotary.inverse_frequencies(self.config.rotary_dim, self.config.rope_theta)
        return jnp.asarray(np.arange(length)[:, None] * frequencies, jnp.float32)[None]

    def head(self, final: Array) -> Array:
        """Merge `merge_size` adjacent normed frames and project them."""
        if not self.config.projector_size:
            return final
        merged = final.reshape(final.shape[0], -1, final.shape[2] * self.config.merge_size)
        hidden = nn.gelu(self.linear_1(merged), approximate=False)
        return self.linear_2(constrain(hidden, "batch", "length", "neurons"))


def _neighbours(x: Array) -> Array:
    """Concatenate each frame with its zero-padded neighbours, for a convolution of width 3."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    return jnp.concatenate([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]], axis=-1)
