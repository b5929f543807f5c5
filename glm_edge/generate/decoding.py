"""Generation: one jitted prefill, then one jitted step per token, with a cache of static shape.

Letters of shapes: `B` rows, `T` tokens of a prompt, `N` generated tokens, `S` cache slots, `V`
vocabulary.

A prompt takes the first slots of the cache, its padding included, wherever that is; generated
tokens take the slots after. Lengths are rounded up (`bucket`), so that few of them compile.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.errors import DataError
from glm_edge.generate.early_exit import EarlyExit, run_until_sure
from glm_edge.generate.prompts import (
    Prompt,
    check_context,
    check_placeholders,
    config_of,
    count_placeholders,
    prompt_mask,
)
from glm_edge.generate.sampling import Sampling, sample
from glm_edge.generate.token_pruning import VisionTokens, prefill_pruned, pruning_plan
from glm_edge.kernels import cache as cache_kernels
from glm_edge.models.glm import init_cache
from glm_edge.models.multimodal import Images, MultimodalGLM

GREEDY = Sampling()


@dataclass(frozen=True)
class Generation:
    """Result of `generate`.

    Attributes:
      tokens: int32 [B, N]; after its stop token, a row repeats that stop token.
      lengths: int32 [B], tokens before the stop token, `N` where none was generated.
      logits: float32 [B, N, V], the scores that each token was drawn from, before any penalty or
        temperature; meaningless after a row's stop token; None unless asked for.
      layers: int32 [B, N], decoder layers that each token ran, 0 after a row's stop token; None
        without early exit.
    """

    tokens: Array
    lengths: Array
    logits: Array | None = None
    layers: Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """State between two steps of decoding.

    Attributes:
      cache: keys and values of all slots, and the number of slots in use.
      logits: float32 [B, V], scores that `token` was drawn from.
      token: int32 [B], newest token of each row.
      position: int32 [B], its rotary position.
      visible: bool [B, S], False at slots that hold padding.
      stopped: bool [B], True from a row's stop token on.
      index: int32, generated tokens.
      keys: [B] PRNG keys, one per row, or None.
      in_prompt: bool [B, V], see `glm_edge.generate.sampling`, or None.
      counts: int32 [B, V], see `glm_edge.generate.sampling`, or None.
      layers: int32 [B], layers that gave `logits`, or None.
      finite: bool [B], False once scores of a row that had not stopped were NaN or infinite.
    """

    cache: Any
    logits: Array
    token: Array
    position: Array
    visible: Array
    stopped: Array
    index: Array
    keys: Array | None
    in_prompt: Array | None
    counts: Array | None
    layers: Array | None = None
    finite: Array | None = None


def generate(
    model: MultimodalGLM,
    params: Any,
    tokens: Any,
    valid: Any = None,
    images: Images | None = None,
    audio: Array | None = None,
    audio_frames: Array | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] | None = None,
    rng: Array | None = None,
    cache_dtype: Any = jnp.float32,
    return_logits: bool = False,
    early_exit: EarlyExit | None = None,
    vision_tokens: VisionTokens | None = None,
    beyond_context: bool = False,
) -> Generation:
    """Continues a batch of prompts until each row has stopped or has `max_new_tokens`.

    Token `n` of row `b` is drawn with `fold_in(fold_in(rng, b), n)`, or `fold_in(rng[b], n)` when
    `rng` holds a key for each row: the same key gives the same tokens whatever the other rows,
    the padding and the length of the run.

        inputs = processor([{"role": "user", "content": "What is on the screen?"}])
        generation = ge.generate.generate(model, params, **inputs, max_new_tokens=64)
        text = processor.decode(generation.tokens[0])

    Args:
      model: the model.
      params: its parameters, boxed or not.
      tokens: int [B, T] prompts; padding may be anywhere.
      valid: bool [B, T], False at padding; None means no padding.
      images: as `MultimodalGLM` takes them, or None.
      audio: as `MultimodalGLM` takes it, or None.
      audio_frames: as `MultimodalGLM` takes them, or None.
      max_new_tokens: tokens to generate at most.
      sampling: how tokens are drawn.
      stop_tokens: token ids that end a row; None takes those of the model's configuration.
      rng: a PRNG key, or [B] keys; None is key 0.
      cache_dtype: type of cached keys and values: a floating one, or `int8` or `int4` with a scale
        for each token and head.
      return_logits: also return the scores.
      early_exit: from `glm_edge.generate.early_exit`; None runs all layers for each token.
      vision_tokens: from `glm_edge.generate.drop_vision_tokens`; None keeps all.
      beyond_context: allows more positions than `max_position_embeddings`, on which the model was
        not trained.

    Returns:
      The tokens, their number in each row, and the scores when asked for.

    Raises:
      DataError: prompts, mask or stop tokens do not fit each other or the model, prompt and answer
        exceed its context, a cache cannot be of that type, or scores are NaN or infinite.
    """
    prompt = Prompt.of(config_of(model), tokens, valid, max_new_tokens, beyond_context)
    inputs = (images, audio, audio_frames)
    state = start(model, params, prompt, *inputs, sampling, rng, cache_dtype, vision_tokens)
    stops = stops_of(model, stop_tokens)
    state = with_first_token(model, state, sampling, stops, early_exit)
    generated, scores, layers, state = decode(
        model,
        params,
        state,
        sampling,
        stops,
        max_new_tokens,
        prompt.room,
        return_logits,
        early_exit,
    )
    _check_scores(jax.device_get(state.finite))
    generated = generated[:, :max_new_tokens]
    lengths = jnp.argmax(jnp.isin(generated, stops), axis=1)
    lengths = jnp.where(state.stopped, lengths, max_new_tokens).astype(jnp.int32)
    scores, layers = (None if x is None else x[:, :max_new_tokens] for x in (scores, layers))
    return Generation(generated, lengths, scores, layers)


def stream(
    model: MultimodalGLM,
    params: Any,
    tokens: Any,
    valid: Any = None,
    images: Images | None = None,
    audio: Array | None = None,
    audio_frames: Array | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] | None = None,
    rng: Array | None = None,
    cache_dtype: Any = jnp.float32,
    early_exit: EarlyExit | None = None,
    vision_tokens: VisionTokens | None = None,
    beyond_context: bool = False,
) -> Iterator[np.ndarray]:
    """Yields what `generate` returns, token by token, and ends when every row has stopped.

    Args:
      model: as in `generate`, like all others.
      params: its parameters.
      tokens: int [B, T].
      valid: bool [B, T].
      images: or None.
      audio: or None.
      audio_frames: or None.
      max_new_tokens: steps at most.
      sampling: how tokens are drawn.
      stop_tokens: token ids that end a row.
      rng: a PRNG key, or [B] keys.
      cache_dtype: type of cached keys and values.
      early_exit: or None.
      vision_tokens: or None.
      beyond_context: allows more positions than the model was trained on.

    Yields:
      int32 [B]; a row that has stopped repeats its stop token.

    Raises:
      DataError: as in `generate`.
    """
    prompt = Prompt.of(config_of(model), tokens, valid, max_new_tokens, beyond_context)
    stops = stops_of(model, stop_tokens)
    inputs = (images, audio, audio_frames)
    state = start(model, params, prompt, *inputs, sampling, rng, cache_dtype, vision_tokens)
    state = with_first_token(model, state, sampling, stops, early_exit)
    for remaining in range(max_new_tokens - 1, -1, -1):
        token, stopped, finite = jax.device_get((state.token, state.stopped, state.finite))
        _check_scores(finite)
        yield token
        if not remaining or stopped.all():
            return
        state = _step(model, params, state, sampling, stops, early_exit)


def greedy(
    model: MultimodalGLM,
    params: Any,
    tokens: Array,
    valid: Array | None = None,
    images: Array | None = None,
    audio: Array | None = None,
    max_new_tokens: int = 16,
) -> Array:
    """Extends prompts by the top-1 token, step by step.

    Args:
      model: whose configuration names the stop tokens.
      params: its parameters, boxed or not.
      tokens: [B, T] prompts.
      valid: bool [B, T], False at padding; None means no padding.
      images: as in `generate`.
      audio: as in `generate`.
      max_new_tokens: tokens to generate.

    Returns:
      int32 [B, max_new_tokens]; after a stop token, a row repeats that stop token.
    """
    return generate(
        model, params, tokens, valid, images, audio, max_new_tokens=max_new_tokens
    ).tokens


def stop_ids(model: MultimodalGLM, stop_tokens: Sequence[int] | None) -> tuple[int, ...]:
    """Returns the tokens that end a row, by default those of the configuration.

    Raises:
      DataError: what is given is not a sequence of the model's tokens.
    """
    if stop_tokens is None:
        return config_of(model).eos_token_ids
    size = config_of(model).decoder.vocab_size
    try:
        stops = tuple(operator.index(token) for token in stop_tokens)
    except TypeError as error:
        raise DataError(f"stop_tokens must be token ids, got {stop_tokens!r:.60}") from error
    if outside := [token for token in stops if not 0 <= token < size]:
        raise DataError(f"stop_tokens: {outside[0]} is not in 0..{size - 1}")
    return stops


def stops_of(model: MultimodalGLM, stop_tokens: Sequence[int] | None) -> Array:
    """Returns `stop_ids` as an array."""
    return jnp.asarray(stop_ids(model, stop_tokens), jnp.int32)


def _check_scores(finite: np.ndarray) -> None:
    if not finite.all():
        raise DataError(
            f"prompt {int(np.argmin(finite))}: the model's scores are NaN or infinite, so no token "
            "is the best; its weights or its inputs are damaged"
        )


def start(
    model,
    params,
    prompt,
    images,
    audio,
    audio_frames,
    sampling,
    rng,
    cache_dtype,
    vision_tokens=None,
) -> DecodeState:
    """Prefills the cache and prepares the state that `sampling` needs."""
    if not isinstance(sampling, Sampling):
        raise DataError(f"sampling must be a Sampling, got {sampling!r:.60}")
    batch = len(prompt.tokens)
    plan = keep = None
    if vision_tokens is not None and images is not None:
        plan, keep = pruning_plan(model.config, prompt, vision_tokens)
    keys = None
    if sampling.uses("temperature"):
        rng = jax.random.key(0) if rng is None else rng
        keys = _row_keys(rng, batch)
    penalized = sampling.uses("repetition_penalty"), sampling.uses("frequency_penalty")
    state, counts = _prefill(
        model,
        params,
        prompt.tokens,
        prompt.valid,
        images,
        audio,
        audio_frames,
        keys,
        prompt.room,
        _cache_dtype(cache_dtype),
        penalized,
        plan,
        keep,
    )
    counts, position = jax.device_get((counts, state.position))
    check_placeholders(counts)
    if prompt.new_tokens is not None:
        check_context(model.config, position + 1, prompt.new_tokens)
    return state


def with_first_token(
    model: MultimodalGLM,
    state: DecodeState,
    sampling: Sampling,
    stops: Array,
    early_exit: EarlyExit | None = None,
) -> DecodeState:
    """Draws the first token, from the prompt's scores after all layers."""
    state = _first(state, sampling, stops)
    if early_exit is None:
        return state
    layers = jnp.full(state.token.shape, model.config.decoder.num_layers, jnp.int32)
    return dataclasses.replace(state, layers=layers)


