"""Intermediate losses between student and teacher: layer outputs and attention weights."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.compress import batches
from glm_edge.compress.calibration import Called
from glm_edge.compress.report import Point
from glm_edge.errors import RecipeError
from glm_edge.params.tree import Params, path_string

# Trains beside the student's parameters and is dropped at the end. No parameter has this name.
PROJECTION_KEY = "projection to the teacher"
_TINY = 1e-30


@dataclass(frozen=True)
class TransferPoint(Point):
    """A training step with its losses of layer outputs and attention, before their weights."""

    hidden: float = 0.0
    attention: float = 0.0


class Intermediates(NamedTuple):
    """The outputs of each layer of a model.

    Attributes:
      hidden: outputs [B, T, D], first layer first; empty unless asked for.
      attention: weights [B, N, T, S] of N heads, first layer first; empty unless asked for.
    """

    hidden: tuple[Array, ...] = ()
    attention: tuple[Array, ...] = ()


def run_with_intermediates(
    model: nn.Module | Called, params: Params, batch: batches.Batch, hidden: bool, attention: bool
) -> tuple[Array, Intermediates]:
    """Run a model on a batch and return logits with layer outputs and attention weights.

    Args:
      model: returns logits, or `(logits, intermediates)` whose `hidden` are the input of the first
        layer and the output of each. It sows attention weights in the collection `attention`, one
        [B, …, T, S] per layer.
      params: its parameters.
      batch: see `glm_edge.compress.batches`.
      hidden: returns layer outputs.
      attention: returns attention weights.

    Returns:
      `(logits, intermediates)`, float32.

    Raises:
      RecipeError: the model does not return or sow these.
    """
    if not hidden and not attention:
        return batches.apply_batch(model, params, batch), Intermediates()
    if isinstance(model, Called):
        raise RecipeError(
            "distill: intermediates= needs a model that reads tokens; leave it out where "
            "calibration has apply="
        )
    inputs = batches.inputs_of(model, batch)
    output, sown = model.apply(
        {"params": params}, batch["tokens"], **inputs, mutable=["attention"] if attention else []
    )
    logits, sown_outputs = output if isinstance(output, tuple) else (output, {})
    outputs = (
        tuple(sown_outputs.get("hidden", ())[1:])
        if hidden and isinstance(sown_outputs, dict)
        else ()
    )
    weights = _in_order(sown.get("attention", {}))
    kind = type(model).__name__
    if hidden and not outputs:
        raise RecipeError(f"distill: {kind} returns no 'hidden' of its layers; leave out hidden=")
    if attention and not weights:
        raise RecipeError(f"distill: {kind} sows no 'attention'; leave out attention=")
    floats = jax.tree.map(lambda array: array.astype(jnp.float32), Intermediates(outputs, weights))
    return logits.astype(jnp.float32), floats


def _in_order(sown: Params) -> tuple[Array, ...]:
    """List the sown arrays, layer 10 after layer 9, with all heads on one axis."""

    def natural(item: tuple[Any, Array]) -> list[Any]:
        parts = re.split(r"(\d+)", path_string(item[0]))
        return [int(part) if part.isdigit() else part for part in parts]

    arrays = sorted(jax.tree_util.tree_leaves_with_path(sown), key=natural)
    return tuple(array.reshape(array.shape[0], -1, *array.shape[-2:]) for _, array in arrays)


def uniform(student: int, teacher: int) -> tuple[int, ...]:
    """Space the teacher's layers evenly, the last for the student's last.

    Args:
      student: number of layers.
      teacher: number of layers.

    Returns:
      Teacher layer per student layer, from 0.
    """
    return tuple(-(-(index + 1) * teacher // student) - 1 for index in range(student))


def pairs(student: int, teacher: int, layers: Sequence[int] | None) -> list[tuple[int, int]]:
    """Pair each layer of the student with one of the teacher.

    Args:
      student: number of layers.
      teacher: number of layers.
      layers: teacher layer per student layer, from 0; None is `uniform`.

    Raises:
      RecipeError: `layers` has another length, or names a layer that the teacher lacks.
    """
    layers = uniform(student, teacher) if layers is None else layers
    if len(layers) != student or max(layers) >= teacher:
        raise RecipeError(
            f"distill: layers={list(layers)} must name one of the teacher's {teacher} layers (from "
            f"0) for each of the student's {student}"
        )
    return list(enumerate(layers))


def hidden_loss(
    student: Sequence[Array],
    teacher: Sequence[Array],
    layers: Sequence[int] | None,
    weights: Array,
    projection: Array | None,
) -> Array:
    """Compute the squared distance of layer outputs relative to the teacher's squared norm.

    Args:
      student: [B, T, D] of each layer.
      teacher: [B, T, E] of each layer.
      layers: see `pairs`.
      weights: [B, T - 1], weight of the position of each prediction.
      projection: [D, E], or None where widths are equal.

    Returns:
      Mean over layers of the weighted mean over positions.

    References:
      TinyBERT: Distilling BERT for Natural Language Understanding, https://arxiv.org/abs/1909.10351.
    """
    losses = []
    for index, teacher_index in pairs(len(student), len(teacher), layers):
        # The last position predicts nothing.
        ours, theirs = student[index][:, :-1], teacher[teacher_index][:, :-1]
        if projection is not None:
            ours = ours @ projection
        norm = jnp.maximum(jnp.sum(jnp.square(theirs), axis=-1), _TINY)
        losses.append(jnp.sum(jnp.square(ours - theirs), axis=-1) / norm)
    return batches.weighted_mean(jnp.mean(jnp.stack(losses), axis=0), weights)


def attention_loss(
    student: Sequence[Array],
    teacher: Sequence[Array],
    layers: Sequence[int] | None,
    weights: Array,
) -> Array:
    """Compute `KL(teacher || student)` of attention over the keys of a query, in nats.

    Args:
      student: [B, N, T, S] of each layer.
      teacher: [B, M, T, S] of each layer. Where numbers of heads differ, the means over heads are
        compared.
      layers: see `pairs`.
      weights: as in `hidden_loss`.

    Returns:
      Mean over layers and heads of the weighted mean over queries.

    References:
      MiniLM: Deep Self-Attention Distillation, https://arxiv.org/abs/2002.10957.
    """
    losses = []
    for index, teacher_index in pairs(len(student), len(teacher), layers):
        ours, theirs = student[index][:, :, :-1], teacher[teacher_index][:, :, :-1]
        if ours.shape[1] != theirs.shape[1]:
            ours, theirs = (jnp.mean(x, axis=1, keepdims=True) for x in (ours, theirs))
        ratio = jnp.log(theirs + _TINY) - jnp.log(ours + _TINY)
        losses.append(jnp.mean(jnp.sum(theirs * ratio, axis=-1), axis=1))
    return batches.weighted_mean(jnp.mean(jnp.stack(losses), axis=0), weights)


def sizes(
    model: nn.Module | Called, params: Params, batch: batches.Batch, hidden: bool
) -> tuple[int, int]:
    """Return the size of a model's vocabulary, and the width of its layers, 0 without `hidden`."""
    logits, intermediates = jax.eval_shape(
        lambda params, batch: run_with_intermediates(model, params, batch, hidden, False),
        params,
        batch,
    )
    return logits.shape[-1], intermediates.hidden[0].shape[-1] if hidden else 0


