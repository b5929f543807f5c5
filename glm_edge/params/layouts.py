"""Which axes of a parameter are inputs, which are outputs, and which number matrices.

Linen does not store this. A `weight` or `embedding` is `[..., out, in]`; a `kernel` is whatever its
module says: `[in, out]` (Dense), `[in, heads, head_dim]` (a DenseGeneral with several outputs),
`[height, width, in, out]` (Conv), each with a layer axis before it under `nn.scan`. What rounds or
masks asks a `Layout` and never a name.
"""

import math
from dataclasses import dataclass
from typing import Any

from jax import Array


@dataclass(frozen=True)
class Layout:
    """Axes of a parameter that are rows, columns and stacked matrices.

    Attributes:
      stack: number of leading axes that number matrices: layers of a scan, members of a vmap, batch
        axes of a DenseGeneral.
      inputs: axes that a product sums over, counted after the stack, in the order of the columns;
        all others are outputs. None for an array that is stored `[..., out, in]`.
    """

    stack: int = 0
    inputs: tuple[int, ...] | None = None

    @classmethod
    def of_rows(cls, ndim: int) -> "Layout":
        """Returns the layout of an array stored `[..., out, in]`."""
        return cls(max(ndim - 2, 0))

    def rows(self, array: Array) -> Array:
        """Arranges a parameter as `[..., out, in]`, with one leading axis per axis of the stack."""
        stack, rows, columns = self.stack, *self.extent(array.shape)
        if self.inputs is not None:
            order = self._order_of(array.ndim)
            array = array.transpose(*range(stack), *(stack + axis for axis in order))
        return array.reshape(*array.shape[:stack], rows, columns)

    def matrices(self, array: Array) -> Array:
        """Arranges a parameter as `[out, in]`, or as `[matrices, out, in]` where it is a stack."""
        rows = self.rows(array)
        return rows.reshape(-1, *rows.shape[-2:]) if self.stack else rows

    def restored(self, matrices: Array, shape: tuple[int, ...]) -> Array:
        """Restores a parameter from `rows` or `matrices`.

        Args:
          matrices: `[..., out, in]`.
          shape: of the parameter.
        """
        if self.inputs is None:
            return matrices.reshape(shape)
        stack, order = self.stack, self._order_of(len(shape))
        ordered = matrices.reshape(*shape[:stack], *(shape[stack + axis] for axis in order))
        back = sorted(range(len(order)), key=order.__getitem__)
        return ordered.transpose(*range(stack), *(stack + axis for axis in back))

    def extent(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Returns `(out, in)` of each matrix of a parameter of this shape."""
        matrix_shape = shape[self.stack :]
        columns = (
            matrix_shape[-1]
            if self.inputs is None
            else math.prod(matrix_shape[axis] for axis in self.inputs)
        )
        return math.prod(matrix_shape) // columns if columns else 0, columns

    def count(self, shape: tuple[int, ...]) -> int:
        """Counts the matrices in a parameter of this shape."""
        return math.prod(shape[: self.stack])

    def kernel(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Returns the fields of a box that restore this shape, see `params.Quantized`."""
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
        """Orders the axes after the stack, outputs before inputs."""
        inputs = self.inputs or ()
        outputs = (axis for axis in range(ndim - self.stack) if axis not in inputs)
        return (*outputs, *inputs)


AS_ROWS = Layout()
"""One matrix, stored `[..., in]` with its outputs before."""


def from_bias(
    kernel: tuple[int, ...], bias: tuple[int, ...] | None, stack: int | None = None
) -> Layout | None:
    """Tells the layout of a stock kernel from the shape of the bias beside it.

    A bias has the axes of the stack and those of the outputs, and stock kernels have their outputs
    last.

    Args:
      kernel: shape.
      bias: shape, or None where there is none.
      stack: leading axes that are known to number matrices; None where this is not known.

    Returns:
      The layout, or None where several fit, or none.
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
    """Tells a layout from the parameter alone: None for a kernel of three or more axes."""
    if path.rsplit("/", 1)[-1] != "kernel":
        return Layout.of_rows(len(shape))
    return from_bias(shape, None)
