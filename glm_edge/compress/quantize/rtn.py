"""Rounding weights to the nearest level."""

from dataclasses import field

from glm_edge.compress.layerwise.runner import Replaced, StageContext
from glm_edge.compress.quantize.options import Quantizer
from glm_edge.compress.quantize.parameter import is_stock, quantize_leaf, row
from glm_edge.compress.transform import register
from glm_edge.params import Format

NAME = "quantize.rtn"


@register(NAME)
class RTN(Quantizer):
    """Rounds weights to the nearest level, `q = round(f / s + z)`, `f' = s (q - z)`.

    Symmetric scales have no zero point; affine grids span zero, which they hold exactly. A scale
    is rounded to its stored type before the codes are computed; one below what the type holds is
    raised to the smallest, and the report counts those and rows that became zero. A group of zeros
    gets scale one, or zero in `ternary34`. Zeros of a masked weight stay zero and its mask is
    dropped. Biases and norms are left.

        recipe = ge.quantize.rtn("int4-g32", where=r"^decoder/")
        model, params, report = recipe(model, params)

    Attributes:
      format: of the weights, a string such as `int8`, `int4-g32`, `int4-g32-affine` or `ternary`,
        or a `Format`; the docstring of `glm_edge.params.Format` explains the strings.
      where: regular expression searched in each path; None rounds every matrix that is not yet
        quantized.
      scale: `max`, the largest magnitude lands on the largest level; `mse`, the fraction of it
        that gives the least squared error; `extreme`, the signed extreme lands on
        `-2^(bits-1)` (symmetric integers only; scales may be negative, which phone kernels refuse).
      fallback_bits: per-channel width for a matrix whose columns are not whole groups; None raises
        there.
      stacked: regular expression of stock weights whose first axis is a layer axis (`nn.scan`),
        where the model itself does not show it.

    Raises:
      RecipeError: an option has no meaning; on call, a pattern matches nothing or a quantized
        weight, columns are not whole groups, or weights are not finite.

    References:
      Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
      https://arxiv.org/abs/1712.05877.
    """

    format: Format | str = field(default=Format("int8"), kw_only=False)
    scale: str = "max"

    def compress_stage(self, work: StageContext) -> Replaced:
        rounding = self.config
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


rtn = RTN
