"""Removing whole layers of a decoder or an encoder."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import field
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from glm_edge.compress import batches
from glm_edge.compress.prune.shrink.arrays import check_kept, one_or_each, shrunk_report
from glm_edge.compress.prune.structured import some
from glm_edge.compress.transform import (
    Context,
    Result,
    Transform,
    check_whole,
    register,
)
from glm_edge.configs import GLMConfig, SpeechConfig, TextConfig, VisionConfig
from glm_edge.errors import DataError, RecipeError
from glm_edge.models.multimodal import image_groups
from glm_edge.params.tree import Params

NAME = "prune.depth"
SCORES = ("influence", "block", "loss")
PARTS = ("decoder", "vision", "speech")
_READS = {"vision": "images", "speech": "audio"}
_WIDTHS = ("num_heads", "num_kv_heads", "intermediate_size")


@register(NAME)
class Depth(Transform):
    """Removes whole layers, whose input then goes to the next layer as it is.

    Attributes:
      layers: how many to remove, chosen by `score`; or the indices of those to remove, in which
        case nothing is scored.
      part: `decoder`, `vision` or `speech` of a GLM; an encoder on its own has only one part.
      score: `influence`, one minus the cosine between what enters and what leaves a layer, the
        lowest go; `block`, the same of neighbouring layers taken together, which go as one; or
        `loss`, which leaves out one layer after the other, each time that whose lack raises the
        calibration loss least.
      max_batches: calibration batches that are scored, taken evenly from those given.

    Raises:
      RecipeError: an option has no meaning; on call, the model has no such part, a layer does not
        exist, or none would remain.
      DataError: a score without calibration, or without batches that the part reads.

    References:
      ShortGPT (influence), https://arxiv.org/abs/2403.03853; The Unreasonable Ineffectiveness of
      the Deeper Layers (blocks), https://arxiv.org/abs/2403.17887; Shortened LLaMA (loss),
      https://arxiv.org/abs/2402.02834.
    """

    needs_model: ClassVar[bool] = True

    layers: int | Sequence[int] = field(kw_only=False)
    part: str = "decoder"
    score: str = "influence"
    max_batches: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in SCORES:
            raise RecipeError(f"{NAME}: score must be influence, block or loss, not {self.score!r}")
        if self.part not in PARTS:
            raise RecipeError(f"{NAME}: part must be decoder, vision or speech, not {self.part!r}")
        check_whole(NAME, max_batches=self.max_batches)
        if isinstance(self.layers, int):
            check_whole(NAME, layers=self.layers)
            return
        self._set(layers=tuple(self.layers))
        if not self.layers or not all(type(index) is int and index >= 0 for index in self.layers):
            raise RecipeError(
                f"{NAME}: layers must be a number or indices, not {self.layers!r:.60}"
            )

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        total = _config_of(model, self.part).num_layers
        count = self.layers if isinstance(self.layers, int) else len(set(self.layers))
        if count >= total:
            raise RecipeError(
                f"{NAME}: removing {count} of {total} layers leaves none of the {self.part}"
            )
        if isinstance(self.layers, int):
            calibration = _readable(some(context.calibration, self.max_batches), self.part, model)
            choose = {"influence": _least_influence, "block": _least_block, "loss": _least_loss}[
                self.score
            ]
            gone = choose(model, params, calibration, self.part, count, context)
        else:
            gone = sorted(set(self.layers))
            if gone[-1] >= total:
                raise RecipeError(
                    f"{NAME}: the {self.part} has no layer {gone[-1]}, only 0..{total - 1}"
                )
        smaller, shrunk = shrink_depth(
            model, params, [index for index in range(total) if index not in gone], self.part
        )
        # Layers are numbered anew, so that rows of the report do not say which ones went.
        reason = f" by {self.score}" if isinstance(self.layers, int) else ""
        note = f"removed layers {', '.join(map(str, gone))} of the {self.part}{reason}"
        report = shrunk_report(NAME, (model, params), (smaller, shrunk), (note,))
        return smaller, shrunk, report


depth = Depth


def shrink_depth(
    model: nn.Module, params: Params, keep: Sequence[int], part: str = "decoder"
) -> tuple[nn.Module, Params]:
    """Keeps some layers, which are numbered anew.

    Args:
      model: a GLM, or an encoder on its own.
      params: its parameters; boxes of any kind.
      keep: ascending indices of the layers that stay.
      part: see `depth`.

    Returns:
      `(model, params)`, equal to the model whose other layers give out what they are given.

    Raises:
      RecipeError: the model has no such part, or a layer does not exist.
    """
    config = _config_of(model, part)
    keep = check_kept(keep, config.num_layers, f"{NAME}: {part} layers").tolist()
    fields: dict[str, Any] = {"num_layers": len(keep)}
    for name in _WIDTHS:
        value = getattr(config, name, 0)
        if isinstance(value, tuple):
            # A pooling head's width comes after those of the layers.
            after = value[config.num_layers :]
            fields[name] = one_or_each([*(value[index] for index in keep), *after])
    if isinstance(config, VisionConfig):
        fields["global_layers"] = tuple(
            new for new, old in enumerate(keep) if old in config.global_layers
        )
    smaller = dataclasses.replace(config, **fields)
    is_glm = isinstance(model.config, GLMConfig)
    tree = params[part] if is_glm else params
    layers = {str(new): tree["layers"][str(old)] for new, old in enumerate(keep)}
    tree = {**tree, "layers": layers}
    if not is_glm:
        return model.clone(config=smaller), tree
    changed = dataclasses.replace(model.config, **{part: smaller})
    return model.clone(config=changed), {**params, part: tree}


def influence(
    model: nn.Module, params: Params, calibration: Sequence[batches.Batch], part: str, span: int = 1
) -> np.ndarray:
    """One minus the cosine between the input of a layer and the output of `span` layers from it.

    Args:
      model: a GLM, or an encoder on its own.
      params: its parameters.
      calibration: batches that the part reads.
      part: see `depth`.
      span: layers taken together.

    Returns:
      float64 [layers - span + 1], the mean over tokens; padding does not count.

    Raises:
      DataError: a batch is malformed, or activations are not finite.
    """
    total, tokens = 0.0, 0.0
    for index, batch in enumerate(calibration):
        if isinstance(model.config, GLMConfig):
            batch = batches.to_device(model, batch, f"{NAME}: calibration batch {index}")
        elif isinstance(model.config, TextConfig):
            read = {name: batch.get(name) for name in ("tokens", "valid", "loss_mask")}
            batch = batches.to_device(model, read, f"{NAME}: calibration batch {index}")
        sums, count = jax.device_get(_distances(model, params, batch, part, span))
        if not np.isfinite(sums).all():
            raise DataError(f"{NAME}: calibration batch {index}: activations are not finite")
        total, tokens = total + np.float64(sums), tokens + np.float64(count)
    return total / max(tokens, 1.0)


@functools.partial(jax.jit, static_argnames=("model", "part", "span"))
def _distances(model, params, batch, part, span):
    config = model.config
    if not isinstance(config, GLMConfig):
        read = next(batch[name] for name in _inputs_of(model, part) if name in batch)
        valid = batch.get("valid") if isinstance(config, TextConfig) else None
        told = {} if valid is None else {"valid": valid}
        return _sums(model.apply({"params": params}, read, **told)[1]["hidden"], span, valid)
    if part == "decoder":
        inputs = batches.inputs_of(model, batch)
        hidden = model.apply({"params": params}, batch["tokens"], **inputs)[1]["hidden"]
        return _sums(hidden, span, batch.get("valid"))
    items = batch[_READS[part]]
    if isinstance(items, list):
        groups = image_groups(items, config.vision)[0]
    else:
        groups = [items.reshape(-1, *items.shape[-(3 if part == "vision" else 2) :])]
    parts = [model.apply({"params": params}, group, method=_encoders[part]) for group in groups]
    sums, counts = zip(*(_sums(hidden, span, None) for hidden in parts), strict=True)
    return sum(sums), sum(counts)


def _sums(hidden, span, valid):
    """Sums of distances over tokens that are not padding, and the number of these."""
    valid = jnp.ones(hidden[0].shape[:2]) if valid is None else valid.astype(jnp.float32)

    def distance(x, y):
        norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
        return jnp.sum(valid * (1 - jnp.sum(x * y, axis=-1) / jnp.maximum(norms, 1e-12)))

    pairs = zip(hidden, hidden[span:], strict=False)
    return jnp.stack([distance(x, y) for x, y in pairs]), jnp.sum(valid)


_encoders = {
    "vision": lambda module, items: module.vision(items)[1]["hidden"],
    "speech": lambda module, items: module.speech(items)[1]["hidden"],
}


def _least_influence(model, params, calibration, part, count, context) -> list[int]:
    scores = influence(model, params, calibration, part)
    context.advance("score", 1, 1)
    return sorted(np.argsort(scores, kind="stable")[:count].tolist())


def _least_block(model, params, calibration, part, count, context) -> list[int]:
    scores = influence(model, params, calibration, part, span=count)
    context.advance("score", 1, 1)
    first = int(np.argmin(scores))
    return list(range(first, first + count))


def _least_loss(model, params, calibration, part, count, context) -> list[int]:
    if not isinstance(model.config, GLMConfig):
        raise RecipeError(
            f"{NAME}: score='loss' is a GLM's loss on the next token, which "
            f"{type(model).__name__} does not have; score by influence"
        )
    total = _config_of(model, part).num_layers
    gone: list[int] = []
    steps = sum(total - done for done in range(count))
    done = 0
    for _ in range(count):
        losses = {}
        for candidate in (index for index in range(total) if index not in gone):
            keep = [index for index in range(total) if index not in (*gone, candidate)]
            smaller, shrunk = shrink_depth(model, params, keep, part)
            losses[candidate] = _loss(smaller, shrunk, calibration)
            done += 1
            context.advance("score", done, steps)
        gone.append(min(losses, key=lambda index: (losses[index], index)))
    return sorted(gone)


def _loss(model: nn.Module, params: Params, calibration: Sequence[batches.Batch]) -> float:
    losses = [
        float(_batch_loss(model, params, batches.to_device(model, batch, f"{NAME}: batch {index}")))
        for index, batch in enumerate(calibration)
    ]
    if not np.isfinite(losses).all():
        raise DataError(f"{NAME}: the loss of a calibration batch is not finite")
    return float(np.mean(losses))


# Models of as many layers of one width are equal, so that candidates share a program.
_batch_loss = jax.jit(batches.mean_loss, static_argnums=0)


def _config_of(model: nn.Module, part: str) -> Any:
    config = getattr(model, "config", None)
    if isinstance(config, VisionConfig | SpeechConfig | TextConfig):
        return config
    part_config = getattr(config, part, None) if isinstance(config, GLMConfig) else None
    if part_config is None:
        raise RecipeError(f"{NAME}: {type(model).__name__} has no {part} whose layers could go")
    return part_config


def _inputs_of(model: nn.Module, part: str) -> tuple[str, ...]:
    """Inputs of a batch of which the part needs one."""
    kinds = {VisionConfig: "images", SpeechConfig: "audio", TextConfig: "tokens"}
    alone = kinds.get(type(model.config))
    return (alone,) if alone else (_READS.get(part, "tokens"),)


def _readable(calibration: list[batches.Batch], part: str, model: nn.Module) -> list[batches.Batch]:
    needed = _inputs_of(model, part)
    if not calibration:
        raise DataError(f"{NAME}: a score needs calibration= batches, and there are none")
    readable = [
        batch for batch in calibration if any(batch.get(name) is not None for name in needed)
    ]
    if not readable:
        raise DataError(f"{NAME}: the {part} reads {needed[0]}, which no calibration batch holds")
    return readable
