"""What a TFLite file holds of each parameter: our own integers and scales, in its terms."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from glm_edge import params as boxes
from glm_edge.errors import ExportError
from glm_edge.export.tflite.flatbuffer import Constant, Grid
from glm_edge.kernels import grid, packing
from glm_edge.params import FakeQuantized, Format, Masked, Narrow, Quantized
from glm_edge.params.formats import PER_TENSOR
from glm_edge.params.tree import Params, nested

BLOCK_MULTIPLE = 32
# Types of weights whose kernels multiply with activations of a static int8 grid.
STATIC_TYPES = ("int8", "int4")
# Rows of this matrix are looked up, too, which no int8 activation meets.
LOOKED_UP = "embed/weight"
# Types whose codes are codes of a wider type that runs, so that scales and values stay.
_WIDER = {"int6": "int8", "int5": "int8", "int3": "int4", "ternary": "int2", "ternary34": "int2"}
_WIDER_IN_GROUPS = dict.fromkeys(("int3", "int2", "ternary", "ternary34"), "int4")
# XNNPACK refuses a scale that is zero or subnormal.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
SMALLEST_HALF, LARGEST_HALF = 2.0**-24, 65280.0
# The most that rounding to bfloat16 changes a number, relative to it.
BRAIN_STEP = 2.0**-8
# Columns that fill a byte, of which kernels want a whole number in a row.
_WHOLE_BYTES = {"int8": 1, "int4": 2, "int2": 4}


@dataclass(frozen=True)
class Conversion:
    """A parameter that the file holds in another form than the tree.

    Attributes:
      path: of the parameter.
      rule: what was done.
      changes_values: False when the dense weight is the same.
    """

    path: str
    rule: str
    changes_values: bool

    def __str__(self) -> str:
        return f"{self.path}: {self.rule}"


@dataclass(frozen=True)
class Held:
    """The parameters of a model as a file holds them.

    Attributes:
      constants: by path.
      params: the same as a tree that the JAX model runs on.
      conversions: what is held in another form than it was given.
    """

    constants: dict[str, Constant]
    params: Params
    conversions: tuple[Conversion, ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all weights, packed, with their scales."""
        return sum(
            constant.data.nbytes + (0 if constant.scale is None else constant.scale.nbytes)
            for constant in self.constants.values()
        )


def constants_of(params: Params) -> Held:
    """Puts parameters in the terms of TFLite.

    Args:
      params: arrays; `Masked` (held dense, with zeros); `Quantized` symmetric integers: int8, int4
        and int2 per channel and int4 in groups of a multiple of 32 as they are, other types in a
        wider one that holds their codes. Where int8 or int4 per channel has static grids of its
        inputs and its products, the file multiplies on them; all others round each row to its own
        range.

    Returns:
      The constants.

    Raises:
      ExportError: a parameter cannot be held; the message says what would be right.
    """
    constants, written, conversions = {}, {}, []
    for path, leaf in boxes.path_items(params):
        constants[path], written[path], found = constant_of(path, leaf)
        conversions += found
    return Held(constants, nested(written), tuple(conversions))


def constant_of(path: str, leaf: Any) -> tuple[Constant, Any, list[Conversion]]:
    """One parameter: its constant, the same as a leaf of the tree, and what was converted."""
    if isinstance(leaf, Quantized):
        return _of_box(path, leaf)
    leaf, conversions = dense_of(path, leaf)
    given, values = jnp.dtype(leaf.dtype), np.asarray(leaf)
    _check_finite(path, values)
    kind = "float16" if _fits_half(values) else "float32"
    held = np.ascontiguousarray(values.astype(kind))
    if given != held.dtype:
        exact = bool(np.array_equal(held.astype(np.float64), values.astype(np.float64)))
        conversions.append(Conversion(path, f"{given} written as {kind}", not exact))
    constant = Constant(kind, held.shape, held.reshape(-1).view(np.uint8))
    return constant, jnp.asarray(held), conversions


