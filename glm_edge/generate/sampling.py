"""Sampling of the next token: bias, penalties, temperature, top-k, top-p, min-p.

Letters of shapes: `B` rows, `V` vocabulary.
"""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.errors import ConfigError

_NEUTRAL = {
    "temperature": 0.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}
_OPTIONAL = ("top_k", "top_p", "min_p")


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Sampling:
    """Sampling rules; the defaults take the top-1 token.

    Rules apply in this order: bias, penalties, temperature, top-k, top-p, min-p. A `Sampling` is a
    pytree whose leaves are the values of the rules in use. A jitted function recompiles when a rule
    is switched on or off, or when `top_k` or the tokens of `logit_bias` change, but not for another
    temperature.

    Attributes:
      temperature: divisor of the scores; 0 takes the top-1 token.
      top_k: number of most likely tokens that may be drawn; ties with the last one may be, too.
      top_p: mass of the smallest set of most likely tokens that may be drawn, at least one; ties
        with the last one may be, too.
      repetition_penalty: divisor of positive scores, and factor of negative ones, of tokens in the
        prompt or the generated text.
      frequency_penalty: value subtracted from a token's score per time that it was generated.
      presence_penalty: value subtracted from a token's score once it was generated.
      min_p: least probability of a token that may be drawn, as a fraction of the largest.
      logit_bias: values added to the scores of tokens, by token id; kept as pairs in order of ids.

    Raises:
      ConfigError: a value is outside its range.

    References:
      CTRL (repetition penalty), https://arxiv.org/abs/1909.05858.
      The Curious Case of Neural Text Degeneration (top-p), https://arxiv.org/abs/1904.09751.
      Turning Up the Heat: Min-p Sampling, https://arxiv.org/abs/2407.01082.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_p: float | None = None
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        kinds: dict[str, Callable[[Any], float]] = dict.fromkeys(_NEUTRAL, float)
        for field, of_type in {**kinds, "top_k": operator.index}.items():
            value = getattr(self, field)
            try:
                converted = None if value is None and field in _OPTIONAL else of_type(value)
            except (TypeError, ValueError):
                self._require(field, False, "an integer" if field == "top_k" else "a number")
            object.__setattr__(self, field, converted)
        self._require("temperature", 0 <= self.temperature < math.inf, "a number from 0")
        self._require("top_k", self.top_k is None or self.top_k > 0, "None or an integer from 1")
        self._require("top_p", self.top_p is None or 0 < self.top_p <= 1, "None or in (0, 1]")
        self._require("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0")
        for field in ("frequency_penalty", "presence_penalty"):
            self._require(field, math.isfinite(getattr(self, field)), "a finite number")
        self._require("min_p", self.min_p is None or 0 <= self.min_p <= 1, "None or in [0, 1]")
        object.__setattr__(self, "logit_bias", self._bias_pairs())

    def _bias_pairs(self) -> tuple[tuple[int, float], ...]:
        try:
            pairs = dict(self.logit_bias).items()
            bias = tuple(sorted((operator.index(token), float(value)) for token, value in pairs))
        except (TypeError, ValueError):
            bias = ((-1, 0.0),)
        holds = all(token >= 0 and math.isfinite(value) for token, value in bias)
        self._require("logit_bias", holds, "a mapping from token ids to finite numbers")
        return bias

    def _require(self, field: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"sampling: {field} must be {expected}, got {getattr(self, field)!r}")

    def uses(self, field: str) -> bool:
        """Test whether a rule changes scores; static while tracing."""
        value = getattr(self, field)
        return value is not None and not (isinstance(value, float) and value == _NEUTRAL[field])

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return the values of the rules in use; and `top_k` and the tokens of `logit_bias`."""
        values = (getattr(self, f) if self.uses(f) else None for f in _NEUTRAL)
        tokens, biases = zip(*self.logit_bias, strict=True) if self.logit_bias else ((), ())
        return (*values, tuple(biases)), (self.top_k, tokens)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], values: tuple[Any, ...]) -> "Sampling":
        """Rebuild without validation: values may be tracers."""
        rebuilt = object.__new__(cls)
        top_k, tokens = static
        *rules, biases = values
        object.__setattr__(rebuilt, "top_k", top_k)
        object.__setattr__(rebuilt, "logit_bias", tuple(zip(tokens, biases, strict=True)))
        for (field, neutral), value in zip(_NEUTRAL.items(), rules, strict=True):
            object.__setattr__(rebuilt, field, neutral if value is None else value)
        return rebuilt


