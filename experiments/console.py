"""What scripts share at the console: flags alone, progress bars, tables, errors in one line."""

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import app

from glm_edge.errors import GlmEdgeError, MissingExtraError, require


def refuse_arguments(argv: Sequence[str]) -> None:
    """Raises UsageError if a script was given more than its name and flags."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; every input is a --flag")


def bar(label: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """Returns a function that wraps an iterable in a progress bar, where tqdm is installed."""
    try:
        tqdm = require("tqdm", extra="bench").tqdm
    except MissingExtraError:
        return iter
    return functools.partial(tqdm, desc=label, leave=False, dynamic_ncols=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints an aligned table."""
    print(text_table(header, rows))


def text_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lays out cells in columns, Markdown's way."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def fail_in_one_line(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Makes a script end with one line and exit status 1 when its input is bad."""

    @functools.wraps(main)
    def guarded(argv: list[str]) -> None:
        try:
            main(argv)
        except GlmEdgeError as error:
            sys.exit(f"error: {error}")

    return guarded
