"""Interpolated modified Kneser-Ney n-gram models, exact, in vectorised numpy.

Letters: `V` vocabulary, `n` order, `T` tokens, `G` distinct n-grams of one order. An n-gram's key
is `id of its first n - 1 tokens * V + its last token`, which is exact in int64 for any order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glm_edge.errors import DataError

UNKNOWN = -1
# Used where a text is too small to estimate its own.
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)


@dataclass(frozen=True)
class _Level:
    """The n-grams of one order.

    Attributes:
      keys: int64 [G], sorted; an n-gram's id is its place here.
      kept: float64 [G], the count less its discount, over its context's count.
      backoff: float64 [G of the order below], weight of the lower order after each context;
        one where the context was never followed by anything.
    """

    keys: np.ndarray
    kept: np.ndarray
    backoff: np.ndarray

    def ids(self, context_ids: np.ndarray, tokens: np.ndarray, vocab_size: int) -> np.ndarray:
        """Ids of n-grams, `UNKNOWN` where never seen."""
        wanted = context_ids.astype(np.int64) * vocab_size + tokens
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where((context_ids >= 0) & (self.keys[place] == wanted), place, UNKNOWN)


@dataclass(frozen=True)
class KneserNey:
    """A trained model; make one with `train`.

    Every order `k` gives `p_k(w | h) = (c(h w) - D(c)) / c(h) + b(h) p_{k-1}(w | h')`, where `h'`
    is `h` without its first token, `c` counts occurrences in the highest order and distinct left
    neighbours below it, `D` has one value each for counts of 1, 2 and more, `b(h)` is the mass that
    the discounts freed, and `p_0 = 1 / V`. After a context never seen, `p_k = p_{k-1}`.

    Attributes:
      vocab_size: `V`.
      levels: orders 1 to n.
      discounts: float64 [n, 3], for counts 1, 2 and 3 or more.

    References:
      Kneser and Ney, Improved backing-off for m-gram language modeling (1995).
      Chen and Goodman, An empirical study of smoothing techniques for language modeling (1999).
    """

    vocab_size: int
    levels: tuple[_Level, ...]
    discounts: np.ndarray

    @property
    def order(self) -> int:
        """Tokens of the longest n-gram."""
        return len(self.levels)

    def log_probs(self, tokens: np.ndarray) -> np.ndarray:
        """Scores a token stream, each token after up to n - 1 tokens before it in the stream.

        Args:
          tokens: int [T].

        Returns:
          float64 [T], natural logarithms of probabilities; the first token has no context.

        Raises:
          DataError: a token lies outside the vocabulary.
        """
        tokens = _checked(tokens, self.vocab_size)
        probability = np.full(len(tokens), 1.0 / self.vocab_size)
        contexts = np.zeros(len(tokens), np.int64)
        for order, level in enumerate(self.levels, start=1):
            # Row i scores token i + order - 1 after the n-gram of order - 1 that begins at i.
            last = tokens[order - 1 :]
            contexts = contexts[: len(last)]
            found = level.ids(contexts, last, self.vocab_size)
            backoff = np.where(contexts >= 0, level.backoff[contexts], 1.0)
            kept = np.where(found >= 0, level.kept[found], 0.0)
            probability[order - 1 :] = kept + backoff * probability[order - 1 :]
            contexts = found
        return np.log(probability)

    def distribution(self, context: Sequence[int]) -> np.ndarray:
        """Probabilities of every next token.

        Args:
          context: the tokens before it; only the last n - 1 count.

        Returns:
          float64 [V], summing to one.

        Raises:
          DataError: a token lies outside the vocabulary.
        """
        context = _checked(context, self.vocab_size)
        probability = np.full(self.vocab_size, 1.0 / self.vocab_size)
        for order, level in enumerate(self.levels[: len(context) + 1], start=1):
            at = np.zeros(1, np.int64)
            suffix = context[len(context) - order + 1 :]
            for lower, token in zip(self.levels, suffix, strict=False):
                at = lower.ids(at, token, self.vocab_size)
            if at[0] == UNKNOWN:
                break
            bounds = at[0] * self.vocab_size + np.array([0, self.vocab_size])
            first, end = np.searchsorted(level.keys, bounds)
            probability *= level.backoff[at[0]]
            probability[level.keys[first:end] % self.vocab_size] += level.kept[first:end]
        return probability


def train(tokens: np.ndarray, vocab_size: int, order: int = 5) -> KneserNey:
    """Counts and smooths the n-grams of a token stream.

    The stream is one document: n-grams run across paragraphs, and no boundary marks are added.

    Args:
      tokens: int [T].
      vocab_size: `V`.
      order: `n`, at least 1.

    Returns:
      The model.

    Raises:
      DataError: a token lies outside the vocabulary, or the stream is shorter than `order`.
    """
    tokens = _checked(tokens, vocab_size)
    if order < 1 or len(tokens) < order:
        raise DataError(f"n-gram model: {len(tokens)} tokens are too few for order {order}")
    ids = [np.zeros(len(tokens) + 1, np.int64)]
    keys, firsts, counts = [], [], None
    for k in range(order):
        last = tokens[k:]
        found, first, inverse, counts = np.unique(
            ids[-1][: len(last)] * vocab_size + last,
            return_index=True,
            return_inverse=True,
            return_counts=True,
        )
        keys.append(found)
        firsts.append(first)
        ids.append(inverse)
    levels, discounts = [], []
    for k in reversed(range(order)):
        if k < order - 1:
            counts = np.bincount(ids[k + 1][firsts[k + 1] + 1], minlength=len(keys[k]))
        discounts.append(_discounts(counts))
        num_contexts = len(keys[k - 1]) if k else 1
        levels.append(_smooth(keys[k], counts, discounts[-1], num_contexts, vocab_size))
    return KneserNey(vocab_size, tuple(reversed(levels)), np.array(discounts[::-1]))


def _smooth(
    keys: np.ndarray, counts: np.ndarray, discounts: np.ndarray, num_contexts: int, vocab_size: int
) -> _Level:
    contexts = keys // vocab_size
    freed = np.concatenate([[0.0], discounts])[np.minimum(counts, 3)]
    totals = np.bincount(contexts, counts, minlength=num_contexts)
    seen = totals > 0
    mass = np.bincount(contexts, freed, minlength=num_contexts)
    backoff = np.where(seen, mass / np.maximum(totals, 1.0), 1.0)
    kept = np.where(seen[contexts], (counts - freed) / np.maximum(totals[contexts], 1.0), 0.0)
    return _Level(keys, kept, backoff)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Chen and Goodman's estimates for counts of 1, 2 and 3 or more."""
    n1, n2, n3, n4 = np.bincount(np.minimum(counts, 5), minlength=6)[1:5]
    if min(n1, n2, n3, n4) == 0:
        return np.array(FALLBACK_DISCOUNTS)
    y = n1 / (n1 + 2 * n2)
    estimates = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    usable = np.all(estimates >= 0) and np.all(estimates <= [1, 2, 3])
    return estimates if usable else np.array(FALLBACK_DISCOUNTS)


def _checked(tokens: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    tokens = np.asarray(tokens, np.int64)
    if len(tokens) and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise DataError(
            f"n-gram model: token ids {tokens.min()} to {tokens.max()} do not fit a vocabulary "
            f"of {vocab_size}; use the tokenizer that the model was trained with"
        )
    return tokens
