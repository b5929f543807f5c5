"""Preparation of prompts: checks, and padding to few lengths, so that few programs compile.

Letters of shapes: `B` rows, `T` tokens of a prompt, `S` cache slots, `D` hidden size, `M` features.
"""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.configs import GLMConfig
from glm_edge.errors import DataError
from glm_edge.models.multimodal import audio_features
from glm_edge.preprocess.inputs import Inputs

# A cache of more slots than this fits no device.
MAX_NEW_TOKENS = 1 << 20


@dataclass(frozen=True)
class Prompt:
    """Prompts padded to the length of a bucket.

    Attributes:
      inputs: with tokens int32 [B, T]; at padding a token that is not a placeholder.
      room: cache slots for generated tokens.
      new_tokens: generated tokens that must have positions; None does not check the context length.
    """

    inputs: Inputs
    room: int
    new_tokens: int | None = None

    @classmethod
    def of(
        cls, config: GLMConfig, inputs: Any, max_new_tokens: int, beyond_context: bool = False
    ) -> Prompt:
        """Check prompts and pad them.

        Args:
          config: of the model.
          inputs: as `Inputs.of` reads them.
          max_new_tokens: tokens to generate at most.
          beyond_context: allows more positions than the model was trained on.

        Raises:
          DataError: inputs do not fit each other or the model.
        """
        max_new_tokens = _count(max_new_tokens)
        inputs = Inputs.of(inputs)
        tokens, valid = inputs.tokens, inputs.valid
        known = (tokens >= 0) & (tokens < config.decoder.vocab_size)
        if not known[valid].all():
            raise DataError(
                f"token {tokens[valid & ~known][0]} is not in 0..{config.decoder.vocab_size - 1}"
            )
        # Positions of three axes advance by less than one per vision token, so `start` checks them.
        if not (beyond_context or config.decoder.mrope_section):
            check_context(config, valid.sum(axis=1), max_new_tokens)
        # Padding must not count as an image or a recording, whatever its token is.
        placeholders = (config.image_token_id, config.audio_token_id)
        filler = next(token for token in range(3) if token not in placeholders)
        extra = ((0, 0), (0, bucket(tokens.shape[1]) - tokens.shape[1]))
        tokens = np.where(valid, tokens, filler).astype(np.int32)
        padded = dataclasses.replace(
            inputs,
            tokens=np.pad(tokens, extra, constant_values=filler),
            valid=np.pad(valid, extra),
        )
        return cls(padded, bucket(max_new_tokens), None if beyond_context else max_new_tokens)


def config_of(model: Any) -> GLMConfig:
    """Return the configuration of a model that generates.

    Raises:
      DataError: the model is not a GLM.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "eos_token_ids"):
        raise DataError(
            f"model must be a glm_edge.MultimodalGLM, which predicts tokens, not "
            f"{model.__name__ + ', a class' if isinstance(model, type) else type(model).__name__}"
        )
    return config


def check_context(config: GLMConfig, lengths: np.ndarray, new_tokens: int) -> None:
    """Check that prompts and answers fit the context length of a model.

    Args:
      config: of the model.
      lengths: [B], positions per prompt.
      new_tokens: tokens to generate at most.

    Raises:
      DataError: a prompt and its answer exceed `max_position_embeddings`.
    """
    context, longest = config.decoder.max_position_embeddings, int(np.max(lengths))
    if longest + new_tokens > context:
        room = context - longest
        cure = f"pass max_new_tokens={room} at most" if room > 0 else "shorten the prompt"
        raise DataError(
            f"a prompt of {longest} positions and {new_tokens} new tokens exceed the {context} "
            f"positions of the model (max_position_embeddings); {cure}, or "
            "DecodeOptions(beyond_context=True) for worse answers"
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


def count_placeholders(
    config: GLMConfig, inputs: Inputs, features: dict[str, Array]
) -> dict[str, tuple[Array, Array]]:
    """Count the placeholders in prompts and the features for them.

    Args:
      config: of the model.
      inputs: of the prompts.
      features: `vision` and `speech`, each [B, M, D] per row or [M, D] of all rows together.

    Returns:
      Both counts per encoder: [B] when features belong to rows, else scalars.
    """
    token_ids = {"vision": config.image_token_id, "speech": config.audio_token_id}
    counts = {}
    for encoder, encoded in features.items():
        placeholder = (inputs.tokens == token_ids[encoder]) & inputs.valid
        count = placeholder.sum(axis=1) if encoded.ndim == 3 else placeholder.sum()
        expected = jnp.full_like(count, encoded.shape[-2])
        if encoder == "speech" and inputs.audio_frames is not None:
            expected = audio_features(inputs.audio_frames, config.speech_encoder.merge_size).sum()
        counts[encoder] = count, expected
    return counts


def check_placeholders(counts: dict[str, tuple[Any, Any]]) -> None:
    """Compare the counts of `count_placeholders`; a row without placeholders needs no features.

    Raises:
      DataError: the numbers of placeholders and features of a prompt differ.
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
    """Round a length up to a multiple of 32, or of an eighth of the next power of two."""
    step = max(32, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


def prompt_mask(visible: Array, query_slots: Array) -> Array:
    """Build a causal mask that also hides padding.

    Args:
      visible: bool [B, S], False at slots that hold padding.
      query_slots: [T] slot of each query.

    Returns:
      bool [B, 1, T, S].
    """
    causal = jnp.arange(visible.shape[1]) <= query_slots[:, None]
    return (causal[None] & visible[:, None])[:, None]
