"""Early exit: a token stops at the first exit whose top-1 probability reaches a threshold.

Letters of shapes: `B` rows, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.errors import DataError, RecipeError
from glm_edge.kernels import matmul
from glm_edge.models.glm import AFTER_KEYS, ALL_PARTS, KEYS_ONLY
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params

THRESHOLD = 0.95
_INPUTS = ("images", "audio", "positions", "mask")
_READ = ("tokens", "loss_mask", *_INPUTS)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EarlyExit:
    """Options of early exit, made by `early_exit`.

    Attributes:
      threshold: scalar; a token exits when its top-1 probability reaches it.
      maps: per exit, `weight` [D, D] and `bias` [D], which predict the last layer's output from the
        activations at the exit; empty takes these activations themselves.
      after: ascending indices of layers after which the head is applied.
    """

    threshold: Array
    maps: Mapping[str, Any]
    after: tuple[int, ...] = field(metadata={"static": True})


def early_exit(
    model: MultimodalGLM,
    after: Sequence[int],
    threshold: float = THRESHOLD,
    maps: Mapping[str, Any] | None = None,
) -> EarlyExit:
    """Set the exits and the threshold of early exit, for `DecodeOptions`.

    After each of these layers the head scores the next token. Where its top-1 probability reaches
    the threshold, the remaining layers do not run. Their keys and values come from the activations
    at the exit, so that their caches have no gaps. Prompts run all layers.

    Args:
      model: a GLM.
      after: indices of layers after which the head is applied, each at least 1 and below the number
        of layers. Each costs as much as the head.
      threshold: in 0..1; 0 always stops at the first exit, 1 almost never.
      maps: from `fit_exits`; None scores activations at an exit as if they were the last output.

    Returns:
      The exits. A change of the threshold alone does not recompile.

    Raises:
      RecipeError: the threshold is not in 0..1, the model lacks a layer, or maps lack an exit.

    References:
      Confident Adaptive Language Modeling, https://arxiv.org/abs/2207.07061; Jump to Conclusions
      (maps), https://arxiv.org/abs/2303.09435.
    """
    layers, maps = model.config.decoder.num_layers, dict(maps or {})
    if not 0.0 <= threshold <= 1.0:
        raise RecipeError(f"early_exit: threshold must be in 0..1, not {threshold}")
    after = _checked_exits(after, layers)
    lacking = [index for index in after if maps and str(index) not in maps]
    if lacking:
        raise RecipeError(f"early_exit: maps lack exit {lacking[0]}; they hold {sorted(maps)}")
    maps = {str(index): maps[str(index)] for index in after if maps}
    return EarlyExit(jnp.float32(threshold), maps, after)


def _checked_exits(after: Sequence[int], layers: int) -> tuple[int, ...]:
    after = tuple(sorted(set(after)))
    if not after or after[0] < 1 or after[-1] >= layers:
        raise RecipeError(
            f"early_exit: after must name layers in 1..{layers - 1} of the model's {layers}, not "
            f"{list(after)}"
        )
    return after


def fit_exits(
    model: MultimodalGLM,
    params: Params,
    data: Iterable[Mapping[str, Any]],
    after: Sequence[int],
    ridge: float = 1e-3,
) -> dict[str, dict[str, Array]]:
    """Fit maps from activations at exits to the output of the last layer, by least squares.

    Args:
      model: a GLM.
      params: its parameters.
      data: batches of `tokens` [B, T] and optional `images`, `audio`, `positions` and `mask`. With
        `loss_mask` [B, T], only positions where it is not zero count. Padding never counts.
      after: exits, see `early_exit`.
      ridge: fraction of the mean diagonal that is added to the diagonal.

    Returns:
      Maps for `early_exit`.

    Raises:
      RecipeError: the model lacks a layer of `after`.
      DataError: there are no batches, or activations are not finite.

    References:
      Jump to Conclusions: Short-Cutting Transformers With Linear Transformations,
      https://arxiv.org/abs/2303.09435.
    """
    after = _checked_exits(after, model.config.decoder.num_layers)
    sums: dict[int, np.ndarray] = {}
    for batch in data:
        read = {name: batch[name] for name in _READ if batch.get(name) is not None}
        moments = jax.device_get(_moments(model, params, read, after))
        for index, moment in zip(after, moments, strict=True):
            sums[index] = sums.get(index, np.zeros(())) + np.asarray(moment, np.float64)
    if not sums:
        raise DataError("fit_exits: there are no batches to fit on")
    maps = {}
    for index, moment in sums.items():
        if not np.isfinite(moment).all():
            raise DataError("fit_exits: activations are not finite")
        # Rows and columns: activations at the exit, a one, and their difference to the last output.
        inputs = (len(moment) + 1) // 2
        gram, target = moment[:inputs, :inputs], moment[:inputs, inputs:]
        gram = gram + ridge * np.mean(np.diag(gram)[:-1]) * np.eye(inputs)
        solved = np.linalg.solve(gram, target).T
        weight = solved[:, :-1] + np.eye(inputs - 1)
        maps[str(index)] = {"weight": jnp.float32(weight), "bias": jnp.float32(solved[:, -1])}
    return maps


@functools.partial(jax.jit, static_argnums=(0, 3))
def _moments(
    model: MultimodalGLM, params: Params, batch: dict[str, Any], after: tuple[int, ...]
) -> list[Array]:
    """Compute second moments [2 D + 1, 2 D + 1] of `(exit, 1, last - exit)` for each exit."""
    inputs = {name: batch[name] for name in _INPUTS if batch.get(name) is not None}
    hidden = model.apply({"params": params}, batch["tokens"], **inputs)[1]["hidden"]
    rows = [x.reshape(-1, x.shape[-1]) for x in hidden]
    valid = jnp.ones((len(rows[0]), 1))
    if batch.get("loss_mask") is not None:
        valid = (batch["loss_mask"] != 0).reshape(-1, 1).astype(jnp.float32)
    elif model.config.pad_token_id is not None:
        valid = (batch["tokens"] != model.config.pad_token_id).reshape(-1, 1).astype(jnp.float32)
    moments = []
    for index in after:
        joined = jnp.concatenate([rows[index], valid, rows[-1] - rows[index]], axis=-1) * valid
        moments.append(jax.lax.dot(joined.T, joined, precision=jax.lax.Precision.HIGHEST))
    return moments


def run_until_sure(
    model: MultimodalGLM,
    params: Params,
    token: Array,
    positions: Array,
    mask: Array,
    cache: Any,
    exits: EarlyExit,
    stopped: Array,
) -> tuple[Array, Any, Array]:
    """Run one decoding step, with only as many layers as its rows need.

    Rows exit one by one. A layer is skipped when all rows have exited, so that a row's result does
    not depend on the other rows.

    Args:
      model: a GLM.
      params: its parameters.
      token: int [B, 1].
      positions: see the model.
      mask: see the model.
      cache: see the model.
      exits: see `early_exit`.
      stopped: bool [B], rows whose scores are not needed.

    Returns:
      `(logits, cache, layers)`: float32 [B, V]; the cache after this token; and int32 [B], number
      of layers per row, 0 where it had stopped.
    """
    total = model.config.decoder.num_layers

    def call(method: Any, *args: Any) -> Any:
        return model.apply({"params": params}, *args, method=method)

    x = call("embed_inputs", token)[0]
    angle, mask, slot = call(lambda module, x: module.decoder.prepare(x, positions, mask, cache), x)

    def layer(index: int, x: Array, layer_cache: Any, part: str) -> tuple[Array, Any]:
        return call(
            lambda module, x: module.decoder.run_layer(
                index, x, angle, mask, layer_cache, slot, part
            ),
            x,
        )

    def scores(x: Array, fitted: Any = None) -> Array:
        if fitted is not None:
            x = matmul.dense(x, fitted["weight"]) + fitted["bias"]
        score = call(lambda module, x: module.predict(module.decoder.norm(x)), x)
        return score[:, 0].astype(jnp.float32)

    # Branches only read the cache, after it is written, so that none of them copies it.
    done, used, layers = stopped, jnp.where(stopped, 0, total).astype(jnp.int32), []
    logits = jnp.zeros((len(token), model.config.decoder.vocab_size), jnp.float32)
    for index in range(total):
        if index in exits.after:
            asked = functools.partial(scores, x, exits.maps.get(str(index)))
            exit_logits = jax.lax.cond(
                done.all(), jnp.zeros_like, lambda _, asked=asked: asked(), logits
            )
            sure = jnp.max(jax.nn.softmax(exit_logits, axis=-1), axis=-1) >= exits.threshold
            leaves = sure & ~done
            logits = jnp.where(leaves[:, None], exit_logits, logits)
            used = jnp.where(leaves, index, used)
            done = done | leaves
        layer_cache = cache["layers"][index]
        if index < exits.after[0]:
            x, layer_cache = layer(index, x, layer_cache, ALL_PARTS)
        else:
            layer_cache = layer(index, x, layer_cache, KEYS_ONLY)[1]
            run = functools.partial(layer, index, layer_cache=layer_cache, part=AFTER_KEYS)
            x = jax.lax.cond(
                done.all(),
                lambda x: x,
                lambda x, run=run, done=done: jnp.where(done[:, None, None], x, run(x)[0]),
                x,
            )
        layers.append(layer_cache)
    logits = jax.lax.cond(
        done.all(),
        lambda logits: logits,
        lambda logits: jnp.where(done[:, None], logits, scores(x)),
        logits,
    )
    return logits, {"layers": layers, "length": slot + 1}, used
