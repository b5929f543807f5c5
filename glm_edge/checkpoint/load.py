"""Loading and saving a model with its parameters, whatever the directory's format."""

import importlib.resources
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from glm_edge import params as boxes
from glm_edge.checkpoint import hugging_face, native, orbax
from glm_edge.checkpoint.companions import read_companions
from glm_edge.checkpoint.orbax import ARRAYS
from glm_edge.checkpoint.placement import Placement
from glm_edge.checkpoint.safetensors import WEIGHTS, check_finite
from glm_edge.checkpoint.shapes import check_params
from glm_edge.configs.stop_tokens import with_stop_tokens
from glm_edge.errors import CheckpointError, ConfigError, OutputError
from glm_edge.files import CONFIG, MAX_FILE_NAME, file_inside, read_bytes, read_json
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.models.text import TextEncoder
from glm_edge.params.sharding import RULES, Rules
from glm_edge.params.tree import Params
from glm_edge.writers import check_writable_name, new_directory, no_directory

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
FORMATS = ("hugging_face", *native.STORES)
_OWN_FILES = (CONFIG, WEIGHTS, ARRAYS)
_MAX_EXTRA_BYTES = 1 << 30
_ORBAX_FILES = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt")


def load(
    path: str | os.PathLike,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    model: nn.Module | None = None,
    like: Params | None = None,
) -> tuple[nn.Module, Params]:
    """Opens a checkpoint directory.

    Activations are float32 whatever type the weights are stored in, so a model computes the same
    numbers from bfloat16 weights as from the same weights cast to float32.

    The tokens that end an answer (`model.config.eos_token_ids`) are those of generation_config.json
    where it names some, else those of config.json, else those of its `text_config`.

        model, params = ge.load("path/to/checkpoint", dtype="float32")

    Args:
      path: directory written by `save`, or a Hugging Face directory of the GLM family (config.json,
        one or several safetensors files).
      dtype: type to which trainable weights are cast; None keeps the stored one. Integers, masks
        and scales of compressed weights always keep theirs. Train in float32.
      mesh: devices to spread the parameters over, maybe of several processes; None puts them on
        the default device.
      rules: which logical axis of a parameter is cut along which axis of the mesh, see
        `glm_edge.params.sharding`.
      model: the module whose parameters the directory holds, where it is not one of this library;
        its class and its plain fields must be those of the module that was saved.
      like: parameters of `model`, abstract ones do, such as
        `jax.eval_shape(model.init, key, x)["params"]`: paths and dense shapes are checked against
        theirs.

    Returns:
      `(model, params)`: a Linen module with its `config`, and its tree of arrays and boxes.

    Raises:
      CheckpointError: a file is missing, truncated, of another format, or does not fit the model.
      ConfigError: config.json names an unknown model, or a field is missing or not known;
        or `rules` name no axis of the mesh.
    """
    directory = _checked_path("load", path)
    _check_dtype(dtype)
    if not os.path.isdir(directory):
        raise CheckpointError(no_directory(directory))
    if not os.path.lexists(directory / CONFIG):
        raise CheckpointError(_without_config(directory))
    fields = read_json(file_inside(directory, CONFIG))
    placement = Placement(mesh, rules)
    if fields.get("format") == native.FORMAT:
        model, params = native.read(directory, fields, placement, model, like)
        return model, params if dtype is None else boxes.cast(params, dtype)
    if "model_type" in fields:
        if model is not None:
            raise CheckpointError(f"{directory}: names its own model; leave out model=")
        return hugging_face.read(directory, fields, dtype, placement)
    raise ConfigError(
        f"{directory / CONFIG}: neither a glm_edge checkpoint ('format': {native.FORMAT!r}) nor a "
        "Hugging Face one ('model_type')"
    )


def build(path: str | os.PathLike) -> nn.Module:
    """Makes the module that a config.json describes, without weights.

    Args:
      path: directory of a checkpoint, or the file itself.

    Returns:
      The module, whose parameters `jax.eval_shape` counts and `init` draws at random.

    Raises:
      CheckpointError: the file is missing, damaged, or a link that leads out of its directory.
      ConfigError: it names an unknown model, or a field is missing or not known.
    """
    path = _checked_path("build", path)
    file = path / CONFIG if os.path.isdir(path) else path
    # A path with this ending is meant as the file itself, not as a repository.
    if not os.path.lexists(file) and file.suffix != ".json":
        raise CheckpointError(no_directory(file))
    fields = read_json(file_inside(file.parent, file.name))
    if fields.get("format") == native.FORMAT:
        return native.build(fields, file)
    name = str(fields.get("_name_or_path") or file.resolve().parent.name)
    member, config = hugging_face.read_config(fields, str(file), name)
    return member.build(with_stop_tokens(config, file.parent))


