"""Preparation of prompts: checks, and padding to few lengths, each of which compiles once.

Letters of shapes: `B` rows, `T` tokens of a prompt, `S` cache slots, `D` hidden size, `M` features.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.configs import GLMConfig
from glm_edge.errors import DataError
from glm_edge.models.multimodal import audio_features

# A cache of more slots than this would not fit any device.
MAX_NEW_TOKENS = 1 << 20


@dataclass(frozen=True)
class Prompt:
    """Prompts padded to the length of a bucket.

    Attributes:
      tokens: int32 [B, T]; at padding a token that is not a placeholder.
      valid: bool [B, T], False at padding.
      room: cache slots for generated tokens.
      new_tokens: tokens for which positions must be left, or None where they may run out.
    """

    tokens: np.ndarray
    valid: np.ndarray
    room: int
    new_tokens: int | None = None

    @classmethod
    def of(
        cls,
        config: GLMConfig,
        tokens: Any,
        valid: Any,
        max_new_tokens: int,
        beyond_context: bool = False,
    ) -> Prompt:
        """Checks prompts and pads them.

        Args:
          config: of the model.
          tokens: int [B, T].
          valid: bool [B, T], or None when there is no padding.
          max_new_tokens: tokens to generate at most.
          beyond_context: positions may exceed those that the model was trained on.

        Raises:
          DataError: prompts and mask do not fit each other or the model.
        """
        max_new_tokens = _count(max_new_tokens)
        tokens = _rows(tokens, "prompts")
        valid = np.ones(tokens.shape, bool) if valid is None else _rows(valid, "valid") != 0
        if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
            raise DataError(
                f"prompts must be integers [rows, tokens], found {tokens.dtype} {tokens.shape}"
            )
        if valid.shape != tokens.shape:
            raise DataError(f"valid has shape {valid.shape}, the prompts {tokens.shape}")
        if not valid.any(axis=1).all():
            raise DataError(f"prompt {int(np.argmin(valid.any(axis=1)))} holds padding only")
        known = (tokens >= 0) & (tokens < config.decoder.vocab_size)
        if not known[valid].all():
            raise DataError(
                f"token {tokens[valid & ~known][0]} is not in 0..{config.decoder.vocab_size - 1}"
            )
        # With images, three-dimensional positions fall behind the tokens: they are checked later.
        if not (beyond_context or config.decoder.mrope_section):
            check_context(config, valid.sum(axis=1), max_new_tokens)
        # Padding must not take the place of an image or a recording, whatever its token is.
        placeholders = (config.image_token_id, config.audio_token_id)
        filler = next(token for token in range(3) if token not in placeholders)
        extra = ((0, 0), (0, bucket(tokens.shape[1]) - tokens.shape[1]))
        return cls(
            np.pad(np.where(valid, tokens, filler).astype(np.int32), extra, constant_values=filler),
            np.pad(valid, extra),
            bucket(max_new_tokens),
            None if beyond_context else max_new_tokens,
        )


def config_of(model: Any) -> GLMConfig:
    """Returns the configuration of a model that generates.

    Raises:
      DataError: the model is not a GLM.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "eos_token_ids"):
        raise DataError(
            f"model must be a glm_edge.MultimodalGLM, which predicts tokens, not "
            f"{model.__name__ + ', a class' if isinstance(model, type) else type(model).__name__}"
        )
    return config


def check_context(config: GLMConfig, lengths: np.ndarray, new_tokens: int) -> None:
    """Refuses what exceeds the positions that a model was trained on.

    Args:
      config: of the model.
      lengths: [B], positions that each prompt takes.
      new_tokens: tokens to generate at most.

    Raises:
      DataError: a prompt and its answer take more than `max_position_embeddings`.
    """
    context, longest = config.decoder.max_position_embeddings, int(np.max(lengths))
    if longest + new_tokens > context:
        room = context - longest
        cure = f"pass max_new_tokens={room} at most" if room > 0 else "shorten the prompt"
        raise DataError(
            f"a prompt of {longest} positions and {new_tokens} new tokens exceed the {context} "
            f"positions of the model (max_position_embeddings); {cure}, or beyond_context=True "
            "to go on with worse answers"
        )


def _count(value: Any) -> int:
    try:
        count = operator.index(value)
    except TypeError as error:
        raise DataError(f"max_new_tokens must be an integer, got {value!r:.60}") from error
    if not 1 <= count <= MAX_NEW_TOKENS:
        raise DataError(
            f"max_new_tokens must be at least 1 and at most {MAX_NEW_TOKENS}, got {count}"
        )
    return count


def _rows(values: Any, name: str) -> np.ndarray:
    try:
        rows = np.asarray(values)
    except ValueError as error:
        raise DataError(
            f"{name} must be rows of one length; pad them and say where in valid"
        ) from error
    if rows.dtype.kind not in "biuf":
        raise DataError(f"{name} must be numbers [rows, tokens], found {rows.dtype} {rows.shape}")
    return rows


def count_placeholders(
    config: GLMConfig,
    tokens: Array,
    valid: Array,
    features: dict[str, Array],
    audio_frames: Array | None = None,
) -> dict[str, tuple[Array, Array]]:
    """Counts the placeholders in prompts and the features for them.

    Args:
      config: of the model.
      tokens: [B, T].
      valid: bool [B, T].
      features: `vision` and `speech`, each [B, M, D] of the rows or [M, D] of all rows together.
      audio_frames: as `MultimodalGLM` takes it.

    Returns:
      Both counts per encoder: [B] when features belong to rows, else scalars.
    """
    token_ids = {"vision": config.image_token_id, "speech": config.audio_token_id}
    counts = {}
    for encoder, encoded in features.items():
        placeholder = (tokens == token_ids[encoder]) & valid
        count = placeholder.sum(axis=1) if encoded.ndim == 3 else placeholder.sum()
        expected = jnp.full_like(count, encoded.shape[-2])
        if encoder == "speech" and audio_frames is not None:
            expected = audio_features(audio_frames, config.speech.merge_size).sum()
        counts[encoder] = count, expected
    return counts


def check_placeholders(counts: dict[str, tuple[Any, Any]]) -> None:
    """Compares the counts of `count_placeholders`; a row may lack images or recordings altogether.

    Raises:
      DataError: a prompt has another number of placeholders than there are features.
    """
    for encoder, (present, expected) in counts.items():
        present, expected = np.atleast_1d(present), np.atleast_1d(expected)
        unfit = (present != expected) & ((present != 0) | (present.size == 1))
        if unfit.any():
            row = int(np.argmax(unfit))
            where = f"prompt {row} holds" if present.size > 1 else "the prompts hold"
            raise DataError(
                f"{where} {present[row]} placeholders of {encoder}, the input gives {expected[row]}"
            )


def bucket(length: int) -> int:
    """Rounds a length up to a multiple of 32, or of an eighth of the next power of two."""
    step = max(32, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


def prompt_mask(visible: Array, query_slots: Array) -> Array:
    """Builds a causal mask that also hides padding.

    Args:
      visible: bool [B, S], False at slots that hold padding.
      query_slots: [T] slot of each query.

    Returns:
      bool [B, 1, T, S].
    """
    causal = jnp.arange(visible.shape[1]) <= query_slots[:, None]
    return (causal[None] & visible[:, None])[:, None]
