"""The field `quantization_config` of config.json, and the quantized matrices of a directory."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from glm_edge.checkpoint.hugging_face.fields import Fields
from glm_edge.checkpoint.hugging_face.member import TensorMapping
from glm_edge.checkpoint.hugging_face.quantized import awq, compressed_tensors, gptq
from glm_edge.checkpoint.hugging_face.quantized.awq import AWQ
from glm_edge.checkpoint.hugging_face.quantized.compressed_tensors import CompressedTensors
from glm_edge.checkpoint.hugging_face.quantized.gptq import GPTQ
from glm_edge.checkpoint.hugging_face.quantized.matrix import PackedMatrix, StoredModule
from glm_edge.checkpoint.safetensors import SafetensorsFile
from glm_edge.errors import CheckpointError, ConfigError

FIELD = "quantization_config"
WEIGHT = ".weight"
# Suffixes of tensors with packed codes, and of those with codes or values; a module has one.
PACKED = ("weight_packed", "qweight")
CODES = ("weight", *PACKED)

Method = CompressedTensors | GPTQ | AWQ
"""A method of quantization with its options."""

READERS: dict[str, Callable[[Fields], Method]] = {
    CompressedTensors.name: compressed_tensors.read_config,
    GPTQ.name: gptq.read_config,
    AWQ.name: awq.read_config,
}


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of a directory, with quantized matrices in the place of their parts.

    Attributes:
      names: names in the files by names of the member's table.
      files: files, or quantized matrices, by names in the files.
      matrices: quantized matrices by names of the member's table.
    """

    names: dict[str, str]
    files: dict[str, Any]
    matrices: dict[str, PackedMatrix]


def read_method(fields: dict[str, Any], where: str) -> Method | None:
    """Read the method of quantization from config.json.

    Args:
      fields: fields of config.json.
      where: file for messages.

    Returns:
      The method with its options, or None for a dense checkpoint.

    Raises:
      ConfigError: the method is unknown, or an option is missing, malformed or unsupported.
    """
    section = Fields(fields, where).optional_section(FIELD)
    if section is None:
        return None
    method = section.take("quant_method")
    if not isinstance(method, str) or method not in READERS:
        raise ConfigError(
            f"{section.where}: field 'quant_method' is {method!r:.60}, which is unsupported; "
            f"supported: {', '.join(READERS)}"
        )
    return READERS[method](section)


def check_unpacked(names: Iterable[str], where: str) -> None:
    """Refuse packed codes whose method is not described.

    Args:
      names: names of the stored tensors.
      where: config.json for the message.

    Raises:
      CheckpointError: a tensor contains packed codes.
    """
    for name in names:
        if name.rpartition(".")[2] in PACKED:
            raise CheckpointError(
                f"{where}: has no field {FIELD!r}, but tensor {name!r} contains packed codes; add "
                "the options of its quantization (older tools wrote them to quantize_config.json)"
            )


def with_matrices(
    entries: Iterable[TensorMapping],
    names: dict[str, str],
    files: dict[str, SafetensorsFile],
    method: Method,
) -> StoredTensors:
    """Replace the parts of each quantized module by its matrix.

    Args:
      entries: maps between tensors and parameters.
      names: names in the files by names of `entries`.
      files: files by names in the files.
      method: method of quantization.

    Returns:
      The tensors.

    Raises:
      CheckpointError: a part is missing or damaged, has a wrong type or shape, or belongs to a
        module that is also stored dense.
    """
    tensors = StoredTensors(dict(names), dict(files), {})
    needed = {name for entry in entries for name in entry.names}
    for name in sorted(name for name in needed if name.endswith(WEIGHT)):
        module = _stored_module(name.removesuffix(WEIGHT), names, files, method.suffixes)
        if not method.is_quantized(module):
            continue
        codes = [suffix for suffix in CODES if suffix in module.names]
        if len(codes) > 1:
            raise CheckpointError(
                f"{module.where(codes[0])}: the module is also stored as {module.names[codes[1]]!r}"
            )
        for suffix in module.names:
            del tensors.names[f"{module.name}.{suffix}"]
        matrix = method.open(module)
        tensors.names[name], tensors.files[name] = name, matrix
        tensors.matrices[name] = matrix
        _drop_zero_bias(tensors, f"{module.name}.bias", needed)
    return tensors


def _stored_module(
    module: str, names: dict[str, str], files: dict[str, SafetensorsFile], suffixes: Iterable[str]
) -> StoredModule:
    stored = {
        suffix: names[f"{module}.{suffix}"]
        for suffix in sorted({*CODES, *suffixes})
        if f"{module}.{suffix}" in names
    }
    return StoredModule(module, stored, {suffix: files[name] for suffix, name in stored.items()})


def _drop_zero_bias(tensors: StoredTensors, name: str, needed: set[str]) -> None:
    """Drop a bias of zeros, which AutoGPTQ adds to modules without a bias."""
    stored = tensors.names.get(name)
    if stored is None or name in needed:
        return
    file = tensors.files[stored]
    if len(file.tensors[stored].shape) == 1 and not np.any(file.read(stored)):
        del tensors.names[name]
