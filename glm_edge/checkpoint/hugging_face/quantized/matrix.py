"""Quantized matrices of Hugging Face directories: stored tensors of a module, codes and scales.

Letters used for shapes: `O` rows (outputs), `I` columns (inputs), `G` groups per row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glm_edge.checkpoint.hugging_face.fields import Fields
from glm_edge.checkpoint.safetensors import SafetensorsFile, TensorInfo
from glm_edge.checkpoint.shapes import check_shape
from glm_edge.errors import BoxError, CheckpointError
from glm_edge.params.formats import Format

SCALE_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Codes(NamedTuple):
    """Integers of a matrix, `w = scale * (code - zero)`.

    Attributes:
      codes: int8 [O, I].
      scale: [O, G] in its stored type.
      zero: int8 [O, G], or None (symmetric).
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None


@dataclass(frozen=True)
class StoredModule:
    """The stored tensors of one module.

    Attributes:
      name: name of the module, such as `model.layers.0.mlp.down_proj`.
      names: name in the file by suffix, such as `weight_packed`.
      files: file by suffix.
    """

    name: str
    names: Mapping[str, str]
    files: Mapping[str, SafetensorsFile]

    def where(self, suffix: str) -> str:
        """Return file and tensor for messages."""
        return f"{self.files[suffix].path}: tensor {self.names[suffix]!r}"

    def info(self, suffix: str, *types: str, dimensions: int = 2) -> TensorInfo:
        """Return type and shape of a tensor, after a check of its type.

        Args:
          suffix: suffix of the tensor.
          *types: accepted types, such as `I32`.
          dimensions: number of its dimensions.

        Returns:
          Type, shape and byte range.

        Raises:
          CheckpointError: the tensor is missing, or has another type or number of dimensions.
        """
        if suffix not in self.names:
            path = next(iter(self.files.values())).path
            raise CheckpointError(f"{path}: tensor {f'{self.name}.{suffix}'!r} is missing")
        info = self.files[suffix].tensors[self.names[suffix]]
        if info.dtype not in types:
            raise CheckpointError(
                f"{self.where(suffix)}: has type {info.dtype}, it must be {' or '.join(types)}"
            )
        if len(info.shape) != dimensions or 0 in info.shape:
            raise CheckpointError(
                f"{self.where(suffix)}: has shape {info.shape}, it must have {dimensions} "
                "dimensions of at least 1"
            )
        return info

    def scale_type(self, suffix: str) -> str:
        """Return the type of the scales, such as `bfloat16`."""
        return SCALE_TYPES[self.info(suffix, *SCALE_TYPES).dtype]

    def check(self, suffix: str, shape: tuple[int, ...], *types: str) -> None:
        """Check type and shape of a tensor.

        Args:
          suffix: suffix of the tensor.
          shape: required shape.
          *types: accepted types.

        Raises:
          CheckpointError: the tensor is missing, or has another type or shape.
        """
        info = self.info(suffix, *types, dimensions=len(shape))
        check_shape(info.shape, shape, self.where(suffix))

    def read(self, suffix: str) -> np.ndarray:
        """Read a tensor."""
        return self.files[suffix].read(self.names[suffix])

    def groups(self, columns: int, group_size: int | None, where: str) -> int:
        """Count the groups per row.

        Args:
          columns: columns per row.
          group_size: columns per group, None for one scale per row.
          where: suffix of the tensor for the message.

        Returns:
          Groups per row.

        Raises:
          CheckpointError: the columns do not divide into groups.
        """
        if group_size is not None and columns % group_size:
            raise CheckpointError(
                f"{self.where(where)}: {columns} columns do not divide into groups of {group_size}"
            )
        return 1 if group_size is None else columns // group_size

    def check_order(self, suffix: str, columns: int, group_size: int | None) -> None:
        """Check that the columns of a group are adjacent.

        Args:
          suffix: suffix of the tensor with the group of each column; it may be missing.
          columns: columns per row.
          group_size: columns per group, None for one scale per row.

        Raises:
          CheckpointError: columns of one group are not adjacent, as after `desc_act`.
        """
        if suffix not in self.names:
            return
        self.check(suffix, (columns,), "I32", "I64")
        expected = np.arange(columns) // (group_size or columns)
        if not np.array_equal(self.read(suffix), expected):
            raise CheckpointError(
                f"{self.where(suffix)}: groups are not adjacent columns (desc_act or actorder by "
                "group), which boxes cannot store; use a checkpoint with desc_act=false, or with "
                "static groups"
            )


@dataclass(frozen=True)
class PackedMatrix:
    """A quantized matrix; its header is read like that of a dense tensor in a file.

    Attributes:
      name: name of the dense weight, such as `model.layers.0.mlp.down_proj.weight`.
      path: file of its codes.
      shape: dense shape (O, I).
      format: format of the box.
      read_codes: reads the codes; raises CheckpointError for damaged tensors.
    """

    name: str
    path: Path
    shape: tuple[int, int]
    format: Format
    read_codes: Callable[[], Codes]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Type and shape of the dense weight by its name."""
        return {self.name: TensorInfo("F32", self.shape, 0, 0)}


def format_of(
    module: StoredModule,
    suffix: str,
    bits: int,
    group_size: int | None,
    symmetric: bool,
) -> Format:
    """Return the format of a module's box.

    Args:
      module: the module.
      suffix: suffix of the scales.
      bits: bits per code.
      group_size: columns per group, None for one scale per row.
      symmetric: False for a matrix with zero points.

    Returns:
      The format, with scales in their stored type.

    Raises:
      CheckpointError: there is no such format.
    """
    try:
        return Format(f"int{bits}", group_size, symmetric, module.scale_type(suffix))
    except BoxError as error:
        raise CheckpointError(f"{module.where(suffix)}: {error}") from error


def read_group_size(fields: Fields, name: str) -> int | None:
    """Return a group size: a positive integer, or None for -1 and null (one scale per row).

    Args:
      fields: fields of a section.
      name: name of the field.

    Returns:
      Columns per group, or None.

    Raises:
      ConfigError: the field is malformed.
    """
    value = fields.take(name)
    return None if type(value) is int and value == -1 else fields.get(name, int, None)
