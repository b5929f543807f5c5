"""Generation: `generate` returns the tokens of a batch, `stream` yields them one by one.

Letters of shapes: `B` rows, `T` tokens of a prompt, `N` generated tokens, `V` vocabulary.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from glm_edge.errors import DataError
from glm_edge.generate import steps
from glm_edge.generate.constraint import Matcher
from glm_edge.generate.options import DecodeOptions
from glm_edge.generate.prompts import Prompt, config_of
from glm_edge.generate.sampling import Sampling
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params
from glm_edge.preprocess.inputs import Inputs

GREEDY = Sampling()
DEFAULTS = DecodeOptions()
# Inputs, or a mapping of the same names, or the tokens of a batch of texts.
ModelInputs = Inputs | Mapping[str, Any] | ArrayLike | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Generation:
    """Result of `generate`.

    Attributes:
      tokens: int32 [B, N]; after its stop token, a row repeats that stop token.
      lengths: int32 [B], number of tokens before the stop token; `N` without one.
      logits: float32 [B, N, V], the scores that each token was drawn from, before any penalty or
        temperature; meaningless after a row's stop token; None unless asked for.
      layers: int32 [B, N], number of decoder layers per token, 0 after a row's stop token; None
        without early exit.
    """

    tokens: Array
    lengths: Array
    logits: Array | None = None
    layers: Array | None = None


def generate(
    model: MultimodalGLM,
    params: Params,
    inputs: ModelInputs,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] | None = None,
    rng: Array | None = None,
    return_logits: bool = False,
    options: DecodeOptions = DEFAULTS,
) -> Generation:
    """Continue a batch of prompts until each row has stopped or has `max_new_tokens`.

    Token `n` of row `b` is drawn with `fold_in(fold_in(rng, b), n)`, or `fold_in(rng[b], n)` when
    `rng` holds one key per row. So the same key gives the same tokens for any other rows, padding
    or length of the run.

        inputs = processor([{"role": "user", "content": "What is on the screen?"}])
        generation = ge.generate.generate(model, params, inputs, max_new_tokens=64)
        text = processor.decode(generation.tokens[0])

    Args:
      model: the model.
      params: its parameters, boxed or not.
      inputs: of a `glm_edge.Processor`; or `glm_edge.preprocess.Inputs(tokens, images=…)`; or a
        mapping of the same names; or int [B, T] tokens without padding.
      max_new_tokens: tokens to generate at most.
      sampling: sampling rules.
      stop_tokens: token ids that end a row; None takes those of the model's configuration.
      rng: a PRNG key, or [B] keys; None is key 0.
      return_logits: also returns the scores.
      options: of the cache and of skipped computation.

    Returns:
      The tokens, their number per row, and the scores when asked for.

    Raises:
      DataError: inputs or stop tokens do not fit each other or the model, prompt and answer exceed
        its context length, or scores are NaN or infinite.
    """
    prompt, state, stops = _begin(
        model, params, inputs, max_new_tokens, sampling, stop_tokens, rng, options
    )
    generated, lengths, scores, layers, state = steps.decode(
        model,
        params,
        state,
        sampling,
        stops,
        max_new_tokens,
        options.early_exit,
        room=prompt.room,
        return_logits=return_logits,
    )
    _check_scores(jax.device_get(state.finite))
    generated = generated[:, :max_new_tokens]
    scores, layers = (None if x is None else x[:, :max_new_tokens] for x in (scores, layers))
    return Generation(generated, lengths, scores, layers)


def stream(
    model: MultimodalGLM,
    params: Params,
    inputs: ModelInputs,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] | None = None,
    rng: Array | None = None,
    options: DecodeOptions = DEFAULTS,
    matchers: Sequence[Matcher] | None = None,
) -> Iterator[np.ndarray]:
    """Yield the tokens of `generate` one by one, and end when every row has stopped.

        matcher = Constraints(tokenizer, eos_token_ids, vocab_size).start(Grammar.json_object())
        for tokens in stream(model, params, inputs, matchers=[matcher]):

    Args:
      model: the model.
      params: its parameters, boxed or not.
      inputs: see `generate`, as are the other arguments.
      max_new_tokens: tokens to generate at most.
      sampling: sampling rules.
      stop_tokens: token ids that end a row.
      rng: a PRNG key, or [B] keys.
      options: of the cache and of skipped computation.
      matchers: constraints of the rows, of `glm_edge.generate.Constraints` with the same stop
        tokens. They accept every token that is yielded.

    Yields:
      int32 [B]; a row that has stopped repeats its stop token.

    Raises:
      DataError: as `generate`; or a grammar exceeds a limit.
    """
    _, state, stops = _begin(
        model, params, inputs, max_new_tokens, sampling, stop_tokens, rng, options, matchers
    )
    for remaining in range(max_new_tokens - 1, -1, -1):
        token, stopped, finite = jax.device_get((state.token, state.stopped, state.finite))
        _check_scores(finite)
        for matcher, accepted in zip(matchers or (), token, strict=False):
            matcher.accept(accepted)
        yield token
        if not remaining or stopped.all():
            return
        allowed = _allowed(matchers, len(token))
        state = steps.step(model, params, state, sampling, stops, options.early_exit, allowed)


def greedy(
    model: MultimodalGLM, params: Params, inputs: ModelInputs, max_new_tokens: int = 16
) -> Array:
    """Extend prompts by the top-1 token, step by step.

    Args:
      model: with the stop tokens in its configuration.
      params: its parameters, boxed or not.
      inputs: see `generate`.
      max_new_tokens: tokens to generate at most.

    Returns:
      int32 [B, max_new_tokens]; after a stop token, a row repeats that stop token.
    """
    return generate(model, params, inputs, max_new_tokens).tokens


def stop_ids(model: MultimodalGLM, stop_tokens: Sequence[int] | None) -> tuple[int, ...]:
    """Return the tokens that end a row, by default those of the configuration.

    Raises:
      DataError: `stop_tokens` are not a sequence of the model's tokens.
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


def _begin(
    model: MultimodalGLM,
    params: Params,
    inputs: ModelInputs,
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: Sequence[int] | None,
    rng: Array | None,
    options: DecodeOptions,
    matchers: Sequence[Matcher] | None = None,
) -> tuple[Prompt, steps.DecodeState, Array]:
    """Run the prefill and draw the first token; return the stop tokens as an array, too."""
    beyond_context = getattr(options, "beyond_context", False)
    prompt = Prompt.of(config_of(model), inputs, max_new_tokens, beyond_context)
    stops = steps.padded_stops(stop_ids(model, stop_tokens))
    state = steps.start(model, params, prompt, sampling, rng, options)
    allowed = _allowed(matchers, len(state.token))
    state = steps.with_first_token(model, state, sampling, stops, options.early_exit, allowed)
    return prompt, state, stops


def _allowed(matchers: Sequence[Matcher] | None, rows: int) -> np.ndarray | None:
    if matchers is None:
        return None
    if len(matchers) != rows:
        raise DataError(f"matchers: {len(matchers)} for {rows} rows")
    return np.stack([matcher.allowed() for matcher in matchers])


def _check_scores(finite: np.ndarray) -> None:
    if not finite.all():
        raise DataError(
            f"prompt {int(np.argmin(finite))}: the model's scores are NaN or infinite, so there is "
            "no top-1 token; its weights or its inputs are damaged"
        )
