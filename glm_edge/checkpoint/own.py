"""Our own checkpoints: `config.json` with the model and the boxes, and one file of arrays."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from glm_edge import params as boxes
from glm_edge.checkpoint import orbax
from glm_edge.checkpoint.files import (
    CONFIG,
    DTYPES,
    WEIGHTS,
    SafetensorsFile,
    check_finite,
    write_json,
    write_safetensors,
)
from glm_edge.checkpoint.placement import Placement
from glm_edge.checkpoint.reading import file_inside
from glm_edge.checkpoint.shapes import (
    ARCHITECTURES,
    check_depth,
    check_names,
    check_params,
    config_from_json,
)
from glm_edge.configs import to_dict
from glm_edge.errors import BoxError, CheckpointError

FORMAT = "glm_edge"
VERSION = 1
STORES = ("safetensors", "orbax")
_FIELDS = {"Masked": ("value", "mask"), "Quantized": ("data", "scale", "zero")}


def write(directory: Path, model: nn.Module, params: Any, store: str) -> None:
    """Writes a model and its parameters into an empty directory, config.json last.

    Args:
      directory: to write into.
      model: whose configuration is written.
      params: tree of arrays and boxes; bytes are stored as they are.
      store: `safetensors` or `orbax`.
    """
    arrays, spec = boxes.to_flat(params)
    fields = {
        "format": FORMAT,
        "version": VERSION,
        "store": store,
        "architecture": type(model).__name__,
        "config": to_dict(model.config),
        "params": spec,
    }
    if store == "orbax":
        fields["arrays"] = orbax.write(directory, arrays)
    else:
        write_safetensors(directory / WEIGHTS, arrays)
    # A directory without config.json does not load, so an interrupted one never looks whole.
    write_json(directory / CONFIG, fields)


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
    return module(config_from_json(fields.get("config"), str(where), kind))


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
    if store == "orbax":
        source, stored = directory / orbax.ARRAYS, orbax.read(directory, fields.get("arrays"))
    else:
        source = directory / WEIGHTS
        file = SafetensorsFile(file_inside(directory, WEIGHTS))
        stored = {
            name: jax.ShapeDtypeStruct(info.shape, DTYPES[info.dtype])
            for name, info in file.tensors.items()
        }
    _check_box_fields(stored, spec, source)
    check_depth(model.config, len(stored), str(source))
    try:
        params = boxes.from_flat(stored, spec)
    except (BoxError, KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    check_params(params, model, str(source))
    arrays = {}
    for name, destination in placement.plan(params, model.config).items():
        array = stored[name] if store == "orbax" else destination.read(file, name)
        check_finite(array, f"{source}: tensor {name!r}")
        arrays[name] = destination.put(array)
    return model, boxes.from_flat(arrays, spec)


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
        needed = {f"{path}.{field}": "of its box" for field in known if field != "zero"}
        if f"{path}.zero" in stored and "zero" in known:
            needed[f"{path}.zero"] = "of its box"
        check_names(stored, needed, str(source))
