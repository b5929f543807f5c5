"""Masks by magnitude."""

from dataclasses import field

import flax.linen as nn

from glm_edge.compress.prune.mask import mask_model
from glm_edge.compress.prune.masks import allocation as allocations
from glm_edge.compress.prune.masks.config import TENSOR, MaskConfig
from glm_edge.compress.prune.masks.shapes import SINGLE, Shape
from glm_edge.compress.prune.scores.from_weights import Score
from glm_edge.compress.transform import (
    Context,
    Result,
    Transform,
    check_fraction,
    check_pattern,
    register,
)
from glm_edge.errors import RecipeError
from glm_edge.params.tree import Params

NAME = "prune.magnitude"
SCOPES = ("tensor", "global")


@register(NAME)
class Magnitude(Transform):
    """Mask of the weights of least magnitude, for the parameters of any Linen module.

    The simplest case of `mask`. Exactly `round(sparsity * size)` weights are masked, of equal
    magnitudes the first; weights masked before count. A mask is stored beside its values, so bytes
    grow until the weight is quantized.

        model, params, report = ge.prune.magnitude(sparsity=0.5)(model, params)

    Attributes:
      sparsity: fraction of zeros, in 0..1, below 1.
      where: regular expression searched in each path; None masks every matrix.
      scope: `tensor` prunes this fraction of each matrix, `global` of all of them together.
      stacked: see `mask`.

    Raises:
      RecipeError: an option has no meaning; on call, a pattern matches nothing or a quantized
        weight, or weights are not finite.

    References:
      Learning both Weights and Connections for Efficient Neural Networks,
      https://arxiv.org/abs/1506.02626.
    """

    sparsity: float = field(kw_only=False)
    where: str | None = None
    scope: str = "tensor"
    stacked: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pattern(NAME, "where", self.where)
        check_pattern(NAME, "stacked", self.stacked)
        check_fraction(NAME, sparsity=self.sparsity)
        if self.scope not in SCOPES:
            raise RecipeError(f"{NAME}: scope must be tensor or global, not {self.scope!r}")

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        masking = MaskConfig(
            name=NAME,
            sparsity=self.sparsity,
            score=Score("norm"),
            shape=Shape(SINGLE),
            allocation=allocations.GLOBAL if self.scope == "global" else allocations.UNIFORM,
            within=TENSOR,
            levels=(),
        )
        return mask_model(masking, self.where, model, params, context, self.stacked)


magnitude = Magnitude
