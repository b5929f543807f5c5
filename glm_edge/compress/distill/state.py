"""A directory with the state of a training, from which an interrupted one resumes."""

import csv
import hashlib
import io
import json
import os
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import Array

from glm_edge.checkpoint.safetensors import SafetensorsFile, write_safetensors
from glm_edge.compress import batches
from glm_edge.compress.calibration import Calibration
from glm_edge.compress.report import Point
from glm_edge.compress.transform import Context
from glm_edge.errors import CheckpointError, OutputError
from glm_edge.files import read_json
from glm_edge.writers import DirectoryLock, check_writable_name, write_json, write_whole

STATE, CURVE, JOB = "state.safetensors", "curve.csv", "job.json"
_LOSSES, _KEYS = "losses", "seen"


class StateDirectory:
    """State after the last saved step: arrays, optimizer, and the losses of all steps so far.

    The number of steps, the key and the batches of the job determine the order of data, so the
    state need not hold it.

    Attributes:
      path: of the directory. It holds `state.safetensors`, which is written beside and renamed, so
        that the file is always complete; `curve.csv`, one line per step; and `job.json`.
    """

    def __init__(self, name: str, path: str | Path, job: dict[str, Any]) -> None:
        """Make the directory, or open that of an equal job.

        Args:
          name: of the transform, for messages.
          path: of the directory.
          job: everything that determines the bytes of the result, JSON-ready.

        Raises:
          OutputError: the directory cannot be written, or holds the state of another job.
        """
        self.path = check_writable_name(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # A failed run of this process may still hold the lock.
            self._lock = DirectoryLock(self.path, self.path, again=True)
            if not (self.path / JOB).exists():
                write_whole(self.path / JOB, lambda file: write_json(file, job))
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
        stored, job = read_json(self.path / JOB), json.loads(json.dumps(job))
        for field, value in job.items():
            if stored.get(field) != value:
                raise OutputError(
                    f"{path}: holds the state of a {name} with another {field}"
                    f"{difference(stored, job)}; pass the same arguments on the same machine to "
                    "resume, or another state_dir"
                )

    def save(self, trained: Any, losses: Sequence[Sequence[float]], keys: Collection[str]) -> None:
        """Write the state after `len(losses)` steps in place of the earlier one.

        Args:
          trained: tree of arrays: parameters and optimizer.
          losses: of each step, in the order of `Losses`.
          keys: keys of the batches read so far.

        Raises:
          OutputError: the directory cannot be written.
        """
        arrays = {path: np.asarray(leaf) for path, leaf in _named(trained).items()}
        arrays[_LOSSES] = np.asarray(losses, np.float32)
        arrays[_KEYS] = np.asarray([key in keys for key in batches.KEYS], np.uint8)
        write_whole(self.path / STATE, lambda file: write_safetensors(file, arrays))

    def restore(self, trained: Any) -> tuple[Any, list[list[float]], set[str]]:
        """Read the state.

        Args:
          trained: tree of arrays of the same shapes, for a training without a state.

        Returns:
          `(trained, losses, keys)`: the saved arrays, on the devices of the argument's; losses of
          each completed step; and keys of the batches. Without a state these are the argument, no
          losses and no keys.

        Raises:
          CheckpointError: the state is damaged.
        """
        file = self.path / STATE
        if not file.exists():
            return trained, [], set()
        stored = SafetensorsFile(file)
        named = _named(trained)
        if set(stored.tensors) != {*named, _LOSSES, _KEYS}:
            raise CheckpointError(f"{file}: is not the state of these parameters; remove it")
        # A step reuses the memory of its arguments, so they must be copies on the device.
        arrays = {path: jnp.array(stored.read(path), copy=True) for path in named}
        leaves = [
            jax.device_put(arrays[path], leaf.sharding) if leaf.committed else arrays[path]
            for path, leaf in named.items()
        ]
        # An earlier version had fewer keys; new ones are at the end.
        keys = {key for key, was in zip(batches.KEYS, stored.read(_KEYS), strict=False) if was}
        trained = jax.tree.unflatten(jax.tree.structure(trained), leaves)
        return trained, stored.read(_LOSSES).tolist(), keys

    def write_curve(self, curve: Sequence[Point]) -> None:
        """Write `curve.csv` with unrounded values.

        Raises:
          OutputError: the directory cannot be written.
        """
        text = io.StringIO()
        names = [field.name for field in fields(curve[0] if curve else Point)]
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(point) for point in curve)
        write_whole(self.path / CURVE, lambda file: file.write_text(text.getvalue()))


