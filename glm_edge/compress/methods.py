"""The table of methods: what each needs, which models it takes, and what it leaves to be exported.

Tests compare every line with what the transforms do.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from glm_edge.compress.transform import registered

YES, NO = "yes", "no"
ANY, GLM = "any", "GLM"
NEAREST, MAGNITUDE = "to nearest", "by magnitude"
INTEGERS, ZEROS, FEWER, FLOATS = "integers", "zeros", "smaller arrays", "floats"


class Method(NamedTuple):
    """One line of the table.

    Attributes:
      name: of the transform.
      data: whether calibration is needed: `yes`, `no`, or the options that need it.
      models: `any` Linen module, or which.
      leaves: what the files of `glm_edge.export` get: `integers` with scales, `zeros` in arrays of
        the same shape, `smaller arrays`, or `floats`.
      within_scan: what becomes of the matrices of a stack, where stacks are taken: `yes`, as
        others; or `to nearest` or `by magnitude`, since their inputs inside `nn.scan` are not seen.
    """

    name: str
    data: str
    models: str
    leaves: str
    within_scan: str = YES

    @property
    def stacked(self) -> str:
        """Describes how stacks of layers (`nn.scan`) become matrices of their own, or is empty."""
        fields = dataclasses.fields(registered(self.name))
        takes = "stacked" in (item.name for item in fields)
        # No GLM is a stack.
        return self.within_scan if takes and self.models != GLM else ""


METHODS = (
    Method("quantize.rtn", NO, ANY, INTEGERS),
    Method("quantize.hqq", NO, ANY, INTEGERS),
    Method("quantize.gptq", YES, ANY, INTEGERS, NEAREST),
    Method("quantize.awq", YES, GLM, INTEGERS),
    Method("quantize.adaround", YES, ANY, INTEGERS, NEAREST),
    Method("quantize.blockwise", YES, ANY, INTEGERS),
    Method("quantize.qat", YES, ANY, INTEGERS),
    Method("quantize.distill_scales", YES, ANY, INTEGERS),
    Method("quantize.activations", YES, ANY, INTEGERS),
    Method("quantize.smoothquant", YES, GLM, FLOATS),
    Method("quantize.rotate", NO, GLM, FLOATS),
    Method("prune.magnitude", NO, ANY, ZEROS),
    Method(
        "prune.mask",
        "wanda, activation, gradients, measured",
        ANY,
        ZEROS,
        f"yes; wanda, activation {MAGNITUDE}",
    ),
    Method("prune.sparsegpt", YES, ANY, ZEROS, MAGNITUDE),
    Method("prune.sparsegpt_quantize", YES, ANY, INTEGERS, NEAREST),
    Method("prune.compact", NO, GLM, FEWER),
    Method("prune.structured", "taylor", GLM, FEWER),
    Method("prune.encoders", "taylor", GLM, FEWER),
    Method("prune.depth", YES, GLM, FEWER),
    Method("prune.vocabulary", NO, GLM, FEWER),
    Method("prune.channels", NO, "MobileNetV2", FEWER),
    Method("distill", YES, ANY, FLOATS),
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
        cells = (f"`{method.name}`", method.data, method.models, method.stacked, method.leaves)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
