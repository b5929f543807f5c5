"""Bounds for readers of exported files, which a stranger may have written."""

import struct

MAX_ENTRIES = 1_000_000
# What readers of tables, names and JSON raise where bytes are not what they should be.
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
    """A count of the entries of all lists of a file, whose lengths may be any number."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, length: int) -> range:
        """Returns the indices of one list.

        Raises:
          ValueError: the lists together have more entries than any export.
        """
        self._count += length
        if self._count > MAX_ENTRIES:
            raise ValueError(f"lists of more than {MAX_ENTRIES} entries")
        return range(length)