def job_of(
    recipe: dict[str, Any],
    student: tuple[Any, Any],
    teacher: tuple[Any, Any] | None,
    context: Context,
) -> dict[str, Any]:
    """List everything that determines the bytes of a training, JSON-ready.

    Args:
      recipe: options.
      student: `(model, params)`, where params are any tree.
      teacher: `(model, params)`, or None.
      context: with calibration.
    """

    def described(model: Any, params: Any) -> list[str | None]:
        config = repr(getattr(model, "config", None))
        return [type(model).__name__, config, getattr(model, "compute", None), digest(params)]

    rng = context.rng
    return {
        "recipe": recipe,
        "student": described(*student),
        "teacher": teacher and described(*teacher),
        "calibration": calibration_digest(context.batches),
        "rng": None if rng is None else np.asarray(jax.random.key_data(rng)).tolist(),
        "machine": machine(),
    }


def machine(any_cores: bool = False) -> dict[str, Any]:
    """Describe the hardware and versions that the last bits of sums depend on, JSON-ready.

    Args:
      any_cores: omits the number of cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = jax.devices()[0]
    return {
        "platform": f"{device.platform} {device.device_kind}",
        "processor": f"{platform.machine()} {_processor()}".strip(),
        **({} if any_cores else {"cores": cores}),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }


def difference(stored: dict[str, Any], job: dict[str, Any]) -> str:
    """Describe in brackets how the machines of two jobs differ; empty where they do not."""
    was, now = stored.get("machine"), job["machine"]
    if not isinstance(was, dict) or was == now:
        return ""
    parts = (f"{key} {was.get(key)}, now {now[key]}" for key in now if was.get(key) != now[key])
    return f" ({'; '.join(parts)})"


def _processor() -> str:
    """Return the name of the processor, whose instructions determine the order of sums."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = (line.partition(":")[2].strip() for line in file if "model name" in line)
            return next(names, "")
    except OSError:
        return platform.processor()


def calibration_digest(calibration: Iterable[Any]) -> str:
    """Compute SHA-256 of all batches, and of the code of the functions that read them."""
    parts: list[Any] = [digest(batch) for batch in calibration]
    if isinstance(calibration, Calibration):
        parts += [digest(calibration.variables)]
        parts += [_code(function) for function in (calibration.apply, calibration.loss)]
        if calibration.augment is not None:
            parts.append(_code(calibration.augment))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _code(function: Any) -> str:
    """Identify a function by its name and its compiled code."""
    code = getattr(function, "__code__", None)
    kind = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"
    if code is None:
        return kind
    constants = [value for value in code.co_consts if isinstance(value, int | float | str | bytes)]
    return f"{kind} {hashlib.sha256(code.co_code).hexdigest()} {constants}"


def digest(tree: Any) -> str:
    """Compute SHA-256 of the names, types, shapes and bytes of a tree's arrays."""
    hashed = hashlib.sha256()
    tree = dict(tree) if isinstance(tree, Mapping) else tree
    for path, leaf in _named(tree).items():
        array = np.ascontiguousarray(leaf)
        hashed.update(f"{path} {array.dtype} {array.shape}\n".encode())
        hashed.update(array.reshape(-1).view(np.uint8).data)
    return hashed.hexdigest()


def _named(tree: Any) -> dict[str, Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
