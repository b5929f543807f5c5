"""The distillation loss, and the divergence of predictions inside it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.compress import batches
from glm_edge.compress.calibration import Called
from glm_edge.errors import RecipeError
from glm_edge.params.tree import Params


class Objective(NamedTuple):
    """The objective of one training step; static when the step is compiled."""

    temperature: float
    alpha: float
    weight_decay: float
    clip_norm: float
    hidden: float = 0.0
    attention: float = 0.0
    layers: tuple[int, ...] | None = None
    beta: float = 0.0


class Losses(NamedTuple):
    """Losses of one step.

    `soft` includes its factor `T^2`; `hidden` and `attention` come before their weights.
    """

    loss: Array
    soft: Array
    hard: Array
    hidden: Array
    attention: Array


def distillation_loss(
    logits: Array, targets: Array | None, tokens: Array, weights: Array, objective: Objective
) -> tuple[Array, tuple[Array, Array]]:
    """Compute the weighted mean of soft and hard losses over predictions.

    Args:
      logits: [B, T, V] of the student.
      targets: [B, T, V] of the teacher; None for labels alone, whose soft loss is 0.
      tokens: [B, T].
      weights: [B, T - 1] of each prediction.
      objective: temperature, alpha and beta.

    Returns:
      `(loss, (soft, hard))`, where `soft` includes its factor `T^2`.

    Raises:
      RecipeError: student and teacher predict different vocabularies, or classes.
    """
    batches.check_predictions("distill: the student", logits, tokens)
    total = jnp.maximum(jnp.sum(weights), batches.NO_WEIGHT)
    hard = jnp.sum(batches.cross_entropy(logits, tokens) * weights) / total
    if targets is None:
        return hard, (jnp.zeros(()), hard)
    batches.check_predictions("distill: the teacher", targets, tokens)
    if logits.shape != targets.shape:
        raise RecipeError(
            f"distill: the student predicts {logits.shape[-1]} tokens, its teacher "
            f"{targets.shape[-1]}; give the teacher's id of each student token as vocabulary="
        )
    # The prediction at a position is of the next token, so the last position has no label.
    distance = _softened(targets[:, :-1], logits[:, :-1], objective)
    soft = jnp.sum(distance * weights) / total
    return objective.alpha * soft + (1.0 - objective.alpha) * hard, (soft, hard)


def classification_loss(
    logits: Array, targets: Array | None, labels: Array, weights: Array, objective: Objective
) -> tuple[Array, tuple[Array, Array]]:
    """Compute the weighted mean of soft and hard losses over the rows of a classifier.

    A row without a label has no hard loss and still counts in the mean, so that the gradients of
    several batches add up to that of one batch with all their rows.

    Args:
      logits: [B, N] of the student.
      targets: [B, N] of the teacher; None for labels alone, whose soft loss is 0.
      labels: int [B], negative for a row without a label.
      weights: [B] of each row.
      objective: temperature, alpha and beta.

    Returns:
      As `distillation_loss`.

    Raises:
      RecipeError: student and teacher predict different classes.
    """
    total = jnp.maximum(jnp.sum(weights), batches.NO_WEIGHT)
    scores = jax.nn.log_softmax(logits)
    entropy = -jnp.take_along_axis(scores, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    hard = jnp.sum(jnp.where(labels >= 0, entropy, 0.0) * weights) / total
    if targets is None:
        return hard, (jnp.zeros(()), hard)
    if logits.shape != targets.shape:
        raise RecipeError(
            f"distill: the student predicts {logits.shape[-1]} classes, its teacher "
            f"{targets.shape[-1]}; they must be alike"
        )
    soft = jnp.sum(_softened(targets, logits, objective) * weights) / total
    return objective.alpha * soft + (1.0 - objective.alpha) * hard, (soft, hard)


def called_loss(
    student: Called,
    params: Params,
    batch: batches.Batch,
    logits: Array,
    targets: Array | None,
    objective: Objective,
) -> tuple[Array, tuple[Array, Array]]:
    """Compute the loss of a model with its own functions; every prediction has equal weight.

    Args:
      student: with `loss` where labels have a weight.
      params: of the student.
      batch: see `glm_edge.compress.calibration.to_device`.
      logits: [..., N] of the student.
      targets: [..., N] of the teacher; None for labels alone, whose soft loss is 0.
      objective: temperature, alpha and beta.

    Returns:
      As `distillation_loss`.

    Raises:
      RecipeError: student and teacher predict different classes, or labels have a weight and there
        is no `loss`.
    """
    if student.loss is None and objective.alpha < 1.0:
        raise RecipeError(
            f"distill: alpha={objective.alpha:g} weighs labels and calibration has no loss=; pass "
            "Calibration(batches, apply=..., loss=...), or alpha=1.0 to learn from the teacher only"
        )
    hard = jnp.zeros(())
    if student.loss is not None:
        hard = batches.mean_loss(student, params, batch)
    if targets is None:
        return hard, (jnp.zeros(()), hard)
    if logits.shape != targets.shape:
        raise RecipeError(
            f"distill: apply gives logits {list(logits.shape)} of the student and "
            f"{list(targets.shape)} of its teacher; they must be alike"
        )
    soft = jnp.mean(_softened(targets, logits, objective))
    if objective.alpha == 1.0:
        return soft, (soft, hard)
    return objective.alpha * soft + (1.0 - objective.alpha) * hard, (soft, hard)


def _softened(targets: Array, logits: Array, objective: Objective) -> Array:
    """Compute the divergence [...] of predictions at the temperature T, times `T^2`."""
    temperature = objective.temperature
    teacher, student = (jax.nn.log_softmax(x / temperature) for x in (targets, logits))
    # T^2 keeps the scale of the gradient, which a temperature divides by T^2.
    return temperature**2 * divergence(teacher, student, objective.beta)


def divergence(teacher: Array, student: Array, beta: float) -> Array:
    """Compute the generalized Jensen-Shannon divergence of predictions.

    Args:
      teacher: [..., V] logarithms of probabilities P.
      student: [..., V], of Q.
      beta: 0 gives `KL(P || Q)` and 1 gives `KL(Q || P)`. Between them, with
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
