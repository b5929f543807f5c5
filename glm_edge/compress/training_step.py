"""One step of training: the loss against a teacher, its gradient, and the optimizer."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import batches, transfer
from glm_edge.compress.calibration import Called
from glm_edge.errors import RecipeError
from glm_edge.params.tree import Params, path_string


class Objective(NamedTuple):
    """What one training step minimises and how: static when it is compiled."""

    temperature: float
    alpha: float
    weight_decay: float
    clip_norm: float
    hidden: float = 0.0
    attention: float = 0.0
    layers: tuple[int, ...] | None = None
    beta: float = 0.0

    def optimizer(self) -> optax.GradientTransformation:
        """Clipping, then AdamW at a learning rate of one."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(1.0, b2=0.98, weight_decay=self.weight_decay),
        )


class Losses(NamedTuple):
    """Of one step; `soft` carries its factor `T^2`, the last two not yet their weights."""

    loss: Array
    soft: Array
    hard: Array
    hidden: Array
    attention: Array


class Sums(NamedTuple):
    """Over the batches of one step, each times its weight, and the sum of these weights."""

    gradient: Params
    losses: Losses
    weight: Array


@functools.partial(
    jax.jit,
    static_argnames=("student", "teacher", "objective"),
    donate_argnames=("trainable", "state"),
)
def train_step(
    student: nn.Module,
    teacher: nn.Module,
    objective: Objective,
    trainable: Params,
    state: optax.OptState,
    rate: Array,
    frozen: Params,
    teacher_params: Params,
    batch: batches.Batch,
    pace: Params | None = None,
    vocabulary: Array | None = None,
) -> tuple[Params, optax.OptState, Losses, Array]:
    """One step of the optimizer; compiled once for each shape of batch.

    Returns:
      `(trainable, state, losses, norm)`, the last of the gradient; where the loss or the norm is
      not finite, the first two are the arguments.

    Raises:
      RecipeError: student and teacher predict different vocabularies.
    """
    found = _gradient(
        student, teacher, objective, trainable, frozen, teacher_params, batch, vocabulary
    )
    return _descend(objective, trainable, state, rate, found.gradient, found.losses, pace)


@functools.partial(
    jax.jit, static_argnames=("student", "teacher", "objective"), donate_argnames=("sums",)
)
def add_gradient(
    student: nn.Module,
    teacher: nn.Module,
    objective: Objective,
    sums: Sums | None,
    trainable: Params,
    frozen: Params,
    teacher_params: Params,
    batch: batches.Batch,
    vocabulary: Array | None,
) -> Sums:
    """Adds what a batch gives, times its weight, to `sums`; None is nothing yet.

    Raises:
      RecipeError: student and teacher predict different vocabularies.
    """
    found = _gradient(
        student, teacher, objective, trainable, frozen, teacher_params, batch, vocabulary
    )
    weighed = jax.tree.map(lambda part: part * found.weight, found[:2])
    added = Sums(*weighed, found.weight)
    return added if sums is None else jax.tree.map(jnp.add, sums, added)


@functools.partial(jax.jit, static_argnames=("objective",), donate_argnames=("trainable", "state"))
def apply_gradient(
    objective: Objective,
    trainable: Params,
    state: optax.OptState,
    rate: Array,
    sums: Sums,
    pace: Params | None = None,
) -> tuple[Params, optax.OptState, Losses, Array]:
    """As `train_step`, with the weighted mean of what several batches gave."""
    gradient, losses = jax.tree.map(lambda part: part / sums.weight, sums[:2])
    return _descend(objective, trainable, state, rate, gradient, losses, pace)


def _gradient(
    student: nn.Module | Called,
    teacher: nn.Module | Called,
    objective: Objective,
    trainable: Params,
    frozen: Params,
    teacher_params: Params,
    batch: batches.Batch,
    vocabulary: Array | None,
) -> Sums:
    """Gradient and losses of a batch, and the weight that they are a mean over."""
    teacher_params = with_shared(teacher_params, frozen)
    asked = (objective.hidden > 0.0, objective.attention > 0.0)
    read = batch
    if vocabulary is not None and not isinstance(student, Called):
        read = {**batch, "tokens": vocabulary[batch["tokens"]]}
    targets, aims = jax.lax.stop_gradient(transfer.observe(teacher, teacher_params, read, *asked))
    if vocabulary is not None:
        targets = targets[..., vocabulary]
    called = isinstance(student, Called)
    weights = jnp.ones(targets.shape[:-1]) if called else batches.loss_weights(student, batch)

    def loss(trainable: Params) -> tuple[Array, Losses]:
        own, projection = transfer.without_projection(trainable)
        params = boxes.combine(own, frozen)
        logits, inside = transfer.observe(student, params, batch, *asked)
        if called:
            total, (soft, hard) = called_loss(student, params, batch, logits, targets, objective)
        else:
            total, (soft, hard) = distillation_loss(
                logits, targets, batch["tokens"], weights, objective
            )
        hidden = attention = jnp.zeros(())
        if asked[0]:
            hidden = transfer.hidden_loss(
                inside.hidden, aims.hidden, objective.layers, weights, projection
            )
            total += objective.hidden * hidden
        if asked[1]:
            attention = transfer.attention_loss(
                inside.attention, aims.attention, objective.layers, weights
            )
            total += objective.attention * attention
        return total, Losses(total, soft, hard, hidden, attention)

    (_, losses), gradient = jax.value_and_grad(loss, has_aux=True)(trainable)
    return Sums(gradient, losses, jnp.maximum(jnp.sum(weights), batches.NO_WEIGHT))


