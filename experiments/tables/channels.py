"""Removal of whole channels from inverted residuals, by what their weights say of them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from glm_edge.errors import RecipeError
from glm_edge.models.cnn import CNN, Inverted, MobileNetV2Config

Variables = dict[str, Any]


def remove(
    model: CNN, variables: Variables, fraction: float, multiple: int = 4
) -> tuple[CNN, Variables]:
    """Removes the hidden channels of every widened block that matter least.

    A channel matters by the scale of its depthwise norm times the L2 norm of the weights that read
    it. What is left computes what the whole model computes with those weights at zero.

    Args:
      model: of a `MobileNetV2Config`, not deployed.
      variables: its variables, arrays.
      fraction: of the hidden channels of each block, at least, in 0..1.
      multiple: channels left are whole multiples of it where there are so many.

    Returns:
      `(model, variables)`.

    Raises:
      RecipeError: the fraction has no meaning, or the model is of another kind.
    """
    if not 0.0 <= fraction < 1.0:
        raise RecipeError(f"channels: fraction must be in 0..1 and below 1, not {fraction}")
    if not isinstance(model.config, MobileNetV2Config) or model.deploy:
        raise RecipeError(
            "channels: only a MobileNetV2 with its norms has hidden channels to remove"
        )
    params, stats = dict(variables["params"]), dict(variables["batch_stats"])
    blocks = []
    for index, block in enumerate(model.config.blocks):
        name = f"blocks_{index}"
        if block.expand:
            keep = _keep(params[name], fraction, multiple)
            params[name], stats[name] = _shrunk(params[name], stats[name], keep)
            block = dataclasses.replace(block, hidden=len(keep))
        blocks.append(block)
    config = dataclasses.replace(model.config, blocks=tuple(blocks))
    return model.clone(config=config), {"params": params, "batch_stats": stats}


def _keep(block: Variables, fraction: float, multiple: int) -> np.ndarray:
    """Indices of the hidden channels that stay, in rising order."""
    read = np.asarray(block["project"]["conv"]["kernel"], np.float64)[0, 0]
    matter = np.abs(np.asarray(block["depthwise"]["norm"]["scale"])) * np.linalg.norm(read, axis=1)
    count = int(len(matter) * (1.0 - fraction) + 1e-9)
    count = max(1, count // multiple * multiple or count)
    return np.sort(np.argsort(-matter, kind="stable")[:count])


def _shrunk(block: Variables, stats: Variables, keep: np.ndarray) -> tuple[Variables, Variables]:
    kept = jnp.asarray(keep)
    block, stats = dict(block), dict(stats)
    for name in ("expand", "depthwise"):
        kernel = block[name]["conv"]["kernel"][..., kept]
        norm = {key: leaf[kept] for key, leaf in block[name]["norm"].items()}
        block[name] = {"conv": {"kernel": kernel}, "norm": norm}
        stats[name] = {"norm": {key: leaf[kept] for key, leaf in stats[name]["norm"].items()}}
    project = block["project"]
    block["project"] = {**project, "conv": {"kernel": project["conv"]["kernel"][:, :, kept]}}
    return block, stats


def widths(config: MobileNetV2Config) -> list[int]:
    """Hidden channels of the widened blocks."""
    return [block.hidden for block in config.blocks if isinstance(block, Inverted) and block.expand]
