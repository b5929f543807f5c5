"""A bidirectional text encoder: BERT, or DistilBERT without token types."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from glm_edge.configs import TextConfig
from glm_edge.errors import DataError
from glm_edge.kernels import attention as attention_kernels
from glm_edge.models.layers import Embed, LayerNorm, Linear, Stack, gated
from glm_edge.params.sharding import constrain


class TextLayer(nn.Module):
    """A post-norm layer."""

    config: TextConfig
    layer: int
    compute: str = "float32"

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:
        config = self.config
        count, width = config.heads(self.layer), config.head_size

        def linear(name: str, features: int) -> Linear:
            return Linear(features, True, self.compute, name=name)

        def heads(name: str) -> Array:
            projected = linear(name, count * width)(x)
            projected = projected.reshape(*x.shape[:2], count, width)
            return constrain(projected, "batch", "length", "heads", "head_dim")

        mixed = attention_kernels.attention(heads("q_proj"), heads("k_proj"), heads("v_proj"), mask)
        mixed = gated(self, "heads", mixed).reshape(*x.shape[:2], count * width)
        attended = linear("o_proj", config.hidden_size)(mixed)
        x = LayerNorm(config.layer_norm_eps, name="attention_norm")(x + attended)
        x = constrain(x, "batch", "length", "embed")
        hidden = nn.gelu(linear("fc1", config.neurons(self.layer))(x), approximate=False)
        hidden = constrain(gated(self, "neurons", hidden), "batch", "length", "neurons")
        x = x + linear("fc2", config.hidden_size)(hidden)
        x = LayerNorm(config.layer_norm_eps, name="output_norm")(x)
        return constrain(x, "batch", "length", "embed")


class TextEncoder(nn.Module):
    """A sentence encoder; with `num_labels`, also a classifier on the first token.

    Attributes:
      config: configuration of the encoder.
      compute: arithmetic of products, see `glm_edge.params.linear`.

    References:
      BERT, https://arxiv.org/abs/1810.04805; DistilBERT, https://arxiv.org/abs/1910.01108.
    """

    config: TextConfig
    compute: str = "float32"

    def setup(self) -> None:
        config = self.config
        self.embed = Embed(config.vocab_size, config.hidden_size)
        self.position = self.param(
            "position",
            nn.initializers.normal(0.02),
            (config.max_position_embeddings, config.hidden_size),
        )
        if config.type_vocab_size:
            self.token_type = Embed(config.type_vocab_size, config.hidden_size)
        self.norm = LayerNorm(config.layer_norm_eps)
        self.layers = Stack(
            tuple(TextLayer(config, i, self.compute) for i in range(config.num_layers))
        )
        if config.pooler:
            self.pooler = Linear(config.hidden_size, True, self.compute)
        if config.num_labels:
            self.classifier = Linear(config.num_labels, True, self.compute)

    def __call__(
        self, tokens: Array, valid: Array | None = None, token_types: Array | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Encode tokens.

        Args:
          tokens: int [B, T] token ids.
          valid: bool [B, T]; False hides padding. None means that all tokens are valid.
          token_types: int [B, T] segment of each token; None means segment 0.

        Returns:
          `(output, intermediates)`: logits [B, num_labels], or hidden states [B, T, D] without
          labels. Intermediates are `hidden` (the input of every layer and the output of the last)
          and, with a pooler, `pooled` [B, D].

        Raises:
          DataError: a row has more tokens than the model has positions.
        """
        limit = self.config.max_position_embeddings
        if tokens.shape[1] > limit:
            raise DataError(f"tokens: {tokens.shape[1]} per row, this encoder reads up to {limit}")
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        if self.config.type_vocab_size:
            types = jnp.zeros_like(tokens) if token_types is None else token_types
            x = x + self.token_type(types)
        x = constrain(self.norm(x), "batch", "length", "embed")
        mask = None if valid is None else valid[:, None, None, :]
        hidden = [x]
        for index in range(self.config.num_layers):
            x = self.layers[index](x, mask)
            hidden.append(x)
        intermediates: dict[str, Any] = {"hidden": hidden}
        first = x[:, 0]
        if self.config.pooler:
            activation = jnp.tanh if self.config.pooler == "tanh" else nn.relu
            first = intermediates["pooled"] = activation(self.pooler(first))
        if not self.config.num_labels:
            return x, intermediates
        return self.classifier(first), intermediates

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for an encoder without labels."""
        return self.config.num_labels

    def classify(self, batch: Mapping[str, Array], train: bool = False) -> Array:
        """Compute logits [B, N] of a batch with `tokens`, and optional `valid` and `token_types`.

        Training does not change the encoder's function, so `train` has no effect.
        """
        return self(batch["tokens"], batch.get("valid"), batch.get("token_types"))[0]
