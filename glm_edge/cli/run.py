"""Provenance of a report: command, seed and versions."""

import importlib.metadata
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import glm_edge as ge


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the results depend on."""
    names = ("jax", "flax", "optax", "numpy", "tensorflow-cpu", "ai-edge-litert", "tokenizers")
    packages = {"python": platform.python_version(), "glm_edge": ge.__version__}
    for name in names:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return packages


def command_line() -> str:
    """Return the command that started this process, without the program's folders."""
    module = sys.modules["__main__"].__spec__
    program = Path(sys.argv[0]).name if module is None else f"python -m {module.name}"
    return " ".join([program.removesuffix(".__main__"), *map(shlex.quote, sys.argv[1:])])


def run_of(seed: int) -> dict[str, Any]:
    """Return the provenance of a report: command, seed and versions."""
    return {"command": command_line(), "seed": seed, "versions": versions()}
