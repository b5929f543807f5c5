"""Tables as text."""

from collections.abc import Collection, Sequence
from typing import Any


def text_table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Lay out cells in columns as Markdown.

    Args:
      header: one cell per column.
      rows: of as many cells.
    """
    columns = _padded([header, *rows], ())
    rule = "|" + "|".join("-" * (len(column[0]) + 2) for column in columns) + "|"
    first, *others = ("| " + " | ".join(cells) + " |" for cells in zip(*columns, strict=True))
    return "\n".join([first, rule, *others])


def table_lines(rows: Sequence[Sequence[Any]], right: Collection[int] = ()) -> list[str]:
    """Lay out cells in columns that are two spaces apart.

    Args:
      rows: header and rows, one cell per column.
      right: indices of the columns that are aligned to the right.

    Returns:
      One line per row, without spaces at its end.
    """
    return ["  ".join(cells).rstrip() for cells in zip(*_padded(rows, right), strict=True)]


def _padded(rows: Sequence[Sequence[Any]], right: Collection[int]) -> list[list[str]]:
    """Return the columns of cells of one width."""
    columns = []
    for index, cells in enumerate(zip(*rows, strict=True)):
        width = max(len(str(cell)) for cell in cells)
        align = str.rjust if index in right else str.ljust
        columns.append([align(str(cell), width) for cell in cells])
    return columns
