"""The training loop that distillation and quantization-aware training share."""

import math
import numbers
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from glm_edge import params as boxes
from glm_edge.compress import batches, on_policy, transfer
from glm_edge.compress.batches import in_order
from glm_edge.compress.calibration import called, is_empty
from glm_edge.compress.report import Point
from glm_edge.compress.training_state import StateDirectory, job_of
from glm_edge.compress.training_step import (
    Objective,
    add_gradient,
    apply_gradient,
    train_step,
    with_shared,
    without_shared,
)
from glm_edge.compress.transform import Context, check_whole
from glm_edge.errors import DataError, RecipeError, TrainingError
from glm_edge.params.tree import Params

COMPUTE = ("float32", "bfloat16")
_PROGRESS_EVERY = 5
_RATES = ("learning_rate", "temperature", "alpha", "warmup", "weight_decay", "clip_norm")


def _is_finite(value: Any) -> bool:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and math.isfinite(value)


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
        if not all(_is_finite(getattr(self, field)) for field in _RATES):
            raise RecipeError(f"{name}: {', '.join(_RATES)} must be finite numbers")
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


class Course(NamedTuple):
    """What only `glm_edge.compress.distill` can ask of the loop."""

    accumulate: int = 1
    state_dir: str | None = None
    save_every: int = 100
    hidden: float = 0.0
    attention: float = 0.0
    layers: tuple[int, ...] | None = None
    vocabulary: tuple[int, ...] | None = None
    mixture: tuple[tuple[str, float], ...] | None = None
    beta: float = 0.0
    on_policy: float = 0.0
    prompt: int | None = None
    sampling_temperature: float = 1.0

    def check(self, name: str) -> None:
        """Raises RecipeError where an option of the transform `name` has no meaning."""
        check_whole(name, accumulate=self.accumulate, save_every=self.save_every)
        if not (0.0 <= self.hidden < np.inf and 0.0 <= self.attention < np.inf):
            raise RecipeError(f"{name}: hidden and attention must be finite and not negative")
        if self.layers is not None and not self.hidden and not self.attention:
            raise RecipeError(f"{name}: layers= needs hidden= or attention= above zero")
        if not (0.0 <= self.beta <= 1.0 and 0.0 <= self.on_policy <= 1.0):
            raise RecipeError(f"{name}: beta and on_policy must be in 0..1")
        if not 0.0 <= self.sampling_temperature < np.inf:
            raise RecipeError(f"{name}: sampling_temperature must be finite and not negative")
        if self.prompt is not None:
            check_whole(name, prompt=self.prompt)
            if not self.on_policy:
                raise RecipeError(f"{name}: prompt= needs on_policy= above zero")
        for kind, share in self.mixture or ():
            if kind not in batches.KINDS or not 0.0 < share < np.inf:
                raise RecipeError(
                    f"{name}: mixture= takes positive shares of {', '.join(batches.KINDS)}, not "
                    f"{share!r} of {kind!r}"
                )

    def data(self, context: Context, skip: int) -> Iterator[batches.Batch]:
        """Batches for ever, without the first `skip`."""
        if self.mixture is None:
            return in_order(context.calibration, context.rng, skip)
        return batches.in_proportion(context.calibration, dict(self.mixture), context.rng, skip)

    @property
    def result(self) -> dict[str, Any]:
        """The options that the result depends on."""
        kept = self._asdict()
        return {name: kept[name] for name in kept if name not in ("state_dir", "save_every")}


