"""Quantization by rounding to nearest (RTN)."""

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

    Symmetric formats have no zero point. Affine ranges include zero and represent it exactly.
    Scales are rounded to their stored type before codes are computed. A scale below the range of
    the type becomes its smallest value; the report counts these scales and rows that became zero.
    Groups of zeros have scale one, or zero in `ternary34`. Zeros of a masked weight stay zero, and
    its mask is dropped. Biases and norms are not quantized.

        recipe = ge.quantize.rtn("int4-g32", where=r"^decoder/")
        model, params, report = recipe(model, params)

    Attributes:
      format: format of the weights, a string such as `int8`, `int4-g32`, `int4-g32-affine` or
        `ternary`, or a `Format`; the docstring of `glm_edge.params.Format` explains the strings.
      where: regular expression searched in each path; None selects every matrix that is not yet
        quantized.
      scale: `max` maps the largest magnitude to the largest level; `mse` uses the fraction of it
        with the least squared error; `fit` alternates rounding with the least-squares scale and
        zero point (iterative ternary fitting, for any type); `extreme` maps the signed extreme to
        `-2^(bits-1)` (symmetric integers only; phone kernels refuse negative scales).
      fallback_bits: per-channel width for a matrix whose columns do not divide into groups; None
        raises RecipeError for it.
      stacked: regular expression of stock weights whose first axis is a layer axis (`nn.scan`), if
        the model does not show it.

    Raises:
      RecipeError: an option is invalid; on call, a pattern matches nothing or a quantized weight,
        columns do not divide into groups, or weights are not finite.

    References:
      Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
      https://arxiv.org/abs/1712.05877;
      PT2-LLM: Post-Training Ternarization for Large Language Models (`fit`),
      https://arxiv.org/abs/2510.03267.
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
