"""Table of methods: required data, supported models, and exported result.

Tests compare every line with the behaviour of the transform.
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
      name: name of the transform.
      data: `yes` if calibration is required, `no`, or the options that require it.
      models: `any` Linen module, or the supported models.
      leaves: exported result: `integers` with scales, `zeros` in arrays of the same shape, `smaller
        arrays`, or `floats`.
      within_scan: treatment of stacked matrices: `yes`, like others; or `to nearest` or `by
        magnitude`, since calibration cannot record their inputs inside `nn.scan`.
    """

    name: str
    data: str
    models: str
    leaves: str
    within_scan: str = YES

    @property
    def stacked(self) -> str:
        """Treatment of stacked layers (`nn.scan`); empty if they are unsupported."""
        fields = dataclasses.fields(registered(self.name))
        takes = "stacked" in (item.name for item in fields)
        # Layers of a GLM are never stacked.
        return self.within_scan if takes and self.models != GLM else ""


METHODS = (
    Method("quantize.rtn", NO, ANY, INTEGERS),
    Method("quantize.hqq", NO, ANY, INTEGERS),
    Method("quantize.gptq", YES, ANY, INTEGERS, NEAREST),
    Method("quantize.awq", YES, GLM, INTEGERS),
    Method("quantize.adaround", YES, ANY, INTEGERS, NEAREST),
    Method("quantize.blockwise", YES, ANY, INTEGERS),
    Method("quantize.catq", YES, ANY, INTEGERS),
    Method("quantize.qat", YES, ANY, INTEGERS),
    Method("quantize.distill_scales", YES, ANY, INTEGERS),
    Method("quantize.activations", YES, ANY, INTEGERS),
    Method("quantize.smoothquant", YES, GLM, FLOATS),
    Method("quantize.rotate", NO, GLM, FLOATS),
    Method("quantize.reorder", NO, GLM, FLOATS),
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
    """Format the table as Markdown."""
    lines = [
        "| method | needs data | models | scanned stacks | leaves to export |",
        "|---|---|---|---|---|",
    ]
    for method in methods:
        cells = (f"`{method.name}`", method.data, method.models, method.stacked, method.leaves)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
