"""Domains of calibration batches: the source of a batch, such as `wiki` or `screens`.

A batch names its domain by the key `domain`, a string. It is not an input of a model: `to_device`
of a batch drops it. Cross-validation leaves out one domain at a time.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from glm_edge.errors import DataError

KEY = "domain"
Item = TypeVar("Item")


def domain_of(batch: Any) -> str | None:
    """Return the domain of a batch, or None for a batch without one."""
    name = batch.get(KEY) if isinstance(batch, Mapping) else None
    return name if isinstance(name, str) else None


def named_domains(domains: Iterable[str | None]) -> tuple[str, ...]:
    """List the distinct domains in the order of their first batch; None is not a domain."""
    return tuple(dict.fromkeys(name for name in domains if name is not None))


def without_domain(batch: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a copy of a batch without its domain.

    Args:
      batch: dict of arrays, with or without a domain.
      where: name of the batch for messages.

    Returns:
      The arrays by name.

    Raises:
      DataError: the domain is not a string.
    """
    name = batch.get(KEY, "")
    if not isinstance(name, str):
        raise DataError(
            f"{where}: domain must be a string that names the source of the batch, such as 'wiki', "
            f"not {type(name).__name__}"
        )
    return {key: value for key, value in batch.items() if key != KEY}


def every_second(batches: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """Split batches into two halves, so that both contain every domain of two or more batches.

    Args:
      batches: batches of one kind.

    Returns:
      `(first, second)`: the even and the odd batches of each domain. If all domains have a single
      batch, the even and the odd ones of all batches.
    """
    by_domain: dict[str | None, list[Item]] = {}
    for batch in batches:
        by_domain.setdefault(domain_of(batch), []).append(batch)
    if all(len(alike) == 1 for alike in by_domain.values()):
        by_domain = {None: list(batches)}
    halves = [(alike[::2], alike[1::2]) for alike in by_domain.values()]
    return [b for half, _ in halves for b in half], [b for _, half in halves for b in half]
