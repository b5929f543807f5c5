"""The training loop that distillation and quantization-aware training share."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress.report import Point
from glm_edge.compress.transform import Context, check_whole
from glm_edge.errors import DataError, RecipeError
from glm_edge.params.tree import Params, path_string

COMPUTE = ("float32", "bfloat16")
_PROGRESS_EVERY = 5


class Objective(NamedTuple):
    """What one training step minimises and how: static when it is compiled."""

    temperature: float
    alpha: float
    weight_decay: float
    clip_norm: float

    def optimizer(self) -> optax.GradientTransformation:
        """Clipping, then AdamW at a learning rate of one."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(1.0, b2=0.98, weight_decay=self.weight_decay),
        )


class Training(NamedTuple):
    """How a student learns from its teacher; see `glm_edge.compress.distill`."""

    steps: int
    learning_rate: float
    temperature: float
    alpha: float
    warmup: float
    weight_decay: float
    clip_norm: float
    compute: str | None

    @property
    def objective(self) -> Objective:
        """The loss and the optimizer."""
        return Objective(self.temperature, self.alpha, self.weight_decay, self.clip_norm)

    def check(self, name: str, teacher: Any) -> None:
        """Raises RecipeError where an option of the transform `name` has no meaning."""
        check_whole(name, steps=self.steps)
        if self.learning_rate <= 0.0 or self.temperature <= 0.0 or self.clip_norm <= 0.0:
            raise RecipeError(f"{name}: learning_rate, temperature and clip_norm must be positive")
        shares = 0.0 <= self.alpha <= 1.0 and 0.0 <= self.warmup < 1.0
        if not shares or self.weight_decay < 0.0:
            raise RecipeError(
                f"{name}: alpha must be in 0..1, warmup in 0..1 and weight_decay not negative"
            )
        if self.compute is not None and self.compute not in COMPUTE:
            raise RecipeError(
                f"{name}: compute must be one of {', '.join(COMPUTE)}, not {self.compute!r}"
            )
        if teacher is not None and not (isinstance(teacher, tuple) and len(teacher) == 2):
            raise RecipeError(f"{name}: teacher must be (model, params)")


def schedule(steps: int, learning_rate: float, warmup: float) -> np.ndarray:
    """Learning rate of each step: a linear warm-up, then a cosine down to a tenth of the peak."""
    rising = max(1, round(warmup * steps))
    up = np.arange(1, rising + 1) / rising
    turn = np.arange(1, steps - rising + 1) / max(1, steps - rising)
    down = 0.1 + 0.45 * (1.0 + np.cos(np.pi * turn))
    return (learning_rate * np.concatenate([up, down])).astype(np.float32)


def learn(
    name: str,
    model: nn.Module,
    trainable: Params,
    frozen: Params,
    teacher: tuple[nn.Module, Params],
    training: Training,
    context: Context,
    pace: Params | None = None,
) -> tuple[Params, tuple[Point, ...], tuple[str, ...]]:
    """Trains a student on its teacher's predictions and on the labels.

    Args:
      name: of the transform, for messages.
      model: the student.
      trainable: what trains; the caller's arrays are left as they are.
      frozen: what does not, see `glm_edge.params.combine`.
      teacher: `(model, params)`.
      training: options.
      context: with calibration.
      pace: factors of the learning rate, a tree like `trainable` of what broadcasts to each array.

    Returns:
      `(trained, curve, notes)`: like `trainable` in float32, a point for each step, and what the
      report should say of calibration.

    Raises:
      RecipeError: the teacher predicts another vocabulary, or the loss is not finite.
      DataError: calibration is missing or not a batch.
    """
    if not context.calibration:
        raise DataError(f"{name} needs calibration= batches to learn from")
    teacher_model, teacher_params = teacher
    rates = schedule(training.steps, training.learning_rate, training.warmup)
    student = _computing(name, model, training.compute)
    coach = _computing(name, teacher_model, training.compute)
    teacher_params = without_shared(teacher_params, frozen)
    # The step reuses its arguments' memory, so it must not be given the caller's own arrays; and
    # a small step would be lost in the rounding of a weight stored in fewer bits.
    trainable = jax.tree.map(lambda array: jnp.array(array, jnp.float32, copy=True), trainable)
    state = training.objective.optimizer().init(trainable)
    losses, seen = [], set()
    data = in_order(context.calibration, context.rng)
    for step, rate in enumerate(rates, start=1):
        batch = batches.to_device(next(data))
        seen |= set(batch)
        trainable, state, parts = train_step(
            student,
            coach,
            training.objective,
            trainable,
            state,
            rate,
            frozen,
            teacher_params,
            batch,
            pace,
        )
        losses.append(parts)
        if step % _PROGRESS_EVERY == 0 or step == len(rates):
            loss = float(parts[0])
            if not np.isfinite(loss):
                raise RecipeError(
                    f"{name}: the loss is {loss} at step {step}; lower learning_rate or check "
                    "the calibration batches"
                )
            context.advance(f"{name}: loss {loss:.3f}", step, len(rates))
    curve = tuple(
        Point(step, *(float(part) for part in parts), learning_rate=float(rate))
        for step, (parts, rate) in enumerate(
            zip(jax.device_get(losses), rates, strict=True), start=1
        )
    )
    return trainable, curve, batches.missing_modalities(model, seen)


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
) -> tuple[Params, optax.OptState, tuple[Array, Array, Array]]:
    """One step of the optimizer; compiled once for each shape of batch.

    Returns:
      `(trainable, state, (loss, soft, hard))`.

    Raises:
      RecipeError: student and teacher predict different vocabularies.
    """
    teacher_params = _with_shared(teacher_params, frozen)
    targets = jax.lax.stop_gradient(batches.apply_batch(teacher, teacher_params, batch))
    weights = batches.loss_weights(student, batch)

    def loss(trainable: Params) -> tuple[Array, tuple[Array, Array]]:
        logits = batches.apply_batch(student, boxes.combine(trainable, frozen), batch)
        return distillation_loss(logits, targets, batch["tokens"], weights, objective)

    (total, (soft, hard)), gradient = jax.value_and_grad(loss, has_aux=True)(trainable)
    updates, state = objective.optimizer().update(gradient, state, trainable)
    updates = jax.tree.map(lambda update: rate * update, updates)
    if pace is not None:
        updates = jax.tree.map(jnp.multiply, updates, pace)
    return optax.apply_updates(trainable, updates), state, (total, soft, hard)


