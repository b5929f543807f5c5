"""Compiled steps of generation: one prefill, then one step per token, with a static-shape cache.

Letters of shapes: `B` rows, `T` tokens of a prompt, `S` cache slots, `V` vocabulary.

A prompt takes the first slots of the cache, padding included; generated tokens take the slots
after. Lengths are rounded up (`bucket`), so that few of them compile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.errors import DataError
from glm_edge.generate.constraint import mask_logits
from glm_edge.generate.early_exit import EarlyExit, run_until_sure
from glm_edge.generate.options import DecodeOptions
from glm_edge.generate.prompts import (
    Prompt,
    check_context,
    check_placeholders,
    count_placeholders,
    prompt_mask,
)
from glm_edge.generate.sampling import Sampling, sample
from glm_edge.generate.token_pruning import PruningPlan, prefill_pruned, pruning_plan
from glm_edge.models.glm import init_cache
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params
from glm_edge.preprocess.inputs import Inputs


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
      index: int32, number of generated tokens.
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


def start(
    model: MultimodalGLM,
    params: Params,
    prompt: Prompt,
    sampling: Sampling,
    rng: Array | None,
    options: DecodeOptions,
) -> DecodeState:
    """Prefill the cache and prepare the state that `sampling` needs.

    Args:
      model: a GLM.
      params: its parameters.
      prompt: of all rows.
      sampling: sampling rules.
      rng: a PRNG key, or [B] keys; None is key 0.
      options: of the cache.

    Raises:
      DataError: an option has another type, placeholders do not match the features, or the prompt
        and its answer exceed the context length.
    """
    for name, value, kind in (
        ("sampling", sampling, Sampling),
        ("options", options, DecodeOptions),
    ):
        if not isinstance(value, kind):
            raise DataError(f"{name} must be a {kind.__name__}, got {value!r:.60}")
    inputs, plan, keep = prompt.inputs, None, None
    if options.vision_tokens is not None and inputs.images is not None:
        plan, keep = pruning_plan(model.config, inputs, options.vision_tokens)
    keys = None
    if sampling.uses("temperature"):
        rng = jax.random.key(0) if rng is None else rng
        keys = _row_keys(rng, len(inputs.tokens))
    state, counts = _prefill(
        model,
        params,
        inputs,
        keys,
        keep,
        room=prompt.room,
        cache_dtype=options.cache_dtype,
        penalized=(
            sampling.uses("repetition_penalty"),
            sampling.uses("frequency_penalty") or sampling.uses("presence_penalty"),
        ),
        plan=plan,
    )
    counts, position = jax.device_get((counts, state.position))
    check_placeholders(counts)
    if prompt.new_tokens is not None:
        check_context(model.config, position + 1, prompt.new_tokens)
    return state


_fold_each = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))


def padded_stops(ids: Sequence[int]) -> Array:
    """Pad stop tokens to a multiple of 8 with -1, which no token equals, so that few compile."""
    width = max(8, -(-len(ids) // 8) * 8)
    return jax.device_put(np.array([*ids, *[-1] * (width - len(ids))], np.int32))


def _row_keys(rng: Array, batch: int) -> Array:
    """Return the given keys of the rows, or derive them from the rows' indices."""
    try:
        if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
            rng = jax.random.wrap_key_data(rng)
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"rng must be a key, as jax.random.key(0), got {rng!r:.60}") from error
    if rng.ndim == 0:
        return _fold_each(rng, np.arange(batch))
    if rng.shape != (batch,):
        raise DataError(f"rng must be a key or {batch} keys, one per row, found shape {rng.shape}")
    return rng


