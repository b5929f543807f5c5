"""Compress, export, measure and plan from the command line.

    glm-edge COMMAND --flag=value ...
    glm-edge COMMAND --help

`python -m glm_edge` is the same program. In a clone, `python -m experiments.compress`, `.export`,
`.evaluate` and `.plan_phone` run the same code; two of them draw phone screens as well.

Exit status: 0 when the work is done, or the commands were listed; 1 when an input is refused, a
verification fails, or after COMMAND --help. A refusal is one line on standard error; of a flag that
does not exist or cannot be read, absl adds a line about help.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from absl import flags

from glm_edge.cli import console

COMMANDS = {
    "compress": "compress a checkpoint by a recipe, one layer at a time where it can",
    "export": "write the file that a phone runs, and verify it against JAX",
    "evaluate": "measure the loss on text, and the distance from a reference",
    "plan": "list what fits a budget of bytes, from shapes alone",
    "serve": "answer requests over HTTP (not built yet)",
}
SERVE = (
    "error: serve: there is no server yet; it will be an engine with an endpoint in OpenAI's "
    "format. Until then, glm_edge.chat(model, params, processor, messages) answers from Python"
)
# XLA reads the first when its backend starts, OpenBLAS the second when numpy is imported: with its
# concurrent scheduler XLA holds every dense weight at once, and OpenBLAS' threads spin.
ENVIRONMENT = {
    "XLA_FLAGS": "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    "OPENBLAS_NUM_THREADS": "1",
}

flags.disclaim_key_flags()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command.

    Args:
      argv: the program's name, a command and its flags; None takes those of the process.
    """
    program, *arguments = sys.argv if argv is None else argv
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(usage())
        return
    if arguments[0] == "--version":
        print(importlib.import_module("glm_edge").__version__)
        return
    name = arguments[0]
    if name not in COMMANDS:
        sys.exit(f"error: unknown command {name!r}; known: {', '.join(COMMANDS)}")
    if name == "serve":
        sys.exit(SERVE)
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    command = importlib.import_module(f"glm_edge.cli.{name}")
    command.define_flags()
    console.launch(command.main, command.__doc__, [program, *arguments[1:]])


def usage() -> str:
    """Returns the list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items()]
    return f"{__doc__}\nCommands:\n" + "\n".join(lines)
