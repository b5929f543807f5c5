"""From one parameter to its quantized box, and the report's row about it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress.report import Row
from glm_edge.compress.rounding import grid as grids
from glm_edge.compress.rounding.grid import Grid
from glm_edge.errors import RecipeError
from glm_edge.params import FakeQuantized, Format, Masked, Quantized

# Matrices of more weights are rounded by bands of rows, so that float32 copies stay small.
BAND = 1 << 24


def as_rows(path: str, leaf: Any, stacked: bool = False) -> tuple[Array, tuple[int, ...]]:
    """The dense weight as `[..., out, in]`, and the kernel shape that undoes it.

    Args:
      path: of the parameter; a leaf named `kernel` is `[..., in, out]`, any other `[..., out, in]`.
      leaf: array or box.
      stacked: a kernel's first axis is a layer axis.
    """
    weight = boxes.dense(leaf)
    if not _is_kernel(path):
        return weight, ()
    layers, kernel_shape = weight.shape[:stacked], weight.shape[stacked:]
    flat = weight.reshape(*layers, -1, weight.shape[-1])
    return jnp.swapaxes(flat, -1, -2), kernel_shape


def dense_rows(path: str, leaf: Any) -> tuple[Array, tuple[int, ...]]:
    """As `as_rows` in float32.

    Raises:
      RecipeError: the weight holds NaN or infinity.
    """
    weight, kernel_shape = as_rows(path, leaf)
    weight = weight.astype(jnp.float32)
    if not bool(jnp.isfinite(weight).all()):
        raise RecipeError(f"{path}: NaN or infinity in the weights")
    return weight, kernel_shape


def quantize_leaf(
    path: str, leaf: Any, format: Format, scale: str = "max", stacked: bool = False
) -> tuple[Any, float]:
    """Rounds one parameter to the nearest levels.

    Args:
      path: of the parameter, see `as_rows`.
      leaf: array or `Masked`.
      format: to store it in.
      scale: see `glm_edge.compress.rounding.grid.choose`.
      stacked: a kernel's first axis is a layer axis.

    Returns:
      `(box, relative error)`; a plain array where the format is a floating type.

    Raises:
      RecipeError: the weight is not finite, its scales do not fit the format's scale type, or the
        format cannot hold the zeros of its mask.
    """
    if format.plain:
        return _cast(path, leaf, format)
    matrix, kernel_shape = as_rows(path, leaf, stacked)
    parts, squares = [], []
    for band in _bands(matrix, format):
        codes, grid, square = grids.nearest(band, format, scale)
        parts.append(boxes.quantized(codes, *grid, format))
        squares.append(square)
    error = math.sqrt(sum(float(square) for square in squares))
    box = jax.tree.map(lambda *bands: _joined(bands), *parts)
    if not math.isfinite(error) or not bool(jnp.isfinite(box.scale).all()):
        raise RecipeError(
            f"{path}: NaN or infinity in the weights, or scales beyond {format.scale_dtype}"
        )
    box = box.replace(kernel_shape=kernel_shape, dtype=str(leaf_dtype(leaf)))
    _check_mask(path, leaf, box)
    return box, error / (_norm(matrix) or 1.0)


def _cast(path: str, leaf: Any, format: Format) -> tuple[Any, float]:
    weight = boxes.dense(leaf)
    held = weight.astype(format.qtype)
    if not bool(jnp.isfinite(held).all()):
        raise RecipeError(f"{path}: NaN or infinity in the weights, or beyond {format.qtype}")
    wide = weight.astype(jnp.float32)
    lost = float(jnp.linalg.norm(held.astype(jnp.float32) - wide))
    held = boxes.mask(held, leaf.mask) if isinstance(leaf, Masked) else held
    return held, lost / (float(jnp.linalg.norm(wide)) or 1.0)


def _bands(matrix: Array, format: Format) -> list[Array]:
    if matrix.ndim != 2 or matrix.size <= BAND or format.group_size == "tensor":
        return [matrix]
    rows = max(1, BAND // matrix.shape[1])
    return [matrix[start : start + rows] for start in range(0, len(matrix), rows)]


def _joined(parts: Sequence[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _norm(matrix: Array) -> float:
    if matrix.ndim != 2:
        return float(jnp.linalg.norm(matrix.astype(jnp.float32)))
    rows = max(1, BAND // matrix.shape[1])
    squares = (_squares(matrix[start : start + rows]) for start in range(0, len(matrix), rows))
    return math.sqrt(sum(float(square) for square in squares))


@jax.jit
def _squares(matrix: Array) -> Array:
    return jnp.sum(jnp.square(matrix.astype(jnp.float32)))


def box_of(
    path: str,
    leaf: Any,
    codes: Array,
    grid: Grid,
    format: Format,
    kernel_shape: tuple[int, ...] = (),
) -> Quantized:
    """Boxes the codes of a parameter.

    Args:
      path: of the parameter.
      leaf: what it was, for its type and its mask.
      codes: int8 [..., out, in].
      grid: of the codes.
      format: to store them in.
      kernel_shape: as `as_rows` gave it.

    Returns:
      The box.

    Raises:
      RecipeError: scales do not fit their type, or a weight that a mask keeps at zero would no
        longer be zero.
    """
    if not bool(jnp.isfinite(grid.scale).all()):
        raise RecipeError(f"{path}: its scales do not fit {format.scale_dtype}")
    box = boxes.quantized(codes, *grid, format, kernel_shape, str(leaf_dtype(leaf)))
    _check_mask(path, leaf, box)
    return box


def _check_mask(path: str, leaf: Any, box: Quantized) -> None:
    if isinstance(leaf, Masked) and bool(jnp.any(jnp.where(leaf.mask, 0, box.unbox()) != 0)):
        raise RecipeError(f"{path}: {box.format} cannot hold the zeros of its mask")


def leaf_dtype(leaf: Any) -> Any:
    """Type of the dense weight of an array or box."""
    if isinstance(leaf, Masked):
        return leaf_dtype(leaf.value)
    return jnp.dtype(leaf.dtype)


def relative_error(before: Any, after: Any) -> float:
    """`|after - before| / |before|` of two parameters of one shape."""
    old, new = (np.asarray(boxes.dense(leaf), np.float32) for leaf in (before, after))
    return float(np.linalg.norm(new - old)) / (float(np.linalg.norm(old)) or 1.0)


def row(
    transform: str,
    path: str,
    before: Any,
    after: Any,
    error: float | None,
    note: str = "",
    output_error: float | None = None,
) -> Row:
    """The report's row about a parameter that was rounded."""
    if isinstance(after, Quantized | FakeQuantized):
        action = str(after.format)
    else:
        action = str(leaf_dtype(after))
    kept = float(before.mask.mean()) if isinstance(before, Masked) else 1.0
    stored = boxes.stored_bytes(after)
    return Row(
        transform,
        path,
        f"{action} ({note})" if note else action,
        kept,
        8 * stored / boxes.count(after),
        boxes.stored_bytes(before),
        stored,
        error,
        output_error,
    )


def _is_kernel(path: str) -> bool:
    return path.rsplit("/", 1)[-1] == "kernel"
