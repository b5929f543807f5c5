"""Compress, export, measure, plan, serve and update from the command line.

    glm-edge COMMAND --flag=value ...
    glm-edge COMMAND --help

`python -m glm_edge` is the same program. In a clone, `python -m experiments.compress`, `.export`,
`.evaluate` and `.plan_phone` run the same code; `.compress` and `.evaluate` also generate phone
screens.

Exit status: 0 on success, or after the list of commands; 1 if an input is rejected or a
verification fails, and after COMMAND --help. An error is one line on standard error; for an unknown
or invalid flag, absl adds a line about help.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from absl import flags

from glm_edge.cli import console

COMMANDS = {
    "compress": "compress a checkpoint by a recipe, one layer at a time if possible",
    "export": "write an on-device file, and verify it against JAX",
    "evaluate": "measure the loss on text, and the distance from a reference",
    "plan": "list the formats and sizes that fit a memory budget, from shapes alone",
    "serve": "answer requests over HTTP, in the form of OpenAI's API",
    "update": "publish, fetch, apply and roll back signed updates of a model",
}
# XLA reads the first when its backend starts, OpenBLAS the second when numpy is imported. XLA's
# concurrent scheduler keeps every dense weight in memory at once, and OpenBLAS' threads spin.
ENVIRONMENT = {
    "XLA_FLAGS": "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    "OPENBLAS_NUM_THREADS": "1",
}

flags.disclaim_key_flags()


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
      argv: program name, command and flags; None uses those of the process.
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
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    command = importlib.import_module(f"glm_edge.cli.{name}")
    command.define_flags()
    console.launch(command.main, command.__doc__, [program, *arguments[1:]])


def usage() -> str:
    """Return the list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items()]
    return f"{__doc__}\nCommands:\n" + "\n".join(lines)
