"""Sampling with different rules per row, in one compiled program.

`glm_edge.generate.sampling.sample` compiles the rules in use. A service has rows of all rules side
by side, so here every rule is an array. The tokens are those of `sample` with the same keys.

Letters of shapes: `R` rows, `V` vocabulary, `S` tokens of a row's text, `N` biased tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.generate.constraint import mask_logits
from glm_edge.generate.sampling import (
    Sampling,
    keep_min_p,
    nucleus_threshold,
    penalize_repeated,
)

# Biased tokens per row, and log-probabilities per token; the limits of OpenAI's API.
MAX_BIASES = 300
MAX_LOGPROBS = 20
_SIGN = np.uint32(1 << 31)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowRules:
    """Rules of `R` rows; a neutral value switches a rule off.

    Attributes:
      temperature: float32 [R]; 0 takes the top-1 token.
      top_k: int32 [R]; 0 is off.
      top_p: float32 [R]; 1 is off.
      min_p: float32 [R]; 0 is off.
      repetition: float32 [R], repetition penalty; 1 is off.
      frequency: float32 [R], frequency penalty; 0 is off.
      presence: float32 [R], presence penalty; 0 is off.
      bias_tokens: int32 [R, N]; unused places hold a token beyond the vocabulary.
      biases: float32 [R, N].
    """

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition: Any
    frequency: Any
    presence: Any
    bias_tokens: Any
    biases: Any

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> "RowRules":
        """Collect the rules of rows in arrays.

        Args:
          samplings: one per row, with at most `MAX_BIASES` biases each.
        """

        def values_of(field: str, neutral: float, dtype: Any = np.float32) -> np.ndarray:
            values = (getattr(sampling, field) for sampling in samplings)
            return np.array([neutral if v is None else v for v in values], dtype)

        tokens = np.full((len(samplings), MAX_BIASES), np.iinfo(np.int32).max, np.int32)
        biases = np.zeros(tokens.shape, np.float32)
        for row, sampling in enumerate(samplings):
            for column, (token, value) in enumerate(dict(sampling.logit_bias).items()):
                tokens[row, column], biases[row, column] = token, value
        return cls(
            temperature=values_of("temperature", 0),
            top_k=values_of("top_k", 0, np.int32),
            top_p=values_of("top_p", 1),
            min_p=values_of("min_p", 0),
            repetition=values_of("repetition_penalty", 1),
            frequency=values_of("frequency_penalty", 0),
            presence=values_of("presence_penalty", 0),
            bias_tokens=tokens,
            biases=biases,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowText:
    """The text of `R` rows before the next token, which penalties and keys depend on.

    Attributes:
      tokens: int32 [R, S], prompt, then generated tokens.
      prompt_lengths: int32 [R].
      lengths: int32 [R], prompt and generated tokens.
      seeds: uint32 [R], seed of each row.
      allowed: uint32 [R, ceil(V / 32)], bits of the tokens that may be drawn; all ones for rows
        without a constraint.
    """

    tokens: Any
    prompt_lengths: Any
    lengths: Any
    seeds: Any
    allowed: Any


class Drawn(NamedTuple):
    """Tokens of `R` rows and their log-probabilities.

    Attributes:
      tokens: int32 [R].
      logprobs: float32 [R], log-probability of each token before any rule.
      top_tokens: int32 [R, MAX_LOGPROBS], most probable tokens before any rule.
      top_logprobs: float32 [R, MAX_LOGPROBS].
      finite: bool [R], False where scores are NaN or infinite.
    """

    tokens: Any
    logprobs: Any
    top_tokens: Any
    top_logprobs: Any
    finite: Any


def row_key(seed: Array) -> Array:
    """Return the key of a row, which `generate` derives for its first row from the same seed."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def draw_rows(logits: Array, rules: RowRules, text: RowText, want_logprobs: Array) -> Drawn:
    """Draw the next token of each row.

    Args:
      logits: [R, V].
      rules: of the rows.
      text: of the rows.
      want_logprobs: bool scalar; False leaves the log-probabilities zero, which saves time.

    Returns:
      The tokens with their log-probabilities.
    """
    raw = logits.astype(jnp.float32)
    scores = _apply_bias(raw, rules)
    penalized = (rules.repetition != 1) | (rules.frequency != 0) | (rules.presence != 0)
    scores = jax.lax.cond(
        penalized.any(),
        lambda scores: _penalize(scores, rules, text),
        lambda scores: scores,
        scores,
    )
    scores = mask_logits(scores, text.allowed)
    greedy = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    tokens = jax.lax.cond(
        (rules.temperature > 0).any(), lambda: _draw(scores, rules, text, greedy), lambda: greedy
    )
    zeros = jnp.zeros((len(raw), min(MAX_LOGPROBS, raw.shape[1])))
    logprobs = jax.lax.cond(
        want_logprobs,
        lambda: _logprobs(raw, tokens, zeros.shape[1]),
        lambda: (zeros[:, 0], zeros.astype(jnp.int32), zeros),
    )
    drawn, top_tokens, top = logprobs
    return Drawn(tokens, drawn, top_tokens, top, jnp.isfinite(raw).all(axis=1))