def distillation_loss(
    logits: Array, targets: Array, tokens: Array, weights: Array, objective: Objective
) -> tuple[Array, tuple[Array, Array]]:
    """Weighted mean of soft and hard losses over predictions.

    Args:
      logits: [B, T, V] of the student.
      targets: [B, T, V] of the teacher.
      tokens: [B, T].
      weights: [B, T - 1] of each prediction.
      objective: temperature and alpha.

    Returns:
      `(loss, (soft, hard))`, where `soft` carries its factor `T^2`.

    Raises:
      RecipeError: student and teacher predict different vocabularies.
    """
    if logits.shape != targets.shape:
        raise RecipeError(
            f"distill: the student predicts {logits.shape[-1]} tokens, its teacher "
            f"{targets.shape[-1]}"
        )
    temperature = objective.temperature
    teacher = jax.nn.log_softmax(targets[:, :-1] / temperature)
    student = jax.nn.log_softmax(logits[:, :-1] / temperature)
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    total = jnp.maximum(jnp.sum(weights), 1e-6)
    soft = temperature**2 * jnp.sum(divergence * weights) / total
    hard = jnp.sum(batches.cross_entropy(logits, tokens) * weights) / total
    return objective.alpha * soft + (1.0 - objective.alpha) * hard, (soft, hard)


def without_shared(teacher_params: Params, frozen: Params) -> Params:
    """The teacher's parameters with None for the arrays that the student holds frozen too.

    Both then read one array, and the compiler runs an encoder that they share once.
    """
    own = dict(boxes.path_items(frozen))
    return boxes.map_with_path(
        lambda path, leaf: None if own.get(path) is leaf else leaf, teacher_params
    )


def _with_shared(teacher_params: Params, frozen: Params) -> Params:
    own = dict(boxes.path_items(frozen))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: own[path_string(path)] if leaf is None else leaf,
        teacher_params,
        is_leaf=lambda node: node is None or boxes.is_box(node),
    )


def in_order(calibration: Sequence[batches.Batch], rng: Array | None) -> Iterator[batches.Batch]:
    """Yields batches for ever, each once before any comes again.

    Args:
      calibration: batches; those without a length are read in their own order.
      rng: jax key that shuffles each round, or None for the order given.

    Raises:
      DataError: there are none.
    """
    for epoch in itertools.count():
        read = 0
        for batch in _shuffled(calibration, rng, epoch):
            yield batch
            read += 1
        if not read:
            raise DataError("calibration holds no batches")


def _shuffled(calibration: Any, rng: Array | None, epoch: int) -> Iterator[batches.Batch]:
    if rng is None or not hasattr(calibration, "__len__"):
        return iter(calibration)
    order = jax.random.permutation(jax.random.fold_in(rng, epoch), len(calibration))
    return (calibration[index] for index in np.asarray(order).tolist())


def _computing(name: str, model: nn.Module, compute: str | None) -> nn.Module:
    if compute is None:
        return model
    if not hasattr(model, "compute"):
        raise RecipeError(f"{name}: {type(model).__name__} has no field 'compute' to set")
    return model.clone(compute=compute)
