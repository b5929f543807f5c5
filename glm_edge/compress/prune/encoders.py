"""Structured pruning of heads and neurons of vision, speech and text encoders."""

from typing import ClassVar

import flax.linen as nn

from glm_edge.compress.prune.shrink.stacks import DECODER, Stack, stacks_of
from glm_edge.compress.prune.structured import Structured
from glm_edge.compress.transform import register
from glm_edge.errors import RecipeError

NAME = "prune.encoders"


@register(NAME)
class Encoders(Structured):
    """Structured pruning of the encoders' attention heads and neurons.

    Arrays and configurations shrink. A head that has its own keys and values goes with them. Where
    query heads share them, each group loses the same number and the shared ones remain. A pooling
    head and the projector remain complete. At least the requested fraction goes.

    Attributes:
      heads: fraction of heads to remove, in 0..1, below 1.
      neurons: fraction of neurons to remove, in 0..1, below 1.
      score: `taylor`, from gradients of a GLM's calibration loss, or `magnitude`, from weights
        alone.
      where: regular expression searched in the encoders' paths, such as `^speech/`; layers whose
        attention (or feed-forward) weights it matches lose heads (or neurons). None is all layers
        of all encoders.
      neuron_multiple: the number of remaining neurons is rounded down to a multiple of this in
        layers at least four times as wide.
      max_batches: calibration batches to score on, evenly spaced among all.

    Raises:
      RecipeError: an option has no meaning; on call, the model has no encoder, nothing would
        remain, a pattern matches none of its layers, or a weight is quantized.
      DataError: `taylor` without calibration that the encoder reads.

    References:
      Are Sixteen Heads Really Better than One?, https://arxiv.org/abs/1905.10650.
    """

    layers_of: ClassVar[str] = "layer of an encoder"

    def stacks(self, model: nn.Module) -> dict[str, Stack]:
        """Select the encoders of a model.

        Raises:
          RecipeError: the model has none.
        """
        stacks = {name: stack for name, stack in stacks_of(model).items() if name != DECODER}
        if not stacks:
            raise RecipeError(f"{self.name}: {type(model).__name__} has no encoder to shrink")
        return stacks


encoders = Encoders
