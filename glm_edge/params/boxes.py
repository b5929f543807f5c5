"""Compressed weights as boxed parameters: pytree nodes whose `unbox()` is the dense array.

A Linen module unboxes a parameter before it reads it, so any module runs on these unchanged. Static
fields are hashable and describe trailing axes only; leading axes (layers stacked for a scan, a
vmapped batch) come from the arrays.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta
from jax import Array

from glm_edge.errors import BoxError
from glm_edge.kernels import matmul, packing


@dataclass(frozen=True)
class Format:
    """How the numbers of a weight are stored.

    Attributes:
      bits: 8, or 4 (two to a byte).
      group_size: columns that share a scale; None for one scale a row (per channel).
      symmetric: True for `f' = s q`; False for `f' = s (q - z)` with an integer zero point.
      scale_dtype: type in which scales are stored.
    """

    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: str = "float32"

    def __post_init__(self):
        if self.bits not in (4, 8):
            raise BoxError(f"format: bits must be 4 or 8, not {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise BoxError(f"format: group_size must be positive, not {self.group_size}")
        if self.scale_dtype not in ("float32", "float16", "bfloat16"):
            raise BoxError(f"format: scale_dtype {self.scale_dtype!r} is not a float type")

    def __str__(self) -> str:
        grouping = f"g{self.group_size}" if self.group_size else "channel"
        return f"int{self.bits}-{grouping}{'' if self.symmetric else '-affine'}"


class _Box(meta.AxisMetadata):
    """What all boxes share: axes come from the data, so adding or removing one changes nothing."""

    trainable: ClassVar[tuple[str, ...]] = ()

    def add_axis(self, index: int, params: dict[Any, Any]):
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]):
        return self


class Masked(struct.PyTreeNode, _Box):
    """A pruned weight: `unbox()` is `value * mask`.

    Build with `mask`. `value` may itself be boxed only by `FakeQuantized`-like training boxes;
    quantizing a masked weight keeps its zeros exactly and drops the mask.
    """

    value: Array
    mask: Array
    trainable: ClassVar[tuple[str, ...]] = ("value",)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return self.value.shape

    def unbox(self) -> Array:
        """Returns the dense weight with its pruned entries at zero."""
        return self.value * self.mask.astype(self.value.dtype)

    def replace_boxed(self, val: Array) -> "Masked":
        """Returns the same mask around new values."""
        return self.replace(value=val)


class Quantized(struct.PyTreeNode, _Box):
    """A weight in low-bit integers: `unbox()` is `scale * (q - zero)`.

    Build with `quantized`. Matrices are held `[..., out, in]`; groups and packing run along `in`.

    Attributes:
      data: int8 [..., out, in], or uint8 [..., out, ceil(in / 2)] at 4 bits, low nibble first.
      scale: [..., out, in / group_size], or [..., out, 1] per channel.
      zero: None, or int8 zero points like `scale`.
      format: bits, grouping, symmetry, scale type.
      columns: `in`.
      kernel_shape: empty for a weight kept `[out, in]`; else the trailing shape of a stock kernel
        `[..., in, out]` that `unbox()` transposes and reshapes back to.
      dtype: type of the dense weight.
    """

    data: Array
    scale: Array
    zero: Array | None
    format: Format = struct.field(pytree_node=False)
    columns: int = struct.field(pytree_node=False)
    kernel_shape: tuple[int, ...] = struct.field(pytree_node=False, default=())
    dtype: str = struct.field(pytree_node=False, default="float32")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        if self.kernel_shape:
            return (*self.data.shape[:-2], *self.kernel_shape)
        return (*self.data.shape[:-1], self.columns)

    def integers(self) -> Array:
        """Returns the signed integers as int8 [..., out, in]."""
        if self.format.bits == 4:
            return packing.unpack_int4(self.data, self.columns)
        return self.data

    def unbox(self) -> Array:
        """Returns the dense weight."""
        dense_rows = matmul.dequantize(self.integers(), self.scale, self.zero).astype(self.dtype)
        if not self.kernel_shape:
            return dense_rows
        return jnp.swapaxes(dense_rows, -1, -2).reshape(*self.data.shape[:-2], *self.kernel_shape)

    def replace_boxed(self, val: Array) -> Array:
        """Returns `val` unboxed: a changed value no longer lies on this box's grid."""
        return val


def is_box(node: Any) -> bool:
    """True for a boxed parameter."""
    return isinstance(node, meta.AxisMetadata)


def dense(node: Any) -> Array:
    """Returns the dense array of a box, or the array itself."""
    return meta.unbox(node)


def mask(value: Array, keep: Array) -> Masked:
    """Boxes a weight with a mask.

    Args:
      value: weight of any shape.
      keep: bool of the same shape; False prunes.

    Returns:
      The box.

    Raises:
      BoxError: shapes differ, the mask is not boolean, or `value` is quantized.
    """
    if isinstance(value, Masked):
        value, keep = value.value, jnp.logical_and(value.mask, keep)
    if is_box(value):
        raise BoxError(f"cannot mask a {type(value).__name__}: prune before quantizing")
    if value.shape != keep.shape or keep.dtype != jnp.bool_:
        raise BoxError(f"mask must be bool of shape {value.shape}, found {keep.dtype} {keep.shape}")
    return Masked(value=value, mask=keep)


