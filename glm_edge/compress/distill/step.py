"""One step of the optimizer: the gradient of one or several batches, then AdamW."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress.calibration import Called
from glm_edge.compress.distill import intermediates as transfer
from glm_edge.compress.distill.classifier import Classifier
from glm_edge.compress.distill.losses import (
    Losses,
    Objective,
    called_loss,
    classification_loss,
    distillation_loss,
)
from glm_edge.params.tree import Params, path_string

Reader = nn.Module | Called | Classifier


class Sums(NamedTuple):
    """Sums over the batches of one step, each times its weight, and the sum of these weights."""

    gradient: Params
    losses: Losses
    weight: Array


class Extra(NamedTuple):
    """Inputs of a classifier besides parameters and batch.

    Attributes:
      collections: the student's collections, such as `batch_stats`.
      teacher_collections: the teacher's.
      key: jax key of the batch, for dropout; None for other models.
    """

    collections: Params
    teacher_collections: Params
    key: Array | None


NOTHING = Extra({}, {}, None)


def optimizer_of(objective: Objective) -> optax.GradientTransformation:
    """Build gradient clipping, then AdamW at a learning rate of one."""
    return optax.chain(
        optax.clip_by_global_norm(objective.clip_norm),
        optax.adamw(1.0, b2=0.98, weight_decay=objective.weight_decay),
    )


@functools.partial(
    jax.jit,
    static_argnames=("student", "teacher", "objective"),
    donate_argnames=("trainable", "state"),
)
def train_step(
    student: Reader,
    teacher: Reader | None,
    objective: Objective,
    trainable: Params,
    state: optax.OptState,
    rate: Array,
    frozen: Params,
    teacher_params: Params,
    batch: batches.Batch,
    lr_scale: Params | None = None,
    vocabulary: Array | None = None,
    extra: Extra = NOTHING,
) -> tuple[Params, optax.OptState, Losses, Array, Params]:
    """Run one step of the optimizer; compile once per shape of batch.

    Returns:
      `(trainable, state, losses, norm, collections)` with the norm of the gradient and the
      student's collections after the batch. Where the loss or the norm is not finite, the first
      two are the arguments.

    Raises:
      RecipeError: student and teacher predict different vocabularies.
    """
    sums, collections = _gradient(
        student, teacher, objective, trainable, frozen, teacher_params, batch, vocabulary, extra
    )
    step = _descend(objective, trainable, state, rate, sums.gradient, sums.losses, lr_scale)
    return *step, collections


@functools.partial(
    jax.jit, static_argnames=("student", "teacher", "objective"), donate_argnames=("sums",)
)
def add_gradient(
    student: Reader,
    teacher: Reader | None,
    objective: Objective,
    sums: Sums | None,
    trainable: Params,
    frozen: Params,
    teacher_params: Params,
    batch: batches.Batch,
    vocabulary: Array | None,
    extra: Extra = NOTHING,
) -> tuple[Sums, Params]:
    """Add the gradient and losses of a batch, times its weight, to `sums`; None starts at zero.

    Returns:
      `(sums, collections)` with the student's collections after the batch.

    Raises:
      RecipeError: student and teacher predict different vocabularies.
    """
    batch_sums, collections = _gradient(
        student, teacher, objective, trainable, frozen, teacher_params, batch, vocabulary, extra
    )
    gradient, losses = jax.tree.map(lambda part: part * batch_sums.weight, batch_sums[:2])
    added = Sums(gradient, losses, batch_sums.weight)
    return added if sums is None else jax.tree.map(jnp.add, sums, added), collections


@functools.partial(jax.jit, static_argnames=("objective",), donate_argnames=("trainable", "state"))
def apply_gradient(
    objective: Objective,
    trainable: Params,
    state: optax.OptState,
    rate: Array,
    sums: Sums,
    lr_scale: Params | None = None,
) -> tuple[Params, optax.OptState, Losses, Array]:
    """Run one step of the optimizer on the weighted mean over several batches.

    Returns:
      `(trainable, state, losses, norm)` as `train_step`.
    """
    gradient, losses = jax.tree.map(lambda part: part / sums.weight, sums[:2])
    return _descend(objective, trainable, state, rate, gradient, losses, lr_scale)


def _gradient(
    student: Reader,
    teacher: Reader | None,
    objective: Objective,
    trainable: Params,
    frozen: Params,
    teacher_params: Params,
    batch: batches.Batch,
    vocabulary: Array | None,
    extra: Extra,
) -> tuple[Sums, Params]:
    """Compute gradient and losses of a batch, and the student's collections after it."""
    wanted = (objective.hidden > 0.0, objective.attention > 0.0)
    targets, teacher_outputs = _teach(
        teacher, objective, with_shared(teacher_params, frozen), batch, vocabulary, extra, student
    )

    def loss(trainable: Params) -> tuple[Array, tuple[Losses, Array, Params]]:
        student_params, projection = transfer.without_projection(trainable)
        params = boxes.combine(student_params, frozen)
        collections: Params = {}
        if isinstance(student, Classifier):
            logits, collections = student.training_logits(
                params, extra.collections, batch, extra.key
            )
            outputs, weights = transfer.Intermediates(), batch["weights"]
            total, (soft, hard) = classification_loss(
                logits, targets, batch["labels"], weights, objective
            )
        else:
            logits, outputs = transfer.run_with_intermediates(student, params, batch, *wanted)
            if isinstance(student, Called):
                weights = jnp.ones(logits.shape[:-1])
                total, (soft, hard) = called_loss(
                    student, params, batch, logits, targets, objective
                )
            else:
                weights = batches.loss_weights(student, batch)
                total, (soft, hard) = distillation_loss(
                    logits, targets, batch["tokens"], weights, objective
                )
        hidden = attention = jnp.zeros(())
        if wanted[0]:
            hidden = transfer.hidden_loss(
                outputs.hidden, teacher_outputs.hidden, objective.layers, weights, projection
            )
            total += objective.hidden * hidden
        if wanted[1]:
            attention = transfer.attention_loss(
                outputs.attention, teacher_outputs.attention, objective.layers, weights
            )
            total += objective.attention * attention
        return total, (Losses(total, soft, hard, hidden, attention), weights, collections)

    (_, (losses, weights, collections)), gradient = jax.value_and_grad(loss, has_aux=True)(
        trainable
    )
    weight = jnp.maximum(jnp.sum(weights), batches.NO_WEIGHT)
    return Sums(gradient, losses, weight), collections


