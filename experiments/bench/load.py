"""Measures time and memory of loading a checkpoint, compared with other readers.

    python -m experiments.bench.load --checkpoint=DIR --out=FILE.json

Every reader runs in a separate process, in turns, --rounds times. Before that, the files are read
once, so that they are in the page cache for all readers. The same amount of memory is also
allocated and freed once, since a virtual machine is slow to allocate memory that it returned to its
host, which would slow the first reader:

  glm_edge            `ge.load`: config, tensors checked and on the device, the model
  safetensors flax    `safetensors.flax.load_file`: jax arrays
  safetensors torch   `safe_open(framework="pt")`, each tensor copied out of the memory map
  safetensors pread   `safetensors.torch` with its `pread` backend
  transformers        `AutoModel.from_pretrained` in the stored type; its weights stay in the memory
                      map, so each page is touched once

Readers with missing packages are skipped. Imports are not timed. The peak is `VmHWM`, which
includes pages of mapped files. The exit status is 1 if the peak of `ge.load` exceeds 1.2 times the
bytes of the files, or its time exceeds twice that of the fastest safetensors reader.
"""

import functools
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from glm_edge.errors import CheckpointError, DataError

FLAGS = flags.FLAGS
OURS = "glm_edge"
MAX_MEMORY_RATIO = 1.2
MAX_TIME_RATIO = 2.0
READ_BYTES = 1 << 24
PAGE_BYTES = 4096
# Slightly more than any reader needs.
WARM_RATIO = 2


def define_flags() -> None:
    """Define this script's flags."""
    flags.DEFINE_string("checkpoint", None, "Directory of the checkpoint to load.", required=True)
    flags.DEFINE_string("out", None, "JSON file for the results.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing --out file.")
    flags.DEFINE_integer("rounds", 5, "Number of runs per reader.", 1)
    flags.DEFINE_list("readers", list(READERS), "Readers to run.")
    flags.DEFINE_string(
        "run", None, "Run only this reader, in this process, and print its measurement."
    )


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; every input is a --flag")
    directory = Path(FLAGS.checkpoint)
    if FLAGS.run:
        print(json.dumps(measure(FLAGS.run, directory)))
        return
    compare()


def compare() -> None:
    """Run the readers in turns, print a table, write the log, and check the limits."""
    # Not at the top: a reader's process should import only what the reader needs.
    from glm_edge.cli.console import bar, print_table
    from glm_edge.cli.corpora import check_absent, write_text

    check_absent(FLAGS.out, FLAGS.overwrite)
    readers = chosen_readers(FLAGS.readers)
    size = read_once(Path(FLAGS.checkpoint))
    order = [reader for _ in range(FLAGS.rounds) for reader in readers]
    runs: dict[str, list[dict[str, float]]] = {reader: [] for reader in readers}
    for reader in bar("runs")(order):
        runs[reader].append(in_new_process(reader))
    report = summary(runs, size)
    rows = [
        [
            name,
            f"{row['seconds']:.2f}",
            f"{row['time_ratio']:.2f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['memory_ratio']:.3f}",
        ]
        for name, row in report["readers"].items()
    ]
    print(f"{size / 1e9:.2f} GB of safetensors, median of {FLAGS.rounds}")
    print_table(["reader", "seconds", "x fastest reading", "peak GB", "x bytes"], rows)
    ours = report["readers"][OURS]
    print(
        f"memory {ours['memory_ratio']:.3f} x bytes, at most {MAX_MEMORY_RATIO}: "
        f"{'yes' if report['memory_holds'] else 'NO'}; time {ours['time_ratio']:.2f} x "
        f"{report['fastest']}, at most {MAX_TIME_RATIO}: {'yes' if report['time_holds'] else 'NO'}"
    )
    if FLAGS.out:
        log = report | {"runs": runs} | provenance()
        write_text(FLAGS.out, json.dumps(log, indent=1) + "\n", FLAGS.overwrite)
    if not (report["memory_holds"] and report["time_holds"]):
        sys.exit(1)


def chosen_readers(names: Sequence[str]) -> list[str]:
    """Return the readers with installed packages, glm_edge first.

    Raises:
      DataError: a name is unknown, or no safetensors reader is selected and installed.
    """
    unknown = [name for name in names if name not in READERS]
    if unknown:
        raise DataError(f"--readers: unknown reader {unknown[0]!r}; known: {', '.join(READERS)}")
    installed = [
        name
        for name in READERS
        if (name in names or name == OURS)
        and all(importlib.util.find_spec(package) for package in READERS[name][1])
    ]
    if not any(name.startswith("safetensors") for name in installed):
        raise DataError("--readers: include an installed safetensors reader for the comparison")
    return installed


def read_once(directory: Path) -> int:
    """Read the files once, so that they are in the page cache.

    Args:
      directory: directory of the checkpoint.

    Returns:
      Total bytes of its safetensors files.

    Raises:
      CheckpointError: it contains no safetensors file.
    """
    size, buffer = 0, bytearray(READ_BYTES)
    for path in shards(directory):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                size += count
    return size