def _cache_dtype(dtype: Any) -> str:
    """Returns the name of a type that a cache may have."""
    known = ("float32", "bfloat16", "float16", *cache_kernels.LARGEST)
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = None
    if name not in known:
        raise DataError(f"cache_dtype: one of {', '.join(known)}, not {dtype!r}")
    return name


def _row_keys(rng: Array, batch: int) -> Array:
    """Returns one key per row: the given ones, or keys derived from the rows' indices."""
    try:
        if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
            rng = jax.random.wrap_key_data(rng)
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"rng must be a key, as jax.random.key(0), got {rng!r:.60}") from error
    if rng.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(batch))
    if rng.shape != (batch,):
        raise DataError(f"rng must be a key or {batch} keys, one per row, found shape {rng.shape}")
    return rng


@functools.partial(jax.jit, static_argnums=(0, 8, 9, 10, 11))
def _prefill(
    model,
    params,
    tokens,
    valid,
    images,
    audio,
    audio_frames,
    keys,
    room,
    cache_dtype,
    penalized,
    plan,
    keep,
) -> tuple[DecodeState, dict[str, tuple[Array, Array]]]:
    """Fills the cache, scores the token after each row's last valid one, counts placeholders."""
    batch, length = tokens.shape
    run = functools.partial(model.apply, {"params": params})

    def embed(module):
        positions, following = module.start_positions(tokens, valid, images)
        return positions, following, *module.embed_inputs(tokens, images, audio, audio_frames)

    def read(module, x, positions):
        cache = init_cache(model.config.decoder, batch, length, cache_dtype)
        final, _, cache = module.decoder(
            x, positions, prompt_mask(valid, jnp.arange(length)), cache
        )
        return final, valid, cache

    positions, following, x, encoded = run(method=embed)
    if plan is None:
        final, visible, cache = run(x, positions, method=read)
    else:
        placeholder = (tokens == model.config.image_token_id) & valid
        inputs = (x, positions, valid, placeholder)
        final, visible, cache = prefill_pruned(model, params, *inputs, cache_dtype, plan, keep)
    last = jnp.max(jnp.where(visible, jnp.arange(visible.shape[1]), 0), axis=1)
    final = jnp.take_along_axis(final, last[:, None, None], axis=1)
    logits = run(final, method="predict")[:, 0]
    extend = functools.partial(jnp.pad, pad_width=((0, 0), (0, room), (0, 0), (0, 0)))
    cache = {**cache, "layers": jax.tree.map(extend, cache["layers"])}
    vocabulary = jnp.zeros((batch, logits.shape[1]), jnp.int32)
    rows = jnp.arange(batch)[:, None]
    state = DecodeState(
        cache=cache,
        logits=logits.astype(jnp.float32),
        token=jnp.zeros(batch, jnp.int32),
        position=following.astype(jnp.int32) - 1,
        visible=jnp.pad(visible, ((0, 0), (0, room)), constant_values=True),
        stopped=jnp.zeros(batch, bool),
        index=jnp.zeros((), jnp.int32),
        keys=keys,
        in_prompt=vocabulary.at[rows, tokens].max(valid) > 0 if penalized[0] else None,
        counts=vocabulary if any(penalized) else None,
        finite=jnp.ones(batch, bool),
    )
    return state, count_placeholders(model.config, tokens, valid, encoded, audio_frames)


