"""Influence of layers: the change of direction of the hidden states that pass through them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.compress import batches
from glm_edge.compress.prune.shrink.stacks import READS
from glm_edge.configs import GLMConfig, SpeechConfig, TextConfig, VisionConfig
from glm_edge.errors import DataError
from glm_edge.models.multimodal import image_groups
from glm_edge.params.tree import Params


def influence(
    model: nn.Module, params: Params, calibration: Sequence[batches.Batch], part: str, span: int = 1
) -> np.ndarray:
    """Compute one minus the cosine between the input of a layer and the output `span` layers on.

    Args:
      model: a GLM, or an encoder on its own.
      params: its parameters.
      calibration: batches that the part reads.
      part: see `glm_edge.prune.depth`.
      span: layers taken together.

    Returns:
      float64 [layers - span + 1], the mean over tokens; padding does not count.

    Raises:
      DataError: a batch is malformed, or activations are not finite.

    References:
      ShortGPT, https://arxiv.org/abs/2403.03853.
    """
    total: np.ndarray = np.zeros(())
    tokens = 0.0
    for index, batch in enumerate(calibration):
        label = f"calibration batch {index}"
        if isinstance(model.config, GLMConfig):
            batch = batches.to_device(model, batch, label)
        elif isinstance(model.config, TextConfig):
            read = {name: batch.get(name) for name in ("tokens", "valid", "loss_mask")}
            batch = batches.to_device(model, read, label)
        else:
            batch = {input_of(model, part): batch[input_of(model, part)]}
        sums, count = jax.device_get(_distances(model, params, batch, part, span))
        if not np.isfinite(sums).all():
            raise DataError(f"{label}: activations are not finite")
        total, tokens = total + np.asarray(sums, np.float64), tokens + float(count)
    return total / max(tokens, 1.0)


def input_of(model: nn.Module, part: str) -> str:
    """Return the input of a batch that a part reads."""
    kinds = {VisionConfig: "images", SpeechConfig: "audio", TextConfig: "tokens"}
    return kinds.get(type(model.config), READS[part])


@functools.partial(jax.jit, static_argnames=("model", "part", "span"))
def _distances(
    model: nn.Module, params: Params, batch: batches.Batch, part: str, span: int
) -> tuple[Array, Array]:
    config = model.config
    if not isinstance(config, GLMConfig):
        valid = batch.get("valid") if isinstance(config, TextConfig) else None
        inputs = {} if valid is None else {"valid": valid}
        hidden = model.apply({"params": params}, batch[input_of(model, part)], **inputs)[1][
            "hidden"
        ]
        return _sums(hidden, span, valid)
    if part == "decoder":
        inputs = batches.inputs_of(model, batch)
        hidden = model.apply({"params": params}, batch["tokens"], **inputs)[1]["hidden"]
        return _sums(hidden, span, batch.get("valid"))
    items = batch[READS[part]]
    if isinstance(items, list):
        groups = image_groups(items, config.vision_tower)[0]
    else:
        groups = [items.reshape(-1, *items.shape[-(3 if part == "vision" else 2) :])]
    apply: Callable[..., Any] = model.apply
    parts = [apply({"params": params}, group, method=_ENCODERS[part]) for group in groups]
    sums, counts = zip(*(_sums(hidden, span, None) for hidden in parts), strict=True)
    return sum(sums), sum(counts)


def _sums(hidden: Sequence[Array], span: int, valid: Array | None) -> tuple[Array, Array]:
    """Sum distances over tokens that are not padding; return also the number of these tokens."""
    weights = jnp.ones(hidden[0].shape[:2]) if valid is None else valid.astype(jnp.float32)

    def distance(x: Array, y: Array) -> Array:
        norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
        return jnp.sum(weights * (1 - jnp.sum(x * y, axis=-1) / jnp.maximum(norms, 1e-12)))

    pairs = zip(hidden, hidden[span:], strict=False)
    return jnp.stack([distance(x, y) for x, y in pairs]), jnp.sum(weights)


_ENCODERS = {
    "vision": lambda module, items: module.vision(items)[1]["hidden"],
    "speech": lambda module, items: module.speech(items)[1]["hidden"],
}
