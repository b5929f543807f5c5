"""Hugging Face directories of the GLM family: a name table per `model_type`."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from glm_edge.checkpoint.files import WEIGHTS, SafetensorsFile, check_finite, read_json
from glm_edge.checkpoint.hugging_face_config import glm_config
from glm_edge.checkpoint.shapes import Shapes, check_names, check_shape, expected_shapes
from glm_edge.configs import GLMConfig
from glm_edge.errors import CheckpointError, ConfigError
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import nested

INDEX = "model.safetensors.index.json"
FLOATING = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Rule:
    """Where one of our parameters comes from.

    Attributes:
      path: regular expression that matches the whole of our path.
      names: tensor names in the file, with the groups of `path` as `\\1`, `\\2`, ….
      build: makes our array from those tensors.
    """

    path: str
    names: tuple[str, ...]
    build: Callable[..., np.ndarray] | None = None


@dataclass(frozen=True)
class Member:
    """How one `model_type` is read.

    Attributes:
      config: turns config.json into our configuration; takes the fields, the file's name for
        messages, and the directory's name for the model.
      rules: the first whose `path` matches names the tensors of a parameter.
      ignored: regular expression of tensor names that may be stored and are not read.
    """

    config: Callable[[dict[str, Any], str, str], GLMConfig]
    rules: tuple[Rule, ...]
    ignored: str


def decoder_rules(prefix: str, head: str) -> tuple[Rule, ...]:
    """The name table of a GLM decoder.

    Args:
      prefix: of its tensors, such as `model.`.
      head: name of the output head's weight.

    Returns:
      Rules for `embed`, `decoder` and `head`.
    """
    layer, stored = r"decoder/layers/(\d+)/", rf"{prefix}layers.\1."
    return (
        Rule("embed/weight", (f"{prefix}embed_tokens.weight",)),
        Rule("head/weight", (head,)),
        Rule("decoder/norm/weight", (f"{prefix}norm.weight",)),
        Rule(layer + "input_norm/weight", (stored + "input_layernorm.weight",)),
        Rule(layer + "post_attention_norm/weight", (stored + "post_attention_layernorm.weight",)),
        Rule(layer + r"attention/([qkvo]_proj)/(weight|bias)", (stored + r"self_attn.\2.\3",)),
        Rule(layer + r"mlp/(gate_up_proj|down_proj)/weight", (stored + r"mlp.\2.weight",)),
    )


MEMBERS = {
    "glm": Member(
        config=glm_config,
        rules=decoder_rules("model.", "lm_head.weight"),
        # A tied model may store its head again; rotary tables were buffers once.
        ignored=r"lm_head\.weight|.*\.rotary_emb\.inv_freq",
    ),
}


def read(
    directory: Path, fields: dict[str, Any], dtype: str | None
) -> tuple[MultimodalGLM, dict[str, Any]]:
    """Reads a Hugging Face directory, tensor by tensor.

    Args:
      directory: of the checkpoint.
      fields: its config.json.
      dtype: type of the parameters, or None for the stored one.

    Returns:
      `(model, params)`.

    Raises:
      CheckpointError: files are missing or damaged, or do not fit the configuration.
      ConfigError: config.json names an unknown model or lacks a field.
    """
    where = str(directory / "config.json")
    model_type = fields["model_type"]
    if not isinstance(model_type, str) or model_type not in MEMBERS:
        raise ConfigError(
            f"{where}: model_type {model_type!r} is unknown; known: {', '.join(MEMBERS)}"
        )
    member = MEMBERS[model_type]
    model = MultimodalGLM(member.config(fields, where, directory.resolve().name))
    files = tensor_files(directory)
    sources = _find_sources(member, expected_shapes(model), files, directory)
    leaves = {}
    for path, source in sources.items():
        array = source.read(files)
        target = array.dtype if dtype is None else jnp.dtype(dtype)
        with np.errstate(over="ignore"):
            array = array.astype(target, copy=False)
        check_finite(array, f"{source.where(files)} as {target}")
        # A copy, because jax would otherwise alias the memory map of a file that may change.
        leaves[path] = jnp.array(array, copy=True)
    return model, nested(leaves)


def tensor_files(directory: Path) -> dict[str, SafetensorsFile]:
    """Opens the one safetensors file of a directory, or all that its index lists.

    Args:
      directory: of the checkpoint.

    Returns:
      Tensor name to the file that holds it.

    Raises:
      CheckpointError: a file is missing or damaged, a tensor is stored twice, or the index and
        the files disagree.
    """
    if (directory / WEIGHTS).is_file():
        file = SafetensorsFile(directory / WEIGHTS)
        return dict.fromkeys(file.tensors, file)
    if not (directory / INDEX).is_file():
        pickled = next(iter(sorted(directory.glob("*.bin"))), None)
        found = f"; {pickled.name} is a pickle: convert it to safetensors" if pickled else ""
        raise CheckpointError(f"{directory}: holds neither {WEIGHTS} nor {INDEX}{found}")
    listed = read_json(directory / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{directory / INDEX}: 'weight_map' must list tensors and files")
    held: dict[str, SafetensorsFile] = {}
    for name in sorted({str(name) for name in listed.values()}):
        if name != Path(name).name:
            raise CheckpointError(
                f"{directory / INDEX}: file {name!r} must be a plain name in the same directory"
            )
        file = SafetensorsFile(directory / name)
        twice = sorted(set(file.tensors) & set(held))
        if twice:
            other = held[twice[0]].path.name
            raise CheckpointError(f"{file.path}: tensor {twice[0]!r} is in {other} as well")
        held.update(dict.fromkeys(file.tensors, file))
    for name, file_name in listed.items():
        if name not in held or held[name].path.name != file_name:
            raise CheckpointError(
                f"{directory / file_name}: tensor {name!r} is missing; {INDEX} says it is there"
            )
    return held


@dataclass(frozen=True)
class _Source:
    """The tensors of one parameter, and what makes them its array."""

    names: tuple[str, ...]
    build: Callable[..., np.ndarray] | None
    shape: tuple[int, ...]

    def where(self, files: dict[str, SafetensorsFile]) -> str:
        names = ", ".join(repr(name) for name in self.names)
        return f"{files[self.names[0]].path}: tensor {names}"

    def read(self, files: dict[str, SafetensorsFile]) -> np.ndarray:
        tensors = [files[name].read(name) for name in self.names]
        array = tensors[0] if self.build is None else self.build(*tensors)
        check_shape(array.shape, self.shape, self.where(files))
        return array


def _find_sources(
    member: Member, expected: Shapes, files: dict[str, SafetensorsFile], directory: Path
) -> dict[str, _Source]:
    """Finds the tensors of every parameter and checks all headers before a tensor is read."""
    sources = {path: _source(member, path, shape) for path, shape in expected.items()}
    needed = {name: source.shape for source in sources.values() for name in source.names}
    ignored = re.compile(member.ignored)
    found = [name for name in files if name in needed or not ignored.fullmatch(name)]
    check_names(found, needed, str(directory))
    for source in sources.values():
        for name in source.names:
            info = files[name].tensors[name]
            where = f"{files[name].path}: tensor {name!r}"
            if info.dtype not in FLOATING:
                raise CheckpointError(
                    f"{where}: is of type {info.dtype}, a weight must be one of "
                    f"{', '.join(FLOATING)}"
                )
            if source.build is None:
                check_shape(info.shape, source.shape, where)
    return sources


def _source(member: Member, path: str, shape: tuple[int, ...]) -> _Source:
    for rule in member.rules:
        match = re.fullmatch(rule.path, path)
        if match:
            return _Source(tuple(match.expand(name) for name in rule.names), rule.build, shape)
    raise CheckpointError(f"parameter {path!r} has no rule in the name table of this model_type")
