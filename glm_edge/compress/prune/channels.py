"""Removing hidden channels of inverted residuals, so that arrays and configuration shrink."""

import dataclasses
from dataclasses import field
from typing import ClassVar

import flax.linen as nn
import numpy as np

from glm_edge import params as boxes
from glm_edge.compress.prune.shrink.arrays import highest, removed, shrunk_report, take
from glm_edge.compress.transform import (
    Context,
    Result,
    Transform,
    check_fraction,
    check_whole,
    register,
)
from glm_edge.errors import RecipeError
from glm_edge.models.cnn import MobileNetV2Config
from glm_edge.params.tree import Params

NAME = "prune.channels"
STATISTICS = "batch_stats"


@register(NAME)
class Channels(Transform):
    """Removes hidden channels of every widened block of a MobileNetV2.

    A channel matters by the scale of its depthwise norm times the L2 norm of the weights that read
    it; the lowest go. What is left computes what the whole model computes with those weights at
    zero. It is called with variables, `{"params": …, "batch_stats": …}`.

    Attributes:
      fraction: of the hidden channels of each block, in 0..1; at least so many go.
      multiple: channels left are whole multiples of it where there are so many.

    Raises:
      RecipeError: an option has no meaning; on call, the model is of another kind or has no norms
        any more, or a kernel is quantized.

    References:
      Learning Efficient Convolutional Networks through Network Slimming,
      https://arxiv.org/abs/1708.06519.
    """

    needs_model: ClassVar[bool] = True

    fraction: float = field(kw_only=False)
    multiple: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(NAME, fraction=self.fraction)
        check_whole(NAME, multiple=self.multiple)

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        config = getattr(model, "config", None)
        if not isinstance(config, MobileNetV2Config) or model.deploy:
            raise RecipeError(f"{NAME}: only a MobileNetV2 with its norms has channels to remove")
        if not {"params", STATISTICS} <= set(params):
            raise RecipeError(
                f"{NAME}: the model comes with its variables, params and {STATISTICS}"
            )
        weights, stats = dict(params["params"]), dict(params[STATISTICS])
        blocks = []
        for index, block in enumerate(config.blocks):
            name = f"blocks_{index}"
            if block.expand:
                keep = _channels_to_keep(weights[name], self.fraction, self.multiple)
                weights[name], stats[name] = _shrunk(weights[name], stats[name], keep, name)
                block = dataclasses.replace(block, hidden=len(keep))
            blocks.append(block)
        smaller = model.clone(config=dataclasses.replace(config, blocks=tuple(blocks)))
        variables = {**params, "params": weights, STATISTICS: stats}
        return smaller, variables, shrunk_report(NAME, (model, params), (smaller, variables))


channels = Channels


def _channels_to_keep(block: Params, fraction: float, multiple: int) -> np.ndarray:
    """Indices of the hidden channels that stay, ascending."""
    read = np.asarray(boxes.dense(block["project"]["conv"]["kernel"]), np.float64)[0, 0]
    matter = np.abs(np.asarray(block["depthwise"]["norm"]["scale"])) * np.linalg.norm(read, axis=1)
    count = len(matter) - removed(len(matter), fraction)
    return highest(matter, max(1, count // multiple * multiple or count))


def _shrunk(block: Params, stats: Params, keep: np.ndarray, path: str) -> tuple[Params, Params]:
    block, stats = dict(block), dict(stats)
    for name in ("expand", "depthwise"):
        kernel = take(block[name]["conv"]["kernel"], keep, -1, f"{path}/{name}", NAME)
        norm = {key: leaf[keep] for key, leaf in block[name]["norm"].items()}
        block[name] = {"conv": {"kernel": kernel}, "norm": norm}
        stats[name] = {"norm": {key: leaf[keep] for key, leaf in stats[name]["norm"].items()}}
    project = block["project"]
    kernel = take(project["conv"]["kernel"], keep, 2, f"{path}/project", NAME)
    block["project"] = {**project, "conv": {"kernel": kernel}}
    return block, stats
