"""Distillation: a student learns to predict what its teacher predicts."""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress.report import Point, Report, Row
from glm_edge.compress.transform import (
    Context,
    Result,
    Transform,
    check_pattern,
    check_whole,
    register,
)
from glm_edge.errors import DataError, RecipeError
from glm_edge.params.tree import Params, path_string

COMPUTE = ("float32", "bfloat16")
_PROGRESS_EVERY = 5


def distill(
    teacher: tuple[nn.Module, Params] | None = None,
    steps: int = 200,
    learning_rate: float = 1e-3,
    temperature: float = 2.0,
    alpha: float = 0.9,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    where: str | None = None,
    compute: str | None = None,
) -> Transform:
    """Trains a (pruned) student on its teacher's predictions and on the labels.

    The loss is `alpha * T^2 * KL(teacher at T || student at T) + (1 - alpha) * cross-entropy`,
    averaged over the predictions that `loss_mask` weighs. The optimizer is AdamW after clipping,
    with a linear warm-up and a cosine to a tenth of the peak. Masks and quantized weights stay as
    they are; what trains is what `glm_edge.params.partition` gives, in float32.

    Args:
      teacher: `(model, params)`; None is the model that the chain was given.
      steps: of the optimizer, one calibration batch each; batches are read in an order drawn from
        `rng`, each once before any comes again.
      learning_rate: peak.
      temperature: `T`, softens both predictions.
      alpha: weight of the teacher, in 0..1; the rest is the labels'.
      warmup: fraction of the steps.
      weight_decay: of AdamW.
      clip_norm: largest norm of the gradient.
      where: regular expression searched in each path; what it matches trains, such as
        `^(decoder|embed|head)/` to leave the encoders as they are. None trains everything.
        Encoders that student and teacher share and that do not train are run once for both.
      compute: `float32` or `bfloat16` products while training; None leaves both models as they
        are.

    Returns:
      The transform; its report holds the `curve`.

    Raises:
      RecipeError: an option has no meaning; on call, there is no teacher, it predicts another
        vocabulary, everything is frozen, or the loss is not finite.
      DataError: calibration is missing or not a batch.

    References:
      Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531.
    """
    check_whole("distill", steps=steps)
    check_pattern("distill", "where", where)
    if learning_rate <= 0.0 or temperature <= 0.0 or clip_norm <= 0.0:
        raise RecipeError("distill: learning_rate, temperature and clip_norm must be positive")
    if not 0.0 <= alpha <= 1.0 or not 0.0 <= warmup < 1.0 or weight_decay < 0.0:
        raise RecipeError(
            "distill: alpha must be in 0..1, warmup in 0..1 and weight_decay not negative"
        )
    if compute is not None and compute not in COMPUTE:
        raise RecipeError(f"distill: compute must be one of {', '.join(COMPUTE)}, not {compute!r}")
    if teacher is not None and not (isinstance(teacher, tuple) and len(teacher) == 2):
        raise RecipeError("distill: teacher must be (model, params)")
    options = {
        "steps": steps,
        "learning_rate": learning_rate,
        "temperature": temperature,
        "alpha": alpha,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "clip_norm": clip_norm,
        "where": where,
        "compute": compute,
    }
    return Transform("distill", options, {} if teacher is None else {"teacher": teacher})


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


def schedule(steps: int, learning_rate: float, warmup: float) -> np.ndarray:
    """Learning rate of each step: a linear warm-up, then a cosine down to a tenth of the peak."""
    rising = max(1, round(warmup * steps))
    up = np.arange(1, rising + 1) / rising
    turn = np.arange(1, steps - rising + 1) / max(1, steps - rising)
    down = 0.1 + 0.45 * (1.0 + np.cos(np.pi * turn))
    return (learning_rate * np.concatenate([up, down])).astype(np.float32)


