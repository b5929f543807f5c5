"""Console helpers of the commands: flags, progress bars, tables, errors in one line."""

import functools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import app, flags, logging

from glm_edge.errors import GlmEdgeError, MissingExtraError, require

FLAGS = flags.FLAGS
# `name=value` as messages of the library spell an argument; the value may be missing.
_ARGUMENT = re.compile(
    r"(?<![\w.-])(?P<name>[a-z]\w*)=(?P<value>\[[^\]]*\]|'[^']*'|\"[^\"]*\"|[\w./*-]*[\w/*])?"
)


def refuse_arguments(argv: Sequence[str]) -> None:
    """Raises UsageError if a script was given more than its name and flags."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; every input is a --flag")


def bar(label: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """Returns a function that wraps an iterable in a progress bar.

    The bar needs tqdm, and a terminal: control characters are noise in a log file.
    """
    try:
        tqdm = require("tqdm", extra="bench").tqdm
    except MissingExtraError:
        return iter
    return functools.partial(tqdm, desc=label, leave=False, dynamic_ncols=True, disable=None)


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


def as_flags(message: str, known: flags.FlagValues = FLAGS) -> str:
    """Rewrites arguments of Python that a message names as the flags of the running script.

    An argument is `name=value` anywhere, or `name: ` at the beginning.

    Args:
      message: such as `exists; pass overwrite=True`.
      known: flags of the script; what is none of them stays as it is.

    Returns:
      The message, such as `exists; pass --overwrite`.
    """

    def spell(match: re.Match) -> str:
        name, value = match["name"], match["value"] or ""
        if name not in known:
            return match[0]
        if value in ("True", "False") and known[name].boolean:
            return f"--{name}" if value == "True" else f"--no{name}"
        items = re.findall(r"[^\s,'\"\[\]]+", value)
        return f"--{name}={','.join(items)}" if items else f"--{name}"

    message = _ARGUMENT.sub(spell, message)
    first = re.match(r"([a-z]\w*): ", message)
    return f"--{message}" if first and first[1] in known else message


def fail_in_one_line(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Makes a script end with one line and exit status 1 when its input is bad."""

    @functools.wraps(main)
    def guarded(argv: list[str]) -> None:
        try:
            main(argv)
        except GlmEdgeError as error:
            sys.exit(f"error: {as_flags(str(error))}")
        # absl prints the whole help above its message.
        except app.UsageError as error:
            sys.exit(f"error: {error}")

    return guarded


def launch(main: Callable[[list[str]], None], help_text: str, argv: Sequence[str]) -> None:
    """Runs a command under absl, whose --help prints the docstring of the main module.

    Args:
      main: called with the program's name and what is no flag.
      help_text: printed above the flags by --help.
      argv: the program's name and its flags.
    """
    sys.modules["__main__"].__doc__ = help_text

    def quietly(argv: list[str]) -> None:
        # jax tells of processors that are not there, TensorFlow of every step of a conversion.
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        main(argv)

    app.run(fail_in_one_line(quietly), argv=list(argv))
