"""Rounding weights to the nearest level."""

from typing import Any

from glm_edge.compress.layerwise.runner import Replaced, StageContext, register_layerwise
from glm_edge.compress.quantize.options import QuantizeConfig, check_groups, spelled_out
from glm_edge.compress.quantize.parameter import is_stock, quantize_leaf, row
from glm_edge.compress.transform import Transform

NAME = "quantize.rtn"


def rtn(
    bits: int = 8,
    group_size: int | str | None = None,
    symmetric: bool = True,
    where: str | None = None,
    scale: str = "max",
    scale_dtype: str | None = None,
    qtype: str | None = None,
    fallback_bits: int | None = None,
    stacked: str | None = None,
) -> Transform:
    """Rounds weights to the nearest level, `q = round(f / s + z)`, `f' = s (q - z)`.

    Symmetric scales have no zero point; affine grids span zero, which they hold exactly. A scale
    is rounded to its stored type before the codes are computed; one below what the type holds is
    raised to the smallest, and the report counts those and rows that became zero. A group of zeros
    gets scale one, or zero in `ternary34`. Zeros of a masked weight stay zero and its mask is
    dropped. Biases and norms are left.

        recipe = ge.quantize.rtn(bits=4, group_size=32, where=r"^decoder/")
        model, params, report = recipe(model, params)

    Args:
      bits: 8, 6, 5, 4, 3 or 2.
      group_size: columns (inputs) that share a scale; None for one scale a row (per channel),
        `tensor` for one scale a matrix.
      symmetric: False for affine, with an integer zero point.
      where: regular expression searched in each path; None rounds every matrix that is not yet
        quantized.
      scale: `max`, the largest magnitude lands on the largest level; `mse`, the fraction of it
        that gives the least squared error; `extreme`, the signed extreme lands on
        `-2^(bits-1)` (symmetric integers only; scales may be negative, which phone kernels refuse).
      scale_dtype: `float32`, `float16` or `bfloat16`; None is float32 per channel and bfloat16 for
        groups.
      qtype: another format than integers, such as `nf4`, `ternary`, `ternary34` or `bfloat16`; see
        `glm_edge.params.Format`.
      fallback_bits: per-channel width for a matrix whose columns are not whole groups; None raises
        there.
      stacked: regular expression of stock weights whose first axis is a layer axis (`nn.scan`),
        where the model itself does not show it.

    Returns:
      The transform.

    Raises:
      RecipeError: an option has no meaning; on call, a pattern matches nothing or a quantized
        weight, columns are not whole groups, or weights are not finite.

    References:
      Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
      https://arxiv.org/abs/1712.05877.
    """
    options = spelled_out(locals())
    QuantizeConfig.of(NAME, options)
    return Transform(NAME, options)


def _round_stage(work: StageContext, **shared: Any) -> Replaced:
    rounding = QuantizeConfig.of(NAME, shared)
    replaced, rows = {}, []
    for path in work.selected:
        leaf = work.leaves[path]
        if rounding.format.plain:
            format, layout = rounding.format, None
        else:
            format, layout = rounding.format_of(path, work.columns(path)), work.layouts[path]
        replaced[path], error = quantize_leaf(
            path, leaf, format, rounding.scale, layout, stock=is_stock(path)
        )
        note = "" if format is rounding.format else "fallback"
        rows.append(row(NAME, path, leaf, replaced[path], error, note))
        work.advance(path)
    return replaced, rows


register_layerwise(NAME, rtn, _round_stage, check=check_groups)
