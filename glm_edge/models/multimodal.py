"""The multimodal GLM: a decoder that reads image and speech features at placeholder tokens.

Letters of shapes: `B` rows, `T` tokens, `D` hidden size, `V` vocabulary, `K` images or recordings
per row, `N` chunks of speech, `M` features.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from glm_edge.configs import GLMConfig, VisionConfig
from glm_edge.errors import DataError
from glm_edge.kernels import rotary
from glm_edge.models.glm import Cache, Decoder
from glm_edge.models.layers import Embed, Linear
from glm_edge.models.speech import SpeechEncoder
from glm_edge.models.vision import VisionEncoder
from glm_edge.params.sharding import constrain

Images = Array | list[Array] | tuple[Array, ...]


class MultimodalGLM(nn.Module):
    """A GLM with the encoders of its configuration.

    Attributes:
      config: configuration of the model.
      compute: arithmetic of products, see `glm_edge.params.linear`.

    Example:
      >>> model, params = ge.load(ge.shipped("nano"))
      >>> logits, intermediates = model.apply({"params": params}, tokens, images=images)
    """

    config: GLMConfig
    compute: str = "float32"

    def setup(self) -> None:
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
        images: Images | None = None,
        audio: Array | None = None,
        positions: Array | None = None,
        mask: Array | None = None,
        cache: Cache | None = None,
        audio_frames: Array | None = None,
    ) -> tuple[Array, dict[str, Any]]:
        """Compute logits of the next token at every position.

        Args:
          tokens: int [B, T], with placeholders at image and speech features.
          images: [B, height, width, channels], or [B, K, …] for K images per row. Images of mixed
            sizes are a list over all rows in reading order, with [height, width, channels] per
            still image and [frames, height, width, channels] per video. None without images.
          audio: [B, frames, mel_bins], or [B, K, …] for K recordings per row. With `audio_frames`,
            chunks [N, frames, mel_bins] of all rows in reading order. None without audio.
          positions: [B, T] or [3, B, T]. None counts from the cache's length and treats every
            token as valid (see `start_positions`).
          mask: bool, broadcastable to [B, 1, T, S], which must include causality; None is causal.
          cache: cache from `glm_edge.models.glm.init_cache`, or None.
          audio_frames: int [N], frames with sound per chunk. Features of other frames are dropped.

        Returns:
          `(logits, intermediates)`: logits [B, T, V], and a dictionary of `hidden` (embedded input
          and output of each layer), `final` (normed), `vision` and `speech` features, and `cache`.

        Raises:
          DataError: an image or a video has a wrong shape.
          ConfigError: the vision tower cannot read an image size.
        """
        if self.is_initializing():
            self.initialize_encoders()
        x, encoded = self.embed_inputs(tokens, images, audio, audio_frames)
        if positions is None:
            start = 0 if cache is None else cache["length"]
            positions = start + self.start_positions(tokens, None, images)[0]
        final, hidden, cache = self.decoder(x, positions, mask, cache)
        intermediates = {"hidden": hidden, "final": final, "cache": cache, **encoded}
        return self.predict(final), intermediates

    def start_positions(
        self, tokens: Array, valid: Array | None = None, images: Images | None = None
    ) -> tuple[Array, Array]:
        """Compute positions of prompts, counted from each row's first valid token.

        Args:
          tokens: int [B, T].
          valid: bool [B, T], False at padding; None means no padding.
          images: as in `__call__`; only their shapes are used.

        Returns:
          `(positions, following)`: positions [B, T], or [3, B, T] with three-dimensional rotary
          positions, 0 at padding; and [B], the position of the first token after the prompt.
        """
        valid = jnp.ones(tokens.shape, bool) if valid is None else valid
        if images is None or not self.config.decoder.mrope_section:
            count = jnp.cumsum(valid, axis=1)
            positions = jnp.where(valid, count - 1, 0)
            if self.config.decoder.mrope_section:
                positions = jnp.broadcast_to(positions, (3, *positions.shape))
            return positions, count[:, -1]
        placeholder = _at(tokens, self.config.image_token_id) & valid
        per_row = not isinstance(images, list | tuple)
        rank = _rank(placeholder, per_row)
        grids = feature_grids(images, self.config.vision_tower)
        return rotary.block_positions(rank, placeholder, valid, grids)

    def embed_inputs(
        self,
        tokens: Array,
        images: Images | None = None,
        audio: Array | None = None,
        audio_frames: Array | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """Embed tokens and replace placeholders by encoded images and speech.

        Arguments as in `__call__`.

        Returns:
          `(x, encoded)`: [B, T, D], and the features of `vision` and `speech`.
        """
        x, encoded = self.embed(tokens), {}
        if images is not None:
            encoded["vision"] = self.encode_images(images)
            x = place_features(x, _at(tokens, self.config.image_token_id), encoded["vision"])
        if audio is not None:
            encoded["speech"] = self.encode_audio(audio, audio_frames)
            x = place_features(x, _at(tokens, self.config.audio_token_id), encoded["speech"])
        return constrain(x, "batch", "length", "embed"), encoded

    def encode_images(self, images: Images) -> Array:
        """Encode images as [B, M, D] for an array, or as [M, D] for a list; see `__call__`."""
        if not isinstance(images, list | tuple):
            items = images.reshape(-1, *images.shape[-3:])
            features = self.vision(items)[0]
            return features.reshape(images.shape[0], -1, features.shape[-1])
        groups, order = image_groups(images, self.config.vision_tower)
        return in_reading_order([self.vision(group)[0] for group in groups], order)

    def encode_audio(self, audio: Array, audio_frames: Array | None = None) -> Array:
        """Encode speech as [B, M, D], or as [N * M, D] with `audio_frames`, sound first."""
        items = audio.reshape(-1, *audio.shape[-2:])
        features = self.speech(items)[0]
        if audio_frames is None:
            return features.reshape(audio.shape[0], -1, features.shape[-1])
        return sounding_first(features, audio_frames, self.config.speech_encoder.merge_size)

    def predict(self, final: Array) -> Array:
        """Compute logits [B, T, V] from the normed output [B, T, D] of the decoder."""
        tied = self.config.decoder.tie_embeddings
        logits = self.embed.attend(final) if tied else self.head(final)
        return constrain(logits, "batch", "length", "vocab")

    def initialize_encoders(self) -> None:
        """Create the encoders' parameters, independent of the inputs of `init`."""
        vision, speech = self.config.vision, self.config.speech
        if vision is not None:
            self.vision(jnp.zeros((1, *vision.image_size, vision.channels)))
        if speech is not None:
            self.speech(jnp.zeros((1, speech.num_frames, speech.mel_bins)))


