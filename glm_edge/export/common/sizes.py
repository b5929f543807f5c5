"""Sizes of an export: lengths and slots of its signatures, checked, and read from a description."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from glm_edge.configs import GLMConfig
from glm_edge.errors import ExportError

DECODE = "decode"
DEFAULT_SLOTS = 1024
# Token counts of the short prefill signatures of a file. Most runs of an action fit the shorter
# one, whose call takes little longer than that of one token.
FORCED_LENGTHS = (4, 8)


def step_name(length: int, attended: int | None = None) -> str:
    """Name the signature for `length` tokens that attends to `attended` slots, None for all.

    Args:
      length: number of tokens.
      attended: number of slots that the signature attends to, or None for all.

    Returns:
      The name, such as `decode`, `prefill_128` or `prefill_128_256`.
    """
    name = DECODE if length == 1 else f"prefill_{length}"
    return name if attended is None else f"{name}_{attended}"


def all_lengths(prefill_lengths: Iterable[int], forced_lengths: Iterable[int]) -> list[int]:
    """List, in ascending order, the token counts of all signatures of steps.

    Args:
      prefill_lengths: token counts of the prefill signatures.
      forced_lengths: token counts of those with logits of their last token.

    Returns:
      The token counts, including one.
    """
    return sorted({1, *prefill_lengths, *forced_lengths})


def logit_rows(
    length: int, prefill_lengths: Iterable[int], prefill_logits: bool, forced_lengths: Iterable[int]
) -> int:
    """Count the tokens whose logits the signature for `length` tokens returns.

    Args:
      length: number of tokens of the signature.
      prefill_lengths: token counts of the prefill signatures.
      prefill_logits: whether those return logits of every token.
      forced_lengths: token counts of the signatures with logits of their last token.

    Returns:
      `length` for all, 1 for the last token, or 0.
    """
    if length == 1 or (prefill_logits and length in prefill_lengths):
        return length
    return int(length in forced_lengths)


def attended_by(
    length: int, attended_slots: Iterable[int], forced_lengths: Iterable[int] = ()
) -> list[int]:
    """List, in ascending order, the slot counts that have a signature for `length` tokens.

    Args:
      length: number of tokens.
      attended_slots: slot counts of the file.
      forced_lengths: token counts of the signatures that run anywhere in a text, as decode does.

    Returns:
      The slot counts.
    """
    fitting = sorted(attended for attended in attended_slots if attended >= length)
    return fitting if length == 1 or length in forced_lengths else fitting[:1]


def check_lengths(
    config: GLMConfig, prefill_lengths: Iterable[int], cache_slots: int | None
) -> tuple[list[int], int]:
    """Return the prefill lengths in ascending order, and the number of cache slots.

    Args:
      config: configuration of the model.
      prefill_lengths: token counts of the prefill signatures.
      cache_slots: number of cache slots; None uses the model's context length, at most 1024.

    Returns:
      `(prefill_lengths, cache_slots)`.

    Raises:
      ExportError: a length is not a fixed integer, or does not fit the model's context.
    """
    lengths = fixed_lengths("prefill_lengths", prefill_lengths)
    context = config.decoder.max_position_embeddings
    slots = min(context, DEFAULT_SLOTS)
    if cache_slots is not None:
        (slots,) = check_fixed("cache_slots", [cache_slots])
    if not 1 <= slots <= context:
        raise ExportError(f"cache_slots={slots}: must be 1 to {context}, the model's context")
    for length in lengths:
        if not 2 <= length <= slots:
            raise ExportError(f"prefill_lengths: {length} must be 2 to {slots}, the cache's slots")
    return lengths, slots


def check_forced(forced_lengths: Iterable[int] | None, cache_slots: int) -> list[int]:
    """Return the token counts of signatures with logits of their last token, in ascending order.

    Args:
      forced_lengths: the token counts; None takes those of `FORCED_LENGTHS` that fit the cache.
      cache_slots: number of cache slots.

    Returns:
      The distinct token counts.

    Raises:
      ExportError: a token count is not a fixed integer, or does not fit the cache.
    """
    if forced_lengths is None:
        return [length for length in FORCED_LENGTHS if length <= cache_slots]
    lengths = fixed_lengths("forced_lengths", forced_lengths)
    for length in lengths:
        if not 2 <= length <= cache_slots:
            raise ExportError(
                f"forced_lengths: {length} must be 2 to {cache_slots}, the cache's slots"
            )
    return lengths


def check_attended(attended_slots: Iterable[int], cache_slots: int) -> list[int]:
    """Return the slot counts that signatures attend to, in ascending order.

    Args:
      attended_slots: slot counts of signatures.
      cache_slots: number of cache slots.

    Returns:
      The distinct slot counts.

    Raises:
      ExportError: a slot count is not a fixed integer, or is not below `cache_slots`.
    """
    attended = fixed_lengths("attended_slots", attended_slots)
    if attended and not 2 <= attended[0] <= attended[-1] < cache_slots:
        shown = f"{attended[:8]}"
        raise ExportError(
            f"attended_slots: {shown} must be 2 to {cache_slots - 1}, fewer than cache_slots"
        )
    return attended


@dataclass(frozen=True)
class Sizes:
    """The sizes of a file's signatures, read from its description.

    Attributes:
      prefill_lengths: token counts of the prefill signatures, ascending.
      cache_slots: number of cache slots.
      prefill_logits: whether prefill returns logits of every token.
      attended_slots: slot counts of the signatures that attend to fewer slots, ascending.
      forced_lengths: token counts of the signatures with logits of their last token, ascending.
    """

    prefill_lengths: list[int]
    cache_slots: int
    prefill_logits: bool
    attended_slots: list[int]
    forced_lengths: list[int]


def described_sizes(description: Mapping[str, Any], config: GLMConfig) -> Sizes:
    """Read the sizes from an untrusted description.

    Args:
      description: description of a file or directory.
      config: configuration of the model, from the description.

    Returns:
      The sizes, which are possible for an export of that model.

    Raises:
      ExportError: a size is missing, has the wrong type, or is impossible for an export.
    """
    names = ("prefill_lengths", "cache_slots", "prefill_logits", "attended_slots")
    # Descriptions of older files lack the last two fields, and Core ML packages the signatures.
    fields = {"attended_slots": [], "forced_lengths": [], **description}
    missing = [name for name in names if name not in fields]
    if missing:
        raise ExportError(f"{missing[0]} is missing")
    for name in ("prefill_lengths", "attended_slots", "forced_lengths"):
        if not isinstance(fields[name], list):
            raise ExportError(f"{name}: must be a list, not {type(fields[name]).__name__}")
    if not isinstance(fields["prefill_logits"], bool):
        raise ExportError(
            f"prefill_logits: must be true or false, not {fields['prefill_logits']!r}"
        )
    if fields["cache_slots"] is None:
        raise ExportError("cache_slots: must be an integer, not None")
    lengths, slots = check_lengths(config, fields["prefill_lengths"], fields["cache_slots"])
    attended = check_attended(fields["attended_slots"], slots)
    forced = check_forced(fields["forced_lengths"], slots)
    for name, sizes in (
        ("prefill_lengths", lengths),
        ("attended_slots", attended),
        ("forced_lengths", forced),
    ):
        if sizes != fields[name]:
            raise ExportError(f"{name}: {fields[name][:8]} must be ascending without duplicates")
    return Sizes(lengths, slots, fields["prefill_logits"], attended, forced)


def fixed_lengths(name: str, lengths: Iterable[int]) -> list[int]:
    """Return the distinct lengths in ascending order.

    Args:
      name: name of the argument, for messages.
      lengths: the lengths.

    Returns:
      The lengths.

    Raises:
      ExportError: a length is not a fixed integer.
    """
    return sorted(set(check_fixed(name, lengths)))


def check_fixed(name: str, lengths: Iterable[int]) -> list[int]:
    """Return the lengths as integers; each becomes one graph.

    Args:
      name: name of the argument, for messages.
      lengths: the lengths.

    Returns:
      The lengths in their order.

    Raises:
      ExportError: a length is not an integer of at least 1, such as None, a symbol or -1.
    """
    values = list(lengths) if isinstance(lengths, Iterable) else [lengths]
    for length in values:
        if not isinstance(length, Integral) or isinstance(length, bool) or length < 1:
            raise ExportError(
                f"{name}: {length!r} is not a fixed length; use an integer of at least 1, as "
                "every graph has one shape"
            )
    return [int(length) for length in values]