def _choose(state: DecodeState, sampling: Sampling, stops: Array) -> DecodeState:
    """Draws the next token of every row from `state.logits`; a stopped row repeats its token."""
    keys = state.keys
    if keys is not None:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.index)
    token = sample(state.logits, sampling, keys, state.in_prompt, state.counts)
    token = jnp.where(state.stopped, state.token, token)
    finite = state.finite & (state.stopped | jnp.isfinite(state.logits).all(axis=1))
    counts = state.counts
    if counts is not None:
        counts = counts.at[jnp.arange(token.size), token].add(1)
    return dataclasses.replace(
        state,
        token=token,
        position=state.position + 1,
        stopped=state.stopped | jnp.isin(token, stops),
        index=state.index + 1,
        counts=counts,
        finite=finite,
    )


def _advance(
    model: MultimodalGLM,
    params: Any,
    state: DecodeState,
    sampling: Sampling,
    stops: Array,
    early_exit: EarlyExit | None = None,
) -> DecodeState:
    """Feeds the newest token and draws the one after it."""
    token, positions = state.token[:, None], state.position[:, None]
    mask, layers = prompt_mask(state.visible, state.cache["length"][None]), None
    if early_exit is None:
        logits, aux = model.apply(
            {"params": params}, token, positions=positions, mask=mask, cache=state.cache
        )
        logits, cache = logits[:, 0].astype(jnp.float32), aux["cache"]
    else:
        logits, cache, layers = run_until_sure(
            model, params, token, positions, mask, state.cache, early_exit, state.stopped
        )
    state = dataclasses.replace(state, cache=cache, logits=logits, layers=layers)
    return _choose(state, sampling, stops)


