"""Rounding weights without calibration, by half-quadratic steps."""

import functools
from typing import Any

from glm_edge.compress.layerwise.runner import Replaced, StageContext, register_layerwise
from glm_edge.compress.quantize.options import QuantizeConfig, check_groups, spelled_out
from glm_edge.compress.quantize.parameter import (
    box_of,
    dense_rows,
    each_matrix,
    relative_error,
    row,
)
from glm_edge.compress.quantize.solvers import hqq_solver as half_quadratic
from glm_edge.compress.transform import Transform, check_whole
from glm_edge.errors import RecipeError
from glm_edge.params.formats import PLAIN

NAME = "quantize.hqq"


def hqq(
    bits: int = 4,
    group_size: int | str | None = 64,
    symmetric: bool = False,
    where: str | None = None,
    scale: str = "max",
    scale_dtype: str | None = None,
    zero_dtype: str = "float16",
    qtype: str | None = None,
    fallback_bits: int | None = None,
    exponent: float = 0.7,
    steps: int = 20,
    stacked: str | None = None,
) -> Transform:
    """Fits grids that leave few weights far wrong, without calibration, and rounds to nearest.

        model, params, report = ge.quantize.hqq(bits=4, group_size=64)(model, params)

    Args:
      bits: 8, 6, 5, 4, 3 or 2.
      group_size: columns that share a scale; None per channel, `tensor` for one scale a matrix.
      symmetric: True fits scales; False fits zero points, which lie between levels.
      where: regular expression searched in each path; None is every matrix not yet quantized.
      scale: of the grid to start from: `max`, `mse` or `extreme`, see `rtn`.
      scale_dtype: `float32`, `float16` or `bfloat16`; None is float32 per channel and bfloat16 for
        groups.
      zero_dtype: type of zero points, `int8` for whole ones.
      qtype: another format than integers, such as `ternary` or `nf4`; symmetric only.
      fallback_bits: per-channel width for a matrix whose columns are not whole groups; None raises
        there.
      exponent: in (0, 1], of the norm of the error.
      steps: grids tried.
      stacked: regular expression of stock weights whose first axis is a layer axis (`nn.scan`),
        where the model itself does not show it.

    Returns:
      The transform.

    Raises:
      RecipeError: an option has no meaning; on call, a pattern matches nothing or a quantized
        weight, columns are not whole groups, weights are not finite, or a mask holds zeros that
        zero points between levels cannot.

    References:
      Half-Quadratic Quantization of Large Machine Learning Models,
      https://mobiusml.github.io/hqq_blog/.
    """
    options = spelled_out(locals())
    QuantizeConfig.of(NAME, options, without=PLAIN)
    check_whole(NAME, steps=steps)
    number = isinstance(exponent, int | float) and not isinstance(exponent, bool)
    if not number or not 0 < exponent <= 1:
        raise RecipeError(f"{NAME}: exponent must be a number above 0 and up to 1: {exponent!r}")
    return Transform(NAME, options)


def _round_stage(work: StageContext, exponent: float, steps: int, **shared: Any) -> Replaced:
    rounding = QuantizeConfig.of(NAME, shared)
    replaced, rows = {}, []
    for path in work.selected:
        leaf: Any = work.leaves[path]
        format, layout = rounding.format_of(path, work.columns(path)), work.layouts[path]
        solve = functools.partial(
            half_quadratic.solve,
            format=format,
            scale=rounding.scale,
            exponent=float(exponent),
            steps=steps,
        )
        codes, grid = each_matrix(solve, dense_rows(path, leaf, layout))
        box = box_of(path, leaf, codes, grid, format, layout)
        note = "" if format is rounding.format else "fallback"
        replaced[path] = box
        rows.append(row(NAME, path, leaf, box, relative_error(leaf, box), note))
        work.advance(path)
    return replaced, rows


register_layerwise(NAME, hqq, _round_stage, check=check_groups)