def vocabulary(ids: Sequence[int] | None, student: int, teacher: int) -> Array | None:
    """Check the teacher's token per student token.

    Args:
      ids: from the option `vocabulary`, or None for the same vocabulary.
      student: size of the vocabulary.
      teacher: size of the vocabulary.

    Returns:
      int32 [V], or None.

    Raises:
      RecipeError: the number of ids is not the student's, or the teacher lacks one.
    """
    if ids is None:
        return None
    if len(ids) != student or max(ids) >= teacher:
        raise RecipeError(
            f"distill: vocabulary= holds {len(ids)} ids up to {max(ids)}; it must name one of the "
            f"teacher's {teacher} tokens for each of the student's {student}"
        )
    return jnp.asarray(ids, jnp.int32)


def with_projection(trainable: Params, widths: tuple[int, int], rng: Array | None) -> Params:
    """Add a random projection [D, E] where widths D and E differ."""
    if widths[0] == widths[1]:
        return trainable
    key = jax.random.fold_in(jax.random.key(0) if rng is None else rng, widths[1])
    drawn = jax.random.normal(key, widths, jnp.float32) * widths[0] ** -0.5
    return {**trainable, PROJECTION_KEY: drawn}


def without_projection(trainable: Params) -> tuple[Params, Array | None]:
    """Split into `(trainable, projection)`, the inverse of `with_projection`."""
    if PROJECTION_KEY not in trainable:
        return trainable, None
    others = {name: tree for name, tree in trainable.items() if name != PROJECTION_KEY}
    return others, trainable[PROJECTION_KEY]