def _descend(
    objective: Objective,
    trainable: Params,
    state: optax.OptState,
    rate: Array,
    gradient: Params,
    losses: Losses,
    pace: Params | None,
) -> tuple[Params, optax.OptState, Losses, Array]:
    norm = optax.tree.norm(gradient)
    updates, after = objective.optimizer().update(gradient, state, trainable)
    updates = jax.tree.map(lambda update: rate * update, updates)
    if pace is not None:
        updates = jax.tree.map(jnp.multiply, updates, pace)
    moved = optax.apply_updates(trainable, updates)
    good = jnp.isfinite(losses.loss) & jnp.isfinite(norm)
    trainable, state = jax.tree.map(
        lambda new, old: jnp.where(good, new, old), (moved, after), (trainable, state)
    )
    return trainable, state, losses, norm


def distillation_loss(
    logits: Array, targets: Array, tokens: Array, weights: Array, objective: Objective
) -> tuple[Array, tuple[Array, Array]]:
    """Weighted mean of soft and hard losses over predictions.

    Args:
      logits: [B, T, V] of the student.
      targets: [B, T, V] of the teacher.
      tokens: [B, T].
      weights: [B, T - 1] of each prediction.
      objective: temperature, alpha and beta.

    Returns:
      `(loss, (soft, hard))`, where `soft` carries its factor `T^2`.

    Raises:
      RecipeError: student and teacher predict different vocabularies, or classes.
    """
    batches.check_predictions("distill: the student", logits, tokens)
    batches.check_predictions("distill: the teacher", targets, tokens)
    if logits.shape != targets.shape:
        raise RecipeError(
            f"distill: the student predicts {logits.shape[-1]} tokens, its teacher "
            f"{targets.shape[-1]}; give the teacher's id of each student token as vocabulary="
        )
    temperature = objective.temperature
    teacher = jax.nn.log_softmax(targets[:, :-1] / temperature)
    student = jax.nn.log_softmax(logits[:, :-1] / temperature)
    distance = divergence(teacher, student, objective.beta)
    total = jnp.maximum(jnp.sum(weights), batches.NO_WEIGHT)
    soft = temperature**2 * jnp.sum(distance * weights) / total
    hard = jnp.sum(batches.cross_entropy(logits, tokens) * weights) / total
    return objective.alpha * soft + (1.0 - objective.alpha) * hard, (soft, hard)


def called_loss(
    student: Called,
    params: Params,
    batch: batches.Batch,
    logits: Array,
    targets: Array,
    objective: Objective,
) -> tuple[Array, tuple[Array, Array]]:
    """As `distillation_loss`, of a model with its own functions; every prediction counts alike.

    Args:
      student: with `loss` where labels count.
      params: of the student.
      batch: see `glm_edge.compress.calibration.to_device`.
      logits: [..., N] of the student.
      targets: [..., N] of the teacher.
      objective: temperature, alpha and beta.

    Raises:
      RecipeError: student and teacher predict different classes, or labels count and there is no
        `loss`.
    """
    if logits.shape != targets.shape:
        raise RecipeError(
            f"distill: apply gives logits {list(logits.shape)} of the student and "
            f"{list(targets.shape)} of its teacher; they must be alike"
        )
    if student.loss is None and objective.alpha < 1.0:
        raise RecipeError(
            f"distill: alpha={objective.alpha:g} weighs labels and calibration has no loss=; pass "
            "Calibration(batches, apply=..., loss=...), or alpha=1.0 to learn from the teacher only"
        )
    temperature = objective.temperature
    teacher, own = (jax.nn.log_softmax(x / temperature) for x in (targets, logits))
    soft = temperature**2 * jnp.mean(divergence(teacher, own, objective.beta))
    hard = jnp.zeros(())
    if student.loss is not None:
        hard = batches.mean_loss(student, params, batch)
    if objective.alpha == 1.0:
        return soft, (soft, hard)
    return objective.alpha * soft + (1.0 - objective.alpha) * hard, (soft, hard)


def divergence(teacher: Array, student: Array, beta: float) -> Array:
    """Generalized Jensen-Shannon divergence of predictions.

    Args:
      teacher: [..., V] logarithms of probabilities P.
      student: [..., V], of Q.
      beta: 0 gives `KL(P || Q)` and 1 gives `KL(Q || P)`; between them, with
        `M = beta * P + (1 - beta) * Q`, it is `beta * KL(P || M) + (1 - beta) * KL(Q || M)`.

    Returns:
      [...], in nats.

    References:
      On-Policy Distillation of Language Models, https://arxiv.org/abs/2306.13649.
    """

    def kl(one: Array, other: Array) -> Array:
        return jnp.sum(jnp.exp(one) * (one - other), axis=-1)

    if beta == 0.0:
        return kl(teacher, student)
    if beta == 1.0:
        return kl(student, teacher)
    middle = jnp.logaddexp(teacher + jnp.log(beta), student + jnp.log1p(-beta))
    return beta * kl(teacher, middle) + (1.0 - beta) * kl(student, middle)


def without_shared(teacher_params: Params, frozen: Params) -> Params:
    """The teacher's parameters with None for the arrays that the student holds frozen too.

    Both then read one array, and the compiler runs an encoder that they share once.
    """
    own = dict(boxes.path_items(frozen))
    return boxes.map_with_path(
        lambda path, leaf: None if own.get(path) is leaf else leaf, teacher_params
    )


def with_shared(teacher_params: Params, frozen: Params) -> Params:
    """The inverse of `without_shared`."""
    own = dict(boxes.path_items(frozen))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: own[path_string(path)] if leaf is None else leaf,
        teacher_params,
        is_leaf=lambda node: node is None or boxes.is_box(node),
    )
