"""The record of a run: its command, commit, machine and versions, stored with its results."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from glm_edge.cli import run

FLAGS = flags.FLAGS
CPU_INFO = Path("/proc/cpuinfo")


def provenance_of(
    script: str,
    names: Sequence[str] = (),
    placeholders: Sequence[str] = (),
    versions: Mapping[str, str] | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Describe this run.

    Args:
      script: module of `experiments`, such as `bench.export`.
      names: flags that affect the results; flags that are None are omitted from the command.
      placeholders: further flags with placeholders, such as `--work_dir=DIR`, so that the log
        contains no path of this machine.
      versions: versions of packages in other environments.
      seed: seed of a script without the flag --seed.

    Returns:
      Command, seed, commit, machine, processor, memory, load average and versions.
    """
    return {
        "command": command_of(script, names, placeholders),
        "seed": FLAGS["seed"].value if seed is None else seed,
        "commit": commit(),
        **machine(),
        "versions": {**run.versions(), **(versions or {})},
    }


def command_of(script: str, names: Sequence[str] = (), placeholders: Sequence[str] = ()) -> str:
    """Return the command that repeats this run.

    Args:
      script: module of `experiments`.
      names: flags that affect the results.
      placeholders: further flags with placeholders.
    """
    values = {name: FLAGS[name].value for name in names}
    spelled = [
        shlex.quote(f"--{name}={','.join(map(str, value)) if isinstance(value, list) else value}")
        for name, value in values.items()
        if value is not None
    ]
    return " ".join([f"python -m experiments.{script}", *spelled, *placeholders])


def without_paths(arguments: Sequence[str]) -> list[str]:
    """Return command-line arguments with placeholders for paths.

    Args:
      arguments: arguments of a script, such as `sys.argv[1:]`.
    """
    shown = []
    for argument in arguments:
        name, separator, _ = argument.partition("=")
        placeholder = name + separator + name.lstrip("-").upper() if separator else "PATH"
        shown.append(placeholder if os.sep in argument else argument)
    return shown


def peers_of(names: Sequence[str]) -> list[str]:
    """List the flags of the peers whose interpreters this run received.

    Args:
      names: names of peers; the interpreter flag of `llama` is `llama_python`.
    """
    return [f"--{name}_python=PYTHON" for name in names if FLAGS[f"{name}_python"].value]


def machine() -> dict[str, Any]:
    """Describe the machine: system, cores, processor, memory, and current load."""
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "processor": processor(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
    }


def processor() -> str:
    """Return the processor's model name, or its architecture if Linux has no name."""
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def commit() -> str | None:
    """Return the commit of this file's checkout, or None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of the installed packages.

    Args:
      packages: names of distributions.
    """
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
