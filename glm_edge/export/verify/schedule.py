"""Splits of a run of tokens into calls of signatures with fixed token counts."""

import functools
from collections.abc import Iterable

from glm_edge.errors import DataError

# A call reads all weights, which takes as long as the arithmetic of about this many tokens, with
# int8 weights on a CPU. Other formats and processors differ, but the order of splits hardly does.
CALL_TOKENS = 7

# First slot, last slot plus one, and token count of the signature.
Call = tuple[int, int, int]


def split(
    start: int, end: int, slots: int, lengths: Iterable[int], call_tokens: int = CALL_TOKENS
) -> list[Call]:
    """Split slots into calls that take the least time; the last one may be padded.

    Args:
      start: slot of the first token.
      end: slot of the last token plus one.
      slots: number of cache slots.
      lengths: token counts of the signatures, including one.
      call_tokens: time of a call without its tokens, in that of a token.

    Returns:
      The calls in their order.

    Raises:
      DataError: the tokens do not fit the cache.
    """
    if end > slots:
        raise DataError(f"{end} tokens do not fit the {slots} slots of the cache")
    sizes = end - start, slots - end, tuple(sorted(lengths))
    calls, first_lengths = [], _first_lengths(*sizes, call_tokens)
    while start < end:
        length = first_lengths[end - start]
        calls.append((start, min(end, start + length), length))
        start += length
    return calls


def split_with_logits(
    start: int, end: int, slots: int, lengths: Iterable[int], scored: Iterable[int]
) -> list[Call]:
    """Split slots into calls, the last of which returns the logits of the last token.

    Args:
      start: slot of the first token.
      end: slot of the last token plus one, at least `start + 1`.
      slots: number of cache slots.
      lengths: token counts of the signatures, including one.
      scored: token counts of those that return logits of their last token, including one.

    Returns:
      The calls in their order.

    Raises:
      DataError: the tokens do not fit the cache.
    """
    if end > slots:
        raise DataError(f"{end} tokens do not fit the {slots} slots of the cache")
    options = []
    for length in scored:
        first = max(start, end - length)
        if first + length <= slots:
            options.append([*split(start, first, slots, lengths), (first, end, length)])
    return min(options, key=_cost)


def _cost(calls: list[Call]) -> tuple[int, int]:
    return sum(CALL_TOKENS + length for _, _, length in calls), len(calls)


@functools.lru_cache(maxsize=256)
def _first_lengths(count: int, spare: int, lengths: tuple[int, ...], call_tokens: int) -> list[int]:
    """Find the signature to run first, for each number of remaining tokens from 0 to `count`.

    Dynamic programming over the remaining tokens, of which `spare` slots are free behind the last.
    """
    costs, first_lengths = [0], [0]
    for remaining in range(1, count + 1):
        # Padding must fit the cache, too. Among equals, the longest comes first.
        cost, length = min(
            (call_tokens + length + costs[max(0, remaining - length)], -length)
            for length in lengths
            if length <= remaining + spare
        )
        costs.append(cost)
        first_lengths.append(-length)
    return first_lengths
