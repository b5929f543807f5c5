"""Compressed weights as boxed parameters: pytree nodes whose `unbox()` returns the dense array.

A Linen module unboxes a parameter before it reads it, so any module runs on boxes unchanged. Static
fields are hashable and describe trailing axes only. Leading axes (layers stacked for a scan, a
vmapped batch) come from the arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import asdict
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.core import meta
from jax import Array
from jax.typing import DTypeLike

from glm_edge.errors import BoxError
from glm_edge.kernels import packing, quantization
from glm_edge.params.formats import FLOATING as DENSE
from glm_edge.params.formats import Format

# Outside of a trace, compiles one program per box, not one per operation. Inside a trace, the
# operations are inlined.
_program = functools.partial(jax.jit, inline=True)


class _Box(meta.AxisMetadata):
    """Base of the boxes; axes come from the arrays, so adding or removing one changes nothing."""

    trainable: ClassVar[tuple[str, ...]] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the dense weight."""
        raise NotImplementedError

    def add_axis(self, index: int, params: dict[Any, Any]) -> Self:
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Self:
        return self

    def __repr__(self) -> str:
        # One line per box, since printed arrays of a tree would fill pages.
        inner = getattr(self, "format", None) or getattr(self, "value", None)
        if not isinstance(inner, Format | _Box):
            inner = getattr(inner, "dtype", "?")
        try:
            shape = "x".join(map(str, self.shape))
        # Placeholders that tree functions put into a box have no shape.
        except (AttributeError, IndexError, TypeError):
            shape = "?"
        return f"{type(self).__name__}({shape}, {inner})"


class Masked(struct.PyTreeNode, _Box, repr=False):
    """A pruned weight; `unbox()` returns `value * mask`.

    Build it with `glm_edge.params.mask`. `value` may be a `FakeQuantized`. Quantizing a masked
    weight keeps its zeros exactly and drops the mask.

    A mask is boolean, so `jax.grad` refuses a tree of masked parameters. Train the first tree of
    `glm_edge.params.partition`, and combine both trees within the loss:

        trainable, frozen = ge.params.partition(params)
        state = TrainState.create(apply_fn=model.apply, params=trainable, tx=optax.adam(1e-3))

        def loss(trainable):
            params = ge.params.combine(trainable, frozen)
            return jnp.mean(jnp.square(model.apply({"params": params}, x) - y))

        state = state.apply_gradients(grads=jax.grad(loss)(state.params))
        params = ge.params.combine(state.params, frozen)

    Attributes:
              value: weight of any shape, an array or a `FakeQuantized`.
              mask: bool of the same shape, False at pruned entries.
    """

    value: Any
    mask: Array
    trainable: ClassVar[tuple[str, ...]] = ("value",)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the dense weight."""
        return self.value.shape

    @_program
    def unbox(self) -> Array:
        """Return the dense weight with zeros at pruned entries."""
        value = meta.unbox(self.value)
        return value * self.mask.astype(value.dtype)

    def replace_boxed(self, val: Array) -> Masked:  # type: ignore[override]  # of arrays alone
        """Return a box with the same mask and new values."""
        return self.replace(value=val)


class Quantized(struct.PyTreeNode, _Box, repr=False):
    """A weight in packed codes; `unbox()` returns `scale * (level - zero)`.

    Build it with `quantized`. Matrices are stored `[..., out, in]`; groups and packing run along
    `in`.

    Attributes:
      data: codes packed by `glm_edge.kernels.packing.pack`, [..., out, bytes].
      scale: [..., out, groups], or [..., 1, 1] per tensor.
      zero: None (symmetric), or zero points in the shape of `scale`.
      input_scale: None, or the scale of the static int8 activations that this weight multiplies,
        [...].
      input_zero: None, or the int8 zero point of these activations, [...].
      output_scale: None, or the scale of the static int8 products, [...]; requires `input_scale`.
      output_zero: None, or the int8 zero point of the products, [...].
      format: type, grouping, symmetry, types of scales and zero points.
      columns: columns per row, `in`.
      kernel_shape: empty for a weight stored `[out, in]`; otherwise the trailing shape of a stock
        kernel, which `unbox()` restores by transposing and reshaping.
      kernel_axes: axes of `kernel_shape`, inputs before outputs, if the kernel has another order;
        otherwise empty.
      dtype: type of the dense weight.
    """

    data: Array
    scale: Array
    zero: Array | None
    input_scale: Array | None = None
    input_zero: Array | None = None
    output_scale: Array | None = None
    output_zero: Array | None = None
    format: Format = struct.field(pytree_node=False, default=Format())
    columns: int = struct.field(pytree_node=False, default=0)
    kernel_shape: tuple[int, ...] = struct.field(pytree_node=False, default=())
    kernel_axes: tuple[int, ...] = struct.field(pytree_node=False, default=())
    dtype: str = struct.field(pytree_node=False, default="float32")

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the dense weight."""
        if self.kernel_shape:
            return (*self.data.shape[:-2], *self.kernel_shape)
        return (*self.data.shape[:-1], self.columns)

    def codes(self) -> Array:
        """Return the unpacked codes as int8 [..., out, in]."""
        return packing.unpack(self.data, self.columns, self.format.qtype)

    def levels(self) -> Array:
        """Return the level of each code, [..., out, in]: int8, or float32 for nf4."""
        return quantization.levels(self.codes(), self.format.qtype)

    @_program
    def rows(self) -> Array:
        """Return the dense weight as float32 [..., out, in]."""
        return quantization.dequantize_levels(self.levels(), self.scale, self.zero)

    @_program
    def unbox(self) -> Array:
        """Return the dense weight."""
        return as_kernel(self.rows().astype(self.dtype), self.kernel_shape, self.kernel_axes)

    def replace_boxed(self, val: Array) -> Array:  # type: ignore[override]
        """Return `val` unboxed, since packed codes do not represent an arbitrary value."""
        return val


