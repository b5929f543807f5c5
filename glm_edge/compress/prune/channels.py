"""Structured pruning of hidden channels of inverted residuals."""

import dataclasses
from dataclasses import field
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from glm_edge import params as boxes
from glm_edge.compress.prune.masks.allocation import keep_highest
from glm_edge.compress.prune.masks.shapes import rounded_up
from glm_edge.compress.prune.shrink.arrays import shrunk_report, take
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
    """Structured pruning of the hidden channels of a MobileNetV2's widened blocks.

    A channel's score is the scale of its depthwise norm times the L2 norm of the weights that read
    it; the lowest go. The smaller model equals the original with those weights at zero. Call it
    with variables, `{"params": …, "batch_stats": …}`.

    Attributes:
      fraction: fraction of each block's hidden channels to remove, in 0..1, rounded up.
      multiple: the number of remaining channels is rounded down to a multiple of this, unless that
        is zero.

    Raises:
      RecipeError: an option has no meaning; on call, the model is not a MobileNetV2 with its norms,
        or a kernel is quantized.

    References:
      Learning Efficient Convolutional Networks through Network Slimming,
      https://arxiv.org/abs/1708.06519.
    """

    needs_model: ClassVar[bool] = True
    takes_variables: ClassVar[bool] = True

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
    """Return the indices of the hidden channels that stay, ascending."""
    read = np.asarray(boxes.dense(block["project"]["conv"]["kernel"]), np.float64)[0, 0]
    matter = np.abs(np.asarray(block["depthwise"]["norm"]["scale"])) * np.linalg.norm(read, axis=1)
    count = len(matter) - rounded_up(len(matter), fraction)
    count = max(1, count // multiple * multiple or count)
    return np.flatnonzero(keep_highest(matter[None], count))


def _shrunk(block: Params, stats: Params, keep: np.ndarray, path: str) -> tuple[Params, Params]:
    block, stats = dict(block), dict(stats)
    for name in ("expand", "depthwise"):
        kernel = take(block[name]["conv"]["kernel"], keep, -1, f"{path}/{name}", NAME)
        norm = {key: jnp.take(leaf, keep) for key, leaf in block[name]["norm"].items()}
        block[name] = {"conv": {"kernel": kernel}, "norm": norm}
        norm_stats = stats[name]["norm"].items()
        stats[name] = {"norm": {key: jnp.take(leaf, keep) for key, leaf in norm_stats}}
    project = block["project"]
    kernel = take(project["conv"]["kernel"], keep, 2, f"{path}/project", NAME)
    block["project"] = {**project, "conv": {"kernel": kernel}}
    return block, stats