def dense_of(path: str, leaf: Any) -> tuple[Any, list[Conversion]]:
    """A parameter that is not quantized as an array, and what that converted.

    Raises:
      ExportError: it is a box for training.
    """
    if isinstance(leaf, Masked):
        rule = "mask written as zeros of a dense weight"
        return boxes.dense(leaf), [Conversion(path, rule, False)]
    if isinstance(leaf, FakeQuantized):
        raise ExportError(f"{path}: a {type(leaf).__name__} is for training; finalize it first")
    if isinstance(leaf, Narrow):
        stored, rule = leaf.value.dtype, f"{leaf.value.dtype} written as {leaf.dtype}"
        found = [] if stored == leaf.dtype else [Conversion(path, rule, False)]
        return boxes.dense(leaf), found
    if boxes.is_box(leaf):
        rule = f"{type(leaf).__name__} written dense"
        return boxes.dense(leaf), [Conversion(path, rule, False)]
    return leaf, []


def _fits_half(values: np.ndarray) -> bool:
    """True for a matrix of 16-bit numbers that are all float16 numbers."""
    if values.ndim != 2 or values.dtype.itemsize != 2:
        return False
    if values.dtype == np.float16:
        return True
    wide = values.astype(np.float32)
    with np.errstate(over="ignore"):
        return bool(np.array_equal(wide.astype(np.float16).astype(np.float32), wide))


def _of_box(path: str, box: Quantized) -> tuple[Constant, Quantized, list[Conversion]]:
    box, conversions = _runnable(path, box)
    grids = (None, None)
    if box.input_scale is not None:
        reason = _not_static(path, box)
        if reason is None:
            grids = _grid(path, box, "input"), _grid(path, box, "output")
        else:
            none = dict.fromkeys(("input_scale", "input_zero", "output_scale", "output_zero"))
            box = box.replace(**none)
            rule = f"static ranges left out, {reason}: the file rounds each row to its own range"
            conversions.append(Conversion(path, rule, True))
    _check_finite(path, np.asarray(box.scale))
    box, found = with_held_scales(path, box, box.scale.shape[-1] > 1)
    conversions += found
    data = np.ascontiguousarray(np.asarray(box.data)).reshape(-1).view(np.uint8)
    kind, scale = box.format.qtype, np.asarray(box.scale).astype(np.float32)
    if scale.shape[-1] == 1:
        return Constant(kind, box.shape, data, scale.reshape(-1), 0, *grids), box, conversions
    held = scale.astype(np.float16)
    return Constant(kind, box.shape, data, held, box.format.group_size), box, conversions


def with_held_scales(path: str, box: Quantized, half: bool) -> tuple[Quantized, list[Conversion]]:
    """Makes the scales of a box ones that a file can hold.

    Args:
      path: of the parameter.
      box: of finite scales.
      half: the file holds scales in float16, of which XNNPACK reads the first eight bits; otherwise
        in float32. None may be zero, negative or, in float32, subnormal.

    Returns:
      The box, and what was changed. Where a scale moves by more than rounding to bfloat16 moves it,
      the codes are the nearest at the new one.

    Raises:
      ExportError: a scale is larger than the file can hold.
    """
    scale = np.asarray(box.scale).astype(np.float32)
    held = _half_scales(path, scale) if half else np.maximum(np.abs(scale), SMALLEST_SCALE)
    if np.array_equal(held, scale):
        return box, []
    conversions = []
    moved = np.abs(held - scale) > np.abs(scale) * BRAIN_STEP
    if not np.array_equal(np.where(moved, scale, held), scale):
        rule = f"scales rounded from {box.scale.dtype} to bfloat16, which XNNPACK multiplies with"
        conversions.append(Conversion(path, rule, True))
    written = jnp.asarray(held).astype(box.scale.dtype)
    if not moved.any():
        return box.replace(scale=written), conversions
    codes, zero = np.asarray(box.codes()), 0.0 if box.zero is None else np.asarray(box.zero)
    groups = codes.shape[-1] // scale.shape[-1]
    ratio, zero, moved = (
        np.repeat(np.broadcast_to(x, scale.shape), groups, axis=-1)
        for x in ((scale / held).astype(np.float64), zero, moved)
    )
    low, high = grid.code_range(box.format.qtype)
    anew = np.clip(np.round((codes - zero) * ratio + zero), low, high)
    anew = jnp.asarray(np.where(moved, anew, codes).astype(np.int8))
    other = box.replace(data=packing.pack(anew, box.format.qtype), scale=written)
    before, after = (np.asarray(each.rows()).astype(np.float64) for each in (box, other))
    error = float(np.linalg.norm(after - before) / max(np.linalg.norm(before), 1e-300))
    count = int((np.abs(held - scale) > np.abs(scale) * BRAIN_STEP).sum())
    rule = (
        f"{count} of {scale.size} scales that {'float16' if half else 'float32'} cannot hold made "
        "the nearest that it can, their codes rounded anew (relative change of the weight "
        f"{error:.2g})"
    )
    conversions.append(Conversion(path, rule, error > 0))
    return other, conversions


