"""Weights in the terms of a TFLite file: codes and scales, bit for bit."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from glm_edge import params as boxes
from glm_edge.errors import ExportError
from glm_edge.export.common.weights import (
    NO_STATIC_RANGES,
    TFLITE,
    Conversion,
    check_box,
    check_finite,
    to_array,
)
from glm_edge.export.tflite.flatbuffer import ActivationGrid, Constant
from glm_edge.kernels import packing, quantization
from glm_edge.params import Format, Quantized
from glm_edge.params.formats import PER_TENSOR
from glm_edge.params.tree import Params, nested

# This matrix is also used for lookups, which have no int8 activations.
LOOKED_UP = "embed/weight"
# XNNPACK rejects a scale that is zero or subnormal.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
SMALLEST_HALF, LARGEST_HALF = 2.0**-24, 65280.0
# Largest relative change of a value by rounding to bfloat16.
BRAIN_STEP = 2.0**-8
# Columns per byte; kernels accept only rows of complete bytes.
_COLUMNS_PER_BYTE = {"int8": 1, "int4": 2, "int2": 4}


@dataclass(frozen=True)
class TFLiteWeights:
    """Parameters of a model as a file stores them.

    Attributes:
      constants: constants by path.
      params: the same values as a parameter tree of the JAX model.
      conversions: parameters that are stored in a different form than in the model.
    """

    constants: dict[str, Constant]
    params: Params
    conversions: tuple[Conversion, ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all packed weights, including scales."""
        return sum(
            constant.data.nbytes + (0 if constant.scale is None else constant.scale.nbytes)
            for constant in self.constants.values()
        )


def to_tflite_weights(params: Params) -> TFLiteWeights:
    """Convert parameters to the terms of TFLite.

    Args:
      params: arrays, `Masked` (stored dense, with zeros) or symmetric `Quantized` integers. int8,
        int4 and int2 per channel, and int4 with a group size that is a multiple of 32, are stored
        unchanged. Others are stored in a wider type with the same codes. A weight of int8 or int4
        per channel with static grids of its inputs and products uses these grids; for all others
        the runtime rounds each row of activations to its own range.

    Returns:
      The weights.

    Raises:
      ExportError: a parameter cannot be stored; the message names a supported alternative.
    """
    constants, leaves, conversions = {}, {}, []
    for path, leaf in boxes.path_items(params):
        constants[path], leaves[path], changes = to_constant(path, leaf)
        conversions += changes
    return TFLiteWeights(constants, nested(leaves), tuple(conversions))


def to_constant(path: str, leaf: Any) -> tuple[Constant, Any, list[Conversion]]:
    """Convert one parameter.

    Args:
      path: path of the parameter.
      leaf: array or box, as in `to_tflite_weights`.

    Returns:
      `(constant, leaf, conversions)`: the constant, a leaf with the same values, and its
      conversions.

    Raises:
      ExportError: as `to_tflite_weights`.
    """
    if isinstance(leaf, Quantized):
        return _from_box(path, leaf)
    leaf, conversions = to_array(path, leaf)
    dtype, values = jnp.dtype(leaf.dtype), np.asarray(leaf)
    check_finite(path, values)
    kind = "float16" if _fits_half(values) else "float32"
    stored = np.ascontiguousarray(values.astype(kind))
    if dtype != stored.dtype:
        exact = bool(np.array_equal(stored.astype(np.float64), values.astype(np.float64)))
        conversions.append(Conversion(path, f"{dtype} written as {kind}", not exact))
    constant = Constant(kind, stored.shape, stored.reshape(-1).view(np.uint8))
    return constant, jnp.asarray(stored), conversions


def _fits_half(values: np.ndarray) -> bool:
    """Return True for a matrix of 16-bit floats that float16 represents exactly."""
    if values.ndim != 2 or values.dtype.itemsize != 2:
        return False
    if values.dtype == np.float16:
        return True
    wide = values.astype(np.float32)
    with np.errstate(over="ignore"):
        return bool(np.array_equal(wide.astype(np.float16).astype(np.float32), wide))


def _from_box(path: str, box: Quantized) -> tuple[Constant, Quantized, list[Conversion]]:
    box, conversions = _to_runnable(path, box)
    grids: tuple[ActivationGrid | None, ActivationGrid | None] = (None, None)
    if box.input_scale is not None:
        reason = _not_static(path, box)
        if reason is None:
            grids = _grid(path, box, "input"), _grid(path, box, "output")
        else:
            box = box.replace(**NO_STATIC_RANGES)
            rule = f"static ranges omitted {reason}: the runtime rounds each row to its own range"
            conversions.append(Conversion(path, rule, True))
    check_finite(path, np.asarray(box.scale))
    box, changes = with_storable_scales(path, box, box.scale.shape[-1] > 1)
    conversions += changes
    data = np.ascontiguousarray(np.asarray(box.data)).reshape(-1).view(np.uint8)
    kind, scale = box.format.qtype, np.asarray(box.scale).astype(np.float32)
    if scale.shape[-1] == 1:
        return Constant(kind, box.shape, data, scale.reshape(-1), 0, *grids), box, conversions
    half = scale.astype(np.float16)
    return Constant(kind, box.shape, data, half, box.format.columns_per_scale), box, conversions


