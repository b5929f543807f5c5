"""Sampling of the next token: penalties, temperature, top-k, top-p.

Letters of shapes: `B` rows, `V` vocabulary.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.errors import ConfigError

_NEUTRAL = {
    "temperature": 0.0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
}


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Sampling:
    """Sampling rules; the defaults take the top-1 token.

    Rules apply in this order: penalties, temperature, top-k, top-p. A `Sampling` is a pytree whose
    leaves are the values of the rules in use. A jitted function recompiles when a rule is switched
    on or off or `top_k` changes, but not for another temperature.

    Attributes:
      temperature: divisor of the scores; 0 takes the top-1 token.
      top_k: number of most likely tokens that may be drawn; ties with the last one may be, too.
      top_p: mass of the smallest set of most likely tokens that may be drawn, at least one; ties
        with the last one may be, too.
      repetition_penalty: divisor of positive scores, and factor of negative ones, of tokens in the
        prompt or the generated text.
      frequency_penalty: value subtracted from a token's score per time that it was generated.

    Raises:
      ConfigError: a value is outside its range.

    References:
      CTRL (repetition penalty), https://arxiv.org/abs/1909.05858.
      The Curious Case of Neural Text Degeneration (top-p), https://arxiv.org/abs/1904.09751.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        kinds: dict[str, Callable[[Any], float]] = dict.fromkeys(_NEUTRAL, float)
        for field, of_type in {**kinds, "top_k": operator.index}.items():
            value = getattr(self, field)
            try:
                converted = None if value is None and field.startswith("top") else of_type(value)
            except (TypeError, ValueError):
                self._require(field, False, "an integer" if field == "top_k" else "a number")
            object.__setattr__(self, field, converted)
        self._require("temperature", 0 <= self.temperature < math.inf, "a number from 0")
        self._require("top_k", self.top_k is None or self.top_k > 0, "None or an integer from 1")
        self._require("top_p", self.top_p is None or 0 < self.top_p <= 1, "None or in (0, 1]")
        self._require("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0")
        self._require("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number")

    def _require(self, field: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"sampling: {field} must be {expected}, got {getattr(self, field)!r}")

    def uses(self, field: str) -> bool:
        """Test whether a rule changes scores; static while tracing."""
        value = getattr(self, field)
        return value is not None and not (isinstance(value, float) and value == _NEUTRAL[field])

    def tree_flatten(self) -> tuple[tuple[Any, ...], int | None]:
        """Return the values of the rules in use, and `top_k`."""
        values = (getattr(self, f) if self.uses(f) else None for f in _NEUTRAL)
        return tuple(values), self.top_k

    @classmethod
    def tree_unflatten(cls, top_k: int | None, values: tuple[Any, ...]) -> "Sampling":
        """Rebuild without validation: values may be tracers."""
        rebuilt = object.__new__(cls)
        object.__setattr__(rebuilt, "top_k", top_k)
        for (field, neutral), value in zip(_NEUTRAL.items(), values, strict=True):
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
      counts: int [B, V], number of times each token was generated; needed by both penalties.

    Returns:
      float32 [B, V]; -inf where a token may not be drawn.
    """
    logits = logits.astype(jnp.float32)
    if sampling.uses("repetition_penalty"):
        penalty = sampling.repetition_penalty
        penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
        repeated = jnp.asarray(in_prompt) | (jnp.asarray(counts) > 0)
        logits = jnp.where(repeated, penalized, logits)
    if sampling.uses("frequency_penalty"):
        logits = logits - sampling.frequency_penalty * jnp.asarray(counts)
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
    return logits


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
