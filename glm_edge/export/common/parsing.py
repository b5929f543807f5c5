"""Limits for readers of exported files, which are untrusted."""

import struct

MAX_ENTRIES = 1_000_000
# Exceptions that readers of tables, names and JSON raise for invalid bytes.
PARSE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)


class EntryCounter:
    """A count of the entries of all lists of an untrusted file."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, length: int) -> range:
        """Count the entries of one list and return its indices.

        Raises:
          ValueError: the lists together have more than `MAX_ENTRIES` entries.
        """
        self._count += length
        if self._count > MAX_ENTRIES:
            raise ValueError(f"lists with more than {MAX_ENTRIES} entries")
        return range(length)