_first = jax.jit(_choose, donate_argnums=0)
_step = jax.jit(_advance, static_argnums=0, donate_argnums=2)


@functools.partial(jax.jit, static_argnums=(0, 6, 7), donate_argnums=2)
def decode(
    model, params, state, sampling, stops, limit, room, return_logits, early_exit=None
) -> tuple[Array, Array | None, Array | None, DecodeState]:
    """Decodes until `limit` tokens or all rows have stopped; results are [B, room, ...]."""

    def put(buffer: Array, state: DecodeState, values: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(buffer, values, state.index - 1, axis=1)

    def going(carry: tuple) -> Array:
        state = carry[0]
        return (state.index < limit) & ~state.stopped.all()

    def body(carry: tuple) -> tuple:
        state, generated, scores, layers = carry
        state = _advance(model, params, state, sampling, stops, early_exit)
        scores = put(scores, state, state.logits) if return_logits else None
        layers = None if early_exit is None else put(layers, state, state.layers)
        return state, put(generated, state, state.token), scores, layers

    batch, vocabulary = state.logits.shape
    generated = put(jnp.zeros((batch, room), jnp.int32), state, state.token)
    scores = None
    if return_logits:
        scores = put(jnp.zeros((batch, room, vocabulary)), state, state.logits)
    layers = None
    if early_exit is not None:
        layers = put(jnp.zeros((batch, room), jnp.int32), state, state.layers)
    carry = jax.lax.while_loop(going, body, (state, generated, scores, layers))
    state, generated, scores, layers = carry
    generated = jnp.where(jnp.arange(room) < state.index, generated, state.token[:, None])
    return generated, scores, layers, state