@functools.partial(jax.jit, static_argnames=("model", "room", "cache_dtype", "penalized", "plan"))
def _prefill(
    model: MultimodalGLM,
    params: Params,
    inputs: Inputs,
    keys: Array | None,
    keep: Any,
    *,
    room: int,
    cache_dtype: str,
    penalized: tuple[bool, bool],
    plan: PruningPlan | None,
) -> tuple[DecodeState, dict[str, tuple[Array, Array]]]:
    """Fill the cache, score the token after each row's last valid one, count placeholders."""
    tokens, valid = inputs.tokens, inputs.valid
    batch, length = tokens.shape
    run: Callable[..., Any] = functools.partial(model.apply, {"params": params})

    def embed(module: Any) -> tuple[Any, ...]:
        positions, following = module.start_positions(tokens, valid, inputs.images)
        sound = inputs.audio, inputs.audio_frames
        return positions, following, *module.embed_inputs(tokens, inputs.images, *sound)

    def read(module: Any, x: Array, positions: Array) -> tuple[Array, Array, Any]:
        cache = init_cache(model.config.decoder, batch, length, cache_dtype)
        mask = prompt_mask(valid, jnp.arange(length))
        final, _, cache = module.decoder(x, positions, mask, cache)
        return final, valid, cache

    positions, following, x, encoded = run(method=embed)
    if plan is None:
        final, visible, cache = run(x, positions, method=read)
    else:
        placeholder = (tokens == model.config.image_token_id) & valid
        embedded = (x, positions, valid, placeholder)
        final, visible, cache = prefill_pruned(model, params, *embedded, cache_dtype, plan, keep)
    # Padding may be anywhere, so the last valid token of a row need not be in the last column.
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
    return state, count_placeholders(model.config, inputs, encoded)


def with_first_token(
    model: MultimodalGLM,
    state: DecodeState,
    sampling: Sampling,
    stops: Array,
    early_exit: EarlyExit | None = None,
    allowed: np.ndarray | None = None,
) -> DecodeState:
    """Draw the first token, from the prompt's scores after all layers.

    `allowed` are rows of `glm_edge.generate.Matcher.allowed`, or None.
    """
    state = _first(state, sampling, stops, allowed)
    if early_exit is None:
        return state
    layers = jnp.full(state.token.shape, model.config.decoder.num_layers, jnp.int32)
    return dataclasses.replace(state, layers=layers)


def _choose(
    state: DecodeState, sampling: Sampling, stops: Array, allowed: Array | None = None
) -> DecodeState:
    """Draw the next token of every row from `state.logits`; a stopped row repeats its token."""
    keys = state.keys
    if keys is not None:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.index)
    logits = state.logits if allowed is None else mask_logits(state.logits, allowed)
    token = sample(logits, sampling, keys, state.in_prompt, state.counts)
    token = jnp.where(state.stopped, state.token, token)
    finite = state.stopped | jnp.isfinite(state.logits).all(axis=1)
    finite = finite if state.finite is None else state.finite & finite
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
    params: Params,
    state: DecodeState,
    sampling: Sampling,
    stops: Array,
    early_exit: EarlyExit | None = None,
    allowed: Array | None = None,
) -> DecodeState:
    """Feed the newest token and draw the next one."""
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
    return _choose(state, sampling, stops, allowed)


# The state's buffers are reused, so that a step copies no cache.
_first = jax.jit(_choose, donate_argnames="state")
step = jax.jit(_advance, static_argnames="model", donate_argnames="state")


@functools.partial(
    jax.jit, static_argnames=("model", "room", "return_logits"), donate_argnames="state"
)
def decode(
    model: MultimodalGLM,
    params: Params,
    state: DecodeState,
    sampling: Sampling,
    stops: Array,
    limit: int,
    early_exit: EarlyExit | None = None,
    *,
    room: int,
    return_logits: bool = False,
) -> tuple[Array, Array, Array | None, Array | None, DecodeState]:
    """Decode until `limit` tokens or all rows have stopped.

    Returns:
      `(tokens, lengths, logits, layers, state)`: lengths are int32 [B], tokens before a row's stop
      token or `limit`; the arrays of tokens are [B, room, ...]; logits and layers are None unless
      asked for.
    """

    def put(buffer: Array, state: DecodeState, values: Array | None) -> Array:
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
    lengths = jnp.argmax(jnp.isin(generated, stops), axis=1)
    lengths = jnp.where(state.stopped, lengths, limit).astype(jnp.int32)
    return generated, lengths, scores, layers, state
