"""From one parameter to its quantized box, and the report's row about it."""

import math
from collections.abc import Callable, Sequence
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
from glm_edge.params import FakeQuantized, Format, Masked, Narrow, Quantized
from glm_edge.params.layouts import Layout, by_name

# Matrices of more weights are rounded by bands of rows, so that float32 copies stay small.
BAND = 1 << 24


def as_rows(leaf: Any, layout: Layout) -> Array:
    """The dense weight of an array or box as `[..., out, in]`."""
    return layout.rows(boxes.dense(leaf))


def dense_rows(path: str, leaf: Any, layout: Layout) -> Array:
    """As `as_rows` in float32.

    Raises:
      RecipeError: the weight holds NaN or infinity.
    """
    weight = as_rows(leaf, layout).astype(jnp.float32)
    if not bool(jnp.isfinite(weight).all()):
        raise RecipeError(f"{path}: NaN or infinity in the weights")
    return weight


def each_matrix(solve: Callable[[Array], Any], rows: Array) -> Any:
    """Calls `solve` with each matrix of a stack `[..., out, in]` and stacks what it returns."""
    if rows.ndim == 2:
        return solve(rows)
    solved = [solve(matrix) for matrix in rows.reshape(-1, *rows.shape[-2:])]
    return jax.tree.map(
        lambda *parts: jnp.stack(parts).reshape(*rows.shape[:-2], *parts[0].shape), *solved
    )


def quantize_leaf(
    path: str,
    leaf: Any,
    format: Format,
    scale: str = "max",
    layout: Layout | None = None,
    stock: bool = False,
) -> tuple[Any, float]:
    """Rounds one parameter to the nearest levels.

    Args:
      path: of the parameter, for messages.
      leaf: array or `Masked`.
      format: to store it in.
      scale: see `glm_edge.compress.rounding.grid.choose`.
      layout: of the parameter; None takes what its name says.
      stock: a stock layer reads it, whose activations keep their type only if its weights do.

    Returns:
      `(box, relative error)`; where the format is a floating type, a plain array, or of a stock
      layer a `Narrow`.

    Raises:
      RecipeError: the weight is not finite, its scales do not fit the format's scale type, the
        format cannot hold the zeros of its mask, or the name does not say which axes are inputs.
    """
    if format.plain:
        return _cast(path, leaf, format, stock)
    layout = by_name(path, tuple(leaf.shape)) if layout is None else layout
    if layout is None:
        raise RecipeError(f"{path} {list(leaf.shape)}: pass layout=, which says its inputs")
    matrix = as_rows(leaf, layout)
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
    box = box.replace(**layout.kernel(leaf.shape), dtype=str(leaf_dtype(leaf)))
    _check_mask(path, leaf, box)
    return box, error / (_norm(matrix) or 1.0)


def _cast(path: str, leaf: Any, format: Format, stock: bool) -> tuple[Any, float]:
    weight = boxes.dense(leaf)
    held = weight.astype(format.qtype)
    if not bool(jnp.isfinite(held).all()):
        raise RecipeError(f"{path}: NaN or infinity in the weights, or beyond {format.qtype}")
    wide = weight.astype(jnp.float32)
    lost = float(jnp.linalg.norm(held.astype(jnp.float32) - wide))
    if stock and weight.dtype != held.dtype:
        # Zeros of a mask are zeros of the value, as in other rounded weights.
        held = boxes.narrow(held, weight.dtype)
    elif isinstance(leaf, Masked):
        held = boxes.mask(held, leaf.mask)
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
    layout: Layout,
) -> Quantized:
    """Boxes the codes of a parameter.

    Args:
      path: of the parameter.
      leaf: what it was, for its type and its mask.
      codes: int8 [..., out, in].
      grid: of the codes.
      format: to store them in.
      layout: of the parameter.

    Returns:
      The box.

    Raises:
      RecipeError: scales do not fit their type, or a weight that a mask keeps at zero would no
        longer be zero.
    """
    if not bool(jnp.isfinite(grid.scale).all()):
        raise RecipeError(f"{path}: its scales do not fit {format.scale_dtype}")
    box = boxes.quantized(codes, *grid, format, dtype=str(leaf_dtype(leaf)))
    box = box.replace(**layout.kernel(leaf.shape))
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


def is_stock(path: str) -> bool:
    """True for a parameter of a stock layer; those of `glm_edge.models` are named `weight`."""
    return path.rsplit("/", 1)[-1] in ("kernel", "embedding")


def relative_error(before: Any, after: Any) -> float:
    """`|after - before| / |before|` of two parameters of one shape."""
    old, new = (np.asarray(boxes.dense(leaf), np.float32) for leaf in (before, after))
    return float(np.linalg.norm(new - old)) / (float(np.linalg.norm(old)) or 1.0)


def row(
    transform: str, path: str, before: Any, after: Any, error: float | None, note: str = ""
) -> Row:
    """The report's row about a parameter that was rounded."""
    if isinstance(after, Quantized | FakeQuantized):
        action = str(after.format)
    elif isinstance(after, Narrow):
        action = str(after.value.dtype)
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
    )
