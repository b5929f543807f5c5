"""Loading and saving of models with their parameters, in all supported directory formats."""

import importlib.resources
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from glm_edge import params as boxes
from glm_edge.checkpoint import gguf, hugging_face, native, orbax
from glm_edge.checkpoint.companions import read_companions
from glm_edge.checkpoint.orbax import ARRAYS
from glm_edge.checkpoint.placement import Placement
from glm_edge.checkpoint.safetensors import WEIGHTS, check_finite
from glm_edge.checkpoint.shapes import check_params
from glm_edge.configs.stop_tokens import with_stop_tokens
from glm_edge.errors import CheckpointError, ConfigError, OutputError
from glm_edge.files import CONFIG, MAX_FILE_NAME, file_inside, read_bytes, read_json
from glm_edge.gguf_file import SUFFIX, GGUFFile, find_gguf
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
    weights: gguf.Weights = "dense",
) -> tuple[nn.Module, Params]:
    """Load a checkpoint directory, or a GGUF file.

    Activations are float32 for all types of stored weights. A model therefore computes the same
    values from bfloat16 weights as from these weights cast to float32.

    The stop tokens (`model.config.eos_token_ids`) come from generation_config.json if it names
    some, otherwise from config.json, otherwise from its `text_config`.

        model, params = ge.load("path/to/checkpoint", dtype="float32")

    Args:
      path: directory written by `save`; a Hugging Face directory of the GLM family (config.json
        and one or more safetensors files), dense or quantized by compressed-tensors, GPTQ or AWQ;
        or a GGUF file of the architecture `llama`, or a directory with one.
      dtype: type to which trainable weights are cast; None keeps the stored type. Integers, masks
        and scales of compressed weights keep their types. Train in float32.
      mesh: mesh of devices, of one or several processes, over which parameters are sharded; None
        means the default device.
      rules: pairs of a parameter's logical axis and a mesh axis, see `glm_edge.params.sharding`.
      model: module of the stored parameters, if it is from outside this library. Its class and
        plain fields must equal those of the saved module.
      like: concrete or abstract parameters of `model`, such as
        `jax.eval_shape(model.init, key, x)["params"]`. Stored paths and dense shapes must match.
      weights: `dense` dequantizes the blocks of a GGUF file, to float32 without `dtype`. `boxes`
        keeps their codes and scales as `Quantized` boxes. Directories always keep the boxes, or
        the codes and scales, that they store.

    Returns:
      `(model, params)`: a Linen module with its `config`, and its tree of arrays and boxes.

    Raises:
      CheckpointError: a file is missing, truncated, in an unknown format, or does not match the
        model.
      ConfigError: config.json names an unknown model, a field is missing or unsupported, or
        `rules` name no axis of the mesh.
    """
    directory = _checked_path("load", path)
    _check_dtype(dtype)
    if weights not in get_args(gguf.Weights):
        known = " and ".join(map(repr, get_args(gguf.Weights)))
        raise CheckpointError(f"weights {weights!r:.60} is unknown; known: {known}")
    file = find_gguf(directory)
    if file is not None:
        if model is not None:
            raise CheckpointError(f"{file}: describes its own model; remove model=")
        return gguf.read(file, dtype, Placement(mesh, rules), weights)
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
            raise CheckpointError(f"{directory}: describes its own model; remove model=")
        return hugging_face.read(directory, fields, dtype, placement)
    raise ConfigError(
        f"{directory / CONFIG}: neither a glm_edge checkpoint ('format': {native.FORMAT!r}) nor a "
        "Hugging Face checkpoint ('model_type')"
    )


