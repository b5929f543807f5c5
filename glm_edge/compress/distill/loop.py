"""The training loop that distillation and quantization-aware training share."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress.calibration import Called, called, is_empty
from glm_edge.compress.distill import intermediates as transfer
from glm_edge.compress.distill import on_policy
from glm_edge.compress.distill.losses import Objective
from glm_edge.compress.distill.options import DistillOptions
from glm_edge.compress.distill.state import StateDirectory, job_of
from glm_edge.compress.distill.step import (
    add_gradient,
    apply_gradient,
    optimizer_of,
    train_step,
    with_shared,
    without_shared,
)
from glm_edge.compress.options import TrainOptions
from glm_edge.compress.report import Point
from glm_edge.compress.transform import Context
from glm_edge.errors import DataError, RecipeError, TrainingError
from glm_edge.params.tree import Params

_PROGRESS_EVERY = 5
_LOGITS_ONLY = DistillOptions()


def schedule(steps: int, learning_rate: float, warmup: float) -> np.ndarray:
    """Compute the learning rate of each step: linear warm-up, then cosine decay to a tenth."""
    rising = max(1, round(warmup * steps))
    up = np.arange(1, rising + 1) / rising
    turn = np.arange(1, steps - rising + 1) / max(1, steps - rising)
    down = 0.1 + 0.45 * (1.0 + np.cos(np.pi * turn))
    return (learning_rate * np.concatenate([up, down])).astype(np.float32)


def train(
    name: str,
    model: nn.Module,
    trainable: Params,
    frozen: Params,
    teacher: tuple[nn.Module, Params],
    training: TrainOptions,
    context: Context,
    lr_scale: Params | None = None,
    options: DistillOptions = _LOGITS_ONLY,
) -> tuple[Params, tuple[Point, ...], tuple[str, ...]]:
    """Train a student on its teacher's predictions and on the labels.

    Args:
      name: of the transform, for messages.
      model: the student.
      trainable: trained parameters; the caller's arrays do not change.
      frozen: the other parameters, see `glm_edge.params.combine`.
      teacher: `(model, params)`.
      training: length and speed.
      context: with calibration.
      lr_scale: factors of the learning rate, a tree like `trainable` whose leaves broadcast to its
        arrays.
      options: of the loss, and of the batches that it is taken on.

    Returns:
      `(trained, curve, notes)`: a tree like `trainable` in float32, one point per step, and notes
      on calibration for the report.

    Raises:
      RecipeError: the teacher predicts another vocabulary.
      TrainingError: the loss or its gradient is not finite.
      DataError: calibration is missing or not a batch.
    """
    if is_empty(context.calibration):
        raise DataError(f"{name} needs calibration= batches to learn from")
    teacher_model, teacher_params = teacher
    rates = schedule(training.steps, training.learning_rate, training.warmup)
    student, teacher_model = (
        called(_with_compute(name, module, training.compute), context.calibration)
        for module in (model, teacher_model)
    )
    teacher_params = without_shared(teacher_params, frozen)
    # The step reuses its arguments' memory, so it must not get the caller's arrays. A small step
    # would also be lost in the rounding of a weight that is stored in fewer bits.
    trainable = jax.tree.map(lambda array: jnp.array(array, jnp.float32, copy=True), trainable)
    objective = _objective(training, options)
    vocabulary = None
    if options.vocabulary is not None or objective.hidden:
        both_params = (boxes.combine(trainable, frozen), with_shared(teacher_params, frozen))
        sample = batches.to_device(student, next(iter(context.batches)))
        sizes = [
            transfer.sizes(model, params, sample, bool(objective.hidden))
            for model, params in zip((student, teacher_model), both_params, strict=True)
        ]
        vocabulary = transfer.vocabulary(options.vocabulary, *(size[0] for size in sizes))
        trainable = transfer.with_projection(trainable, (sizes[0][1], sizes[1][1]), context.rng)
    state = optimizer_of(objective).init(trainable)
    losses: list[list[float]] = []
    keys: set[str] = set()
    directory = None
    if training.state_dir is not None:
        job = job_of(
            _result_options(training, options),
            (student, (trainable, frozen)),
            (teacher_model, teacher[1]),
            context,
        )
        directory = StateDirectory(name, training.state_dir, job)
        (trainable, state), losses, keys = directory.restore((trainable, state))
        directory.write_curve(_curve(losses, rates, objective))
    feed = _Feed(name, student, frozen, options, context, len(losses) * training.accumulate, keys)

    def save() -> None:
        if directory is not None:
            directory.save((trainable, state), losses, keys)
            directory.write_curve(_curve(losses, rates, objective))

    for step, rate in enumerate(rates[len(losses) :], start=len(losses) + 1):
        if training.accumulate == 1:
            batch, alpha = feed.next(trainable, objective.alpha)
            trainable, state, step_losses, norm = train_step(
                student,
                teacher_model,
                objective._replace(alpha=alpha),
                trainable,
                state,
                rate,
                frozen,
                teacher_params,
                batch,
                lr_scale,
                vocabulary,
            )
        else:
            sums = None
            for _ in range(training.accumulate):
                batch, alpha = feed.next(trainable, objective.alpha)
                sums = add_gradient(
                    student,
                    teacher_model,
                    objective._replace(alpha=alpha),
                    sums,
                    trainable,
                    frozen,
                    teacher_params,
                    batch,
                    vocabulary,
                )
            trainable, state, step_losses, norm = apply_gradient(
                objective, trainable, state, rate, sums, lr_scale
            )
        step_losses = [float(part) for part in jax.device_get(step_losses)]
        for quantity, value in (("loss", step_losses[0]), ("gradient's norm", float(norm))):
            if not np.isfinite(value):
                save()
                raise TrainingError(
                    f"{name}: the {quantity} is {value} at step {step}; lower learning_rate or "
                    "check the calibration batches",
                    step,
                    boxes.combine(transfer.without_projection(trainable)[0], frozen),
                )
        losses.append(step_losses)
        if step % training.save_every == 0 or step == len(rates):
            save()
        if step % _PROGRESS_EVERY == 0 or step == len(rates):
            context.advance(f"{name}: loss {step_losses[0]:.3f}", step, len(rates))
    trained, _ = transfer.without_projection(trainable)
    notes = batches.missing_modalities(student, keys) + batches.padding_notes(model, feed.ragged)
    return trained, _curve(losses, rates, objective), notes


class _Feed:
    """Batches of a training on the device; the student continues the on-policy ones.

    Attributes:
      ragged: True once a batch had padding.
    """

    def __init__(
        self,
        name: str,
        student: nn.Module | Called,
        frozen: Params,
        options: DistillOptions,
        context: Context,
        skip: int,
        keys: set[str],
    ):
        """Start after `skip` batches; add to `keys` those of every batch."""
        self.ragged = False
        self._name, self._student, self._frozen = name, student, frozen
        self._on_policy, self._rng, self._keys = options.on_policy, context.rng, keys
        self._batches = enumerate(options.data(context, skip), start=skip)

    def next(self, trainable: Params, alpha: float) -> tuple[batches.Batch, float]:
        """Return the next batch, and the weight of the teacher in its loss."""
        number, batch = next(self._batches)
        self._keys.update(batches.keys_of(batch))
        batch = batches.to_device(self._student, batch, f"{self._name}: calibration")
        self.ragged = self.ragged or "valid" in batch
        policy = self._on_policy
        if policy is None or not on_policy.is_written(policy.share, self._rng, number):
            return batch, alpha
        # Sampled tokens are not ground truth, so the labels have no weight.
        return on_policy.written(
            self._student,
            trainable,
            self._frozen,
            batch,
            policy.prompt,
            policy.temperature,
            self._rng,
            number,
        ), 1.0


def _objective(training: TrainOptions, options: DistillOptions) -> Objective:
    inside = options.intermediates
    return Objective(
        options.temperature,
        options.alpha,
        training.weight_decay,
        training.clip_norm,
        hidden=inside.hidden if inside else 0.0,
        attention=inside.attention if inside else 0.0,
        layers=tuple(inside.layers) if inside and inside.layers is not None else None,
        beta=options.beta,
    )


def _result_options(training: TrainOptions, options: DistillOptions) -> dict[str, Any]:
    """List the options that the result depends on."""
    result = {**dataclasses.asdict(training), **dataclasses.asdict(options)}
    del result["state_dir"], result["save_every"]
    return result


def _curve(losses: list[list[float]], rates: np.ndarray, objective: Objective) -> tuple[Point, ...]:
    inside = objective.hidden or objective.attention
    kind: Any = transfer.TransferPoint if inside else Point
    return tuple(
        kind(step, *step_losses[:3], float(rate), *(step_losses[3:] if inside else ()))
        for step, (step_losses, rate) in enumerate(zip(losses, rates, strict=False), start=1)
    )


def _with_compute(name: str, model: nn.Module, compute: str | None) -> nn.Module:
    if compute is None:
        return model
    if not hasattr(model, "compute"):
        raise RecipeError(f"{name}: {type(model).__name__} has no field 'compute' to set")
    return model.clone(compute=compute)