def audio_features(audio_frames: ArrayLike, merge_size: int) -> Array:
    """Count the features of speech chunks after a stride of 2 and merge of complete groups.

    Args:
      audio_frames: integers, frames with sound per chunk.
      merge_size: frames, after the stride, per feature.

    Returns:
      Integers in the same shape.
    """
    return (jnp.asarray(audio_frames) + 1) // 2 // merge_size


def sounding(features: Array, audio_frames: Array, merge_size: int) -> Array:
    """Mark the features of frames with sound.

    Args:
      features: [N, M, D] features of chunks.
      audio_frames: int [N], frames with sound per chunk.
      merge_size: frames, after the stride, per feature.

    Returns:
      bool [N, M].
    """
    count = audio_features(audio_frames, merge_size)
    return jnp.arange(features.shape[1]) < count[:, None]


def sounding_first(features: Array, audio_frames: Array, merge_size: int) -> Array:
    """Flatten the features of chunks, with features of sound first.

    Args:
      features: [N, M, D] features of chunks.
      audio_frames: int [N], frames with sound per chunk.
      merge_size: frames, after the stride, per feature.

    Returns:
      [N * M, D].
    """
    left_out = ~sounding(features, audio_frames, merge_size)
    order = jnp.argsort(left_out.reshape(-1), stable=True)
    return features.reshape(-1, features.shape[-1])[order]


def image_groups(
    images: Sequence[Array], config: VisionConfig
) -> tuple[list[Array], list[tuple[int, int, int]]]:
    """Group images by size, to compile and run the tower once per size.

    Args:
      images: images of any sizes, or videos; see `MultimodalGLM`.
      config: configuration of the tower.

    Returns:
      `(groups, order)`: one array [temporal patches, P, height, width, channels] per size, and for
      each image `(group, start, stop)` of its temporal patches.

    Raises:
      DataError: an image has a wrong shape.
    """
    cut = [_temporal_patches(image, config) for image in images]
    sizes = sorted({patches.shape[2:4] for patches in cut})
    members: list[list[Array]] = [[] for _ in sizes]
    order = []
    for patches in cut:
        group = sizes.index(patches.shape[2:4])
        start = sum(len(member) for member in members[group])
        members[group].append(patches)
        order.append((group, start, start + len(patches)))
    return [jnp.concatenate(group) for group in members], order


