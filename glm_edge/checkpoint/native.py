"""Native checkpoints: a `config.json` that describes model and boxes, and a file of arrays."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import unfreeze

from glm_edge import params as boxes
from glm_edge.checkpoint import orbax
from glm_edge.checkpoint.placement import Destination, Placement
from glm_edge.checkpoint.safetensors import (
    DTYPES,
    WEIGHTS,
    SafetensorsFile,
    by_tensor,
    check_finite,
    write_safetensors,
)
from glm_edge.checkpoint.shapes import (
    ARCHITECTURES,
    check_against,
    check_depth,
    check_names,
    check_params,
    config_from_json,
)
from glm_edge.configs import to_dict
from glm_edge.configs.stop_tokens import with_stop_tokens
from glm_edge.errors import BoxError, CheckpointError
from glm_edge.files import CONFIG, file_inside
from glm_edge.params.boxes import check_reach
from glm_edge.params.tree import Params
from glm_edge.writers import write_json

FORMAT = "glm_edge"
VERSION = 1
# Architecture name of Linen modules from outside this library.
STOCK = "linen"
STORES = ("safetensors", "orbax")
_STATIC = ("input_scale", "input_zero", "output_scale", "output_zero")
_FIELDS = {
    "Masked": ("value", "mask"),
    "Quantized": ("data", "scale", "zero", *_STATIC),
    "FakeQuantized": ("value", "scale", "zero"),
    "Narrow": ("value",),
}
_OPTIONAL = ("zero", *_STATIC)


def write(directory: Path, model: nn.Module, params: Params, store: str) -> None:
    """Write a model and its parameters into an empty directory, config.json last.

    Args:
      directory: empty directory.
      model: model with the configuration to write.
      params: tree of arrays and boxes, stored without conversion.
      store: `safetensors` or `orbax`.
    """
    arrays, spec = boxes.to_flat(params)
    fields = describe(model, spec, store)
    if store == "orbax":
        fields["arrays"] = orbax.write(directory, arrays)
    else:
        write_safetensors(directory / WEIGHTS, arrays)
    # A directory without config.json does not load, so an interrupted write is never loaded.
    write_json(directory / CONFIG, fields)


def describe(model: nn.Module, spec: dict[str, Any], store: str = "safetensors") -> dict[str, Any]:
    """Return the fields of config.json.

    Args:
      model: model with the configuration to describe. For a module from outside this library,
        its class and JSON-compatible fields are described.
      spec: description of boxes from `glm_edge.params.to_flat`.
      store: `safetensors` or `orbax`.

    Returns:
      JSON-ready fields.
    """
    fields = {"format": FORMAT, "version": VERSION, "store": store}
    if is_stock(model):
        stock = {"class": type(model).__name__, "fields": _plain_fields(model)}
        return {**fields, "architecture": STOCK, "module": stock, "params": spec}
    fields |= {"architecture": type(model).__name__, "config": to_dict(model.config)}
    return {**fields, "params": spec}


def is_stock(model: Any) -> bool:
    """Test for a Linen module from outside this library, which `load` needs as an argument."""
    return type(model).__name__ not in ARCHITECTURES


def check_stock(model: Any, params: Any, where: str) -> None:
    """Check that a model from outside this library can be saved with its parameters.

    Args:
      model: model to save.
      params: parameters of the model.
      where: directory for messages.

    Raises:
      CheckpointError: the model is not a Linen module, `params` is not a tree of arrays and boxes,
        or paths are ambiguous.
    """
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            f"{where}: a checkpoint stores one of {', '.join(ARCHITECTURES)} or your own Linen "
            f"module, not a {type(model).__name__}; for nnx, save "
            "nnx.to_pure_dict(nnx.state(module)) with a Linen module of the same parameters"
        )
    leaves = dict(boxes.path_items(params)) if isinstance(params, Mapping) else {}
    arrays = all(boxes.is_box(leaf) or hasattr(leaf, "dtype") for leaf in leaves.values())
    if not leaves or not arrays:
        raise CheckpointError(
            f"{where}: params is a {type(params).__name__}; it must be the nested dict of "
            "model.init(...)['params'], with arrays and boxes (for a TrainState, its params)"
        )
    again = boxes.from_flat(*boxes.to_flat(params))
    like: Any = jax.tree.structure(unfreeze(params))
    if jax.tree.structure(again) != like:
        raise CheckpointError(
            f"{where}: params must be nested dicts whose names do not contain '/' and do not end "
            "like a field of a box"
        )


def _plain_fields(module: nn.Module) -> dict[str, Any]:
    fields = {
        field.name: getattr(module, field.name, None)
        for field in dataclasses.fields(module)
        if field.name not in ("parent", "name")
    }
    plain = (bool, int, float, str)
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in fields.items()
        if all(isinstance(x, plain) for x in (value if isinstance(value, tuple) else (value,)))
    }


def build(fields: dict[str, Any], where: Path, model: nn.Module | None = None) -> nn.Module:
    """Build the module that a native config.json describes.

    Args:
      fields: fields of config.json.
      where: file for messages.
      model: the module itself, for a checkpoint of a module from outside this library.

    Returns:
      The module, without parameters.

    Raises:
      CheckpointError: the architecture is unknown, or `model` is missing or does not match.
      ConfigError: the configuration is malformed.
    """
    architecture = fields.get("architecture", "MultimodalGLM")
    if architecture == STOCK:
        return _checked_stock(fields.get("module"), where, model)
    if model is not None:
        raise CheckpointError(
            f"{where}: describes a {architecture!r:.60}, which load builds; remove model="
        )
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{where}: architecture {architecture!r:.60} is unknown; known: "
            f"{', '.join(ARCHITECTURES)}"
        )
    module, kind = ARCHITECTURES[architecture]
    config = config_from_json(fields.get("config"), str(where), kind)
    return module(with_stop_tokens(config, where.parent))


def _checked_stock(stored: Any, where: Path, model: nn.Module | None) -> nn.Module:
    named = isinstance(stored, dict) and isinstance(stored.get("class"), str)
    if not named or not isinstance(stored.get("fields"), dict):
        raise CheckpointError(f"{where}: 'module' must name the class and fields of a module")
    if model is None:
        raise CheckpointError(
            f"{where}: has the parameters of a {stored['class']!r:.60}, your own module; pass it: "
            "load(path, model=module)"
        )
    if type(model).__name__ != stored["class"]:
        raise CheckpointError(
            f"{where}: has the parameters of a {stored['class']!r:.60}, not of a "
            f"{type(model).__name__}"
        )
    fields = _plain_fields(model)
    for name in sorted(set(fields) & set(stored["fields"])):
        if fields[name] != stored["fields"][name]:
            raise CheckpointError(
                f"{where}: {name} of the module is {stored['fields'][name]!r:.60} in the "
                f"checkpoint and {fields[name]!r:.60} in model="
            )
    return model


def read(
    directory: Path,
    fields: dict[str, Any],
    placement: Placement,
    model: nn.Module | None = None,
    like: Params | None = None,
) -> tuple[nn.Module, Params]:
    """Read a directory that `write` wrote.

    Args:
      directory: checkpoint directory.
      fields: fields of config.json.
      placement: placement of arrays on devices.
      model: see `build`.
      like: concrete or abstract parameters whose paths and dense shapes the stored ones must have,
        for a module from outside this library; None disables this check.

    Returns:
      `(model, params)`.

    Raises:
      CheckpointError: files are missing or damaged, or do not match the configuration.
      ConfigError: the configuration is malformed.
    """
    source = open_directory(directory, fields, model, like)
    arrays, config = {}, getattr(source.model, "config", None)
    for name, destination in placement.plan(source.params, config).items():
        arrays[name] = destination.put(source.read(name, destination))
    params = boxes.from_flat(arrays, source.spec)
    check_reaches(params, str(directory))
    return source.model, params


def check_reaches(params: Any, where: str) -> None:
    """Refuse boxes whose dense weights would not be finite.

    Args:
      params: tree of arrays and boxes.
      where: file or directory for messages.

    Raises:
      CheckpointError: the scales of a box are too large for the type of its dense weight.
    """
    for path, leaf in boxes.path_items(params):
        try:
            check_reach(leaf, f"{where}: parameter {path!r}")
        except BoxError as error:
            raise CheckpointError(str(error)) from error


@dataclass(frozen=True)
class NativeSource:
    """A native directory with checked headers, whose arrays are read on demand.

    Attributes:
      model: module without parameters.
      params: tree of abstract arrays and boxes.
      spec: description of boxes, see `glm_edge.params.to_flat`.
      files: file by name of an array; empty for Orbax.
      restored: arrays by name of an Orbax directory, which Orbax reads completely.
    """

    model: nn.Module
    params: Params
    spec: dict[str, Any]
    files: dict[str, SafetensorsFile]
    restored: dict[str, Any]

    def read(self, name: str, destination: Destination) -> np.ndarray:
        """Read one array.

        Args:
          name: name of the array.
          destination: destination of the array, which selects its rows.

        Returns:
          The array, or its rows.

        Raises:
          CheckpointError: the array is damaged or not finite.
        """
        if name in self.restored:
            array, where = self.restored[name], orbax.ARRAYS
        else:
            file = self.files[name]
            array, where = destination.read(file, name), str(file.path)
        check_finite(array, f"{where}: tensor {name!r}")
        return array


def open_directory(
    directory: Path,
    fields: dict[str, Any],
    model: nn.Module | None = None,
    like: Params | None = None,
) -> NativeSource:
    """Check the headers of a directory; arguments and exceptions as in `read`."""
    where = directory / CONFIG
    if fields.get("version") != VERSION:
        raise CheckpointError(
            f"{where}: version {fields.get('version')!r:.60} is unknown; this library reads "
            f"version {VERSION}"
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
    model = build(fields, where, model)
    files: dict[str, SafetensorsFile] = {}
    restored: dict[str, Any] = {}
    stored: Any
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
    if not is_stock(model):
        check_depth(model.config, len(stored), str(source))
    try:
        params = boxes.from_flat(stored, spec)
    except (BoxError, KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    if not is_stock(model):
        check_params(params, model, str(source))
    elif like is not None:
        expected = {path: tuple(leaf.shape) for path, leaf in boxes.path_items(like)}
        check_against(params, expected, str(source))
    return NativeSource(model, params, spec, files, restored)


def _tensor_files(directory: Path, names: Any) -> dict[str, SafetensorsFile]:
    where = directory / CONFIG
    plain = isinstance(names, list) and all(
        isinstance(name, str) and name == Path(name).name for name in names
    )
    if not plain or not names:
        raise CheckpointError(f"{where}: 'files' must list safetensors files of the directory")
    return by_tensor(SafetensorsFile(file_inside(directory, name)) for name in names)


def _check_box_fields(arrays: dict[str, Any], spec: dict[str, Any], source: Path) -> None:
    """Check that every array under the path of a box is a field of it, so that none is lost."""
    for path, static in spec.items():
        kind = static.get("box")
        known = _FIELDS.get(kind) if isinstance(kind, str) else None
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
