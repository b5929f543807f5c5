"""Quantized matrices as boxes, through the member's table of tensors."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_edge.checkpoint.hugging_face.member import TensorMapping
from glm_edge.checkpoint.hugging_face.quantized.matrix import PackedMatrix
from glm_edge.checkpoint.safetensors import check_finite
from glm_edge.checkpoint.shapes import Shapes, check_shape
from glm_edge.errors import CheckpointError
from glm_edge.kernels import packing
from glm_edge.params.boxes import Quantized, quantized
from glm_edge.params.formats import Format
from glm_edge.params.tree import MATRIX_NAMES


def check_matrices(
    entries: Iterable[TensorMapping], matrices: Mapping[str, PackedMatrix], expected: Shapes
) -> None:
    """Check that boxes can store the quantized matrices, before codes are read.

    Args:
      entries: maps between tensors and parameters.
      matrices: quantized matrices by names of `entries`.
      expected: dense shape by parameter path.

    Raises:
      CheckpointError: a matrix is a convolution, has a wrong shape, or shares a parameter with a
        tensor of another format.
    """
    for entry in entries:
        stored = [matrices[name] for name in entry.names if name in matrices]
        if not stored:
            continue
        first = stored[0]
        where = f"{first.path}: tensor {first.name!r}"
        shapes = [expected[path] for path in entry.paths]
        if not entry.by_rows or not all(map(_is_matrix, entry.paths, shapes)):
            raise CheckpointError(
                f"{where}: is quantized, but {entry.paths[0]!r} is not a matrix of a product or an "
                "embedding"
            )
        formats = {str(matrix.format) for matrix in stored}
        if len(stored) < len(entry.names) or len(formats) > 1:
            raise CheckpointError(
                f"{where}: {', '.join(entry.names)} are one parameter, {entry.paths[0]!r}, and "
                f"must have one format, not {', '.join(sorted(formats))}"
                f"{'' if len(stored) == len(entry.names) else ' and dense'}"
            )
        rows = sum(shape[0] for shape in shapes)
        # Tensors that one parameter joins have equal numbers of rows.
        for matrix in stored:
            check_shape(matrix.shape, (rows // len(stored), shapes[0][-1]), where)


def _is_matrix(path: str, shape: tuple[int, ...]) -> bool:
    return path.rpartition("/")[2] in MATRIX_NAMES and len(shape) == 2


def abstract_box(shape: tuple[int, ...], format: Format, dtype: str) -> Quantized:
    """Make a box of abstract arrays.

    Args:
      shape: dense shape [out, in].
      format: format of the box.
      dtype: type of the dense weight.

    Returns:
      The box.
    """
    rows, columns = shape
    width = packing.packed_columns(columns, format.qtype)
    scale_shape = format.scale_shape(shape)
    data: Any = jax.ShapeDtypeStruct((rows, width), packing.stored_dtype(format.qtype))
    scale: Any = jax.ShapeDtypeStruct(scale_shape, format.scale_dtype)
    zero: Any = None
    if not format.symmetric:
        zero = jax.ShapeDtypeStruct(scale_shape, format.zero_dtype)
    return Quantized(data, scale, zero, format=format, columns=columns, dtype=dtype)


def read_boxes(
    entry: TensorMapping, matrices: Sequence[PackedMatrix], dtype: str
) -> dict[str, Quantized]:
    """Read the boxes of one entry of a member's table.

    Codes, scales and zero points have the rows of the dense weight, so the entry splits, joins and
    reorders all of them as it does the weight.

    Args:
      entry: map between tensors and parameters.
      matrices: quantized matrices in the order of `entry.names`.
      dtype: type of the dense weights.

    Returns:
      Box by parameter path.

    Raises:
      CheckpointError: a tensor is damaged, or a scale is not finite.
    """
    parts = [matrix.read_codes() for matrix in matrices]
    for matrix, part in zip(matrices, parts, strict=True):
        check_finite(part.scale, f"{matrix.path}: scales of {matrix.name!r}")
    columns = [_converted(entry, matrices, [part[index] for part in parts]) for index in range(3)]
    format = matrices[0].format
    return {
        path: quantized(
            jnp.asarray(codes),
            jnp.asarray(scale),
            None if zero is None else jnp.asarray(zero),
            format,
            dtype=dtype,
        )
        for path, codes, scale, zero in zip(entry.paths, *columns, strict=True)
    }


def _converted(
    entry: TensorMapping, matrices: Sequence[PackedMatrix], arrays: list[np.ndarray | None]
) -> Sequence[np.ndarray | None]:
    stored = [array for array in arrays if array is not None]
    if len(stored) < len(arrays):
        return [None] * len(entry.paths)
    try:
        return entry.read(*stored)
    except ValueError as error:
        names = ", ".join(repr(matrix.name) for matrix in matrices)
        raise CheckpointError(
            f"{matrices[0].path}: tensor {names}: {len(stored[0])} rows do not make {entry.paths}"
        ) from error
