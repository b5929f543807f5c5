"""Files of a peer: weights and their inputs in, weights and their sizes out.

Shapes: `N` calibration rows, `in` and `out` sides of a matrix, `W` windows of `T` tokens.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.common import child

META = "meta"


class Stored(NamedTuple):
    """A matrix quantized by a peer.

    Attributes:
      dense: effective dense weight, float32 [out, in].
      stored_bits: bits of codes, scales, zero points and headers, as the peer stores them.
      packed_bits: `stored_bits` with codes packed to their width; None if they already are.
    """

    dense: np.ndarray
    stored_bits: int
    packed_bits: int | None = None


@dataclass(frozen=True)
class Task:
    """Inputs of a peer.

    Attributes:
      weights: weights float32 [out, in] by path.
      inputs: file of `write_inputs`, or None for a method without calibration.
      options: options of the method.
      checkpoint: Hugging Face directory of the same decoder, with a tokenizer.
    """

    weights: dict[str, np.ndarray]
    inputs: Path | None
    options: dict[str, Any]
    checkpoint: Path | None

    def rows(self, path: str, limit: int | None = None) -> np.ndarray:
        """Return at most `limit` evenly spaced calibration inputs of a weight, float32 [N, in]."""
        with np.load(self._inputs()) as file:
            shared = dict(file["shared"])
            rows = file[shared.get(path, path)]
        if limit is None or len(rows) <= limit:
            return rows
        return rows[np.linspace(0, len(rows) - 1, limit).astype(int)]

    def tokens(self) -> np.ndarray:
        """Return calibration windows of text, int32 [W, T]."""
        with np.load(self._inputs()) as file:
            return file["tokens"]

    def _inputs(self) -> Path:
        if self.inputs is None:
            raise ValueError("this method needs calibration; pass inputs")
        return self.inputs


def write_inputs(path: Path, rows: dict[str, np.ndarray], tokens: np.ndarray) -> None:
    """Write calibration for peers; store equal inputs, such as those of query and key, once.

    Args:
      path: path of the npz file.
      rows: inputs float32 [N, in] by the path of their weight.
      tokens: token ids int32 [W, T].
    """
    shared: list[tuple[str, str]] = []
    arrays: dict[str, np.ndarray] = {}
    for name, array in rows.items():
        same = next((k for k, v in arrays.items() if np.array_equal(v, array)), None)
        if same is None:
            arrays[name] = array
        else:
            shared.append((name, same))
    np.savez(path, tokens=tokens, shared=np.array(shared, str).reshape(-1, 2), **arrays)


def serve(quantize: Callable[[Task], dict[str, Stored]], packages: dict[str, str]) -> None:
    """Answer requests to quantize: read a task, time `quantize`, write its matrices.

    Args:
      quantize: gives every weight of the task back.
      packages: distributions whose versions are noted, and the module of each, imported before
        the clock starts.
    """

    def answer(
        weights: str, out: str, options: dict[str, Any], checkpoint: str, inputs: str | None = None
    ) -> dict[str, Any]:
        with np.load(weights) as file:
            dense = {path: file[path] for path in file.files}
        task = Task(dense, None if inputs is None else Path(inputs), options, Path(checkpoint))
        start = time.perf_counter()
        stored = quantize(task)
        seconds = time.perf_counter() - start
        write(Path(out), stored, dense, {"seconds": seconds})
        return {}

    child.serve(lambda: {"quantize": answer}, packages)


def write(
    path: Path, stored: dict[str, Stored], weights: dict[str, np.ndarray], meta: dict[str, Any]
) -> None:
    """Write a peer's matrices and `meta` with their total bits.

    Raises:
      ValueError: a matrix is missing, has the wrong shape, or is not finite.
    """
    for name, weight in weights.items():
        dense = stored[name].dense
        if dense.shape != weight.shape or not np.isfinite(dense).all():
            raise ValueError(f"{name}: {dense.shape}, expected finite {weight.shape}")
    bits = sum(stored[name].stored_bits for name in weights)
    packed = sum(s.stored_bits if s.packed_bits is None else s.packed_bits for s in stored.values())
    meta = {**meta, "stored_bits": int(bits), "packed_bits": int(packed)}
    meta["weights"] = sum(weight.size for weight in weights.values())
    meta["peak_rss_bytes"] = child.peak_bytes()
    dense = {name: np.asarray(stored[name].dense, np.float32) for name in weights}
    np.savez(path, **{META: np.array(json.dumps(meta))}, **dense)


def hugging_face_name(path: str) -> str:
    """Return the name of the Hugging Face GLM layer with a weight of the decoder."""
    name = path.removesuffix("/weight").removeprefix("decoder/").replace("/", ".")
    return f"model.{name.replace('.attention.', '.self_attn.')}"


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the file of `write`: matrices by path, and `meta`."""
    with np.load(path) as file:
        meta = json.loads(str(file[META]))
        return {name: file[name] for name in file.files if name != META}, meta
