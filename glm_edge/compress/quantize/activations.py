"""Static int8 quantization of the inputs and products of quantized matrices."""

from collections.abc import Iterator
from dataclasses import field
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.compress.layerwise.runner import (
    LayerwiseTransform,
    Replaced,
    StageContext,
    apply_layerwise,
)
from glm_edge.compress.layerwise.stages import MARKED_ROWS
from glm_edge.compress.quantize.parameter import row
from glm_edge.compress.quantize.solvers import activation_ranges as ranges
from glm_edge.compress.transform import Context, Result, check_pattern, register
from glm_edge.errors import RecipeError
from glm_edge.kernels import matmul
from glm_edge.params import Quantized
from glm_edge.params.tree import Params

NAME = "quantize.activations"


@register(NAME)
class Activations(LayerwiseTransform):
    """Calibrates static int8 scales of the inputs and products of quantized matrices.

    Matrices that read the same rows share input scales. A model uses these scales with
    `compute="int8_static"`. Chain this after a transform that quantizes weights. Matrices without
    calibration inputs (a tied head) use one scale per row; the report counts them with the reason.

        recipe = ge.chain(ge.quantize.rtn("int8"), ge.quantize.activations("mse"))
        model, params, report = recipe(model, params, calibration=batches)

    Attributes:
      method: `minmax`, `percentile`, `mse` or `entropy`, see
        `glm_edge.compress.quantize.solvers.activation_ranges.choose_range`.
      percentile: percentage of the values within the range of the method `percentile`.
      where: regular expression searched in each path; None selects every quantized matrix.
      symmetric: uses zero point 0.

    Raises:
      RecipeError: an option is invalid; on call, the pattern matches no quantized matrix, or
        activations are not finite.
      DataError: on call, calibration is missing.

    References:
      Integer Quantization for Deep Learning Inference, https://arxiv.org/abs/2004.09602.
    """

    rounds: ClassVar[bool] = False
    needs: ClassVar[str] = "inputs"
    needs_model: ClassVar[bool] = True

    method: str = field(default="minmax", kw_only=False)
    percentile: float = 99.99
    where: str | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pattern(NAME, "where", self.where)
        if self.method not in ranges.METHODS:
            known = ", ".join(ranges.METHODS)
            raise RecipeError(f"{NAME}: method must be one of {known}, not {self.method!r}")
        if not 50 < self.percentile <= 100:
            raise RecipeError(f"{NAME}: percentile must be in (50, 100], not {self.percentile!r}")

    def compress_stage(self, work: StageContext) -> Replaced:
        named = [path for path in work.named if isinstance(work.leaves[path], Quantized)]
        groups = [tuple(path for path in group if path in named) for group in work.readers()]
        # Matrices that read the same rows share a scale and one measurement.
        groups = [group for group in groups if group]
        inputs = {group[0]: _ActivationRange(group[0], "inputs") for group in groups}
        outputs = {path: _ActivationRange(path, "outputs") for group in groups for path in group}

        def each() -> Iterator[tuple[_ActivationRange, Array, Array]]:
            for view in work.batches():
                collected = view.collect(MARKED_ROWS, paths=inputs)
                for group in groups:
                    if group[0] in collected:
                        rows, valid = (collected[group[0]][name] for name in ("rows", "valid"))
                        yield inputs[group[0]], rows, valid
                        yield from (
                            (outputs[p], _product(rows, work.leaves[p]), valid) for p in group
                        )

        # Rows of padding are zero, which every range includes anyway.
        for range_, values, _ in each():
            range_.widen(values)
        for range_, values, valid in each() if self.method != "minmax" else ():
            range_.count(values, valid, self.symmetric)
        replaced, report = {}, []
        for group in groups:
            fields, note = inputs[group[0]].grid(self.method, self.percentile, self.symmetric)
            for path in group:
                products, after_note = outputs[path].grid(
                    self.method, self.percentile, self.symmetric
                )
                before = work.leaves[path]
                replaced[path] = before.replace(**fields, **products)
                notes = f"{note}; {after_note}"
                report.append(row(NAME, path, before, replaced[path], None, notes))
        for path in named:
            if path not in replaced:
                leaf, note = work.leaves[path], f"without a range: {work.unseen(path)}"
                report.append(row(NAME, path, leaf, leaf, None, note))
        return replaced, report

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        result = apply_layerwise(self, model, params, context)
        if all("without a range: " in row.action for row in result[2].rows):
            raise RecipeError(
                f"{NAME}: where={self.where!r} matches no quantized matrix with calibration "
                "inputs; quantize first"
            )
        return result


activations = Activations


@jax.jit
def _product(rows: Array, box: Quantized) -> Array:
    return matmul.dense(rows, box.rows())


@jax.jit
def _ends(values: Array) -> tuple[Array, Array]:
    return values.min(), values.max()


class _ActivationRange:
    """The range and histogram of one activation over all calibration batches."""

    def __init__(self, path: str, side: str) -> None:
        self.path, self.side = path, side
        self.low, self.high = np.inf, -np.inf
        self.counts: np.ndarray = np.zeros((), np.int64)

    def widen(self, values: Array) -> None:
        low, high = (float(end) for end in _ends(values))
        if not np.isfinite([low, high]).all():
            raise RecipeError(f"{NAME}: {self.path}: calibration {self.side} are not finite")
        self.low, self.high = min(self.low, low), max(self.high, high)

    def count(self, values: Array, valid: Array, symmetric: bool) -> None:
        ends = ranges.widened(self.low, self.high, symmetric)
        # int64, since a long calibration has more values than int32 can count.
        self.counts = self.counts + np.asarray(ranges.histogram(values, *ends, valid), np.int64)

    def grid(self, method: str, percentile: float, symmetric: bool) -> tuple[dict[str, Array], str]:
        """Compute the scale and zero point as fields of the box, and a note."""
        low, high = ranges.widened(self.low, self.high, symmetric)
        ends = ranges.choose_range(self.counts, low, high, method, percentile, symmetric)
        scale, zero = ranges.int8_grid(*ends, symmetric)
        name = self.side.removesuffix("s")
        fields = {f"{name}_scale": jnp.asarray(scale), f"{name}_zero": jnp.asarray(zero)}
        note = f"{self.side} {ends[0]:.4g} to {ends[1]:.4g}, seen {low:.4g} to {high:.4g}"
        return fields, note