def _apply_bias(scores: Array, rules: RowRules) -> Array:
    rows = jnp.arange(len(scores))[:, None]
    return jax.lax.cond(
        (rules.biases != 0).any(),
        lambda: scores.at[rows, rules.bias_tokens].add(rules.biases, mode="drop"),
        lambda: scores,
    )


def _penalize(scores: Array, rules: RowRules, text: RowText) -> Array:
    index = jnp.arange(text.tokens.shape[1])
    written = index < text.lengths[:, None]
    generated = written & (index >= text.prompt_lengths[:, None])
    rows = jnp.arange(len(scores))[:, None]
    counts = jnp.zeros(scores.shape, jnp.int32)
    repeated = counts.at[rows, text.tokens].max(written.astype(jnp.int32)) > 0
    counts = counts.at[rows, text.tokens].add(generated.astype(jnp.int32))
    scores = penalize_repeated(scores, repeated, rules.repetition[:, None])
    scores = scores - rules.frequency[:, None] * counts
    return scores - rules.presence[:, None] * (counts > 0)


def _draw(scores: Array, rules: RowRules, text: RowText, greedy: Array) -> Array:
    """Draw from rows with a temperature; the others take their top-1 token."""
    hot = rules.temperature > 0
    scores = scores / jnp.where(hot, rules.temperature, 1)[:, None]
    scores = jax.lax.cond(
        (rules.top_k > 0).any(),
        lambda scores: _keep_top_k(scores, rules.top_k),
        lambda s: s,
        scores,
    )

    def keep_nucleus(scores: Array) -> Array:
        probabilities = jax.nn.softmax(scores, axis=-1)
        least = nucleus_threshold(probabilities, rules.top_p[:, None])
        cut = (probabilities < least) & (rules.top_p < 1)[:, None]
        return jnp.where(cut, -jnp.inf, scores)

    scores = jax.lax.cond((rules.top_p < 1).any(), keep_nucleus, lambda s: s, scores)
    scores = jax.lax.cond(
        (rules.min_p > 0).any(), lambda s: keep_min_p(s, rules.min_p[:, None]), lambda s: s, scores
    )
    index = text.lengths - text.prompt_lengths
    keys = jax.vmap(jax.random.fold_in)(jax.vmap(row_key)(text.seeds), index)
    drawn = jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)
    return jnp.where(hot, drawn, greedy)


def _keep_top_k(scores: Array, top_k: Array) -> Array:
    """Set all but the `top_k` largest scores of each row, and ties with the last, to -inf."""
    # Floats in the order of unsigned integers: negative ones flipped, the sign bit of others set.
    # Adding zero makes -0 equal to 0.
    bits = jax.lax.bitcast_convert_type(scores + 0.0, jnp.uint32)
    ordered = jnp.where(bits >= _SIGN, ~bits, bits | _SIGN)
    wanted = jnp.where(top_k > 0, jnp.minimum(top_k, scores.shape[1]), scores.shape[1])[:, None]

    def halve(step: Array, threshold: Array) -> Array:
        candidate = threshold | (_SIGN >> step.astype(jnp.uint32))
        enough = jnp.sum(ordered >= candidate, axis=-1, keepdims=True) >= wanted
        return jnp.where(enough, candidate, threshold)

    threshold = jax.lax.fori_loop(0, 32, halve, jnp.zeros((len(scores), 1), jnp.uint32))
    return jnp.where(ordered < threshold, -jnp.inf, scores)


def _logprobs(raw: Array, tokens: Array, count: int) -> tuple[Array, Array, Array]:
    logprobs = jax.nn.log_softmax(raw, axis=-1)
    top, top_tokens = jax.lax.top_k(logprobs, count)
    drawn = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
    return drawn, top_tokens.astype(jnp.int32), top
