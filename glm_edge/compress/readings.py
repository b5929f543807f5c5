"""Readings of kernels by the layers of a model: contracted axes, and rows of inputs.

Stock Linen layers are intercepted while the model runs on concrete or abstract arrays. A layer
inside a lifted transform (`nn.scan`, `nn.vmap`, `nn.remat`) shows its kernel without the axes that
the transform adds, which identifies stacks. The inputs of such a layer cannot be recorded.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList
from jax import Array

from glm_edge.errors import RecipeError
from glm_edge.models.layers import Embed, Linear
from glm_edge.params.boxes import is_box
from glm_edge.params.layouts import Layout, by_name, from_bias
from glm_edge.params.patterns import compiled
from glm_edge.params.tree import nested

LOOKED_UP = "its rows are looked up, not multiplied"
UNWATCHED = "no layer that calibration can record multiplies it"
_LIFTED = "its layer runs inside nn.scan, nn.vmap or nn.remat, whose inputs cannot be recorded"
_GROUPED = "its convolution is grouped or masked"
_BATCHED = "its layer multiplies each batch entry by a separate matrix"
# Usual sizes and channels of images, to run image models without a batch.
_SIDES = (28, 32, 224, 8, 16, 64, 96, 128, 256, 384)
_CHANNELS = (1, 3, 4)
# Axes of the kernel of a convolution over images.
_IMAGE_KERNEL = 4
_FLAGS = {"train": False, "training": False, "is_training": False, "deterministic": True}


class Reading(NamedTuple):
    """One call of a layer that has a matrix.

    Attributes:
      path: path of the parameter.
      shape: shape of the parameter within the layer, without axes that a lifted transform adds.
      layout: layout within that shape, or None if the layer does not define it.
      x: input array of the layer.
      kind: key of the rows; layers of equal kind with the same input read the same rows.
      rows: function that returns the rows that the matrix multiplies, [..., in], with leading axes
        as in `x`; None if they cannot be recorded.
      reason: reason why `rows` is None.
    """

    path: str
    shape: tuple[int, ...]
    layout: Layout | None
    x: Any = None
    kind: Hashable = ()
    rows: Callable[[], Array] | None = None
    reason: str = UNWATCHED


def watched(note: Callable[[Reading], None]) -> AbstractContextManager[None]:
    """Call `note` with every `Reading` of the models that run within this context."""
    roots: list[Any] = []

    def see(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        roots.append(module.scope.root)
        # A lifted transform runs its module in a separate scope.
        lifted = roots[-1] is not roots[0]
        try:
            outcome = call(*args, **kwargs)
        finally:
            roots.pop()
        if context.method_name != "__call__":
            return outcome
        x = args[0] if args else kwargs.get("inputs")
        einsum = kwargs.get("einsum_str", args[1] if len(args) > 1 else None)
        for name, leaf in module.variables.get("params", {}).items():
            if isinstance(leaf, Mapping) or not hasattr(leaf, "shape"):
                continue
            path = "/".join((*module.path, name))
            reading = _reading(module, path, name, tuple(leaf.shape), x, einsum)
            if reading.rows is not None and lifted:
                reading = reading._replace(rows=None, reason=_LIFTED)
            note(reading)
        return outcome

    return nn.intercept_methods(see)


def _reading(
    module: nn.Module, path: str, name: str, shape: tuple[int, ...], x: Any, einsum: str | None
) -> Reading:
    if isinstance(module, Embed | nn.Embed):
        return Reading(path, shape, by_name(name, shape), x, reason=LOOKED_UP)
    if isinstance(module, Linear) and name == "weight":
        return Reading(path, shape, by_name(name, shape), x, "last", lambda: x)
    if name != "kernel":
        return Reading(path, shape, by_name(name, shape), x)
    if isinstance(module, nn.Dense):
        return Reading(path, shape, Layout(0, (0,)), x, "last", lambda: x)
    if isinstance(module, nn.DenseGeneral):
        return _general(module, path, shape, x)
    if isinstance(module, nn.Einsum):
        return _einsum(einsum or module.einsum_str or "", path, shape, x)
    if isinstance(module, nn.ConvTranspose):
        inputs = (*range(len(shape) - 2), len(shape) - 1 - (not module.transpose_kernel))
        return Reading(path, shape, Layout(0, inputs), x, reason="its convolution is transposed")
    if isinstance(module, nn.ConvLocal):
        return Reading(path, shape, Layout(len(shape) - 2, (0,)), x, reason=_BATCHED)
    if isinstance(module, nn.Conv):
        return _convolution(module, path, shape, x)
    return Reading(path, shape, by_name(name, shape), x)


def _general(module: nn.DenseGeneral, path: str, shape: tuple[int, ...], x: Array) -> Reading:
    axes = module.axis if isinstance(module.axis, tuple | list) else (module.axis,)
    axes = tuple(axis % x.ndim for axis in axes)
    batch = len(tuple(module.batch_dims))
    layout = Layout(batch, tuple(range(len(axes))))
    if batch:
        return Reading(path, shape, layout, x, reason=_BATCHED)
    kind = "last" if axes == (x.ndim - 1,) else axes
    return Reading(path, shape, layout, x, kind, lambda: _last(x, axes))


def _last(x: Array, axes: tuple[int, ...]) -> Array:
    """Move axes to the end in the given order, and join them."""
    others = tuple(axis for axis in range(x.ndim) if axis not in axes)
    return x.transpose(*others, *axes).reshape(*(x.shape[axis] for axis in others), -1)


def _einsum(text: str, path: str, shape: tuple[int, ...], x: Array) -> Reading:
    operands, _, result = text.replace(" ", "").rpartition("->")
    source, _, kernel = operands.rpartition(",")
    if "." in kernel:
        return Reading(path, shape, None, x)
    # Replace an ellipsis by one letter per axis.
    free = (chr(code) for code in range(0x3B1, 0x3B1 + x.ndim))
    source = source.replace("...", "".join(itertools.islice(free, x.ndim - len(source) + 3)))
    inputs = [axis for axis, letter in enumerate(kernel) if letter not in result]
    each = [axis for axis, letter in enumerate(kernel) if letter in result and letter in source]
    if each != list(range(len(each))):
        return Reading(path, shape, None, x, reason=_BATCHED)
    layout = Layout(len(each), tuple(axis - len(each) for axis in inputs))
    letters = [kernel[axis] for axis in inputs]
    if each:
        return Reading(path, shape, layout, x, reason=_BATCHED)
    # A letter that is summed over in one operand only is not a matrix product of rows.
    summed = {letter for letter in source if letter not in result and letter.isascii()}
    if summed != set(letters) or len(set(source)) != len(source):
        return Reading(path, shape, layout, x)
    axes = tuple(source.index(letter) for letter in letters)
    kind = "last" if axes == (x.ndim - 1,) else axes
    return Reading(path, shape, layout, x, kind, lambda: _last(x, axes))


def _convolution(module: nn.Conv, path: str, shape: tuple[int, ...], x: Array) -> Reading:
    layout = Layout(0, tuple(range(len(shape) - 1)))
    if module.feature_group_count != 1 or module.mask is not None:
        return Reading(path, shape, layout, x, reason=_GROUPED)

    def rows() -> Array:
        # A convolution with an identity kernel extracts patches in the order of the kernel's axes,
        # for any padding, stride and dilation.
        columns = math.prod(shape[:-1])
        changes: dict[str, Any] = {"features": columns, "use_bias": False, "dtype": None}
        changes |= {"precision": "highest"}
        patches = module.clone(**changes, name=None, parent=None)
        identity = jnp.eye(columns).reshape(*shape[:-1], columns)
        columns_of_patches: Any = patches.apply({"params": {"kernel": identity}}, x)
        return columns_of_patches

    geometry = (module.strides, module.padding, module.input_dilation, module.kernel_dilation)
    return Reading(path, shape, layout, x, (shape[:-1], repr(geometry)), rows)


class Layouts(Mapping[str, Layout]):
    """Layouts of the matrices of a model by path.

    Access to an unknown layout raises RecipeError, so that only transforms that need it fail.
    """

    def __init__(
        self, name: str, shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, Any]
    ) -> None:
        self._name, self._shapes, self._known = name, shapes, known

    def __getitem__(self, path: str) -> Layout:
        layout = self._known[path]
        if isinstance(layout, Layout):
            return layout
        why = layout or "its shape does not define which axes are inputs"
        raise RecipeError(
            f"{self._name}: {path} {list(self._shapes[path])}: {why}; pass calibration= with a "
            "batch that the model runs on, select it by stacked= if its first axis indexes the "
            "layers of an nn.scan, or exclude it by where="
        )

    def known(self, path: str) -> Layout:
        """Return the layout, or that of a matrix `[..., out, in]` if unknown."""
        layout = self._known.get(path)
        return layout if isinstance(layout, Layout) else Layout()

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def layouts_of(
    name: str,
    model: nn.Module | None,
    leaves: Mapping[str, Any],
    stacked: str | None = None,
    watch: Callable[[Callable[[Reading], None]], None] | None = None,
) -> Layouts:
    """Infer the layout of each parameter.

    The layout comes from an abstract run of the model, by `watch` or on tokens or images of usual
    sizes. If the model does not run, it comes from the shape of the bias.

    Args:
      name: name of the transform for messages.
      model: Linen module; with None, kernels of four axes are treated as convolutions.
      leaves: parameters by path, arrays or boxes.
      stacked: regular expression of parameters whose first axis indexes layers.
      watch: function that runs the model and passes readings to its argument; None tries usual
        inputs.

    Returns:
      Layouts by path.

    Raises:
      RecipeError: `stacked` matches a parameter that is not a stack.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    is_stack = compiled(stacked or "(?!)").search
    readings: dict[str, Reading] = {}
    if any(map(_is_kernel, shapes)) and isinstance(model, nn.Module):
        if watch is not None:

            def keep_first(reading: Reading) -> None:
                readings.setdefault(reading.path, reading)

            watch(keep_first)
        else:
            readings = _tried(model, leaves)
    known: dict[str, Any] = {}
    for path, shape in shapes.items():
        if not _is_kernel(path):
            known[path] = by_name(path, shape)
            continue
        bias = shapes.get(f"{path.rsplit('/', 1)[0]}/bias") if "/" in path else shapes.get("bias")
        layout = _from_reading(readings.get(path), shape, bias)
        asked = 1 if is_stack(path) else None
        known[path] = from_bias(shape, bias, asked) if layout is None else layout
        if known[path] is None and model is None and len(shape) == _IMAGE_KERNEL:
            known[path] = Layout(0, tuple(range(_IMAGE_KERNEL - 1)))
        if asked and isinstance(known[path], Layout) and not known[path].stack:
            raise RecipeError(
                f"{name}: stacked={stacked!r} matches {path} {list(shape)}, which is one matrix"
            )
    return Layouts(name, shapes, known)