def _half_scales(path: str, scale: np.ndarray) -> np.ndarray:
    """Positive scales that both float16, which the file holds, and bfloat16 hold exactly."""
    size = np.abs(scale).astype(ml_dtypes.bfloat16).astype(np.float32)
    if size.max(initial=0.0) > LARGEST_HALF:
        raise ExportError(
            f"{path}: a scale of {size.max():.3g} is beyond float16, in which the file holds those "
            f"of groups; right would be at most {LARGEST_HALF:g}, or one scale per channel"
        )
    # Upwards, so that no code of the group leaves its range.
    return np.maximum(np.ceil(size / SMALLEST_HALF), 1.0) * np.float32(SMALLEST_HALF)


def _not_static(path: str, box: Quantized) -> str | None:
    """Why products with a box cannot run on its static ranges, or None."""
    if path == LOOKED_UP:
        return "as its rows are looked up, too"
    if box.output_scale is None:
        return "as its products have none"
    if box.scale.shape[-1] > 1 or box.format.qtype not in STATIC_TYPES:
        return f"as {box.format} has no kernel for them"
    return None


def _grid(path: str, box: Quantized, side: str) -> Grid:
    scale, zero = np.float32(getattr(box, f"{side}_scale")), int(getattr(box, f"{side}_zero"))
    _check_finite(path, scale)
    if scale < SMALLEST_SCALE:
        raise ExportError(
            f"{path}: {side}_scale is {scale}; right would be at least {SMALLEST_SCALE:.3g}"
        )
    return Grid(float(scale), zero)


def _runnable(path: str, box: Quantized) -> tuple[Quantized, list[Conversion]]:
    """A box of a format that LiteRT runs, of the same dense weight."""
    form = box.format
    per_channel = box.scale.shape[-1] == 1
    wanted = (_WIDER if per_channel else _WIDER_IN_GROUPS).get(form.qtype, form.qtype)
    while per_channel and wanted in _WHOLE_BYTES and box.columns % _WHOLE_BYTES[wanted]:
        wanted = {"int2": "int4", "int4": "int8"}[wanted]
    _refuse_unfit(path, box, wanted)
    if wanted == form.qtype and form.group_size != PER_TENSOR:
        return box, []
    scale = jnp.broadcast_to(box.scale, (box.shape[0], box.scale.shape[-1]))
    target = Format(wanted, None if per_channel else form.group_size, True, form.scale_dtype)
    grids = box.input_scale, box.input_zero, box.output_scale, box.output_zero
    # LiteRT refuses the scale zero that a group of zeros has where no code is level zero.
    codes = box.codes().reshape(*scale.shape, -1) * (scale != 0)[..., None].astype(jnp.int8)
    scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    same = boxes.quantized(codes.reshape(box.shape), scale, None, target, (), box.dtype, *grids)
    rule = f"{form} written as {target}, of the same values"
    return same, [Conversion(path, rule, False)]


def _refuse_unfit(path: str, box: Quantized, wanted: str) -> None:
    form, right = box.format, "int8, int4 or int2 per channel, or int4 in groups of 32"
    reason = None
    if box.kernel_shape or box.data.ndim != 2:
        reason, right = "it is stored [in, out] or stacked", "a matrix [out, in] of one layer"
    elif not form.symmetric:
        reason, right = "LiteRT multiplies with weights that have no zero point", "symmetric=True"
    elif wanted not in _WHOLE_BYTES:
        reason = "its levels are not evenly spaced"
    elif box.scale.shape[-1] > 1 and wanted != "int4":
        reason = f"XNNPACK has no kernel for {form.qtype} in groups"
    elif box.scale.shape[-1] > 1 and form.group_size % BLOCK_MULTIPLE:
        reason = f"XNNPACK needs groups of a multiple of {BLOCK_MULTIPLE}"
    if reason is not None:
        raise ExportError(f"{path}: {form} cannot be written: {reason}; right would be {right}")


def _check_finite(path: str, values: np.ndarray) -> None:
    if not np.isfinite(values.astype(np.float32)).all():
        raise ExportError(f"{path}: holds NaN or infinity; export finite weights")
