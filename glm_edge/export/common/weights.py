"""Parameters in the terms of formats that dequantize: `f' = scale * (code - zero)`."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from glm_edge import params as boxes
from glm_edge.errors import ExportError
from glm_edge.export.tflite.weights import Conversion, dense_of
from glm_edge.params import Quantized
from glm_edge.params.tree import Params, nested

# A type whose integers are held exactly by a wider one that runtimes know.
WIDER = {
    "int8": "int8",
    "int6": "int8",
    "int5": "int8",
    "int4": "int4",
    "int3": "int4",
    "int2": "int4",
    "ternary": "int4",
    "ternary34": "int4",
}
RANGES = {"int8": (-128, 127), "int4": (-8, 7)}


@dataclass(frozen=True)
class Weight:
    """A parameter as numbers, or as integers with scales.

    Attributes:
      values: numbers of any shape; or int8 codes [out, in].
      type: `int8` or `int4`, or that of the numbers.
      scale: None, or float32 [out, groups], or [1, 1] for one scale a matrix.
      zero: None, or int8 like `scale`.
      group_size: columns that share a scale; 0 for a scale a row or a matrix.
    """

    values: np.ndarray
    type: str
    scale: np.ndarray | None = None
    zero: np.ndarray | None = None
    group_size: int = 0


def weight_of(
    path: str, leaf: Any, target: str, affine: bool = True, floats: Collection[str] = ("float32",)
) -> tuple[Weight, list[Conversion]]:
    """Puts one parameter in these terms.

    Args:
      path: of the parameter.
      leaf: an array or a box.
      target: name of the format, for messages.
      affine: the format has zero points.
      floats: types of plain numbers that the format has; others are written as float32.

    Returns:
      The weight, and what it was converted to.

    Raises:
      ExportError: the format cannot hold it; the message says what would be right.
    """
    if isinstance(leaf, Quantized):
        return _of_box(path, leaf, target, affine)
    leaf, conversions = dense_of(path, leaf)
    values, given = np.asarray(leaf), str(jnp.dtype(leaf.dtype))
    _check_finite(path, values)
    if given not in floats:
        conversions.append(Conversion(path, f"{given} written as float32", given == "float64"))
        values = values.astype(np.float32)
    return Weight(values, str(values.dtype)), conversions


def held_bytes(leaf: Any, floats: Collection[str] = ("float32",)) -> int:
    """Bytes that a parameter takes in these terms, with its scales, before it is put in them.

    Args:
      leaf: an array or a box.
      floats: as in `weight_of`.

    Returns:
      The bytes.
    """
    numbers = math.prod(leaf.shape)
    if not isinstance(leaf, Quantized):
        given = None if boxes.is_box(leaf) else str(jnp.dtype(leaf.dtype))
        return numbers * (jnp.dtype(given).itemsize if given in floats else 4)
    halves = 1 if WIDER.get(leaf.format.qtype) == "int4" else 2
    zeros = 0 if leaf.zero is None else leaf.zero.size
    return -(-(numbers + zeros) * halves // 2) + 4 * leaf.scale.size


def _of_box(
    path: str, box: Quantized, target: str, affine: bool
) -> tuple[Weight, list[Conversion]]:
    form, conversions = box.format, []
    _refuse_unfit(path, box, target, affine)
    wider = WIDER[form.qtype]
    if wider != form.qtype:
        rule = f"{form.qtype} written as {wider}: the same integers and scales"
        conversions.append(Conversion(path, rule, False))
    if box.input_scale is not None:
        rule = "static range of its input left out: products are taken with float32 inputs"
        conversions.append(Conversion(path, rule, False))
    scale = np.asarray(box.scale).astype(np.float32)
    _check_finite(path, scale)
    grouped = scale.shape[-1] > 1
    zero = None if box.zero is None else np.asarray(box.zero).astype(np.int8)
    codes = np.asarray(box.codes())
    return Weight(codes, wider, scale, zero, form.group_size if grouped else 0), conversions


def _refuse_unfit(path: str, box: Quantized, target: str, affine: bool) -> None:
    form, reason = box.format, None
    right = "integers of 8 or 4 bits, symmetric, per channel or in groups"
    if box.kernel_shape or box.data.ndim != 2:
        reason, right = "it is stored [in, out] or stacked", "a matrix [out, in] of one layer"
    elif form.qtype not in WIDER:
        reason = f"levels of {form.qtype} are no integers times a scale"
    elif box.zero is not None and not affine:
        reason, right = "its weights have no zero point here", "symmetric=True"
    elif box.zero is not None:
        zero, (low, high) = np.asarray(box.zero).astype(np.float32), RANGES[WIDER[form.qtype]]
        if (zero != np.round(zero)).any() or zero.min() < low or zero.max() > high:
            reason, right = "zero points must be integers that codes can be", f"{low} to {high}"
    if reason is not None:
        raise ExportError(f"{path}: {target} cannot hold {form}: {reason}; right would be {right}")


def _check_finite(path: str, values: np.ndarray) -> None:
    if not np.isfinite(values.astype(np.float32)).all():
        raise ExportError(f"{path}: holds NaN or infinity; export finite weights")


def held_params(params: Params, weights: Mapping[str, Weight]) -> Params:
    """Parameters with the values that a file holds, as a tree that the JAX model runs on.

    Args:
      params: as they were given.
      weights: what `weight_of` made of each.

    Returns:
      Boxes with the same codes, float32 scales and no static ranges; all else as arrays.
    """
    none = dict.fromkeys(("input_scale", "input_zero", "output_scale", "output_zero"))

    def held(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Quantized):
            return jnp.asarray(weights[path].values)
        form = dataclasses.replace(leaf.format, scale_dtype="float32")
        scale = jnp.asarray(weights[path].scale)
        return leaf.replace(scale=scale, format=form, dtype="float32", **none)

    return nested({path: held(path, leaf) for path, leaf in boxes.path_items(params)})


def check_weights(held: Mapping[str, Weight], params: Params, where: str | Path) -> int:
    """Compares weights that were read back from a file with parameters, bit for bit.

    Args:
      held: by path; plain numbers may be missing, which some formats hold inside their graphs.
      params: from `held_params`.
      where: the file, for messages.

    Returns:
      Parameters compared.

    Raises:
      ExportError: one is missing, or has other codes, scales, zero points or numbers.
    """
    compared = 0
    for path, leaf in boxes.path_items(params):
        if path not in held:
            if isinstance(leaf, Quantized):
                raise ExportError(f"{where}: damaged: holds no {path}")
            continue
        weight, expected = held[path], {"values": leaf, "scale": None, "zero": None}
        if isinstance(leaf, Quantized):
            expected = {"values": leaf.codes(), "scale": leaf.scale, "zero": leaf.zero}
        for field, wanted in expected.items():
            wrong = _different(getattr(weight, field), wanted)
            if wrong:
                raise ExportError(
                    f"{where}: damaged, or of other parameters: {wrong} {field} of {path} are not "
                    "those of the model"
                )
        compared += 1
    return compared


def _different(found: np.ndarray | None, wanted: Any) -> int:
    """How many numbers are not the same, all of them where shapes differ."""
    if found is None or wanted is None:
        return int(found is not wanted)
    wanted = np.asarray(wanted).astype(np.float32)
    if found.shape != wanted.shape:
        return max(found.size, wanted.size, 1)
    return int((found.astype(np.float32) != wanted).sum())


def dequantized(weight: Weight) -> np.ndarray:
    """Dense float32 numbers of a weight."""
    if weight.scale is None:
        return weight.values.astype(np.float32)
    groups = weight.scale.shape[-1]
    codes = weight.values.reshape(len(weight.values), groups, -1).astype(np.float32)
    if weight.zero is not None:
        codes = codes - weight.zero.astype(np.float32)[..., None]
    return (codes * weight.scale[..., None]).reshape(weight.values.shape)


def packed_nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes of 4 bits in C order, two to a byte, low nibble first; an odd last one stands alone."""
    flat = (codes.reshape(-1) & 15).astype(np.uint8)
    flat = np.concatenate([flat, np.zeros(len(flat) % 2, np.uint8)])
    return flat[0::2] | (flat[1::2] << 4)
