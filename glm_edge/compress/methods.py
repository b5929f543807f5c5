"""The table of methods: what each needs, which models it takes, and what it leaves to be exported.

Tests compare every line with what the transforms do.
"""

import inspect
from collections.abc import Iterable
from typing import NamedTuple

from glm_edge.compress.transform import entry

YES, NO = "yes", "no"
ANY, GLM, TOKENS = "any", "GLM", "any that predicts tokens"
INTEGERS, ZEROS, FEWER, FLOATS = "integers", "zeros", "smaller arrays", "floats"


class Method(NamedTuple):
    """One line of the table.

    Attributes:
      name: of the transform.
      data: whether calibration is needed: `yes`, `no`, or the options that need it.
      models: `any` Linen module, or which.
      leaves: what the files of `glm_edge.export` get: `integers` with scales, `zeros` in arrays of
        the same shape, `smaller arrays`, or `floats`.
    """

    name: str
    data: str
    models: str
    leaves: str

    @property
    def stacked(self) -> bool:
        """True where stacks of layers (`nn.scan`) are taken as matrices of their own."""
        return "stacked" in inspect.signature(entry(self.name).factory).parameters


METHODS = (
    Method("quantize.rtn", NO, ANY, INTEGERS),
    Method("quantize.hqq", NO, ANY, INTEGERS),
    Method("quantize.gptq", YES, ANY, INTEGERS),
    Method("quantize.awq", YES, GLM, INTEGERS),
    Method("quantize.adaround", YES, ANY, INTEGERS),
    Method("quantize.blockwise", YES, ANY, INTEGERS),
    Method("quantize.qat", YES, TOKENS, INTEGERS),
    Method("quantize.distill_scales", YES, TOKENS, INTEGERS),
    Method("quantize.activations", YES, ANY, INTEGERS),
    Method("quantize.smoothquant", YES, GLM, FLOATS),
    Method("quantize.rotate", NO, GLM, FLOATS),
    Method("prune.magnitude", NO, ANY, ZEROS),
    Method("prune.mask", "wanda, activation, gradients, measured", ANY, ZEROS),
    Method("prune.sparsegpt", YES, ANY, ZEROS),
    Method("prune.sparsegpt_quantize", YES, ANY, INTEGERS),
    Method("prune.compact", NO, GLM, FEWER),
    Method("prune.structured", "taylor", GLM, FEWER),
    Method("prune.encoders", "taylor", GLM, FEWER),
    Method("prune.depth", YES, GLM, FEWER),
    Method("prune.vocabulary", NO, GLM, FEWER),
    Method("prune.channels", NO, "MobileNetV2", FEWER),
    Method("distill", YES, TOKENS, FLOATS),
    Method("reparameterize", NO, "GLM, RepVGG, MobileNetV2", FLOATS),
)
"""Every registered transform."""


def to_markdown(methods: Iterable[Method] = METHODS) -> str:
    """Returns the table as Markdown, headings first."""
    lines = [
        "| method | needs data | models | scanned stacks | leaves to export |",
        "|---|---|---|---|---|",
    ]
    for method in methods:
        stacked = YES if method.stacked else ""
        cells = (f"`{method.name}`", method.data, method.models, stacked, method.leaves)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
