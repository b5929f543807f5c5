"""Our own checkpoints: `config.json` with the model and the boxes, and one file of arrays."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from glm_edge import params as boxes
from glm_edge.checkpoint import orbax
from glm_edge.checkpoint.files import (
    DTYPES,
    WEIGHTS,
    SafetensorsFile,
    by_tensor,
    check_finite,
    write_safetensors,
)
from glm_edge.checkpoint.placement import Destination, Placement
from glm_edge.checkpoint.shapes import (
    ARCHITECTURES,
    check_depth,
    check_names,
    check_params,
    config_from_json,
)
from glm_edge.configs import to_dict
from glm_edge.configs.stop_tokens import with_stop_tokens
from glm_edge.errors import BoxError, CheckpointError
from glm_edge.files import CONFIG, file_inside, write_json

FORMAT = "glm_edge"
VERSION = 1
STORES = ("safetensors", "orbax")
_STATIC = ("input_scale", "input_zero", "output_scale", "output_zero")
_FIELDS = {
    "Masked": ("value", "mask"),
    "Quantized": ("data", "scale", "zero", *_STATIC),
    "FakeQuantized": ("value", "scale", "zero"),
}
_OPTIONAL = ("zero", *_STATIC)


def write(directory: Path, model: nn.Module, params: Any, store: str) -> None:
    """Writes a model and its parameters into an empty directory, config.json last.

    Args:
      directory: to write into.
      model: whose configuration is written.
      params: tree of arrays and boxes; bytes are stored as they are.
      store: `safetensors` or `orbax`.
    """
    arrays, spec = boxes.to_flat(params)
    fields = describe(model, spec, store)
    if store == "orbax":
        fields["arrays"] = orbax.write(directory, arrays)
    else:
        write_safetensors(directory / WEIGHTS, arrays)
    # A directory without config.json does not load, so an interrupted one never looks whole.
    write_json(directory / CONFIG, fields)


def describe(model: nn.Module, spec: dict[str, Any], store: str = "safetensors") -> dict[str, Any]:
    """Fields of config.json.

    Args:
      model: whose configuration is written.
      spec: of the boxes, see `glm_edge.params.to_flat`.
      store: `safetensors` or `orbax`.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "store": store,
        "architecture": type(model).__name__,
        "config": to_dict(model.config),
        "params": spec,
    }


def build(fields: dict[str, Any], where: Path) -> nn.Module:
    """Makes the module that a config.json of ours describes.

    Args:
      fields: of the file.
      where: the file, for messages.

    Returns:
      The module, without parameters.

    Raises:
      CheckpointError: the architecture is unknown.
      ConfigError: the configuration is not one.
    """
    architecture = fields.get("architecture", "MultimodalGLM")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{where}: architecture {architecture!r:.60} is unknown; known: "
            f"{', '.join(ARCHITECTURES)}"
        )
    module, kind = ARCHITECTURES[architecture]
    config = config_from_json(fields.get("config"), str(where), kind)
    return module(with_stop_tokens(config, where.parent))


def read(directory: Path, fields: dict[str, Any], placement: Placement) -> tuple[nn.Module, Any]:
    """Reads a directory that `write` wrote.

    Args:
      directory: of the checkpoint.
      fields: its config.json.
      placement: says on which devices the arrays go.

    Returns:
      `(model, params)`.

    Raises:
      CheckpointError: files are missing or damaged, or do not fit the configuration.
      ConfigError: the configuration is not one.
    """
    source = open_directory(directory, fields)
    arrays = {}
    for name, destination in placement.plan(source.params, source.model.config).items():
        arrays[name] = destination.put(source.read(name, destination))
    return source.model, boxes.from_flat(arrays, source.spec)


@dataclass(frozen=True)
class Source:
    """A directory whose headers have been checked and whose arrays are read on demand.

    Attributes:
      model: without parameters.
      params: abstract arrays and boxes.
      spec: of the boxes, see `glm_edge.params.to_flat`.
      files: name of an array to its file; empty for Orbax.
      restored: arrays of an Orbax directory, which is read whole.
    """

    model: nn.Module
    params: Any
    spec: dict[str, Any]
    files: dict[str, SafetensorsFile]
    restored: dict[str, Any]

    def read(self, name: str, destination: Destination) -> np.ndarray:
        """Reads one array.

        Raises:
          CheckpointError: it is damaged or not finite.
        """
        if name in self.restored:
            array, where = self.restored[name], orbax.ARRAYS
        else:
            file = self.files[name]
            array, where = destination.read(file, name), file.path
        check_finite(array, f"{where}: tensor {name!r}")
        return array


def open_directory(directory: Path, fields: dict[str, Any]) -> Source:
    """Checks the headers of a directory; arguments and errors as in `read`."""
    where = directory / CONFIG
    if fields.get("version") != VERSION:
        raise CheckpointError(
            f"{where}: version {fields.get('version')!r:.60} is unknown; this library reads "
            f"{VERSION}"
        )
    store, spec = fields.get("store"), fields.get("params")
    if store not in STORES:
        raise CheckpointError(
            f"{where}: store {store!r:.60} is unknown; known: {', '.join(STORES)}"
        )
    if not isinstance(spec, dict) or not all(isinstance(box, dict) for box in spec.values()):
        raise CheckpointError(
            f"{where}: 'params' must describe the boxes of the arrays; without it their bytes "
            "have no meaning"
        )
    model = build(fields, where)
    files, restored = {}, {}
    if store == "orbax":
        source = directory / orbax.ARRAYS
        stored = restored = orbax.read(directory, fields.get("arrays"))
    else:
        source = directory / WEIGHTS
        files = _tensor_files(directory, fields.get("files", [WEIGHTS]))
        stored = {
            name: jax.ShapeDtypeStruct(file.tensors[name].shape, DTYPES[file.tensors[name].dtype])
            for name, file in files.items()
        }
    _check_box_fields(stored, spec, source)
    check_depth(model.config, len(stored), str(source))
    try:
        params = boxes.from_flat(stored, spec)
    except (BoxError, KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    check_params(params, model, str(source))
    return Source(model, params, spec, files, restored)


def _tensor_files(directory: Path, names: Any) -> dict[str, SafetensorsFile]:
    where = directory / CONFIG
    plain = isinstance(names, list) and all(
        isinstance(name, str) and name == Path(name).name for name in names
    )
    if not plain or not names:
        raise CheckpointError(f"{where}: 'files' must list safetensors files of the directory")
    return by_tensor(SafetensorsFile(file_inside(directory, name)) for name in names)


def _check_box_fields(arrays: dict[str, Any], spec: dict[str, Any], source: Path) -> None:
    """Every array of a described box is a field of it, so that none is dropped in silence."""
    for path, static in spec.items():
        known = _FIELDS.get(static.get("box"))
        if known is None:
            raise CheckpointError(
                f"{source}: parameter {path!r:.200}: unknown box {static.get('box')!r:.60}; known: "
                f"{', '.join(_FIELDS)}"
            )
        stored = [name for name in arrays if name.rpartition(".")[0] == path]
        needed = {
            f"{path}.{field}": "of its box"
            for field in known
            if field not in _OPTIONAL or f"{path}.{field}" in stored
        }
        check_names(stored, needed, str(source))
