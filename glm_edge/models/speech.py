"""The GLM-ASR speech encoder: two convolutions, a transformer, a 4x merge and a projector."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.configs import SpeechConfig
from glm_edge.kernels import attention as attention_kernels
from glm_edge.kernels import rotary
from glm_edge.models.layers import LayerNorm, Linear, Stack


class SpeechAttention(nn.Module):
    """Full attention with half-split partial rotary positions; keys have no bias."""

    config: SpeechConfig
    compute: str = "float32"

    @nn.compact
    def __call__(self, x: Array, angle: Array) -> Array:
        config = self.config

        def project(name: str, use_bias: bool) -> Array:
            projected = Linear(config.hidden_size, use_bias, self.compute, name=name)(x)
            return projected.reshape(*x.shape[:2], config.num_heads, -1)

        query = rotary.rotate_half(project("q_proj", True), angle)
        key = rotary.rotate_half(project("k_proj", False), angle)
        mixed = attention_kernels.attention(query, key, project("v_proj", True))
        return Linear(config.hidden_size, True, self.compute, name="o_proj")(mixed.reshape(x.shape))


class SpeechLayer(nn.Module):
    """One pre-norm layer with a GELU feed-forward network."""

    config: SpeechConfig
    compute: str = "float32"

    @nn.compact
    def __call__(self, x: Array, angle: Array) -> Array:
        config = self.config
        normed = LayerNorm(config.layer_norm_eps, name="input_norm")(x)
        x = x + SpeechAttention(config, self.compute, name="attention")(normed, angle)
        hidden = LayerNorm(config.layer_norm_eps, name="post_attention_norm")(x)
        hidden = Linear(config.intermediate_size, True, self.compute, name="fc1")(hidden)
        hidden = nn.gelu(hidden, approximate=False)
        return x + Linear(config.hidden_size, True, self.compute, name="fc2")(hidden)


class SpeechEncoder(nn.Module):
    """Turns log-mel frames into features for the decoder.

    Attributes:
      config: of the encoder.
      out_features: hidden size of the decoder.
      compute: see `glm_edge.params.linear`.
    """

    config: SpeechConfig
    out_features: int
    compute: str = "float32"

    def setup(self):
        config = self.config
        self.conv1 = Linear(config.hidden_size, True, self.compute)
        self.conv2 = Linear(config.hidden_size, True, self.compute)
        self.layers = Stack(
            tuple(SpeechLayer(config, self.compute) for _ in range(config.num_layers))
        )
        self.norm = LayerNorm(config.layer_norm_eps)
        self.linear_1 = Linear(config.projector_size, True, self.compute)
        self.linear_2 = Linear(self.out_features, True, self.compute)

    def __call__(self, mel: Array) -> tuple[Array, dict[str, Any]]:
        """Encodes log-mel spectrograms.

        Args:
          mel: [B, num_frames, mel_bins].

        Returns:
          `(features, intermediates)`: [B, num_frames / 8, out_features], and `hidden`, the input
          of every layer and the output of the last.
        """
        x = self.embed(mel)
        angle = self.angles(x.shape[1])
        hidden = [x]
        for index in range(self.config.num_layers):
            x = self.layers[index](x, angle)
            hidden.append(x)
        return self.head(x), {"hidden": hidden}

    def embed(self, mel: Array) -> Array:
        """The two convolutions, [B, num_frames / 2, hidden_size]."""
        x = nn.gelu(self.conv1(_neighbours(mel)), approximate=False)
        return nn.gelu(self.conv2(_neighbours(x)[:, ::2]), approximate=False)

    def angles(self, length: int) -> Array:
        """Rotary angles, [1, length, rotary_dim / 2]."""
        config = self.config
        head_dim = config.hidden_size // config.num_heads
        frequencies = rotary.inverse_frequencies(
            int(head_dim * config.partial_rotary_factor), config.rope_theta
        )
        return jnp.asarray(np.arange(length)[:, None] * frequencies, jnp.float32)[None]

    def head(self, x: Array) -> Array:
        """Final norm, merge of neighbouring frames, and projector."""
        merged = self.norm(x).reshape(x.shape[0], -1, x.shape[2] * self.config.merge_size)
        return self.linear_2(nn.gelu(self.linear_1(merged), approximate=False))


def _neighbours(x: Array) -> Array:
    """Each frame with the one before and the one after, zero outside: a width-3 convolution."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    return jnp.concatenate([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]], axis=-1)