def build(path: str | os.PathLike) -> nn.Module:
    """Build the module that a config.json describes, without weights.

        model = ge.build("path/to/config.json")
        params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]

    Args:
      path: checkpoint directory, path of config.json, or a GGUF file.

    Returns:
      The module, without parameters.

    Raises:
      CheckpointError: the file is missing, damaged, or a link that leads out of its directory.
      ConfigError: the file names an unknown model, or a field is missing or unsupported.
    """
    path = _checked_path("build", path)
    if path.suffix == SUFFIX or os.path.isdir(path):
        stored = find_gguf(path)
        if stored is not None:
            return gguf.build(stored)
    file = path / CONFIG if os.path.isdir(path) else path
    # A path that ends in .json is a file, not a repository name.
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
    """Save a model and its parameters as a directory; the write is atomic.

    The arithmetic of products (`model.compute`) is chosen at run time and not stored. For a module
    from outside this library, only the parameters with their boxes are stored. Pass the module to
    `load`:

        ge.save(module, params, "compressed")
        module, params = ge.load("compressed", model=module)

        ge.save(model, params, "copy", source="path/to/checkpoint")

    Args:
      model: any Linen module. The configuration of a model of this library is stored.
      params: tree of arrays and boxes, stored without conversion.
      path: directory to create.
      format: `hugging_face` (for transformers; dense models of the family), `safetensors` (native;
        all models, also compressed or pruned) or `orbax`. None means the first of these that can
        store the model.
      overwrite: replaces an existing checkpoint.
      extras: further files by name, such as `{"tokenizer.json": path or bytes}`.
      source: directory or GGUF file of the original model. Its tokenizer, chat template,
        processor and generation files are copied, see `glm_edge.checkpoint.companions`. `extras`
        override files of the same name.

    Returns:
      The directory.

    Raises:
      CheckpointError: parameters do not match the model or are not finite, the format cannot store
        them, or a file to copy is missing.
      OutputError: the directory exists without `overwrite`, or cannot be written.
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
        raise CheckpointError(f"{target}: Hugging Face cannot store a {type(model).__name__}")
    if not stock and format in (None, "hugging_face"):
        described = hugging_face.fields_of(model.config, params)
        if described is None and format:
            raise CheckpointError(
                f"{target}: Hugging Face cannot store this model (boxes, widths that "
                "differ per layer, or unknown encoders); save it with format='safetensors', or "
                "write boxes for vLLM with ge.export.compressed_tensors"
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
            f"{target}: saved without a tokenizer, so the checkpoint cannot process text; pass the "
            "original directory as source=, or extras={} to silence this warning",
            stacklevel=2,
        )
    return target


def shipped(name: str = "nano") -> Path:
    """Return the directory of a checkpoint that comes with the package.

        model, params = ge.load(ge.shipped("nano"))

    Args:
      name: name of the checkpoint.

    Returns:
      The directory, for `load` and `load_tokenizer`.

    Raises:
      CheckpointError: the package does not contain a checkpoint of this name.
    """
    assets = Path(str(importlib.resources.files("glm_edge") / "assets"))
    known = sorted(path.parent.name for path in assets.glob(f"*/{CONFIG}"))
    if name not in known:
        raise CheckpointError(
            f"no checkpoint {name!r} comes with glm_edge; known: {', '.join(known) or 'none'}"
        )
    return assets / name


def load_tokenizer(path: str | os.PathLike) -> "Tokenizer":
    """Load the tokenizer of a checkpoint, as `glm_edge.Processor` does.

    Padding and truncation of the file are disabled. They would truncate texts and add padding to
    calibration data.

    Args:
      path: checkpoint directory, or a GGUF file.

    Returns:
      A `tokenizers.Tokenizer`.

    Raises:
      CheckpointError: the directory or its tokenizer.json does not exist, or the file is damaged or
        could run without bounds on time or memory.
    """
    from glm_edge.preprocess.gguf_tokenizer import read_gguf_tokenizer
    from glm_edge.preprocess.tokenizer_files import read_tokenizer

    directory = _checked_path("load_tokenizer", path)
    file = find_gguf(directory)
    if file is not None:
        return read_gguf_tokenizer(GGUFFile(file))
    if not os.path.isdir(directory):
        raise CheckpointError(no_directory(directory))
    return read_tokenizer(directory / TOKENIZER)


def _checked_path(name: str, path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(
            f"{name}: path must be a checkpoint directory, not a {type(path).__name__}"
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
            f"{directory}: an Orbax directory without {CONFIG}, so model and packing are unknown; "
            "save with glm_edge.save(format='orbax')"
        )
    return f"{directory}: has no {CONFIG}; a checkpoint is a directory with one"


def read_extras(extras: Mapping[str, str | os.PathLike | bytes] | None) -> dict[str, bytes]:
    """Read further files for a checkpoint.

    Args:
      extras: path or bytes by name; None means no files.

    Returns:
      Bytes by name.

    Raises:
      OutputError: a name contains a directory, or is the name of a checkpoint's own file.
      CheckpointError: a path cannot be read.
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
