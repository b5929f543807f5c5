"""The record of a run: its command, commit, machine and versions, stored beside its numbers."""

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
) -> dict[str, Any]:
    """Describes this run.

    Args:
      script: module of `experiments`, such as `bench.export`.
      names: flags that change the numbers; those that are None are left off the command.
      placeholders: further flags as a reader should spell them, such as `--work_dir=DIR`, so that
        no path of this machine enters the log.
      versions: of packages that another environment has.

    Returns:
      Command, commit, machine, processor, memory, load average and versions.
    """
    return {
        "command": command_of(script, names, placeholders),
        "commit": commit(),
        **machine(),
        "versions": {**run.versions(), **(versions or {})},
    }


def command_of(script: str, names: Sequence[str] = (), placeholders: Sequence[str] = ()) -> str:
    """Spells the command that repeats this run.

    Args:
      script: module of `experiments`.
      names: flags that change the numbers.
      placeholders: further flags, spelled out.
    """
    values = {name: FLAGS[name].value for name in names}
    spelled = [
        shlex.quote(f"--{name}={','.join(map(str, value)) if isinstance(value, list) else value}")
        for name, value in values.items()
        if value is not None
    ]
    return " ".join([f"python -m experiments.{script}", *spelled, *placeholders])


def peers_of(names: Sequence[str]) -> list[str]:
    """Lists the flags of the peers whose interpreters this run was told.

    Args:
      names: peers; the interpreter of `llama` is the flag `llama_python`.
    """
    return [f"--{name}_python=PYTHON" for name in names if FLAGS[f"{name}_python"].value]


def machine() -> dict[str, Any]:
    """Describes the machine: system, cores, processor, memory, and its load now."""
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "processor": processor(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
    }


def processor() -> str:
    """Returns the processor's model name, or its architecture where Linux gives no name."""
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def commit() -> str | None:
    """Returns the commit of the checkout that this file is in, or None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Returns the versions of those packages that are installed.

    Args:
      packages: distribution names.
    """
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
