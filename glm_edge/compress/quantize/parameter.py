"""Quantization of one parameter to a box, and its row of the report."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress.quantize.solvers import scales as grids
from glm_edge.compress.quantize.solvers.scales import Grid
from glm_edge.compress.report import Row
from glm_edge.errors import RecipeError
from glm_edge.kernels import quantization as kernels
from glm_edge.params import FakeQuantized, Format, Masked, Narrow, Quantized
from glm_edge.params.boxes import Weight
from glm_edge.params.layouts import Layout, by_name

# Larger matrices are quantized in bands of rows of this many weights, to limit float32 copies.
BAND = 1 << 24


def as_rows(leaf: Any, layout: Layout) -> Array:
    """Return the dense weight of an array or box as `[..., out, in]`."""
    return layout.rows(boxes.dense(leaf))


def dense_rows(path: str, leaf: Any, layout: Layout) -> Array:
    """Return the dense weight as float32 `[..., out, in]`, after checking that it is finite.

    Args:
      path: path of the parameter for messages.
      leaf: array or box.
      layout: layout of the parameter.

    Returns:
      float32 [..., out, in].

    Raises:
      RecipeError: the weight contains NaN or infinity.
    """
    weight, finite = _float32_rows(leaf, layout)
    if not finite:
        raise RecipeError(f"{path}: NaN or infinity in the weights")
    return weight


@functools.partial(jax.jit, static_argnames="layout")
def _float32_rows(leaf: Any, layout: Layout) -> tuple[Array, Array]:
    """Return the dense weight as float32 `[..., out, in]`, and True if it is finite."""
    weight = as_rows(leaf, layout).astype(jnp.float32)
    return weight, jnp.isfinite(weight).all()


def each_matrix(solve: Callable[[Array], Any], rows: Array) -> Any:
    """Call a solver with each matrix of a stack `[..., out, in]`, and stack the results."""
    if rows.ndim == 2:
        return solve(rows)
    solved = [solve(matrix) for matrix in rows.reshape(-1, *rows.shape[-2:])]
    return jax.tree.map(
        lambda *parts: jnp.stack(parts).reshape(*rows.shape[:-2], *parts[0].shape), *solved
    )


def quantize_leaf(
    path: str,
    leaf: Weight,
    format: Format,
    scale: str = "max",
    layout: Layout | None = None,
    stock: bool = False,
) -> tuple[Weight, float]:
    """Round one parameter to the nearest levels.

    Args:
      path: path of the parameter for messages.
      leaf: array or `Masked`.
      format: target format.
      scale: see `glm_edge.compress.quantize.solvers.scales.choose`.
      layout: layout of the parameter; None infers it from the path.
      stock: True for a parameter of a stock layer, whose weights determine the type of activations.

    Returns:
      `(box, relative error)`. For a floating format, the box is a plain array, or a `Narrow` in a
      stock layer.

    Raises:
      RecipeError: the weight is not finite, its scales exceed the format's scale type, the format
        cannot represent the zeros of its mask, or its layout is ambiguous.
    """
    if format.plain:
        return _cast(path, leaf, format, stock)
    layout = by_name(path, tuple(leaf.shape)) if layout is None else layout
    if layout is None:
        raise RecipeError(f"{path} {list(leaf.shape)}: pass layout=, which defines its inputs")
    matrix = as_rows(leaf, layout)
    peak = _peak(matrix)
    if not np.isfinite(peak):
        raise RecipeError(f"{path}: NaN or infinity in the weights")
    parts, lost, power = [], 0.0, 0.0
    for band in _bands(matrix, format):
        codes, grid = grids.nearest(band, format, scale)
        part, squares = _boxed(codes, grid, band, peak, format, str(leaf_dtype(leaf)))
        parts.append(part)
        squares = np.asarray(squares, np.float64)
        lost, power = lost + squares[0].sum(), power + squares[1].sum()
    box = jax.tree.map(lambda *bands: _joined(bands), *parts)
    if not math.isfinite(lost) or not _all_finite(box.scale):
        raise RecipeError(f"{path}: its scales exceed the range of {format.scale_dtype}")
    box = box.replace(**layout.kernel(leaf.shape), dtype=str(leaf_dtype(leaf)))
    _check_mask(path, leaf, box)
    return box, math.sqrt(lost / (power or 1.0))


def _cast(path: str, leaf: Weight, format: Format, stock: bool) -> tuple[Weight, float]:
    weight = boxes.dense(leaf)
    narrowed = weight.astype(format.qtype)
    if not bool(jnp.isfinite(narrowed).all()):
        raise RecipeError(f"{path}: NaN or infinity in the weights, or beyond {format.qtype}")
    error = relative_error(weight, narrowed)
    if stock and weight.dtype != narrowed.dtype:
        # Zeros of a mask become zeros of the value, as in other quantized weights.
        return boxes.narrow(narrowed, weight.dtype), error
    return boxes.mask(narrowed, leaf.mask) if isinstance(leaf, Masked) else narrowed, error


def _bands(matrix: Array, format: Format) -> list[Array]:
    if matrix.ndim != 2 or matrix.size <= BAND or format.group_size == "tensor":
        return [matrix]
    rows = max(1, BAND // matrix.shape[1])
    return [matrix[start : start + rows] for start in range(0, len(matrix), rows)]


def _joined(parts: Sequence[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _all_finite(scale: Array) -> bool:
    return bool(np.isfinite(np.float32(scale)).all())


@jax.jit
def _peak(matrix: Array) -> Array:
    return jnp.max(jnp.abs(matrix), initial=0.0).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("format", "dtype"))
def _boxed(
    codes: Array, grid: Grid, band: Array, peak: Array, format: Format, dtype: str
) -> tuple[Quantized, tuple[Array, Array]]:
    """Box codes, and compute the squares of their error, see `_squares`."""
    box = boxes.quantized(codes, *grid, format, dtype=dtype)
    return box, _squares(box.unbox(), band, peak)


def _squares(after: Array, before: Array, peak: Array) -> tuple[Array, Array]:
    """Compute squared error and squared norm per row, in units in which `peak` is near one."""
    before = before.astype(jnp.float32)
    lost = grids.normalized(after.astype(jnp.float32) - before, peak)
    power = jnp.square(grids.normalized(before, peak))
    return jnp.sum(jnp.square(lost), axis=-1), jnp.sum(power, axis=-1)


def box_of(
    path: str,
    leaf: Any,
    codes: Array,
    grid: Grid,
    format: Format,
    layout: Layout,
) -> Quantized:
    """Box the codes of a parameter.

    Args:
      path: path of the parameter.
      leaf: original parameter, for its type and mask.
      codes: int8 [..., out, in].
      grid: scales and zero points of the codes.
      format: storage format.
      layout: layout of the parameter.

    Returns:
      The box.

    Raises:
      RecipeError: scales exceed their type, or a masked weight would not stay zero.
    """
    if not _all_finite(grid.scale):
        raise RecipeError(f"{path}: its scales exceed the range of {format.scale_dtype}")
    box = boxes.quantized(codes, *grid, format, dtype=str(leaf_dtype(leaf)))
    box = box.replace(**layout.kernel(leaf.shape))
    _check_mask(path, leaf, box)
    return box


def _check_mask(path: str, leaf: Any, box: Quantized) -> None:
    if isinstance(leaf, Masked) and bool(
        np.any(np.asarray(box.unbox())[~np.asarray(leaf.mask)] != 0)
    ):
        raise RecipeError(f"{path}: {box.format} cannot represent the zeros of its mask")


def leaf_dtype(leaf: Weight) -> np.dtype:
    """Return the type of the dense weight of an array or box."""
    if isinstance(leaf, Masked):
        return leaf_dtype(leaf.value)
    return jnp.dtype(leaf.dtype)


def is_stock(path: str) -> bool:
    """Test for a parameter of a stock layer; those of `glm_edge.models` are named `weight`."""
    return path.rsplit("/", 1)[-1] in ("kernel", "embedding")


def relative_error(before: Any, after: Any) -> float:
    """Compute `|after - before| / |before|` of two parameters of equal shape."""
    old, new = (np.asarray(boxes.dense(leaf)).reshape(-1) for leaf in (before, after))
    lost = power = 0.0
    # float64 represents the squares of all float32 values. numpy sums in an order without threads.
    for start in range(0, old.size, BAND >> 2):
        before, after = (x[start : start + (BAND >> 2)].astype(np.float64) for x in (old, new))
        lost, power = lost + np.sum(np.square(after - before)), power + np.sum(np.square(before))
    return math.sqrt(lost / (power or 1.0))


def row(
    transform: str,
    path: str,
    before: Any,
    after: Any,
    error: float | None,
    note: str = "",
    output_error: float | None = None,
) -> Row:
    """Build the report's row of a quantized parameter.

    Args:
      transform: name of the transform.
      path: path of the parameter.
      before: original parameter.
      after: quantized parameter.
      error: relative error of the weight, or None.
      note: text appended to the action.
      output_error: relative error at the output on calibration inputs, or None.

    Returns:
      The row.
    """
    if isinstance(after, Quantized | FakeQuantized):
        action = str(after.format)
    elif isinstance(after, Narrow):
        action = str(after.value.dtype)
    else:
        action = str(leaf_dtype(after))
    fraction = float(np.mean(before.mask)) if isinstance(before, Masked) else 1.0
    stored = boxes.stored_bytes(after)
    # Training or a search can diverge from the weight when its step size is too large.
    worse = "error larger than that of zeros" if error is not None and error > 1 else ""
    note = ", ".join(filter(None, (note, _underflow(before, after), worse)))
    return Row(
        transform,
        path,
        f"{action} ({note})" if note else action,
        fraction,
        8 * stored / boxes.count(after),
        boxes.stored_bytes(before),
        stored,
        error,
        output_error,
    )


def _underflow(before: Any, after: Any) -> str:
    """Describe scales and weights that underflow in their stored type; empty without any."""
    notes = []
    if isinstance(after, Quantized):
        smallest = kernels.smallest_scale(after.format.scale_dtype)
        raised = int(np.sum(np.abs(np.float32(after.scale)) == smallest))
        if raised:
            notes.append(
                f"{raised} of {after.scale.size} scales are the smallest of "
                f"{after.format.scale_dtype}"
            )
        lost = _zeroed_rows(before, after)
        if lost:
            notes.append(f"{lost} of {math.prod(after.data.shape[:-1])} rows became zero")
    elif not isinstance(after, FakeQuantized):
        value = boxes.dense(after)
        lost = int(_zeroed(boxes.dense(before)[..., None], value[..., None]))
        if lost:
            notes.append(f"{lost} of {value.size} weights became zero")
    return ", ".join(notes)


def _zeroed_rows(before: Any, after: Quantized) -> int:
    """Count the rows that became zero, in bands as in `quantize_leaf`."""
    dense = _rows_like(after, boxes.dense(before))
    bare = after.replace(kernel_shape=(), kernel_axes=())
    if dense.ndim != 2 or dense.size <= BAND:
        return int(_zeroed(dense, bare))
    size, count = max(1, BAND // dense.shape[1]), 0
    for start in range(0, len(dense), size):
        rows = slice(start, start + size)
        scale_rows = rows if len(bare.scale) == len(dense) else slice(None)
        zero = None if bare.zero is None else bare.zero[scale_rows]
        part = bare.replace(data=bare.data[rows], scale=bare.scale[scale_rows], zero=zero)
        count += int(_zeroed(dense[rows], part))
    return count


def _rows_like(box: Quantized, dense: Array) -> Array:
    """Arrange a dense weight as `[..., out, in]`, in the order of a box's rows and columns."""
    if not box.kernel_shape:
        return dense
    stack = dense.ndim - len(box.kernel_shape)
    if box.kernel_axes:
        dense = dense.transpose(*range(stack), *(stack + axis for axis in box.kernel_axes))
    columns = dense.reshape(*dense.shape[:stack], -1, box.data.shape[-2])
    return jnp.swapaxes(columns, -1, -2)


@jax.jit
def _zeroed(before: Array, after: Any) -> Array:
    """Count rows, along the last axis, that became zero."""
    return jnp.sum(jnp.any(before != 0, axis=-1) & ~jnp.any(boxes.dense(after) != 0, axis=-1))