def in_reading_order(groups: Sequence[Array], order: Sequence[tuple[int, int, int]]) -> Array:
    """Join the features of groups in the order of the images.

    Args:
      groups: [temporal patches, tokens, D] features per group of `image_groups`.
      order: `(group, start, stop)` per image from `image_groups`.

    Returns:
      [M, D].
    """
    parts = [groups[group][start:stop] for group, start, stop in order]
    return jnp.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])


def feature_counts(images: Sequence[Any], config: VisionConfig) -> list[int]:
    """Count the decoder's features per still image or video.

    Args:
      images: [height, width, channels] or [frames, height, width, channels] each.
      config: configuration of the tower.

    Returns:
      One count per image.

    Raises:
      DataError: the frames of a video are not a multiple of `temporal_patch_size`.
      ConfigError: patches do not divide into merged cells or windows.
    """
    counts = []
    for image in images:
        if image.ndim == 4 and image.shape[0] % config.temporal_patch_size:
            raise DataError(_frames_error(image, config))
        grids = feature_grids([image], config)
        edges = 2 * config.boundary_embeddings
        counts.append(sum(rows * columns + edges for rows, columns in grids))
    return counts


def _frames_error(image: Array, config: VisionConfig) -> str:
    size = config.temporal_patch_size
    return f"a video must have a multiple of {size} frames, found {image.shape[0]}"


def _temporal_patches(image: Array, config: VisionConfig) -> Array:
    """Reshape an image or a video to [temporal patches, P, height, width, channels]."""
    if image.ndim not in (3, 4) or image.shape[-1] != config.channels:
        raise DataError(
            f"an image must be [height, width, {config.channels}] and a video [frames, height, "
            f"width, {config.channels}], found {list(image.shape)}"
        )
    size = config.temporal_patch_size
    if image.ndim == 3:
        return jnp.broadcast_to(image, (1, size, *image.shape))
    if image.shape[0] % size:
        raise DataError(_frames_error(image, config))
    return image.reshape(-1, size, *image.shape[1:])


def feature_grids(images: Images, config: VisionConfig) -> list[tuple[int, int]]:
    """List (rows, columns) of features per image, or per temporal patch of a video.

    Args:
      images: as in `MultimodalGLM`; only their shapes are used.
      config: configuration of the tower.

    Returns:
      Pairs in reading order.
    """
    if not isinstance(images, list | tuple):
        shapes = [images.shape[-3:]] * (images.shape[1] if images.ndim == 5 else 1)
    else:
        shapes = [
            image.shape[-3:]
            for image in images
            for _ in range(image.shape[0] // config.temporal_patch_size if image.ndim == 4 else 1)
        ]
    grids = [config.grid_of((shape[0], shape[1])) for shape in shapes]
    return [(rows // config.merge_size, columns // config.merge_size) for rows, columns in grids]


def _at(tokens: Array, token: int | None) -> Array:
    """Mark the placeholders of one kind; a model without them has none."""
    return jnp.zeros(tokens.shape, bool) if token is None else tokens == token


def _rank(placeholder: Array, per_row: bool) -> Array:
    """Index the placeholders within each row, or over all rows in reading order."""
    if per_row:
        return jnp.cumsum(placeholder, axis=1) - 1
    return jnp.cumsum(placeholder.reshape(-1)).reshape(placeholder.shape) - 1


def place_features(x: Array, placeholder: Array, features: Array) -> Array:
    """Replace embedded placeholders by features, in order.

    Args:
      x: [B, T, D] embedded tokens.
      placeholder: bool [B, T], True at placeholders.
      features: [B, M, D] per row of `x`, or [M, D] for all rows in reading order.

    Returns:
      [B, T, D].
    """
    per_row = features.ndim == 3
    index = jnp.clip(_rank(placeholder, per_row), 0, features.shape[-2] - 1)
    placed = features[jnp.arange(x.shape[0])[:, None], index] if per_row else features[index]
    return jnp.where(placeholder[..., None], placed.astype(x.dtype), x)