class FakeQuantized(struct.PyTreeNode, _Box, repr=False):
    """A weight in training that is fake-quantized when its module reads it.

    `unbox()` returns exactly the values of a `Quantized` with the same scales. Gradients pass
    straight through the rounding where it does not clip, and reach the scales as in learned step
    size quantization. Build it with `fake_quantized`; `finalize` returns the `Quantized`.

    Attributes:
      value: float32 [..., out, in].
      scale: float32 [..., out, groups] or [..., 1, 1]; rounded to the stored type when read.
      zero: None (symmetric), or zero points in the shape of `scale`. Integers do not train.
      format: target format.
      kernel_shape: as in `Quantized`.
      kernel_axes: as in `Quantized`.
      dtype: type of the dense weight.

    References:
      Learned Step Size Quantization, https://arxiv.org/abs/1902.08153.
    """

    value: Array
    scale: Array
    zero: Array | None
    format: Format = struct.field(pytree_node=False, default=Format())
    kernel_shape: tuple[int, ...] = struct.field(pytree_node=False, default=())
    kernel_axes: tuple[int, ...] = struct.field(pytree_node=False, default=())
    dtype: str = struct.field(pytree_node=False, default="float32")
    trainable: ClassVar[tuple[str, ...]] = ("value", "scale")

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the dense weight."""
        if self.kernel_shape:
            return (*self.value.shape[:-2], *self.kernel_shape)
        return self.value.shape

    def stored_scale(self) -> Array:
        """Return float32 scales rounded to their stored type, with straight-through gradients."""
        stored = quantization.round_scale(self.scale, self.format.scale_dtype)
        return quantization.straight_through(self.scale, stored.astype(jnp.float32))

    @_program
    def unbox(self) -> Array:
        """Return the rounded dense weight."""
        # LSQ scales the gradient of a step by 1 / sqrt(N Q_max), N weights per scale.
        low, high = quantization.code_range(self.format.qtype)
        reach = max(abs(low), high) if self.format.qtype != "nf4" else 1
        group = self.value.size / max(self.scale.size, 1)
        scale = self.stored_scale()
        scale = quantization.straight_through(scale * (group * reach) ** -0.5, scale)
        dense = quantization.fake_quantize(self.value, scale, self.zero, self.format.qtype)
        return as_kernel(dense.astype(self.dtype), self.kernel_shape, self.kernel_axes)

    @_program
    def finalize(self) -> Quantized:
        """Return the packed box with the same dense weight."""
        scale = self.stored_scale().astype(self.format.scale_dtype)
        codes = quantization.quantize(self.value, scale, self.zero, self.format.qtype)
        box = quantized(codes, scale, self.zero, self.format, self.kernel_shape, self.dtype)
        return box.replace(kernel_axes=self.kernel_axes)

    def replace_boxed(self, val: Array) -> Array:  # type: ignore[override]
        """Return `val` unboxed."""
        return val


class Narrow(struct.PyTreeNode, _Box, repr=False):
    """A weight of a stock module stored in a narrower floating type; `unbox()` widens it.

    A stock layer computes in the widest type of its inputs and parameters. Plain bfloat16 weights
    would change the types of activations, which `nn.scan` refuses. Build it with `narrow`.

    Attributes:
      value: weight in the shape of the parameter.
      dtype: type of the dense weight.
    """

    value: Array
    dtype: str = struct.field(pytree_node=False, default="float32")
    trainable: ClassVar[tuple[str, ...]] = ("value",)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the dense weight."""
        return self.value.shape

    def unbox(self) -> Array:
        """Return the dense weight."""
        return self.value.astype(self.dtype)

    def replace_boxed(self, val: Array) -> Array:  # type: ignore[override]
        """Return `val` unboxed."""
        return val