def shards(directory: Path) -> list[Path]:
    """Return the safetensors files of a directory, in order."""
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{directory}: contains no safetensors files")
    return paths


def in_new_process(reader: str) -> dict[str, float]:
    """Run a reader in a fresh Python.

    Raises:
      DataError: the reader failed; the message contains its last line.
    """
    command = [sys.executable, "-m", "experiments.bench.load", f"--run={reader}"]
    command.append(f"--checkpoint={FLAGS.checkpoint}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"reader {reader!r} ended with status {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(reader: str, directory: Path) -> dict[str, float]:
    """Run a reader in this process.

    Args:
      reader: a key of `READERS`.
      directory: directory of the checkpoint.

    Returns:
      `seconds` of reading, `peak_bytes` of the process, `imported_bytes` before reading.
    """
    read = READERS[reader][0](directory)
    imported = peak_bytes()
    use_memory(WARM_RATIO * sum(path.stat().st_size for path in shards(directory)))
    start = time.perf_counter()
    loaded = read()
    seconds = time.perf_counter() - start
    result = {"seconds": seconds, "peak_bytes": peak_bytes(), "imported_bytes": imported}
    del loaded
    return result


def use_memory(size: int) -> None:
    """Allocate and write `size` bytes in another process, which then ends."""
    subprocess.run([sys.executable, "-c", f"import numpy; numpy.ones({size}, 'u1')"], check=False)


def peak_bytes() -> int:
    """Return the peak RSS of this process in bytes, including pages of mapped files.

    Raises:
      DataError: the system does not provide the value; Linux does.
    """
    from experiments.common import child

    peak = child.peak_bytes()
    if not peak:
        raise DataError("peak memory is read from /proc/self/status, which is Linux's")
    return peak


def _glm_edge(directory: Path) -> Callable[[], Any]:
    import jax

    import glm_edge as ge

    load = ge.load
    jax.devices()
    return lambda: jax.block_until_ready(load(directory)[1])


def _safetensors_flax(directory: Path) -> Callable[[], Any]:
    import jax
    from safetensors.flax import load_file

    jax.devices()
    return lambda: [jax.block_until_ready(load_file(path)) for path in shards(directory)]


def _safetensors_torch(directory: Path, backend: str) -> Callable[[], Any]:
    from safetensors import safe_open

    importlib.import_module("torch")

    def read() -> Any:
        tensors = []
        for path in shards(directory):
            with safe_open(path, framework="pt", backend=backend) as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(name)
                    tensors.append(tensor.clone() if backend == "mmap" else tensor)
        return tensors

    return read


def _transformers(directory: Path) -> Callable[[], Any]:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()

    def read() -> Any:
        model = transformers.AutoModel.from_pretrained(directory, dtype="auto")
        for parameter in model.parameters():
            parameter.detach().reshape(-1).view(torch.uint8)[::PAGE_BYTES].sum()
        return model

    return read


READERS: dict[str, tuple[Callable[[Path], Callable[[], Any]], tuple[str, ...]]] = {
    OURS: (_glm_edge, ()),
    "safetensors flax": (_safetensors_flax, ("safetensors",)),
    "safetensors torch": (functools.partial(_safetensors_torch, backend="mmap"), ("torch",)),
    "safetensors pread": (functools.partial(_safetensors_torch, backend="pread"), ("torch",)),
    "transformers": (_transformers, ("torch", "transformers")),
}


def summary(runs: dict[str, list[dict[str, float]]], size: int) -> dict[str, Any]:
    """Return the medians, the ratios and the results of the limits.

    Args:
      runs: results of `measure` per run, by reader.
      size: total bytes of the safetensors files.

    Returns:
      `bytes`, `readers` (medians and ratios), `fastest` safetensors reader, `memory_holds`,
      `time_holds`.
    """
    medians = {
        reader: {key: statistics.median(run[key] for run in measured) for key in measured[0]}
        for reader, measured in runs.items()
    }
    fastest = min(
        (reader for reader in medians if reader.startswith("safetensors")),
        key=lambda reader: medians[reader]["seconds"],
    )
    for row in medians.values():
        row["time_ratio"] = row["seconds"] / medians[fastest]["seconds"]
        row["memory_ratio"] = row["peak_bytes"] / size
    return {
        "bytes": size,
        "readers": medians,
        "fastest": fastest,
        "memory_holds": medians[OURS]["memory_ratio"] <= MAX_MEMORY_RATIO,
        "time_holds": medians[OURS]["time_ratio"] <= MAX_TIME_RATIO,
    }


def provenance() -> dict[str, Any]:
    """Describe the run, without paths of the machine."""
    from experiments.common.provenance import provenance_of, versions_of

    checkpoint = f"--checkpoint={Path(FLAGS.checkpoint).name}"
    packages = versions_of(("flax", "safetensors", "torch", "transformers"))
    return provenance_of("bench.load", ("rounds", "readers"), [checkpoint], packages, seed=0)


if __name__ == "__main__":
    from glm_edge.cli.console import launch

    define_flags()
    launch(main)
