"""The multimodal GLM: a decoder that reads image and speech features at placeholder tokens."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from glm_edge.configs import GLMConfig
from glm_edge.models.glm import Cache, Decoder
from glm_edge.models.layers import Embed, Linear
from glm_edge.models.speech import SpeechEncoder
from glm_edge.models.vision import VisionEncoder


class MultimodalGLM(nn.Module):
    """A GLM with the encoders that its configuration names.

    Attributes:
      config: of the model.
      compute: how products are computed, see `glm_edge.params.linear`.
    """

    config: GLMConfig
    compute: str = "float32"

    def setup(self):
        config, width = self.config, self.config.decoder.hidden_size
        self.embed = Embed(config.decoder.vocab_size, width, self.compute)
        self.decoder = Decoder(config.decoder, self.compute)
        if not config.decoder.tie_embeddings:
            self.head = Linear(config.decoder.vocab_size, False, self.compute)
        if config.vision is not None:
            self.vision = VisionEncoder(config.vision, width, self.compute)
        if config.speech is not None:
            self.speech = SpeechEncoder(config.speech, width, self.compute)

    def __call__(
        self,
        tokens: Array,
        images: Array | None = None,
        audio: Array | None = None,
        positions: Array | None = None,
        mask: Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Array, dict[str, Any]]:
        """Scores the next token at every position.

        Args:
          tokens: [B, T]; placeholders stand where image and speech features go.
          images: [B, height, width, channels], or [B, K, …] for K images a row, or None.
          audio: [B, num_frames, mel_bins], or [B, K, …] for K recordings a row, or None.
          positions: [B, T] or [3, B, T]; None counts from the cache's length.
          mask: bool, broadcastable to [B, 1, T, S], which must include causality; None is causal.
          cache: from `glm_edge.models.glm.init_cache`, or None.

        Returns:
          `(logits, intermediates)`: [B, T, V], and a dictionary of `hidden` (embedded input,
          output of each layer), `final` (normed), `vision` and `speech` features, and `cache`.
        """
        if self.is_initializing():
            self.initialize_encoders()
        x, encoded = self.embed_inputs(tokens, images, audio)
        if positions is None:
            start = 0 if cache is None else cache["length"]
            positions = start + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        final, hidden, cache = self.decoder(x, positions, mask, cache)
        intermediates = {"hidden": hidden, "final": final, "cache": cache, **encoded}
        return self.predict(final), intermediates

    def embed_inputs(
        self, tokens: Array, images: Array | None = None, audio: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Embeds tokens and puts encoded images and speech at their placeholders."""
        x, encoded = self.embed(tokens), {}
        if images is not None:
            encoded["vision"] = self.encode_images(images)
            x = place_features(x, tokens == self.config.image_token_id, encoded["vision"])
        if audio is not None:
            encoded["speech"] = self.encode_audio(audio)
            x = place_features(x, tokens == self.config.audio_token_id, encoded["speech"])
        return x, encoded

    def encode_images(self, images: Array) -> Array:
        """Image features [B, num_tokens, D], or [B, K * num_tokens, D] of K images a row."""
        return _encode_rows(lambda rows: self.vision(rows)[0], images, item_axes=3)

    def encode_audio(self, audio: Array) -> Array:
        """Speech features [B, num_tokens, D], or [B, K * num_tokens, D] of K recordings a row."""
        return _encode_rows(lambda rows: self.speech(rows)[0], audio, item_axes=2)

    def predict(self, final: Array) -> Array:
        """Scores of every token from the normed output of the decoder."""
        if self.config.decoder.tie_embeddings:
            return self.embed.attend(final)
        return self.head(final)

    def initialize_encoders(self) -> None:
        """Creates the encoders' parameters whatever inputs `init` was given."""
        vision, speech = self.config.vision, self.config.speech
        if vision is not None:
            self.vision(jnp.zeros((1, *vision.image_size, vision.channels)))
        if speech is not None:
            self.speech(jnp.zeros((1, speech.num_frames, speech.mel_bins)))


def _encode_rows(encode: Callable[[Array], Array], inputs: Array, item_axes: int) -> Array:
    item = inputs.shape[inputs.ndim - item_axes :]
    features = encode(inputs.reshape(-1, *item))
    return features.reshape(inputs.shape[0], -1, features.shape[-1])


def place_features(x: Array, placeholder: Array, features: Array) -> Array:
    """Replaces embedded placeholders by features, in order.

    Args:
      x: [B, T, D] embedded tokens.
      placeholder: bool [B, T]; each row holds at most `M` of them.
      features: [B, M, D].

    Returns:
      [B, T, D].
    """
    rank = jnp.cumsum(placeholder, axis=1) - 1
    index = jnp.clip(rank, 0, features.shape[1] - 1)
    placed = jnp.take_along_axis(features, index[..., None], axis=1)
    return jnp.where(placeholder[..., None], placed.astype(x.dtype), x)
