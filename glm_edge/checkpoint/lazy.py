"""A checkpoint with parameters that are read on demand."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn

from glm_edge import params as boxes
from glm_edge.checkpoint import gguf, hugging_face, native
from glm_edge.checkpoint.placement import Placement
from glm_edge.errors import CheckpointError
from glm_edge.files import CONFIG, file_inside, read_json
from glm_edge.gguf_file import find_gguf
from glm_edge.writers import no_directory


@dataclass(frozen=True)
class LazyCheckpoint:
    """A checkpoint with checked headers, whose parameters are read on demand.

    Attributes:
      model: module without parameters.
      abstract: abstract array or box of every parameter by path.
      files: files that store the arrays.
    """

    model: nn.Module
    abstract: dict[str, Any]
    files: tuple[Path, ...]
    _source: Any

    def read(self, paths: Iterable[str]) -> dict[str, Any]:
        """Read parameters in their stored types.

        Args:
          paths: parameter paths.

        Returns:
          Arrays or boxes by path, in the order of `paths`.

        Raises:
          CheckpointError: a tensor is damaged or not finite.
        """
        wanted = list(paths)
        if isinstance(self._source, native.NativeSource):
            leaves = self._read_native(wanted)
        else:
            leaves = self._read_tensors(wanted)
        return {path: leaves[path] for path in wanted}

    def fingerprint(self) -> str:
        """Compute a digest of file names, sizes and modification times."""
        digest = hashlib.sha256()
        for file in self.files:
            status = os.stat(file)
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _read_native(self, wanted: list[str]) -> dict[str, Any]:
        leaves: dict[str, Any] = {}
        for path in wanted:
            leaf = self.abstract[path]
            plan = Placement().plan({path: leaf}, self.model.config)
            arrays = {name: to.put(self._source.read(name, to)) for name, to in plan.items()}
            spec = {path: self._source.spec[path]} if boxes.is_box(leaf) else {}
            leaves |= dict(boxes.path_items(boxes.from_flat(arrays, spec)))
        return leaves

    def _read_tensors(self, wanted: list[str]) -> dict[str, Any]:
        plan = Placement().plan(self.abstract, self.model.config)
        leaves: dict[str, Any] = {}
        for entry in self._source.entries:
            if not set(entry.paths) & set(wanted):
                continue
            leaves |= self._source.leaves(entry, plan, None)
        return leaves


def open_lazily(path: str | os.PathLike) -> LazyCheckpoint:
    """Open a checkpoint without reading its arrays.

    Args:
      path: path for `glm_edge.load`, except a directory stored with Orbax. Blocks of a GGUF file
        are dequantized.

    Returns:
      The checkpoint.

    Raises:
      CheckpointError: a file is missing, damaged or does not match the model, or the directory is
        an Orbax directory.
      ConfigError: config.json names an unknown model, or a field is missing or unsupported.
    """
    directory = Path(path)
    file = find_gguf(directory)
    if file is not None:
        source = gguf.open_file(file)
        return LazyCheckpoint(source.model, source.abstract(), (file,), source)
    if not directory.is_dir():
        raise CheckpointError(no_directory(directory))
    fields = read_json(file_inside(directory, CONFIG))
    if fields.get("format") != native.FORMAT:
        source = hugging_face.open_directory(directory, fields)
        return LazyCheckpoint(source.model, source.abstract(), _paths(source.files), source)
    if fields.get("store") == "orbax":
        raise CheckpointError(
            f"{directory}: an Orbax directory cannot be read in parts; load it and save it with "
            "format='safetensors' first"
        )
    stored = native.open_directory(directory, fields)
    abstract = dict(boxes.path_items(stored.params))
    return LazyCheckpoint(stored.model, abstract, _paths(stored.files), stored)


def _paths(files: dict[str, Any]) -> tuple[Path, ...]:
    return tuple(sorted({file.path for file in files.values()}))