def process_logits(
    logits: Array, sampling: Sampling, in_prompt: Array | None = None, counts: Array | None = None
) -> Array:
    """Apply the rules to scores.

    Args:
      logits: [B, V].
      sampling: the rules.
      in_prompt: bool [B, V], True for tokens of the prompt; needed by `repetition_penalty`.
      counts: int [B, V], number of times each token was generated; needed by all penalties.

    Returns:
      float32 [B, V]; -inf where a token may not be drawn.
    """
    logits = logits.astype(jnp.float32)
    if sampling.logit_bias:
        tokens, values = zip(*sampling.logit_bias, strict=True)
        logits = logits.at[:, np.array(tokens)].add(jnp.array(values, jnp.float32), mode="drop")
    if sampling.uses("repetition_penalty"):
        repeated = jnp.asarray(in_prompt) | (jnp.asarray(counts) > 0)
        logits = penalize_repeated(logits, repeated, sampling.repetition_penalty)
    if sampling.uses("frequency_penalty"):
        logits = logits - sampling.frequency_penalty * jnp.asarray(counts)
    if sampling.uses("presence_penalty"):
        logits = logits - sampling.presence_penalty * (jnp.asarray(counts) > 0)
    if not sampling.uses("temperature"):
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        top_logits = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0]
        logits = jnp.where(logits < top_logits[:, -1:], -jnp.inf, logits)
    if sampling.uses("top_p") and sampling.top_p is not None:
        probabilities = jax.nn.softmax(logits, axis=-1)
        least = nucleus_threshold(probabilities, sampling.top_p)
        logits = jnp.where(probabilities < least, -jnp.inf, logits)
    if sampling.uses("min_p") and sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def penalize_repeated(logits: Array, repeated: Array, penalty: Array | float) -> Array:
    """Divide positive scores of repeated tokens by a penalty, and multiply negative ones by it.

    Args:
      logits: float32 [B, V].
      repeated: bool [B, V], True for tokens of the prompt or the generated text.
      penalty: scalar or [B, 1].

    Returns:
      float32 [B, V].
    """
    return jnp.where(repeated, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_min_p(logits: Array, min_p: Array | float) -> Array:
    """Set scores of tokens to -inf that are less probable than `min_p` times the most probable.

    Args:
      logits: float32 [B, V].
      min_p: scalar or [B, 1].

    Returns:
      float32 [B, V].
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    least = min_p * probabilities.max(axis=-1, keepdims=True)
    return jnp.where(probabilities < least, -jnp.inf, logits)


def nucleus_threshold(probabilities: Array, top_p: Array | float) -> Array:
    """Find the largest probability at or above which tokens sum to at least `top_p`.

    Args:
      probabilities: float32 [B, V].
      top_p: the least sum.

    Returns:
      float32 [B, 1].
    """
    # Non-negative floats are ordered as their bits, so 31 bisections of the bits are exact. On a
    # CPU this is 30 times faster than sorting a vocabulary of 59,264.
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)

    def halve(step: Array, threshold: Array) -> Array:
        candidate = threshold | (1 << (30 - step))
        mass = jnp.sum(jnp.where(bits >= candidate, probabilities, 0.0), axis=-1, keepdims=True)
        return jnp.where(mass >= top_p, candidate, threshold)

    start = jnp.zeros((probabilities.shape[0], 1), jnp.int32)
    threshold = jax.lax.fori_loop(0, 31, halve, start)
    threshold = jax.lax.bitcast_convert_type(threshold, jnp.float32)
    return jnp.minimum(threshold, probabilities.max(axis=-1, keepdims=True))


def sample(
    logits: Array,
    sampling: Sampling,
    keys: Array | None = None,
    in_prompt: Array | None = None,
    counts: Array | None = None,
) -> Array:
    """Draw a token for each row.

    Args:
      logits: [B, V].
      sampling: the rules.
      keys: [B] PRNG keys; not needed at temperature 0.
      in_prompt: as in `process_logits`.
      counts: as in `process_logits`.

    Returns:
      int32 [B].
    """
    processed = process_logits(logits, sampling, in_prompt, counts)
    if not sampling.uses("temperature"):
        return jnp.argmax(processed, axis=-1).astype(jnp.int32)
    draw: Callable[..., Array] = jax.vmap(jax.random.categorical)
    return draw(keys, processed).astype(jnp.int32)
