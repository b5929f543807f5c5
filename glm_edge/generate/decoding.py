"""Greedy generation: one jitted prefill, then one jitted loop of single-token steps."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.models.glm import init_cache
from glm_edge.models.multimodal import MultimodalGLM


def greedy(
    model: MultimodalGLM,
    params: Any,
    tokens: Array,
    valid: Array | None = None,
    images: Array | None = None,
    audio: Array | None = None,
    max_new_tokens: int = 16,
) -> Array:
    """Extends prompts by the likeliest token, step by step.

    Args:
      model: whose configuration names the stop tokens.
      params: its parameters, boxed or not.
      tokens: [B, T] prompts, padded on the left.
      valid: bool [B, T], False at padding; None means no padding.
      images: one image a row, or None.
      audio: one log-mel spectrogram a row, or None.
      max_new_tokens: tokens to generate.

    Returns:
      int32 [B, max_new_tokens]; after a stop token, a row repeats that stop token.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    valid = jnp.ones(tokens.shape, bool) if valid is None else jnp.asarray(valid, bool)
    return _greedy(model, params, tokens, valid, images, audio, max_new_tokens)


@functools.partial(jax.jit, static_argnums=(0, 6))
def _greedy(model, params, tokens, valid, images, audio, max_new_tokens):
    batch, length = tokens.shape
    num_slots = length + max_new_tokens
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    seen = jnp.concatenate([valid, jnp.ones((batch, max_new_tokens), bool)], axis=1)
    cache = init_cache(model.config.decoder, batch, num_slots)
    logits, aux = model.apply(
        {"params": params},
        tokens,
        images,
        audio,
        positions,
        prompt_mask(seen, jnp.arange(length)),
        cache,
    )
    first = jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)

    def step(carry, index):
        token, cache, stopped = carry
        stopped = stopped | _is_stop(token, model.config.eos_token_ids)
        logits, aux = model.apply(
            {"params": params},
            token[:, None],
            positions=positions[:, -1:] + 1 + index,
            mask=prompt_mask(seen, length + index[None]),
            cache=cache,
        )
        following = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
        following = jnp.where(stopped, token, following)
        return (following, aux["cache"], stopped), token

    carry = (first, aux["cache"], jnp.zeros(batch, bool))
    _, generated = jax.lax.scan(step, carry, jnp.arange(max_new_tokens))
    return generated.T


def prompt_mask(seen: Array, query_slots: Array) -> Array:
    """Causal mask that also hides padding.

    Args:
      seen: bool [B, S], False at slots that hold padding.
      query_slots: [T] slot of each query.

    Returns:
      bool [B, 1, T, S].
    """
    causal = jnp.arange(seen.shape[1]) <= query_slots[:, None]
    return (causal[None] & seen[:, None])[:, None]


def _is_stop(token: Array, stop_tokens: tuple[int, ...]) -> Array:
    return functools.reduce(jnp.logical_or, [token == stop for stop in stop_tokens], token < 0)