def _teach(
    teacher: Reader | None,
    objective: Objective,
    params: Params,
    batch: batches.Batch,
    vocabulary: Array | None,
    extra: Extra,
    student: Reader,
) -> tuple[Array | None, transfer.Intermediates]:
    """Run the teacher on the student's batch; None without a teacher."""
    if teacher is None:
        return None, transfer.Intermediates()
    if isinstance(teacher, Classifier):
        logits = teacher.logits(params, extra.teacher_collections, batch)
        return jax.lax.stop_gradient(logits), transfer.Intermediates()
    if vocabulary is not None and not isinstance(student, Called):
        batch = {**batch, "tokens": vocabulary[batch["tokens"]]}
    targets, outputs = jax.lax.stop_gradient(
        transfer.run_with_intermediates(
            teacher, params, batch, objective.hidden > 0.0, objective.attention > 0.0
        )
    )
    return targets if vocabulary is None else targets[..., vocabulary], outputs


def _descend(
    objective: Objective,
    trainable: Params,
    state: optax.OptState,
    rate: Array,
    gradient: Params,
    losses: Losses,
    lr_scale: Params | None,
) -> tuple[Params, optax.OptState, Losses, Array]:
    norm = optax.tree.norm(gradient)
    updates, after = optimizer_of(objective).update(gradient, state, trainable)
    updates = jax.tree.map(lambda update: rate * update, updates)
    if lr_scale is not None:
        updates = jax.tree.map(jnp.multiply, updates, lr_scale)
    moved = optax.apply_updates(trainable, updates)
    # Keeps the last good parameters, which the error then holds.
    good = jnp.isfinite(losses.loss) & jnp.isfinite(norm)
    trainable, state = jax.tree.map(
        lambda new, old: jnp.where(good, new, old), (moved, after), (trainable, state)
    )
    return trainable, state, losses, norm


def without_shared(teacher_params: Params, frozen: Params) -> Params:
    """Replace by None the teacher's arrays that are also frozen arrays of the student.

    Both models then read one array, and the compiler runs a shared encoder once.
    """
    shared = dict(boxes.path_items(frozen))
    return boxes.map_with_path(
        lambda path, leaf: None if shared.get(path) is leaf else leaf, teacher_params
    )


def with_shared(teacher_params: Params, frozen: Params) -> Params:
    """Invert `without_shared`."""
    shared = dict(boxes.path_items(frozen))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: shared[path_string(path)] if leaf is None else leaf,
        teacher_params,
        is_leaf=lambda node: node is None or boxes.is_box(node),
    )
