"""The training loop that distillation and quantization-aware training share, and its one step."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress.batches import in_order
from glm_edge.compress.calibration import Called, called, is_empty
from glm_edge.compress.distill import intermediates as transfer
from glm_edge.compress.distill import on_policy
from glm_edge.compress.distill.state import StateDirectory, job_of
from glm_edge.compress.report import Point
from glm_edge.compress.transform import Context, Teacher, check_type, check_whole
from glm_edge.errors import DataError, RecipeError, TrainingError
from glm_edge.params.tree import Params, path_string

COMPUTE = ("float32", "bfloat16")
_PROGRESS_EVERY = 5
_TRAIN = "TrainOptions"


class Objective(NamedTuple):
    """The objective of one training step: static when it is compiled."""

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
    lr_scale: Params | None = None,
    vocabulary: Array | None = None,
) -> tuple[Params, optax.OptState, Losses, Array]:
    """One step of the optimizer; compiled once for each shape of batch.

    Returns:
      `(trainable, state, losses, norm)`, the last of the gradient; where the loss or the norm is
      not finite, the first two are the arguments.

    Raises:
      RecipeError: student and teacher predict different vocabularies.
    """
    sums = _gradient(
        student, teacher, objective, trainable, frozen, teacher_params, batch, vocabulary
    )
    return _descend(objective, trainable, state, rate, sums.gradient, sums.losses, lr_scale)


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
    batch_sums = _gradient(
        student, teacher, objective, trainable, frozen, teacher_params, batch, vocabulary
    )
    weighed = jax.tree.map(lambda part: part * batch_sums.weight, batch_sums[:2])
    added = Sums(*weighed, batch_sums.weight)
    return added if sums is None else jax.tree.map(jnp.add, sums, added)


@functools.partial(jax.jit, static_argnames=("objective",), donate_argnames=("trainable", "state"))
def apply_gradient(
    objective: Objective,
    trainable: Params,
    state: optax.OptState,
    rate: Array,
    sums: Sums,
    lr_scale: Params | None = None,
) -> tuple[Params, optax.OptState, Losses, Array]:
    """As `train_step`, with the weighted mean of what several batches gave."""
    gradient, losses = jax.tree.map(lambda part: part / sums.weight, sums[:2])
    return _descend(objective, trainable, state, rate, gradient, losses, lr_scale)


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
    targets, aims = jax.lax.stop_gradient(
        transfer.run_with_intermediates(teacher, teacher_params, read, *asked)
    )
    if vocabulary is not None:
        targets = targets[..., vocabulary]
    called = isinstance(student, Called)
    weights = jnp.ones(targets.shape[:-1]) if called else batches.loss_weights(student, batch)

    def loss(trainable: Params) -> tuple[Array, Losses]:
        student_params, projection = transfer.without_projection(trainable)
        params = boxes.combine(student_params, frozen)
        logits, inside = transfer.run_with_intermediates(student, params, batch, *asked)
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
    lr_scale: Params | None,
) -> tuple[Params, optax.OptState, Losses, Array]:
    norm = optax.tree.norm(gradient)
    updates, after = objective.optimizer().update(gradient, state, trainable)
    updates = jax.tree.map(lambda update: rate * update, updates)
    if lr_scale is not None:
        updates = jax.tree.map(jnp.multiply, updates, lr_scale)
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
    teacher, predicted = (jax.nn.log_softmax(x / temperature) for x in (targets, logits))
    soft = temperature**2 * jnp.mean(divergence(teacher, predicted, objective.beta))
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
    shared = dict(boxes.path_items(frozen))
    return boxes.map_with_path(
        lambda path, leaf: None if shared.get(path) is leaf else leaf, teacher_params
    )


def with_shared(teacher_params: Params, frozen: Params) -> Params:
    """The inverse of `without_shared`."""
    shared = dict(boxes.path_items(frozen))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: shared[path_string(path)] if leaf is None else leaf,
        teacher_params,
        is_leaf=lambda node: node is None or boxes.is_box(node),
    )


@dataclass(frozen=True)
class TrainOptions:
    """Length and speed of a training, for every transform that trains.

    The optimizer is AdamW after clipping. Its learning rate rises linearly in the warm-up and falls
    by a cosine to a tenth of the peak.

    Attributes:
      steps: of the optimizer, one calibration batch each; batches are read in an order drawn from
        `rng`, each once before any comes again.
      learning_rate: peak.
      warmup: fraction of the steps.
      weight_decay: of AdamW.
      clip_norm: largest norm of the gradient.
      compute: `float32` or `bfloat16` products while training; None leaves the model as it is.
      accumulate: batches of each step; their gradients are added up to that of one batch with all
        their rows, and each step reads so many.
      state_dir: directory that stores what training needs to resume: rerunning the same call gives
        bit-identical results. It also holds the curve, as `curve.csv`, and the parameters after the
        last good step when the loss is not finite.
      save_every: steps between two states.

    Raises:
      RecipeError: an option has no meaning.
    """

    steps: int = 200
    learning_rate: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    compute: str | None = None
    accumulate: int = 1
    state_dir: str | None = None
    save_every: int = 100

    def __post_init__(self) -> None:
        if isinstance(self.state_dir, os.PathLike):
            object.__setattr__(self, "state_dir", os.fspath(self.state_dir))
        for item in dataclasses.fields(self):
            check_type(_TRAIN, item.name, getattr(self, item.name), item.type)
        check_whole(
            _TRAIN, steps=self.steps, accumulate=self.accumulate, save_every=self.save_every
        )
        if self.learning_rate <= 0.0 or self.clip_norm <= 0.0:
            raise RecipeError(f"{_TRAIN}: learning_rate and clip_norm must be positive")
        if not 0.0 <= self.warmup < 1.0 or self.weight_decay < 0.0:
            raise RecipeError(f"{_TRAIN}: warmup must be in 0..1 and weight_decay not negative")
        if self.compute is not None and self.compute not in COMPUTE:
            raise RecipeError(
                f"{_TRAIN}: compute must be one of {', '.join(COMPUTE)}, not {self.compute!r}"
            )

    def __repr__(self) -> str:
        items = ((item, getattr(self, item.name)) for item in dataclasses.fields(self))
        shown = [f"{item.name}={value!r}" for item, value in items if value != item.default]
        return f"TrainOptions({', '.join(shown)})"

    @classmethod
    def of(cls, transform: str, options: Any) -> "TrainOptions":
        """Reads the option `train` of a transform: an instance, or a mapping as JSON holds it.

        Raises:
          RecipeError: it is neither, or an option is unknown or has no meaning.
        """
        if isinstance(options, cls):
            return options
        known = [item.name for item in dataclasses.fields(cls)]
        if not isinstance(options, Mapping):
            raise RecipeError(f"{transform}: train must be TrainOptions, not {options!r:.60}")
        unknown = next((name for name in options if name not in known), None)
        if unknown is not None:
            raise RecipeError(
                f"{transform}: train has no option {unknown!r:.60}; known: {', '.join(known)}"
            )
        return cls(**options)


def as_teacher(transform: str, teacher: Any) -> Teacher | None:
    """Reads the option `teacher` of a transform.

    Raises:
      RecipeError: it is no pair of a model and its parameters.
    """
    if teacher is None or isinstance(teacher, Teacher):
        return teacher
    if not (isinstance(teacher, tuple) and len(teacher) == 2):
        raise RecipeError(f"{transform}: teacher must be (model, params)")
    return Teacher(teacher)


class DistillOptions(NamedTuple):
    """The losses of a student; see `glm_edge.compress.distill`."""

    temperature: float = 2.0
    alpha: float = 0.9
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
        if self.temperature <= 0.0:
            raise RecipeError(f"{name}: temperature must be positive")
        if not 0.0 <= self.alpha <= 1.0:
            raise RecipeError(f"{name}: alpha must be in 0..1")
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
        """Returns an endless iterator over batches, without the first `skip`."""
        if self.mixture is None:
            return in_order(context.calibration, context.rng, skip)
        return batches.in_proportion(context.calibration, dict(self.mixture), context.rng, skip)


_PLAIN = DistillOptions()


def _result_options(training: TrainOptions, options: DistillOptions) -> dict[str, Any]:
    """The options that the result depends on."""
    result = {**dataclasses.asdict(training), **options._asdict()}
    del result["state_dir"], result["save_every"]
    return result


def schedule(steps: int, learning_rate: float, warmup: float) -> np.ndarray:
    """Learning rate of each step: a linear warm-up, then a cosine down to a tenth of the peak."""
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
    options: DistillOptions = _PLAIN,
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
      lr_scale: factors of the learning rate, a tree like `trainable` of what broadcasts to each
        array.
      options: of the loss, and of what data it is taken.

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
    student, teacher_model = (
        called(_computing(name, module, training.compute), context.calibration)
        for module in (model, teacher_model)
    )
    teacher_params = without_shared(teacher_params, frozen)
    # The step reuses its arguments' memory, so it must not be given the caller's own arrays; and
    # a small step would be lost in the rounding of a weight stored in fewer bits.
    trainable = jax.tree.map(lambda array: jnp.array(array, jnp.float32, copy=True), trainable)
    objective = Objective(
        options.temperature,
        options.alpha,
        training.weight_decay,
        training.clip_norm,
        options.hidden,
        options.attention,
        options.layers,
        options.beta,
    )
    # What a student wrote itself teaches nothing as a label.
    without_labels = objective._replace(alpha=1.0)
    vocabulary = None
    if options.vocabulary is not None or options.hidden:
        both_params = (boxes.combine(trainable, frozen), with_shared(teacher_params, frozen))
        sample = batches.to_device(student, next(iter(context.calibration)))
        sizes = [
            transfer.sizes(model, params, sample, bool(options.hidden))
            for model, params in zip((student, teacher_model), both_params, strict=True)
        ]
        vocabulary = transfer.vocabulary(options.vocabulary, *(size[0] for size in sizes))
        trainable = transfer.with_projection(
            trainable, tuple(size[1] for size in sizes), context.rng
        )
    state = objective.optimizer().init(trainable)
    losses, keys, directory, ragged = [], set(), None, False
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
    first = len(losses) + 1
    data = enumerate(options.data(context, read := len(losses) * training.accumulate), start=read)

    def next_batch() -> tuple[batches.Batch, Objective]:
        """The next batch and what to learn from it."""
        nonlocal ragged
        number, batch = next(data)
        keys.update(batches.keys_of(batch))
        batch = batches.to_device(student, batch, f"{name}: calibration")
        ragged = ragged or "valid" in batch
        if not on_policy.is_written(options.on_policy, context.rng, number):
            return batch, objective
        arguments = (
            student,
            trainable,
            frozen,
            batch,
            options.prompt,
            options.sampling_temperature,
        )
        return on_policy.written(*arguments, context.rng, number), without_labels

    def keep() -> None:
        if directory is not None:
            directory.save((trainable, state), losses, keys)
            directory.write_curve(_curve(losses, rates, objective))

    for step, rate in enumerate(rates[len(losses) :], start=first):
        if training.accumulate == 1:
            batch, batch_objective = next_batch()
            trainable, state, step_losses, norm = train_step(
                student,
                teacher_model,
                batch_objective,
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
                batch, batch_objective = next_batch()
                sums = add_gradient(
                    student,
                    teacher_model,
                    batch_objective,
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
                keep()
                raise TrainingError(
                    f"{name}: the {quantity} is {value} at step {step}; lower learning_rate or "
                    "check the calibration batches",
                    step,
                    boxes.combine(transfer.without_projection(trainable)[0], frozen),
                )
        losses.append(step_losses)
        if step % training.save_every == 0 or step == len(rates):
            keep()
        if step % _PROGRESS_EVERY == 0 or step == len(rates):
            context.advance(f"{name}: loss {step_losses[0]:.3f}", step, len(rates))
    trained, _ = transfer.without_projection(trainable)
    notes = batches.missing_modalities(student, keys) + batches.padding_notes(model, ragged)
    return trained, _curve(losses, rates, objective), notes


def _curve(losses: list[list[float]], rates: np.ndarray, objective: Objective) -> tuple[Point, ...]:
    inside = objective.hidden or objective.attention
    kind = transfer.TransferPoint if inside else Point
    return tuple(
        kind(step, *step_losses[:3], float(rate), *(step_losses[3:] if inside else ()))
        for step, (step_losses, rate) in enumerate(zip(losses, rates, strict=False), start=1)
    )


def _computing(name: str, model: nn.Module, compute: str | None) -> nn.Module:
    if compute is None:
        return model
    if not hasattr(model, "compute"):
        raise RecipeError(f"{name}: {type(model).__name__} has no field 'compute' to set")
    return model.clone(compute=compute)
