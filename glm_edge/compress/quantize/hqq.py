"""HQQ: half-quadratic quantization without calibration."""

import functools
from dataclasses import field
from typing import Any, ClassVar

from glm_edge.compress.layerwise.runner import Replaced, StageContext
from glm_edge.compress.quantize.options import Quantizer
from glm_edge.compress.quantize.parameter import (
    box_of,
    dense_rows,
    each_matrix,
    relative_error,
    row,
)
from glm_edge.compress.quantize.solvers import hqq_solver as half_quadratic
from glm_edge.compress.transform import check_whole, register
from glm_edge.errors import RecipeError
from glm_edge.params import Format
from glm_edge.params.formats import PLAIN

NAME = "quantize.hqq"


@register(NAME)
class HQQ(Quantizer):
    """Fits scales or zero points to a sparse error without calibration, then rounds to nearest.

        model, params, report = ge.quantize.hqq()(model, params)

    Attributes:
      format: format of the weights, such as `int4-g64-affine-zero=float16`, see
        `glm_edge.params.Format`. Symmetric formats fit scales. Affine formats fit zero points,
        which may be between levels if they are stored in a floating type.
      where: see `glm_edge.quantize.rtn`, also for `scale`, `fallback_bits` and `stacked`.
      exponent: exponent `p` of the error's norm, in (0, 1].
      steps: half-quadratic steps.

    Raises:
      RecipeError: an option is invalid; on call, a pattern matches nothing or a quantized weight,
        columns do not divide into groups, weights are not finite, or zero points between levels
        cannot represent the zeros of a mask.

    References:
      Half-Quadratic Quantization of Large Machine Learning Models,
      https://mobiusml.github.io/hqq_blog/.
    """

    unsupported: ClassVar[tuple[str, ...]] = PLAIN

    format: Format | str = field(
        default=Format("int4", 64, False, "bfloat16", "float16"), kw_only=False
    )
    scale: str = "max"
    exponent: float = 0.7
    steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(NAME, steps=self.steps)
        if not 0 < self.exponent <= 1:
            raise RecipeError(f"{NAME}: exponent must be a number in (0, 1], not {self.exponent!r}")

    def compress_stage(self, work: StageContext) -> Replaced:
        rounding = self.config
        replaced, rows = {}, []
        for path in work.selected:
            leaf: Any = work.leaves[path]
            format, layout = rounding.format_of(path, work.columns(path)), work.layouts[path]
            solve = functools.partial(
                half_quadratic.solve,
                format=format,
                scale=rounding.scale,
                exponent=float(self.exponent),
                steps=self.steps,
            )
            codes, grid = each_matrix(solve, dense_rows(path, leaf, layout))
            box = box_of(path, leaf, codes, grid, format, layout)
            note = "" if format is rounding.format else "fallback"
            replaced[path] = box
            rows.append(row(NAME, path, leaf, box, relative_error(leaf, box), note))
            work.advance(path)
        return replaced, rows


hqq = HQQ
