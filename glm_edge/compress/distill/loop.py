"""The training loop that distillation and quantization-aware training share."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress.calibration import Augment, Calibration, has_length, is_empty
from glm_edge.compress.distill import intermediates as transfer
from glm_edge.compress.distill import on_policy
from glm_edge.compress.distill.classifier import Classifier, has_labels, reader_of, variables_of
from glm_edge.compress.distill.losses import Objective
from glm_edge.compress.distill.options import DistillOptions
from glm_edge.compress.distill.state import StateDirectory, job_of
from glm_edge.compress.distill.step import (
    Extra,
    Reader,
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
# Separate the keys of augmentation and dropout from those of the order of batches.
_AUGMENT, _DROPOUT = 0x6175, 0x6472
_LOGITS_ONLY = DistillOptions()


def schedule(steps: int, learning_rate: float, warmup: float) -> np.ndarray:
    """Compute the learning rate of each step: linear warm-up, then cosine decay to a tenth."""
    rising = max(1, round(warmup * steps))
    up = np.arange(1, rising + 1) / rising
    turn = np.arange(1, steps - rising + 1) / max(1, steps - rising)
    down = 0.1 + 0.45 * (1.0 + np.cos(np.pi * turn))
    return (learning_rate * np.concatenate([up, down])).astype(np.float32)


class Trained(NamedTuple):
    """Result of a training.

    Attributes:
      trainable: a tree like the trained parameters, in float32.
      collections: the student's other collections.
      curve: one point per step.
      notes: notes on calibration for the report.
    """

    trainable: Params
    collections: Params
    curve: tuple[Point, ...]
    notes: tuple[str, ...]


def train(
    name: str,
    model: nn.Module,
    trainable: Params,
    frozen: Params,
    teacher: tuple[nn.Module, Params] | None,
    training: TrainOptions,
    context: Context,
    lr_scale: Params | None = None,
    options: DistillOptions = _LOGITS_ONLY,
    collections: Params | None = None,
) -> Trained:
    """Train a student on its teacher's predictions and on the labels.

    Args:
      name: of the transform, for messages.
      model: the student.
      trainable: trained parameters; the caller's arrays do not change.
      frozen: the other parameters, see `glm_edge.params.combine`.
      teacher: `(model, params)`; None for labels alone.
      training: length and speed.
      context: with calibration.
      lr_scale: factors of the learning rate, a tree like `trainable` whose leaves broadcast to its
        arrays.
      options: of the loss, and of the batches that it is taken on.
      collections: a classifier's collections besides its parameters, such as `batch_stats`.

    Returns:
      The trained parameters and collections, with curve and notes.

    Raises:
      RecipeError: the teacher predicts another vocabulary.
      TrainingError: the loss or its gradient is not finite.
      DataError: calibration is missing or not a batch, or has no label and labels alone count.
    """
    if is_empty(context.calibration):
        raise DataError(f"{name} needs calibration= batches to learn from")
    collections = collections or {}
    rates = schedule(training.steps, training.learning_rate, training.warmup)
    student = reader_of(_with_compute(name, model, training.compute), context.calibration)
    teacher_model: Reader | None = None
    teacher_params: Params = {}
    teacher_collections: Params = {}
    if teacher is not None:
        teacher_model = reader_of(
            _with_compute(name, teacher[0], training.compute), context.calibration
        )
        teacher_params = teacher[1]
        if isinstance(teacher_model, Classifier):
            teacher_params, teacher_collections = variables_of(teacher_params)
    _check_classifiers(name, student, teacher_model, options, context)
    teacher_params = without_shared(teacher_params, frozen)
    # The step reuses its arguments' memory, so it must not get the caller's arrays. A small step
    # would also be lost in the rounding of a weight that is stored in fewer bits.
    trainable = jax.tree.map(lambda array: jnp.array(array, jnp.float32, copy=True), trainable)
    objective = _objective(training, options)
    vocabulary = None
    if teacher_model is not None and (options.vocabulary is not None or objective.hidden):
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
            (student, (trainable, frozen, collections)),
            None if teacher is None else (teacher_model, teacher[1]),
            context,
        )
        directory = StateDirectory(name, training.state_dir, job)
        stored, losses, keys = directory.restore((trainable, state, collections))
        trainable, state, collections = stored
        directory.write_curve(_curve(losses, rates, objective))
    feed = _Feed(name, student, frozen, options, context, len(losses) * training.accumulate, keys)

    def save() -> None:
        if directory is not None:
            directory.save((trainable, state, collections), losses, keys)
            directory.write_curve(_curve(losses, rates, objective))

    for step, rate in enumerate(rates[len(losses) :], start=len(losses) + 1):
        before = collections
        if training.accumulate == 1:
            read = feed.next(trainable, objective.alpha)
            trainable, state, step_losses, norm, collections = train_step(
                student,
                teacher_model,
                objective._replace(alpha=read.alpha),
                trainable,
                state,
                rate,
                frozen,
                teacher_params,
                read.batch,
                lr_scale,
                vocabulary,
                Extra(collections, teacher_collections, read.key),
            )
        else:
            sums = None
            for _ in range(training.accumulate):
                read = feed.next(trainable, objective.alpha)
                sums, collections = add_gradient(
                    student,
                    teacher_model,
                    objective._replace(alpha=read.alpha),
                    sums,
                    trainable,
                    frozen,
                    teacher_params,
                    read.batch,
                    vocabulary,
                    Extra(collections, teacher_collections, read.key),
                )
            trainable, state, step_losses, norm = apply_gradient(
                objective, trainable, state, rate, sums, lr_scale
            )
        step_losses = [float(part) for part in jax.device_get(step_losses)]
        for quantity, value in (("loss", step_losses[0]), ("gradient's norm", float(norm))):
            if not np.isfinite(value):
                collections = before
                save()
                healthy = boxes.combine(transfer.without_projection(trainable)[0], frozen)
                raise TrainingError(
                    f"{name}: the {quantity} is {value} at step {step}; lower learning_rate or "
                    "check the calibration batches",
                    step,
                    {"params": healthy, **collections} if collections else healthy,
                )
        losses.append(step_losses)
        if step % training.save_every == 0 or step == len(rates):
            save()
        if step % _PROGRESS_EVERY == 0 or step == len(rates):
            context.advance(f"{name}: loss {step_losses[0]:.3f}", step, len(rates))
    trained, _ = transfer.without_projection(trainable)
    notes = batches.missing_modalities(student, keys) + batches.padding_notes(model, feed.ragged)
    return Trained(trained, collections, _curve(losses, rates, objective), notes)


def _check_classifiers(
    name: str,
    student: Reader,
    teacher: Reader | None,
    options: DistillOptions,
    context: Context,
) -> None:
    """Check what a classifier supports; raise RecipeError or DataError otherwise."""
    kinds = {isinstance(model, Classifier) for model in (student, teacher) if model is not None}
    if kinds == {True, False}:
        raise RecipeError(f"{name}: one of student and teacher is a classifier; they must be alike")
    if True not in kinds:
        return
    for option in ("intermediates", "vocabulary", "on_policy"):
        if getattr(options, option) is not None:
            raise RecipeError(f"{name}: {option}= needs a model that predicts the next token")
    unlabelled = options.alpha == 0.0 and has_length(context.calibration)
    if unlabelled and not any(map(has_labels, context.batches)):
        raise DataError(f"{name}: alpha=0 learns from labels alone, and no batch has 'labels'")


class _Read(NamedTuple):
    """A batch on the device, the weight of the teacher in its loss, and the key of dropout."""

    batch: batches.Batch
    alpha: float
    key: jax.Array | None


class _Feed:
    """Batches of a training on the device; the student continues the on-policy ones.

    Attributes:
      ragged: True once a batch had padding.
    """

    def __init__(
        self,
        name: str,
        student: Reader,
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
        calibration = context.calibration
        augment = calibration.augment if isinstance(calibration, Calibration) else None
        self._augment: Augment | None = None if augment is None else jax.jit(augment)

    def next(self, trainable: Params, alpha: float) -> _Read:
        """Read the next batch."""
        number, batch = next(self._batches)
        self._keys.update(batches.keys_of(batch))
        batch = self._on_device(batch)
        self.ragged = self.ragged or "valid" in batch
        batch = self._augmented(batch, number)
        if isinstance(self._student, Classifier):
            return _Read(batch, alpha, self._key(_DROPOUT, number))
        policy = self._on_policy
        if policy is None or not on_policy.is_written(policy.share, self._rng, number):
            return _Read(batch, alpha, None)
        # Sampled tokens are not ground truth, so the labels have no weight.
        batch = on_policy.written(
            self._student,
            trainable,
            self._frozen,
            batch,
            policy.prompt,
            policy.temperature,
            self._rng,
            number,
        )
        return _Read(batch, 1.0, None)

    def _on_device(self, batch: Any) -> batches.Batch:
        where = f"{self._name}: calibration"
        if isinstance(self._student, Classifier):
            return self._student.to_device(batch, where)
        return batches.to_device(self._student, batch, where)

    def _augmented(self, batch: batches.Batch, number: int) -> batches.Batch:
        """Augment a batch; student and teacher then read the same arrays."""
        if self._augment is None:
            return batch
        key = self._key(_AUGMENT, number)
        if "variables" in batch:
            return {**batch, "batch": self._augment(key, batch["batch"])}
        return self._augment(key, batch)

    def _key(self, stream: int, number: int) -> jax.Array:
        rng = jax.random.key(0) if self._rng is None else self._rng
        return jax.random.fold_in(jax.random.fold_in(rng, stream), number)


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