Box = Masked | Quantized | FakeQuantized | Narrow
"""Any box."""

Weight = Array | Box
"""A parameter: an array or a box."""


def as_kernel(rows: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """Restore a stock kernel from `[..., out, in]`, see `Quantized` for both fields."""
    if not shape:
        return rows
    stack = rows.shape[:-2]
    columns = jnp.swapaxes(rows, -1, -2)
    if not axes:
        return columns.reshape(*stack, *shape)
    ordered = columns.reshape(*stack, *(shape[axis] for axis in axes))
    back = sorted(range(len(axes)), key=axes.__getitem__)
    return ordered.transpose(*range(len(stack)), *(len(stack) + axis for axis in back))


def is_box(node: object) -> bool:
    """Test for a boxed parameter."""
    return isinstance(node, meta.AxisMetadata)


def dense(node: Weight) -> Array:
    """Return the dense array of a box, or the array itself."""
    return meta.unbox(node)


def mask(value: Array | Masked | FakeQuantized, keep: Array) -> Masked:
    """Box a weight with a mask.

    Args:
      value: weight of any shape.
      keep: bool of the same shape; False prunes.

    Returns:
      The box. Masking a `Masked` again intersects both masks.

    Raises:
      BoxError: shapes differ, the mask is not boolean, or `value` is quantized.

    Example:
      >>> box = mask(jnp.asarray([1.0, 2.0]), jnp.asarray([True, False]))
      >>> box.unbox()
      Array([1., 0.], dtype=float32)
    """
    if isinstance(value, Masked):
        return mask(value.value, jnp.logical_and(value.mask, keep))
    if is_box(value) and not isinstance(value, FakeQuantized):
        raise BoxError(f"cannot mask a {type(value).__name__}: prune before quantizing")
    if value.shape != keep.shape or keep.dtype != jnp.bool_:
        raise BoxError(f"mask must be bool of shape {value.shape}, found {keep.dtype} {keep.shape}")
    return Masked(value=value, mask=keep)


def narrow(value: Array, dtype: DTypeLike) -> Narrow:
    """Box a weight that is stored in a narrower type than its module computes with.

    Args:
      value: weight of any shape, in a floating type.
      dtype: type of the dense weight.

    Returns:
      The box.

    Raises:
      BoxError: a type is not a floating type.
    """
    dtype = str(jnp.dtype(dtype))
    if dtype not in DENSE or str(value.dtype) not in DENSE:
        raise BoxError(f"types must be {', '.join(DENSE)}, found {value.dtype} and {dtype}")
    return Narrow(value, dtype)


def quantized(
    codes: Array,
    scale: Array,
    zero: Array | None,
    format: Format,
    kernel_shape: tuple[int, ...] = (),
    dtype: str = "float32",
    input_scale: Array | None = None,
    input_zero: Array | None = None,
    output_scale: Array | None = None,
    output_zero: Array | None = None,
) -> Quantized:
    """Pack codes and boxes them with their scales.

    Args:
      codes: int8 [..., out, in] within the range of `format.qtype`.
      scale: scales in the shape `format.scale_shape(codes.shape)`.
      zero: None for a symmetric format, otherwise zero points in the shape of `scale`.
      format: storage format.
      kernel_shape: trailing shape of a stock kernel, or empty for `[out, in]`.
      dtype: type of the dense weight.
      input_scale: scale of static int8 activations, or None.
      input_zero: int8 zero point of the activations, or None.
      output_scale: scale of static int8 products, or None.
      output_zero: int8 zero point of the products, or None.

    Returns:
      The box.

    Raises:
      BoxError: shapes or types do not match the format.
    """
    if codes.dtype != jnp.int8:
        raise BoxError(f"codes must be int8, found {codes.dtype}")
    _check_grid(codes.shape, scale, zero, format)
    if kernel_shape and math.prod(kernel_shape) != math.prod(codes.shape[-2:]):
        raise BoxError(f"kernel_shape {kernel_shape} does not match {codes.shape[-2:]} weights")
    return Quantized(
        data=packing.pack(codes, format.qtype),
        scale=scale.astype(format.scale_dtype),
        zero=None if zero is None else zero.astype(format.zero_dtype),
        input_scale=input_scale,
        input_zero=input_zero,
        output_scale=output_scale,
        output_zero=output_zero,
        format=format,
        columns=codes.shape[-1],
        kernel_shape=tuple(kernel_shape),
        dtype=str(jnp.dtype(dtype)),
    )


def fake_quantized(
    value: Array,
    scale: Array,
    zero: Array | None,
    format: Format,
    kernel_shape: tuple[int, ...] = (),
    dtype: str = "float32",
) -> FakeQuantized:
    """Box a weight for quantization-aware training.

    Args:
      value: weight [..., out, in].
      scale: initial scales in the shape `format.scale_shape(value.shape)`.
      zero: None for a symmetric format, otherwise zero points in the shape of `scale`.
      format: target format.
      kernel_shape: trailing shape of a stock kernel, or empty for `[out, in]`.
      dtype: type of the dense weight.

    Returns:
      The box.

    Raises:
      BoxError: shapes do not match the format.
    """
    _check_grid(value.shape, scale, zero, format)
    return FakeQuantized(
        value=value.astype(jnp.float32),
        scale=scale.astype(jnp.float32),
        zero=zero,
        format=format,
        kernel_shape=tuple(kernel_shape),
        dtype=str(jnp.dtype(dtype)),
    )


def _check_grid(shape: tuple[int, ...], scale: Array, zero: Array | None, format: Format) -> None:
    if format.plain:
        raise BoxError(f"{format} is a plain array, not a box")
    expected = format.scale_shape(shape)
    if scale.shape != expected:
        raise BoxError(f"scale must be {expected} for {format}, found {scale.shape}")
    if (zero is None) != format.symmetric:
        raise BoxError(f"only an affine format has zero points: {format}")
    if zero is not None and zero.shape != expected:
        raise BoxError(f"zero points must be {expected} for {format}, found {zero.shape}")


def describe(box: Any) -> dict[str, Any]:
    """Return the static fields of a box as JSON-ready values, the input of `rebuild`.

    Args:
      box: one of `BOXES`.

    Returns:
      Class name and static fields.

    Raises:
      BoxError: the box is of another class, or contains another box.
    """
    if type(box) not in BOXES.values():
        raise BoxError(f"a {type(box).__name__} cannot be stored; known: {', '.join(BOXES)}")
    inner_box = next((type(v).__name__ for v in vars(box).values() if is_box(v)), None)
    if inner_box:
        raise BoxError(
            f"a {inner_box} inside a {type(box).__name__} cannot be stored; finish training"
        )
    static = {name: getattr(box, name) for name in _static_fields(type(box))}
    if "format" in static:
        static |= {"format": asdict(box.format), "kernel_shape": list(box.kernel_shape)}
        axes = static.pop("kernel_axes")
        static |= {"kernel_axes": list(axes)} if axes else {}
    return {"box": type(box).__name__, **static}


def rebuild(fields: dict[str, Array], static: dict[str, Any]) -> Any:
    """Rebuild a box from its arrays and the output of `describe`.

    Args:
      fields: arrays by field name.
      static: static fields from `describe`.

    Returns:
      The box.

    Raises:
      BoxError: the class or a field is unknown, or the arrays do not match the description.
    """
    kind = static.get("box")
    if not isinstance(kind, str) or kind not in BOXES:
        raise BoxError(f"unknown box {kind!r:.60}; known: {', '.join(BOXES)}")
    _check_keys(static, ("box", *_static_fields(BOXES[kind])), f"the description of a {kind}")
    if kind == "Masked":
        return mask(fields["value"], fields["mask"])
    dtype = static.get("dtype")
    if not isinstance(dtype, str) or dtype not in DENSE:
        raise BoxError(f"dtype must be one of {', '.join(DENSE)}, found {dtype!r:.60}")
    if kind == "Narrow":
        return narrow(fields["value"], dtype)
    format = _read_format(static.get("format"))
    kernel_shape = _read_integers(static, "kernel_shape")
    axes = _read_integers(static, "kernel_axes") if "kernel_axes" in static else ()
    if axes and sorted(axes) != list(range(len(kernel_shape))):
        raise BoxError(f"kernel_axes {axes} are not a permutation of the axes of {kernel_shape}")
    if kind == "FakeQuantized":
        box = fake_quantized(
            fields["value"], fields["scale"], fields.get("zero"), format, kernel_shape, dtype
        )
        return box.replace(kernel_axes=axes)
    columns, data = static.get("columns"), fields["data"]
    if type(columns) is not int or columns < 1:
        raise BoxError(f"columns must be a positive integer, found {columns!r:.60}")
    width = packing.packed_columns(columns, format.qtype)
    stored = packing.stored_dtype(format.qtype)
    if data.dtype != stored or data.ndim < 2 or data.shape[-1] != width:
        raise BoxError(
            f"data must be {stored} with {width} bytes per row for {columns} of {format}, found "
            f"{data.dtype} {data.shape}"
        )
    scale, zero = fields["scale"], fields.get("zero")
    _check_grid((*data.shape[:-1], columns), scale, zero, format)
    if str(scale.dtype) != format.scale_dtype:
        raise BoxError(f"scale is {scale.dtype}, {format} requires {format.scale_dtype}")
    if zero is not None and str(zero.dtype) != format.zero_dtype:
        raise BoxError(f"zero points are {zero.dtype}, {format} requires {format.zero_dtype}")
    grids = _static_grid(fields, "input", data), _static_grid(fields, "output", data)
    if grids[0][0] is None and grids[1][0] is not None:
        raise BoxError("output_scale requires input_scale")
    if kernel_shape and math.prod(kernel_shape) != data.shape[-2] * columns:
        raise BoxError(f"kernel_shape {kernel_shape} does not match {data.shape[-2]} x {columns}")
    return Quantized(
        data, scale, zero, *grids[0], *grids[1], format, columns, kernel_shape, axes, dtype
    )


def _static_fields(kind: type) -> tuple[str, ...]:
    return tuple(
        field.name
        for field in dataclasses.fields(kind)
        if not field.metadata.get("pytree_node", True)
    )


def _check_keys(stored: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    """Refuse unknown keys, since they may change the meaning of the bytes."""
    unknown = [key for key in stored if key not in known]
    if unknown:
        raise BoxError(f"{where} has the unknown key {unknown[0]!r:.60}; known: {', '.join(known)}")


def _read_format(stored: Any) -> Format:
    if not isinstance(stored, dict):
        raise BoxError(f"format must be an object with a qtype, found {stored!r:.60}")
    _check_keys(stored, tuple(field.name for field in dataclasses.fields(Format)), "format")
    return Format(**stored)


def _read_integers(static: dict[str, Any], name: str) -> tuple[int, ...]:
    value = static.get(name)
    if not isinstance(value, list | tuple) or not all(type(x) is int and x >= 0 for x in value):
        raise BoxError(f"{name} must be a list of integers, found {value!r:.60}")
    return tuple(value)


def _static_grid(
    fields: dict[str, Array], side: str, data: Array
) -> tuple[Array | None, Array | None]:
    scale, zero = fields.get(f"{side}_scale"), fields.get(f"{side}_zero")
    if scale is None and zero is None:
        return None, None
    if scale is None or zero is None:
        raise BoxError(f"{side}_scale and {side}_zero must be set together")
    if {scale.shape, zero.shape} != {data.shape[:-2]}:
        raise BoxError(f"{side}_scale and {side}_zero must be {data.shape[:-2]} each")
    return scale, zero


BOXES = {
    "Masked": Masked,
    "Quantized": Quantized,
    "FakeQuantized": FakeQuantized,
    "Narrow": Narrow,
}


def check_reach(box: Weight, where: str) -> None:
    """Check that every level times its scale is finite in the type of the dense weight.

    Args:
      box: a box with arrays. Other parameters are not checked.
      where: path of the parameter for the message.

    Raises:
      BoxError: a scale is too large.
    """
    if not isinstance(box, Quantized | FakeQuantized):
        return
    low, high = (1, 1) if box.format.qtype == "nf4" else quantization.code_range(box.format.qtype)
    zero = 0.0 if box.zero is None else _largest(box.zero)
    steps = max(abs(low), high) + zero
    largest = _largest(box.scale) * steps
    if not largest <= float(jnp.finfo(box.dtype).max):
        raise BoxError(f"{where}: weights up to {largest:.3g} are not finite in {box.dtype}")


def _largest(x: Array) -> float:
    """Return the largest magnitude; in numpy where that compiles no program per shape."""
    xp: Any = np if getattr(x, "is_fully_addressable", True) else jnp
    return float(xp.max(xp.abs(xp.asarray(x, "float32")), initial=0.0))


def array_fields(box: Box) -> dict[str, Any]:
    """Return the array fields of a box by name; absent fields are None."""
    return {
        field.name: getattr(box, field.name)
        for field in dataclasses.fields(box)
        if field.metadata.get("pytree_node", True)
    }


def tree_leaves(tree: Any) -> list[Any]:
    """List the leaves of a parameter tree, with each box as one leaf."""
    return jax.tree.leaves(tree, is_leaf=is_box)
