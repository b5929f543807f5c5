"""Layouts of parameters: the axes of inputs, of outputs, and of stacked matrices.

Linen does not store this. A `weight` or `embedding` is `[..., out, in]`. The shape of a `kernel`
depends on its module: `[in, out]` (Dense), `[in, heads, head_dim]` (DenseGeneral with several
outputs), `[height, width, in, out]` (Conv), each with a leading layer axis under `nn.scan`.
Transforms use a `Layout`, never a parameter's name.
"""

import math
from dataclasses import dataclass
from typing import Any

from jax import Array


@dataclass(frozen=True)
class Layout:
    """Axes of a parameter that are rows, columns and stacked matrices.

    Attributes:
      stack: count of leading axes that index matrices: layers of a scan, members of a vmap, batch
        axes of a DenseGeneral.
      inputs: axes that a product sums over, counted after the stack, in the order of the columns.
        All other axes are outputs. None for an array stored `[..., out, in]`.
    """

    stack: int = 0
    inputs: tuple[int, ...] | None = None

    @classmethod
    def of_rows(cls, ndim: int) -> "Layout":
        """Return the layout of an array stored `[..., out, in]`."""
        return cls(max(ndim - 2, 0))

    def rows(self, array: Array) -> Array:
        """Arrange a parameter as `[..., out, in]`, with the axes of the stack in front."""
        stack, rows, columns = self.stack, *self.extent(array.shape)
        if self.inputs is not None:
            order = self._order_of(array.ndim)
            array = array.transpose(*range(stack), *(stack + axis for axis in order))
        return array.reshape(*array.shape[:stack], rows, columns)

    def matrices(self, array: Array) -> Array:
        """Arrange a parameter as `[out, in]`, or a stack of them as `[matrices, out, in]`."""
        rows = self.rows(array)
        return rows.reshape(-1, *rows.shape[-2:]) if self.stack else rows

    def restored(self, matrices: Array, shape: tuple[int, ...]) -> Array:
        """Restore a parameter from `rows` or `matrices`.

        Args:
          matrices: `[..., out, in]`.
          shape: shape of the parameter.

        Returns:
          The parameter in its original shape.
        """
        if self.inputs is None:
            return matrices.reshape(shape)
        stack, order = self.stack, self._order_of(len(shape))
        ordered = matrices.reshape(*shape[:stack], *(shape[stack + axis] for axis in order))
        back = sorted(range(len(order)), key=order.__getitem__)
        return ordered.transpose(*range(stack), *(stack + axis for axis in back))

    def extent(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return `(out, in)` of each matrix of a parameter of this shape."""
        matrix_shape = shape[self.stack :]
        columns = (
            matrix_shape[-1]
            if self.inputs is None
            else math.prod(matrix_shape[axis] for axis in self.inputs)
        )
        return math.prod(matrix_shape) // columns if columns else 0, columns

    def count(self, shape: tuple[int, ...]) -> int:
        """Count the matrices in a parameter of this shape."""
        return math.prod(shape[: self.stack])

    def kernel(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Return the fields of `params.Quantized` that restore this shape."""
        if self.inputs is None:
            return {"kernel_shape": (), "kernel_axes": ()}
        matrix_shape = shape[self.stack :]
        outputs = tuple(axis for axis in range(len(matrix_shape)) if axis not in self.inputs)
        axes = (*self.inputs, *outputs)
        return {
            "kernel_shape": matrix_shape,
            "kernel_axes": () if axes == tuple(range(len(matrix_shape))) else axes,
        }

    def _order_of(self, ndim: int) -> tuple[int, ...]:
        """Order the axes after the stack, outputs before inputs."""
        inputs = self.inputs or ()
        outputs = (axis for axis in range(ndim - self.stack) if axis not in inputs)
        return (*outputs, *inputs)


AS_ROWS = Layout()
"""Layout of one matrix, stored `[out, in]`."""


def from_bias(
    kernel: tuple[int, ...], bias: tuple[int, ...] | None, stack: int | None = None
) -> Layout | None:
    """Infer the layout of a stock kernel from the shape of its bias.

    A bias has the axes of the stack and of the outputs. Stock kernels have their outputs last.

    Args:
      kernel: shape of the kernel.
      bias: shape of the bias, or None without a bias.
      stack: count of leading axes that index matrices, or None if unknown.

    Returns:
      The layout, or None if no layout or more than one matches.
    """
    if len(kernel) == 2 and not stack:
        return Layout(0, (0,))
    if stack is not None and len(kernel) == stack + 2:
        return Layout(stack, (0,))
    if bias is None:
        return None
    fitting = [
        Layout(leading, tuple(range(len(kernel) - leading - outputs)))
        for outputs in range(1, len(bias) + 1)
        for leading in (len(bias) - outputs,)
        if leading + outputs < len(kernel)
        and (stack is None or leading == stack)
        and bias == (*kernel[:leading], *kernel[len(kernel) - outputs :])
    ]
    return fitting[0] if len(fitting) == 1 else None


def by_name(path: str, shape: tuple[int, ...]) -> Layout | None:
    """Infer a layout from path and shape; None for a kernel of three or more axes."""
    if path.rsplit("/", 1)[-1] != "kernel":
        return Layout.of_rows(len(shape))
    return from_bias(shape, None)