def with_storable_scales(
    path: str, box: Quantized, half: bool
) -> tuple[Quantized, list[Conversion]]:
    """Replace the scales of a box with scales that a file can store.

    Args:
      path: path of the parameter.
      box: quantized parameter with finite scales.
      half: whether the file stores scales in float16, of which XNNPACK reads the first eight bits,
        instead of float32. A stored scale may not be zero, negative or, in float32, subnormal.

    Returns:
      The box, and its conversions. If a scale changes by more than bfloat16 rounding, its codes are
      rounded again with the new scale.

    Raises:
      ExportError: a scale exceeds the file's range.
    """
    scale = np.asarray(box.scale).astype(np.float32)
    storable = _half_scales(path, scale) if half else np.maximum(np.abs(scale), SMALLEST_SCALE)
    if np.array_equal(storable, scale):
        return box, []
    conversions = []
    # Groups whose scale changes by more than bfloat16 rounding need new codes.
    moved = np.abs(storable - scale) > np.abs(scale) * BRAIN_STEP
    if not np.array_equal(np.where(moved, scale, storable), scale):
        rule = f"scales rounded from {box.scale.dtype} to bfloat16, which XNNPACK uses"
        conversions.append(Conversion(path, rule, True))
    new_scale = jnp.asarray(storable).astype(box.scale.dtype)
    if not moved.any():
        return box.replace(scale=new_scale), conversions
    codes, zero = np.asarray(box.codes()), 0.0 if box.zero is None else np.asarray(box.zero)
    columns = codes.shape[-1] // scale.shape[-1]
    count = int(moved.sum())
    ratio, zero, moved = (
        np.repeat(np.broadcast_to(x, scale.shape), columns, axis=-1)
        for x in ((scale / storable).astype(np.float64), zero, moved)
    )
    # scale * (code - zero) = storable * (nearest - zero), solved for the nearest code.
    low, high = quantization.code_range(box.format.qtype)
    nearest = np.clip(np.round((codes - zero) * ratio + zero), low, high)
    nearest = jnp.asarray(np.where(moved, nearest, codes).astype(np.int8))
    other = box.replace(data=packing.pack(nearest, box.format.qtype), scale=new_scale)
    before, after = (np.asarray(each.rows()).astype(np.float64) for each in (box, other))
    error = float(np.linalg.norm(after - before) / max(float(np.linalg.norm(before)), 1e-300))
    rule = (
        f"{count} of {scale.size} scales outside the range of {'float16' if half else 'float32'} "
        "replaced by the nearest value within it, their codes rounded again (relative change of "
        f"the weight {error:.2g})"
    )
    conversions.append(Conversion(path, rule, error > 0))
    return other, conversions


def _half_scales(path: str, scale: np.ndarray) -> np.ndarray:
    """Return positive scales that both float16, the file's type, and bfloat16 represent."""
    size = np.abs(scale).astype(ml_dtypes.bfloat16).astype(np.float32)
    if size.max(initial=0.0) > LARGEST_HALF:
        raise ExportError(
            f"{path}: a scale of {size.max():.3g} exceeds the range of float16, the stored type "
            f"of group scales; use at most {LARGEST_HALF:g}, or one scale per channel"
        )
    # Rounded up, so that every code of the group stays in range.
    return np.maximum(np.ceil(size / SMALLEST_HALF), 1.0) * np.float32(SMALLEST_HALF)


def _not_static(path: str, box: Quantized) -> str | None:
    """Return the reason why products with a box cannot use its static ranges, or None."""
    if path == LOOKED_UP:
        return "because it is also used for lookups"
    if box.output_scale is None:
        return "because its products have none"
    if box.scale.shape[-1] > 1 or box.format.qtype not in TFLITE.static_types:
        return f"because {box.format} has no kernel for them"
    return None


def _grid(path: str, box: Quantized, side: str) -> ActivationGrid:
    scale, zero = np.float32(getattr(box, f"{side}_scale")), int(getattr(box, f"{side}_zero"))
    check_finite(path, np.asarray(scale))
    if scale < SMALLEST_SCALE:
        raise ExportError(f"{path}: {side}_scale is {scale}; use at least {SMALLEST_SCALE:.3g}")
    return ActivationGrid(float(scale), zero)


def _to_runnable(path: str, box: Quantized) -> tuple[Quantized, list[Conversion]]:
    """Convert a box to a format that LiteRT runs, with the same dense weight."""
    form, qtype = box.format, check_box(path, box, TFLITE)
    per_channel = box.scale.shape[-1] == 1
    # Widens the type until a row fills complete bytes.
    while per_channel and box.columns % _COLUMNS_PER_BYTE[qtype]:
        qtype = {"int2": "int4", "int4": "int8"}[qtype]
    if qtype == form.qtype and form.group_size != PER_TENSOR:
        return box, []
    scale = jnp.broadcast_to(box.scale, (box.shape[0], box.scale.shape[-1]))
    target = Format(qtype, None if per_channel else form.group_size, True, form.scale_dtype)
    grids = box.input_scale, box.input_zero, box.output_scale, box.output_zero
    # A group of zeros has scale zero if no code represents zero; LiteRT rejects such a scale.
    codes = box.codes().reshape(*scale.shape, -1) * (scale != 0)[..., None].astype(jnp.int8)
    scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    same = boxes.quantized(codes.reshape(box.shape), scale, None, target, (), box.dtype, *grids)
    rule = f"{form} written as {target} with the same values"
    return same, [Conversion(path, rule, False)]