def save(
    model: nn.Module,
    params: Params,
    path: str | os.PathLike,
    format: str | None = None,
    overwrite: bool = False,
    extras: Mapping[str, str | os.PathLike | bytes] | None = None,
    source: str | os.PathLike | None = None,
) -> Path:
    """Writes a model and its parameters as a directory that appears whole or not at all.

    How products are computed (`model.compute`) is chosen at run time and not stored. Of a module
    that is not one of this library, parameters are stored with their boxes, and `load` is given the
    module:

        ge.save(module, params, "compressed")
        module, params = ge.load("compressed", model=module)

        ge.save(model, params, "copy", source="path/to/checkpoint")

    Args:
      model: whose configuration is written; any Linen module.
      params: tree of arrays and boxes; bytes are stored as they are.
      path: directory to create.
      format: `hugging_face` (what transformers opens: dense models of the family), `safetensors`
        (ours: anything, compressed or pruned) or `orbax`; None is the first of these that can hold
        the model.
      overwrite: replaces an existing checkpoint.
      extras: further files by name, such as `{"tokenizer.json": path or bytes}`.
      source: directory that the model was loaded from: its tokenizer, chat template, processor
        and generation files are copied, see `glm_edge.checkpoint.companions`; `extras` replace
        files of the same name.

    Returns:
      The directory.

    Raises:
      CheckpointError: parameters do not fit the model or are not finite, the format cannot hold
        them, or a file to copy is missing.
      OutputError: the directory exists and may not be replaced, or cannot be written.
    """
    if format not in (None, *FORMATS):
        raise CheckpointError(f"format {format!r} is unknown; known: {', '.join(FORMATS)}")
    if isinstance(model, str | os.PathLike) or not isinstance(path, str | os.PathLike):
        raise CheckpointError(
            f"call it as save(model, params, path), not save({type(model).__name__}, "
            f"{type(params).__name__}, {type(path).__name__})"
        )
    target = check_writable_name(path)
    if format == "orbax":
        orbax.check_path(target, OutputError)
    contents = {} if source is None else read_companions(source)
    contents |= read_extras(extras)
    stock = native.is_stock(model)
    if stock:
        native.check_stock(model, params, str(target))
    else:
        check_params(params, model, str(target))
    for name, array in boxes.to_flat(params)[0].items():
        check_finite(np.asarray(array), f"{target}: tensor {name!r}")
    native.check_reaches(params, str(target))
    described = None
    if stock and format == "hugging_face":
        raise CheckpointError(f"{target}: no Hugging Face member is a {type(model).__name__}")
    if not stock and format in (None, "hugging_face"):
        described = hugging_face.fields_of(model.config, params)
        if described is None and format:
            raise CheckpointError(
                f"{target}: no Hugging Face member holds this model (boxes, widths that differ by "
                "layer, or encoders of another shape); save it with format='safetensors'"
            )
    with new_directory(target, overwrite) as temporary:
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
        if described is None:
            native.write(temporary, model, params, format or "safetensors")
        else:
            hugging_face.write(temporary, model.config, params, described)
    reads_text = isinstance(model, MultimodalGLM | TextEncoder)
    if source is None and extras is None and reads_text:
        warnings.warn(
            f"{target}: saved without a tokenizer, so it cannot read text by itself; pass source= "
            "the directory that the model was loaded from, or extras={} where that is meant",
            stacklevel=2,
        )
    return target


def shipped(name: str = "nano") -> Path:
    """Returns the directory of a checkpoint that comes with the package.

    Args:
      name: of the checkpoint.

    Returns:
      Its directory, for `load` and `load_tokenizer`.

    Raises:
      CheckpointError: the package holds none of this name.
    """
    assets = Path(str(importlib.resources.files("glm_edge") / "assets"))
    known = sorted(path.parent.name for path in assets.glob(f"*/{CONFIG}"))
    if name not in known:
        raise CheckpointError(
            f"no checkpoint {name!r} comes with glm_edge; known: {', '.join(known) or 'none'}"
        )
    return assets / name


def load_tokenizer(path: str | os.PathLike) -> "Tokenizer":
    """Opens the tokenizer of a checkpoint, as `glm_edge.Processor` does.

    Padding and truncation that its file may ask for are left out: they would cut texts and put
    padding among tokens that are calibrated on.

    Args:
      path: directory of the checkpoint.

    Returns:
      A `tokenizers.Tokenizer`.

    Raises:
      CheckpointError: the directory does not exist, holds no tokenizer.json, or one that is damaged
        or that asks for what may not end or takes memory without bound.
    """
    from glm_edge.preprocess.tokenizer_files import read_tokenizer

    directory = _checked_path("load_tokenizer", path)
    if not os.path.isdir(directory):
        raise CheckpointError(no_directory(directory))
    return read_tokenizer(directory / TOKENIZER)


def _checked_path(name: str, path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(
            f"{name}: path must be that of a checkpoint's directory, not a {type(path).__name__}"
        )
    return Path(path)


def _check_dtype(dtype: str | None) -> None:
    floating = ("float32", "bfloat16", "float16")
    try:
        known = dtype is None or str(jnp.dtype(dtype)) in floating
    except TypeError:
        known = False
    if not known:
        raise CheckpointError(f"dtype {dtype!r} is unknown; known: {', '.join(floating)} or None")


def _without_config(directory: Path) -> str:
    if any((directory / name).exists() for name in _ORBAX_FILES):
        return (
            f"{directory}: an Orbax directory without {CONFIG}; arrays alone do not say which "
            "model they belong to nor how they are packed: save with glm_edge.save(format='orbax')"
        )
    return f"{directory}: holds no {CONFIG}; a checkpoint is a directory with one"


def read_extras(extras: Mapping[str, str | os.PathLike | bytes] | None) -> dict[str, bytes]:
    """Reads further files that go into a checkpoint.

    Args:
      extras: path or bytes by name; None for none.

    Returns:
      Bytes by name.

    Raises:
      OutputError: a name is not a plain one, or that of a file which the checkpoint has.
      CheckpointError: a source cannot be read.
    """
    return {name: _read_extra(name, source) for name, source in (extras or {}).items()}


def _read_extra(name: str, source: str | os.PathLike | bytes) -> bytes:
    plain = isinstance(name, str) and name == Path(name).name and name.isprintable()
    ours = name in _OWN_FILES or (plain and name.endswith((".safetensors", ".safetensors.json")))
    if not plain or name in ("", ".", "..") or len(os.fsencode(name)) > MAX_FILE_NAME or ours:
        raise OutputError(
            f"extra file {str(name)[:200]!r} must be a plain name other than {_OWN_FILES}"
        )
    if isinstance(source, bytes):
        return source
    return read_bytes(source, _MAX_EXTRA_BYTES)
