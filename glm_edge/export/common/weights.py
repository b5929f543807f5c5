"""Weights as exported files store them, and a table of the forms that each format supports."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from glm_edge import params as boxes
from glm_edge.errors import ExportError
from glm_edge.params import FakeQuantized, Masked, Narrow, Quantized
from glm_edge.params.tree import Params, nested

RANGES = {"int8": (-128, 127), "int4": (-8, 7)}
# Fields for `Quantized.replace` that remove the static ranges of activations.
NO_STATIC_RANGES = dict.fromkeys(("input_scale", "input_zero", "output_scale", "output_zero"))
# Types whose integers a wider type, which runtimes support, represents exactly.
_WIDER = {
    "int8": "int8",
    "int6": "int8",
    "int5": "int8",
    "int4": "int4",
    "int3": "int4",
    "int2": "int4",
    "ternary": "int4",
    "ternary34": "int4",
}
_NARROW = ("int2", "ternary", "ternary34")


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """The forms in which one format stores a parameter.

    Attributes:
      name: name of the format, for messages.
      per_channel: stored type by type of the box, for one scale per row or per matrix.
      in_groups: stored type by type of the box, for one scale per group.
      group_multiple: number of columns that must divide every group size.
      zero_points: whether the format stores affine weights, with integer zero points. No format
        stores zero points between levels, as of affine `ternary`.
      stacked: whether the format stores weights with any number and order of axes.
      floats: types of plain values that are stored unchanged; others become float32.
      static_types: stored types whose products support static ranges of activations.
      right: description of the supported quantized weights, for messages.
    """

    name: str
    per_channel: Mapping[str, str] = field(default_factory=lambda: _WIDER)
    in_groups: Mapping[str, str] = field(default_factory=lambda: _WIDER)
    group_multiple: int = 1
    zero_points: bool = True
    stacked: bool = False
    floats: tuple[str, ...] = ("float32",)
    static_types: tuple[str, ...] = ()
    right: str = "integers of 8 or 4 bits, symmetric, per channel or in groups"

    def stored_type(self, box: Quantized) -> str | None:
        """Return the type of a box's stored codes, or None if the format has none.

        Args:
          box: the quantized parameter.

        Returns:
          The type, or None.
        """
        table = self.in_groups if box.scale.shape[-1] > 1 else self.per_channel
        return table.get(box.format.qtype)


TFLITE = WeightFormat(
    name="TFLite",
    per_channel=_WIDER | dict.fromkeys(_NARROW, "int2"),
    in_groups={qtype: wider for qtype, wider in _WIDER.items() if wider == "int4"},
    group_multiple=32,
    zero_points=False,
    static_types=("int8", "int4"),
    right="int8, int4 or int2 per channel, or int4 in groups of 32",
)
# A `.tflite` file of `ge.export.function` dequantizes its parameters when it is loaded.
TFLITE_FUNCTION = WeightFormat(
    name="TFLite", stacked=True, right="integers of 8 or 4 bits with integer zero points"
)
ONNX = WeightFormat(name="ONNX", floats=("float32", "float16"))
MNN = WeightFormat(name="MNN", zero_points=False)
COREML = WeightFormat(name="Core ML")
# Ternary weights would take four bits each.
_INTEGERS = {qtype: wider for qtype, wider in _WIDER.items() if qtype.startswith("int")}
COMPRESSED_TENSORS = WeightFormat(
    name="compressed-tensors",
    per_channel=_INTEGERS,
    in_groups=_INTEGERS,
    floats=("float32", "float16", "bfloat16"),
    right="integers of 8 or 4 bits, per channel or in groups",
)


@dataclass(frozen=True)
class Conversion:
    """A parameter that the file stores in a different form than the tree.

    Attributes:
      path: path of the parameter.
      rule: description of the conversion.
      changes_values: False if the dense weight is unchanged.
    """

    path: str
    rule: str
    changes_values: bool

    def __str__(self) -> str:
        return f"{self.path}: {self.rule}"


@dataclass(frozen=True)
class Weight:
    """A parameter as plain values, or as integers with scales: `f' = scale * (code - zero)`.

    Attributes:
      values: plain values of any shape; or int8 codes [out, in].
      type: `int8` or `int4`, or the type of the plain values.
      scale: None, float32 [out, groups], or [1, 1] for one scale per matrix.
      zero: None, or int8 with the shape of `scale`.
      group_size: number of columns that share a scale; 0 for one scale per row or per matrix.
    """

    values: np.ndarray
    type: str
    scale: np.ndarray | None = None
    zero: np.ndarray | None = None
    group_size: int = 0


def to_weight(path: str, leaf: Any, target: WeightFormat) -> tuple[Weight, list[Conversion]]:
    """Convert one parameter to the form that a format stores.

    Args:
      path: path of the parameter.
      leaf: an array or a box.
      target: weight format of the file.

    Returns:
      The weight and its conversions.

    Raises:
      ExportError: the format cannot store it; the message names a supported alternative.
    """
    if isinstance(leaf, Quantized):
        return _from_box(path, leaf, target)
    array, conversions = to_array(path, leaf)
    values, dtype = np.asarray(array), str(jnp.dtype(array.dtype))
    check_finite(path, values)
    if dtype not in target.floats:
        conversions.append(Conversion(path, f"{dtype} written as float32", dtype == "float64"))
        values = values.astype(np.float32)
    return Weight(values, str(values.dtype)), conversions


def _from_box(path: str, box: Quantized, target: WeightFormat) -> tuple[Weight, list[Conversion]]:
    stored = check_box(path, box, target)
    scale = np.asarray(box.scale).astype(np.float32)
    check_finite(path, scale)
    size = box.format.columns_per_scale if scale.shape[-1] > 1 else 0
    zero = None if box.zero is None else np.asarray(box.zero).astype(np.int8)
    weight = Weight(np.asarray(box.codes()), stored, scale, zero, size)
    return weight, box_conversions(path, box, stored)


def to_array(path: str, leaf: Any) -> tuple[Any, list[Conversion]]:
    """Return an unquantized parameter as an array, and its conversions.

    Args:
      path: path of the parameter.
      leaf: an array, or a box that is not quantized.

    Returns:
      `(array, conversions)`.

    Raises:
      ExportError: the parameter is a box for training.
    """
    if isinstance(leaf, Masked):
        rule = "mask written as zeros in a dense weight"
        return boxes.dense(leaf), [Conversion(path, rule, False)]
    if isinstance(leaf, FakeQuantized):
        raise ExportError(f"{path}: a {type(leaf).__name__} is for training; finalize it first")
    if isinstance(leaf, Narrow):
        stored, rule = leaf.value.dtype, f"{leaf.value.dtype} written as {leaf.dtype}"
        conversions = [] if stored == leaf.dtype else [Conversion(path, rule, False)]
        return boxes.dense(leaf), conversions
    if boxes.is_box(leaf):
        rule = f"{type(leaf).__name__} written dense"
        return boxes.dense(leaf), [Conversion(path, rule, False)]
    return leaf, []


def check_box(path: str, box: Quantized, target: WeightFormat) -> str:
    """Reject a box that a format cannot store.

    Args:
      path: path of the parameter.
      box: the quantized parameter.
      target: weight format of the file.

    Returns:
      The type of the stored codes.

    Raises:
      ExportError: the format cannot store it; the message names a supported alternative.
    """
    form, stored, grouped = box.format, target.stored_type(box), box.scale.shape[-1] > 1
    reason, right = None, target.right
    if not target.stacked and (box.kernel_shape or box.data.ndim != 2):
        reason, right = "it is stored [in, out] or stacked", "a matrix [out, in] of one layer"
    elif form.qtype not in _WIDER:
        reason = "its levels are not integer multiples of a scale"
    elif not form.symmetric and not target.zero_points:
        reason, right = "the format does not store zero points", "a format without -affine"
    elif stored is None:
        reason = f"the runtime has no kernel for {form.qtype}{' in groups' if grouped else ''}"
    elif grouped and form.columns_per_scale % target.group_multiple:
        reason = f"group sizes must be a multiple of {target.group_multiple}"
    elif box.zero is not None:
        zero, (low, high) = np.asarray(box.zero).astype(np.float32), RANGES[stored]
        if (zero != np.round(zero)).any() or zero.min() < low or zero.max() > high:
            reason, right = (
                "zero points must be integers within the range of the codes",
                f"{low} to {high}"
                if form.zero_dtype == "int8"
                else "zero=int8, or a format without -affine",
            )
    if reason is not None or stored is None:
        raise ExportError(
            f"{path}: {form} cannot be written as {target.name}: {reason}; use {right}"
        )
    return stored


def box_conversions(path: str, box: Quantized, stored: str) -> list[Conversion]:
    """List the conversions of a box whose codes are stored as `stored`, without static ranges.

    Args:
      path: path of the parameter.
      box: the quantized parameter.
      stored: type of the stored codes.

    Returns:
      The conversions.
    """
    conversions = []
    if stored != box.format.qtype:
        rule = f"{box.format.qtype} written as {stored}: the same integers and scales"
        conversions.append(Conversion(path, rule, False))
    if box.input_scale is not None:
        rule = "static range of its input is not written: products use float32 inputs"
        conversions.append(Conversion(path, rule, False))
    return conversions


def check_finite(path: str, values: np.ndarray) -> None:
    """Reject NaN and infinity.

    Args:
      path: path of the parameter.
      values: its values.

    Raises:
      ExportError: a value is NaN or infinite.
    """
    if not np.isfinite(values.astype(np.float32)).all():
        raise ExportError(f"{path}: contains NaN or infinity; export finite weights")


def stored_bytes(leaf: Any, target: WeightFormat) -> int:
    """Count the bytes that a format stores for a parameter, scales included.

    Args:
      leaf: an array or a box.
      target: weight format of the file.

    Returns:
      The number of bytes.
    """
    size = math.prod(leaf.shape)
    if not isinstance(leaf, Quantized):
        dtype = None if boxes.is_box(leaf) else str(jnp.dtype(leaf.dtype))
        return size * (jnp.dtype(dtype).itemsize if dtype in target.floats else 4)
    halves = 1 if target.stored_type(leaf) == "int4" else 2
    zeros = 0 if leaf.zero is None else leaf.zero.size
    return -(-(size + zeros) * halves // 2) + 4 * leaf.scale.size


def to_params(params: Params, weights: Mapping[str, Weight]) -> Params:
    """Return a parameter tree with the values that a file stores.

    Args:
      params: parameters of the model.
      weights: results of `to_weight` by path.

    Returns:
      Quantized parameters as boxes with the same codes, float32 scales and no static ranges; all
      others as arrays.
    """

    def stored(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Quantized):
            return jnp.asarray(weights[path].values)
        form = dataclasses.replace(leaf.format, scale_dtype="float32")
        scale = jnp.asarray(weights[path].scale)
        return leaf.replace(scale=scale, format=form, dtype="float32", **NO_STATIC_RANGES)

    return nested({path: stored(path, leaf) for path, leaf in boxes.path_items(params)})


def check_weights(stored: Mapping[str, Weight], params: Params, where: str | Path) -> int:
    """Compare weights that were read from a file with parameters, bit for bit.

    Args:
      stored: weights by path; plain values may be missing, as some formats store them inside their
        graphs.
      params: parameters from `to_params`.
      where: name of the file, for messages.

    Returns:
      The number of parameters that were compared.

    Raises:
      ExportError: a weight is missing, or has different codes, scales, zero points or values.
    """
    compared = 0
    for path, leaf in boxes.path_items(params):
        if path not in stored:
            if isinstance(leaf, Quantized):
                raise ExportError(f"{where}: damaged: contains no {path}")
            continue
        weight, expected = stored[path], {"values": leaf, "scale": None, "zero": None}
        if isinstance(leaf, Quantized):
            expected = {"values": leaf.codes(), "scale": leaf.scale, "zero": leaf.zero}
        for name, value in expected.items():
            wrong = _count_different(getattr(weight, name), value)
            if wrong:
                raise ExportError(
                    f"{where}: damaged, or of other parameters: {wrong} {name} of {path} differ "
                    "from the model's"
                )
        compared += 1
    return compared


def _count_different(stored: np.ndarray | None, expected: Any) -> int:
    """Count the values that differ; all of them if the shapes differ."""
    if stored is None or expected is None:
        return int(stored is not expected)
    expected = np.asarray(expected).astype(np.float32)
    if stored.shape != expected.shape:
        return max(stored.size, expected.size, 1)
    return int((stored.astype(np.float32) != expected).sum())


def dequantize(weight: Weight) -> np.ndarray:
    """Return the dense float32 values of a weight.

    Args:
      weight: the weight.

    Returns:
      The dense weight, float32 [out, in] or of the shape of plain values.
    """
    if weight.scale is None:
        return weight.values.astype(np.float32)
    groups = weight.scale.shape[-1]
    # [out, groups, columns per group], so that scale and zero broadcast.
    codes = weight.values.reshape(len(weight.values), groups, -1).astype(np.float32)
    if weight.zero is not None:
        codes = codes - weight.zero.astype(np.float32)[..., None]
    return (codes * weight.scale[..., None]).reshape(weight.values.shape)


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Pack 4-bit codes in C order, two per byte, low nibble first; pad an odd count.

    Args:
      codes: int8 codes of any shape, in -8..7.

    Returns:
      Packed bytes, uint8 [(codes + 1) / 2].
    """
    flat = (codes.reshape(-1) & 15).astype(np.uint8)
    flat = np.concatenate([flat, np.zeros(len(flat) % 2, np.uint8)])
    return flat[0::2] | (flat[1::2] << 4)