_PLAIN = Course()


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
    course: Course = _PLAIN,
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
      course: further options.

    Returns:
      `(trained, curve, notes)`: like `trainable` in float32, a point for each step, and what the
      report should say of calibration.

    Raises:
      RecipeError: the teacher predicts another vocabulary.
      TrainingError: the loss or its gradient is not finite.
      DataError: calibration is missing or not a batch.
    """
    if is_empty(context.calibration):
        raise DataError(f"{name} needs calibration= batches to learn from")
    teacher_model, teacher_params = teacher
    rates = schedule(training.steps, training.learning_rate, training.warmup)
    student, coach = (
        called(_computing(name, module, training.compute), context.calibration)
        for module in (model, teacher_model)
    )
    teacher_params = without_shared(teacher_params, frozen)
    # The step reuses its arguments' memory, so it must not be given the caller's own arrays; and
    # a small step would be lost in the rounding of a weight stored in fewer bits.
    trainable = jax.tree.map(lambda array: jnp.array(array, jnp.float32, copy=True), trainable)
    objective = training.objective._replace(
        hidden=course.hidden,
        attention=course.attention,
        layers=course.layers,
        beta=course.beta,
    )
    # What a student wrote itself teaches nothing as a label.
    without_labels = objective._replace(alpha=1.0)
    vocabulary = None
    if course.vocabulary is not None or course.hidden:
        whole = (boxes.combine(trainable, frozen), with_shared(teacher_params, frozen))
        sample = batches.to_device(student, next(iter(context.calibration)))
        sizes = [
            transfer.sizes(model, params, sample, bool(course.hidden))
            for model, params in zip((student, coach), whole, strict=True)
        ]
        vocabulary = transfer.vocabulary(course.vocabulary, *(size[0] for size in sizes))
        trainable = transfer.with_projection(
            trainable, tuple(size[1] for size in sizes), context.rng
        )
    state = objective.optimizer().init(trainable)
    losses, seen, directory, ragged = [], set(), None, False
    if course.state_dir is not None:
        job = job_of(
            {**training._asdict(), **course.result},
            (student, (trainable, frozen)),
            (coach, teacher[1]),
            context,
        )
        directory = StateDirectory(name, course.state_dir, job)
        (trainable, state), losses, seen = directory.restore((trainable, state))
        directory.write_curve(_curve(losses, rates, objective))
    first = len(losses) + 1
    data = enumerate(course.data(context, read := len(losses) * course.accumulate), start=read)

    def taken() -> tuple[batches.Batch, Objective]:
        """The next batch and what to learn from it."""
        nonlocal ragged
        number, batch = next(data)
        seen.update(batches.keys_of(batch))
        batch = batches.to_device(student, batch, f"{name}: calibration")
        ragged = ragged or "valid" in batch
        if not on_policy.is_written(course.on_policy, context.rng, number):
            return batch, objective
        own = (student, trainable, frozen, batch, course.prompt, course.sampling_temperature)
        return on_policy.written(*own, context.rng, number), without_labels

    def keep() -> None:
        if directory is not None:
            directory.save((trainable, state), losses, seen)
            directory.write_curve(_curve(losses, rates, objective))

    for step, rate in enumerate(rates[len(losses) :], start=first):
        if course.accumulate == 1:
            batch, aim = taken()
            trainable, state, found, norm = train_step(
                student,
                coach,
                aim,
                trainable,
                state,
                rate,
                frozen,
                teacher_params,
                batch,
                pace,
                vocabulary,
            )
        else:
            sums = None
            for _ in range(course.accumulate):
                batch, aim = taken()
                sums = add_gradient(
                    student,
                    coach,
                    aim,
                    sums,
                    trainable,
                    frozen,
                    teacher_params,
                    batch,
                    vocabulary,
                )
            trainable, state, found, norm = apply_gradient(
                objective, trainable, state, rate, sums, pace
            )
        found = [float(part) for part in jax.device_get(found)]
        for what, value in (("loss", found[0]), ("gradient's norm", float(norm))):
            if not np.isfinite(value):
                keep()
                raise TrainingError(
                    f"{name}: the {what} is {value} at step {step}; lower learning_rate or check "
                    "the calibration batches",
                    step,
                    boxes.combine(transfer.without_projection(trainable)[0], frozen),
                )
        losses.append(found)
        if step % course.save_every == 0 or step == len(rates):
            keep()
        if step % _PROGRESS_EVERY == 0 or step == len(rates):
            context.advance(f"{name}: loss {found[0]:.3f}", step, len(rates))
    trained, _ = transfer.without_projection(trainable)
    notes = batches.missing_modalities(student, seen) + batches.padding_notes(model, ragged)
    return trained, _curve(losses, rates, objective), notes


def _curve(losses: list[list[float]], rates: np.ndarray, objective: Objective) -> tuple[Point, ...]:
    inside = objective.hidden or objective.attention
    kind = transfer.TransferPoint if inside else Point
    return tuple(
        kind(step, *found[:3], float(rate), *(found[3:] if inside else ()))
        for step, (found, rate) in enumerate(zip(losses, rates, strict=False), start=1)
    )


def _computing(name: str, model: nn.Module, compute: str | None) -> nn.Module:
    if compute is None:
        return model
    if not hasattr(model, "compute"):
        raise RecipeError(f"{name}: {type(model).__name__} has no field 'compute' to set")
    return model.clone(compute=compute)