def quantized(
    integers: Array,
    scale: Array,
    zero: Array | None,
    format: Format,
    kernel_shape: tuple[int, ...] = (),
    dtype: str = "float32",
) -> Quantized:
    """Boxes integers with their scales, packing them.

    Args:
      integers: int8 [..., out, in] within the signed range of `format.bits`.
      scale: [..., out, groups].
      zero: None when symmetric, else int8 like `scale`.
      format: how they are stored.
      kernel_shape: trailing shape of a stock kernel, or empty for `[out, in]`.
      dtype: type of the dense weight.

    Returns:
      The box.

    Raises:
      BoxError: shapes or types do not fit the format.
    """
    columns = integers.shape[-1]
    groups = num_groups(columns, format)
    expected = (*integers.shape[:-1], groups)
    if integers.dtype != jnp.int8:
        raise BoxError(f"integers must be int8, found {integers.dtype}")
    if scale.shape != expected:
        raise BoxError(f"scale must be {expected} for {format}, found {scale.shape}")
    if (zero is None) != format.symmetric or (zero is not None and zero.shape != expected):
        raise BoxError(f"zero points of shape {expected} go with an affine format, and only there")
    if kernel_shape and math.prod(kernel_shape) != integers.shape[-2] * columns:
        raise BoxError(f"kernel_shape {kernel_shape} does not hold {integers.shape[-2:]} weights")
    return Quantized(
        data=packing.pack_int4(integers) if format.bits == 4 else integers,
        scale=scale.astype(format.scale_dtype),
        zero=None if zero is None else zero.astype(jnp.int8),
        format=format,
        columns=columns,
        kernel_shape=tuple(kernel_shape),
        dtype=str(jnp.dtype(dtype)),
    )


def num_groups(columns: int, format: Format) -> int:
    """Number of scales a row.

    Raises:
      BoxError: `columns` is not a whole number of groups.
    """
    if format.group_size is None:
        return 1
    if columns % format.group_size:
        raise BoxError(f"{columns} columns are not whole groups of {format.group_size}")
    return columns // format.group_size


def describe(box: Quantized | Masked) -> dict[str, Any]:
    """Static fields of a box as JSON-ready values, the inverse of `rebuild`."""
    if isinstance(box, Masked):
        return {"box": "Masked"}
    return {
        "box": "Quantized",
        "format": asdict(box.format),
        "columns": box.columns,
        "kernel_shape": list(box.kernel_shape),
        "dtype": box.dtype,
    }


def rebuild(fields: dict[str, Array], static: dict[str, Any]) -> Quantized | Masked:
    """Rebuilds a box from its arrays and the output of `describe`.

    Raises:
      BoxError: the description names no known box, or the arrays do not fit it.
    """
    kind = static.get("box")
    if kind == "Masked":
        return mask(fields["value"], fields["mask"])
    if kind != "Quantized":
        raise BoxError(f"unknown box {kind!r}; known: Masked, Quantized")
    box = Quantized(
        data=fields["data"],
        scale=fields["scale"],
        zero=fields.get("zero"),
        format=Format(**static["format"]),
        columns=static["columns"],
        kernel_shape=tuple(static["kernel_shape"]),
        dtype=str(jnp.dtype(static["dtype"])),
    )
    width = -(-box.columns // 2) if box.format.bits == 4 else box.columns
    stored = jnp.uint8 if box.format.bits == 4 else jnp.int8
    groups = num_groups(box.columns, box.format)
    if box.data.dtype != stored or box.data.shape[-1] != width:
        raise BoxError(
            f"data must be {jnp.dtype(stored)} with {width} columns for {box.format} of "
            f"{box.columns}, found {box.data.dtype} {box.data.shape}"
        )
    if box.scale.shape != (*box.data.shape[:-1], groups):
        raise BoxError(
            f"scale {box.scale.shape} does not fit data {box.data.shape} of {box.format}"
        )
    if str(box.scale.dtype) != box.format.scale_dtype:
        raise BoxError(f"scale is {box.scale.dtype}, {box.format} says {box.format.scale_dtype}")
    if (box.zero is None) != box.format.symmetric:
        raise BoxError(f"zero points go with an affine format, and only there: {box.format}")
    if box.zero is not None and (box.zero.shape, box.zero.dtype) != (box.scale.shape, jnp.int8):
        raise BoxError(
            f"zero points must be int8 {box.scale.shape}, found {box.zero.dtype} {box.zero.shape}"
        )
    return box


def tree_leaves(tree: Any) -> list[Any]:
    """Leaves of a parameter tree with boxes kept whole."""
    return jax.tree.leaves(tree, is_leaf=is_box)
