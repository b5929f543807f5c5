"""Console helpers of the commands: flags, progress bars, tables, one-line errors."""

import functools
import logging as std_logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import app, flags, logging

from glm_edge.errors import GlmEdgeError, MissingExtraError, require
from glm_edge.process_wide import QUIET_TENSORFLOW
from glm_edge.tables import text_table

FLAGS = flags.FLAGS
HELP_FLAGS = {"--help", "-help", "-h", "-?"}
EXIT_STATUS = (
    "Exit status: 0 on success; 1 if an input is rejected or a check fails, and after --help.\nAn "
    "error is one line on standard error."
)
QUIET_LOGGERS = ("jax", "orbax", "tensorflow")
# An argument in the library's messages: `name=value`; the value may be missing.
_ARGUMENT = re.compile(
    r"(?<![\w.-])(?P<name>[a-z]\w*)=(?P<value>\[[^\]]*\]|'[^']*'|\"[^\"]*\"|[\w./*-]*[\w/*])?"
)


def refuse_arguments(argv: Sequence[str]) -> None:
    """Raise UsageError if the command line contains more than flags."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; every input is a --flag")


def bar(label: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """Return a function that wraps an iterable in a progress bar.

    The bar needs tqdm and a terminal, since control characters would clutter a log file.
    """
    make = _tqdm()
    return iter if make is None else functools.partial(make, desc=label)


def progress() -> Callable[[str, int, int], None]:
    """Return a callback `(stage, done, total)` that shows each stage as a progress bar.

    Transforms take it as `progress=`. Without tqdm or a terminal it shows nothing.
    """
    make = _tqdm()
    bars: dict[str, Any] = {}

    def show(stage: str, done: int, total: int) -> None:
        name = stage.split(":", 1)[0]
        if make is None:
            return
        current = bars.get(name)
        if current is None or done < current.n or total != current.total:
            for other in bars.values():
                other.close()
            bars.clear()
            current = bars[name] = make(total=total, desc=stage)
        current.set_description(stage, refresh=False)
        current.update(done - current.n)
        if done >= total:
            bars.pop(name).close()

    return show


def _tqdm() -> Callable[..., Any] | None:
    try:
        tqdm = require("tqdm", extra="bench").tqdm
    except MissingExtraError:
        return None
    # None disables the bar if standard error is not a terminal.
    return functools.partial(tqdm, leave=False, dynamic_ncols=True, disable=None)


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print an aligned table."""
    print(text_table(header, rows))


def as_flags(message: str, known: flags.FlagValues = FLAGS) -> str:
    """Rewrite Python arguments in a message as flags of the running script.

    An argument is `name=value` anywhere, or `name: ` at the beginning.

    Args:
      message: message, such as `exists; pass overwrite=True`.
      known: flags of the script; other arguments are not changed.

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
    """Make a script end with a one-line error and exit status 1 for invalid input."""

    @functools.wraps(main)
    def guarded(argv: list[str]) -> None:
        try:
            main(argv)
        except GlmEdgeError as error:
            sys.exit(f"error: {as_flags(str(error))}")
        # absl prints the complete help above its message.
        except app.UsageError as error:
            sys.exit(f"error: {error}")

    return guarded


def launch(
    main: Callable[[list[str]], None],
    help_text: str | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Run a command or a script: its --help, its messages and its exit status.

    Args:
      main: function of the program's name and the arguments that are not flags.
      help_text: help of the command; None uses the docstring of the main module.
      argv: program name and flags; None uses those of the process.
    """
    argv = list(sys.argv if argv is None else argv)
    module = sys.modules["__main__"]
    # absl's --helpfull and --helpshort read this docstring.
    module.__doc__ = help_text or module.__doc__ or ""
    if HELP_FLAGS.intersection(argv[1:]):
        print(help_page(module.__doc__, FLAGS.main_module_help()))
        sys.exit(1)
    silence_libraries()

    def quietly(argv: list[str]) -> None:
        # absl.app sets the verbosity to INFO, at which jax reports every absent backend.
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        main(argv)

    app.run(fail_in_one_line(quietly), argv=argv)


def help_page(text: str, described: str) -> str:
    """Format the page of --help: summary, example, flags, details, exit status.

    Args:
      text: docstring; its first indented lines are the example.
      described: absl's description of the main module's flags.

    Returns:
      The page. Flags precede the details, so that the first screen shows them.
    """
    lines = text.strip().splitlines()
    example = next((i for i, line in enumerate(lines) if line.startswith("    ")), None)
    end = 1
    if example is not None:
        end = next((i for i in range(example, len(lines)) if not lines[i].strip()), len(lines))
    details = "\n".join(lines[end:]).strip()
    listed = [line for line in described.splitlines() if line.startswith("  ")]
    status = "" if "Exit status" in text else EXIT_STATUS
    parts = ["\n".join(lines[:end]), "\n".join(["Flags:", *listed]), details, status]
    return "\n\n".join([part for part in parts if part] + ["--helpfull lists every flag."])


def silence_libraries() -> None:
    """Hide messages below a warning; every command and script calls this.

    Reports of absent backends (jax), of each step of a conversion (TensorFlow) and of each saved
    array (Orbax) would hide the command's output.
    """
    for variable, value in QUIET_TENSORFLOW.items():
        os.environ.setdefault(variable, value)
    for name in QUIET_LOGGERS:
        std_logging.getLogger(name).setLevel(std_logging.WARNING)