def _apply_distill(
    model: nn.Module,
    params: Params,
    context: Context,
    steps: int,
    learning_rate: float,
    warmup: float,
    where: str | None,
    compute: str | None,
    teacher: tuple[nn.Module, Params] | None = None,
    **objective: float,
) -> Result:
    teacher_model, teacher_params = teacher or context.original
    if teacher is None and context.original[1] is params:
        raise RecipeError(
            "distill: the model would be its own teacher; pass teacher=(model, params), or put "
            "distill after a transform in a chain"
        )
    if not context.calibration:
        raise DataError("distill needs calibration= batches to learn from")
    rates = schedule(steps, learning_rate, warmup)
    student, coach = _computing(model, compute), _computing(teacher_model, compute)
    trainable, frozen = split(params, where)
    teacher_params = _without_shared(teacher_params, frozen)
    trained, curve, seen = _train(
        student, coach, teacher_params, trainable, frozen, Objective(**objective), rates, context
    )
    healed = boxes.combine(trained, frozen)
    row = _row(f"trained {steps} steps", trainable, trained)
    notes = batches.missing_modalities(model, seen)
    return model, healed, Report.of([row], params, healed, curve=curve, notes=notes)


register("distill", distill, _apply_distill)


def split(params: Params, where: str | None) -> tuple[Params, Params]:
    """As `glm_edge.params.partition`, with what `where` does not match on the frozen side.

    Raises:
      RecipeError: the pattern matches nothing that can train.
    """
    trainable, frozen = boxes.partition(params)
    if where is None:
        return trainable, frozen
    held = _keep(trainable, lambda path: not re.search(where, path))
    trainable = _keep(trainable, lambda path: bool(re.search(where, path)))
    if not jax.tree.leaves(trainable):
        raise RecipeError(f"distill: where={where!r} matches no parameter that can train")
    return trainable, boxes.combine(held, frozen)


def _keep(tree: Params, wanted: Callable[[str], bool]) -> Params:
    """The tree with None in place of the arrays at other paths."""
    return boxes.map_with_path(
        lambda path, leaf: leaf if wanted(path) else jax.tree.map(lambda _: None, leaf), tree
    )


def _without_shared(teacher_params: Params, frozen: Params) -> Params:
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


def _train(
    student: nn.Module,
    teacher: nn.Module,
    teacher_params: Params,
    trainable: Params,
    frozen: Params,
    objective: Objective,
    rates: np.ndarray,
    context: Context,
) -> tuple[Params, tuple[Point, ...], set[str]]:
    # The step reuses its arguments' memory, so it must not be given the caller's own arrays; and
    # a small step would be lost in the rounding of a weight stored in fewer bits.
    trainable = jax.tree.map(lambda array: jnp.array(array, jnp.float32, copy=True), trainable)
    state = objective.optimizer().init(trainable)
    losses, seen = [], set()
    data = in_order(context.calibration, context.rng)
    for step, rate in enumerate(rates, start=1):
        batch = batches.to_device(next(data))
        seen |= set(batch)
        trainable, state, parts = train_step(
            student, teacher, objective, trainable, state, rate, frozen, teacher_params, batch
        )
        losses.append(parts)
        if step % _PROGRESS_EVERY == 0 or step == len(rates):
            loss = float(parts[0])
            if not np.isfinite(loss):
                raise RecipeError(
                    f"distill: the loss is {loss} at step {step}; lower learning_rate or check "
                    "the calibration batches"
                )
            context.advance(f"distill: loss {loss:.3f}", step, len(rates))
    curve = tuple(
        Point(step, *(float(part) for part in parts), learning_rate=float(rate))
        for step, (parts, rate) in enumerate(
            zip(jax.device_get(losses), rates, strict=True), start=1
        )
    )
    return trainable, curve, seen


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
) -> tuple[Params, optax.OptState, tuple[Array, Array, Array]]:
    """One step of the optimizer; compiled once for each shape of batch.

    Returns:
      `(trainable, state, (loss, soft, hard))`.
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


def _computing(model: nn.Module, compute: str | None) -> nn.Module:
    if compute is None:
        return model
    if not hasattr(model, "compute"):
        raise RecipeError(f"distill: {type(model).__name__} has no field 'compute' to set")
    return model.clone(compute=compute)


def _row(action: str, before: Params, after: Params) -> Row:
    """One line for all trained arrays: how far they moved."""
    pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    moved = sum(float(jnp.sum(jnp.square(new - old))) for old, new in pairs)
    norm = sum(float(jnp.sum(jnp.square(old))) for old, _ in pairs)
    stored = sum(old.nbytes for old, _ in pairs)
    size = sum(old.size for old, _ in pairs)
    return Row(
        "distill",
        f"{len(pairs)} arrays",
        action,
        1.0,
        8 * stored / size,
        stored,
        stored,
        (moved / norm) ** 0.5 if norm else 0.0,
    )
