"""Divergence of a changed model from the uncompressed one, on held-out batches by kind."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress.batches import Batch
from glm_edge.compress.calibration import Calibration, Called, with_batches
from glm_edge.compress.domains import every_second
from glm_edge.errors import DataError
from glm_edge.params import Quantized
from glm_edge.params.tree import Params, nested

GROUPS = (
    r"^decoder/layers/\d+/(?:attention|mlp)",
    r"^(?:vision|speech)/[^/]+",
    r"^[^/]+",
)


def kind_of(batch: Any, calibration: Any = None) -> str:
    """Name the modality of a batch: `text`, `images`, `audio` or `images+audio`.

    Args:
      batch: a batch of `calibration`.
      calibration: a `Calibration` with functions has only one kind, `batches`.

    Returns:
      The kind.
    """
    if isinstance(calibration, Calibration) and (calibration.apply or calibration.loss):
        return "batches"
    names = batches.keys_of(batch)
    return "+".join(name for name in ("images", "audio") if name in names) or "text"


def split(calibration: Any, reads: bool) -> tuple[Any, dict[str, list[Any]]]:
    """Split batches between the transform and the measurement, by kind and domain.

    Args:
      calibration: all batches, or a `Calibration`.
      reads: True if the transform needs calibration; otherwise all batches are held out.

    Returns:
      `(calibration of the transform, held-out batches by kind)`.

    Raises:
      DataError: a kind has only one batch, and the transform needs calibration.
    """
    kinds: dict[str, list[Batch]] = {}
    for batch in calibration:
        kinds.setdefault(kind_of(batch, calibration), []).append(batch)
    if not reads:
        return None, kinds
    single_kinds = [kind for kind, kind_batches in kinds.items() if len(kind_batches) < 2]
    if single_kinds:
        raise DataError(
            f"plan: calibration has one batch of {single_kinds[0]}; pass two or more, since every "
            "second batch is held out for measurement"
        )
    halves = {kind: every_second(kind_batches) for kind, kind_batches in kinds.items()}
    calibrating = [batch for half, _ in halves.values() for batch in half]
    return with_batches(calibration, calibrating), {
        kind: half for kind, (_, half) in halves.items()
    }


class Divergence:
    """Mean divergence of the logits of changed parameters from the original ones.

    Attributes:
      kinds: kinds of batches, the keys of the results.
    """

    def __init__(
        self, model: nn.Module | Called, params: Params, held_out: Mapping[str, Sequence[Batch]]
    ):
        """Run the uncompressed model on every batch, and store its logits."""
        self.kinds = tuple(held_out)
        self._model, self._cases = model, []
        dense = _dense(dict(boxes.path_items(params)))
        for kind, kind_batches in held_out.items():
            for batch in kind_batches:
                batch = batches.to_device(model, batch, "plan")
                reference = _logits(model, dense, batch)
                weights = (
                    jnp.ones(reference.shape[:-1])
                    if isinstance(model, Called)
                    else batches.loss_weights(model, batch)
                )
                self._cases.append((kind, batch, weights, reference))

    def __call__(
        self, leaves: Mapping[str, Any], model: nn.Module | Called | None = None
    ) -> dict[str, float]:
        """Compute the divergence in nats per token by kind of batch."""
        dense = _dense(leaves)
        sums = {kind: [0.0, 0.0] for kind in self.kinds}
        for kind, batch, weights, reference in self._cases:
            logits = _logits(model or self._model, dense, batch)
            sums_of_batch = _divergence(logits, weights, reference)
            for index in (0, 1):
                sums[kind][index] += float(sums_of_batch[index])
        return {kind: lost / max(count, 1.0) for kind, (lost, count) in sums.items()}


def _dense(leaves: Mapping[str, Any]) -> Params:
    """Dequantize a tree to float32, so that one compiled program serves all formats."""

    def widen(leaf: Any) -> Array:
        leaf = leaf.replace(dtype="float32") if isinstance(leaf, Quantized) else leaf
        return boxes.dense(leaf).astype(jnp.float32)

    return nested({path: widen(leaf) for path, leaf in leaves.items()})


@functools.partial(jax.jit, static_argnames="model")
def _logits(model: nn.Module, params: Params, batch: Batch) -> Array:
    logits = batches.apply_batch(model, params, batch)
    return logits if isinstance(model, Called) else logits[:, :-1]


@jax.jit
def _divergence(logits: Array, weights: Array, reference: Array) -> tuple[Array, Array]:
    expected = jax.nn.log_softmax(reference)
    predicted = jax.nn.log_softmax(logits)
    lost = jnp.sum(jnp.exp(expected) * (expected - predicted), axis=-1)
    return jnp.sum(lost * weights), jnp.sum(weights)