def _is_kernel(path: str) -> bool:
    return path.rsplit("/", 1)[-1] == "kernel"


def _from_reading(
    reading: Reading | None, shape: tuple[int, ...], bias: tuple[int, ...] | None
) -> Layout | str | None:
    """Return a layout, the reason why there is none, or None without information."""
    if reading is None:
        return None
    added = len(shape) - len(reading.shape)
    if added < 0 or shape[added:] != reading.shape:
        return (
            f"its module reads it as {list(reading.shape)}, so its stack is not along the first "
            "axis"
        )
    if reading.layout is None:
        return from_bias(shape, bias, added)
    return Layout(added + reading.layout.stack, reading.layout.inputs)


def _tried(model: nn.Module, leaves: Mapping[str, Any]) -> dict[str, Reading]:
    """Collect readings on the first usual input that a model accepts; empty if it accepts none.

    A module checks the shapes of its parameters, so an accepted input shows the true axes.
    """
    leaves = {
        path: leaf if is_box(leaf) else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in leaves.items()
    }
    variables = nested(leaves)
    # Some models are passed with all variables, `params` and `batch_stats`.
    prefix = "params/" if isinstance(variables.get("params"), Mapping) else ""
    variables = variables if prefix else {"params": variables}
    keys = {name: jax.random.key(0) for name in ("params", "dropout")}
    known = inspect.signature(type(model).__call__).parameters
    flags: dict[str, Any] = {name: value for name, value in _FLAGS.items() if name in known}

    def run(variables: Any, x: Array) -> Any:
        # Missing statistics may be created, missing parameters not.
        return model.apply(variables, x, **flags, rngs=keys, mutable=DenyList("params"))

    for x in _usual_inputs(leaves):
        readings: list[Reading] = []
        try:
            with watched(readings.append):
                jax.eval_shape(run, variables, x)
        # Any exception of a foreign module means that it does not accept this input.
        except Exception:
            continue
        return {prefix + reading.path: reading for reading in readings}
    return {}


def _usual_inputs(leaves: Mapping[str, Any]) -> Iterator[jax.ShapeDtypeStruct]:
    """Yield tokens, then images of usual sizes if there is a kernel of an image convolution."""
    yield jax.ShapeDtypeStruct((1, 2), jnp.int32)
    sizes = [leaf.shape for path, leaf in leaves.items() if _is_kernel(path)]
    channels = [
        c for c in _CHANNELS if any(len(size) >= _IMAGE_KERNEL and size[-2] == c for size in sizes)
    ]
    for side, channel in itertools.product(_SIDES, channels):
        yield jax.ShapeDtypeStruct((1, side, side, channel), jnp.float32)
