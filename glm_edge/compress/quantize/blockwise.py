"""Quantization-aware distillation block by block."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress.batches import in_order
from glm_edge.compress.distill.loop import schedule
from glm_edge.compress.layerwise.runner import Replaced, StageContext
from glm_edge.compress.layerwise.stages import Leaves, Stage, State, Through, advance
from glm_edge.compress.options import TrainOptions
from glm_edge.compress.quantize import parameter as leaves
from glm_edge.compress.quantize.options import Quantizer
from glm_edge.compress.quantize.qat import fake, finalize, lr_scale_of, split
from glm_edge.compress.transform import register
from glm_edge.errors import RecipeError
from glm_edge.params.formats import PLAIN
from glm_edge.params.tree import nested

NAME = "quantize.blockwise"
_OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1.0, b2=0.98))


@register(NAME)
class Blockwise(Quantizer):
    """Trains each fake-quantized block to reproduce the outputs of the original block.

    Blocks are trained one after the other, on the outputs of the quantized blocks before. The loss
    is the squared error to the original model's activations (for logits, KL). Memory contains one
    block at a time. Add `qat` or `distill_scales` afterwards to train end to end.

        recipe = ge.quantize.blockwise("int4-g32", train=ge.TrainOptions(steps=200))
        model, params, report = recipe(model, params, calibration=batches, rng=key)

    Attributes:
      format: format of the weights, such as `int4-g32`, see `glm_edge.params.Format`. Zero points
        keep their initial values.
      where: see `glm_edge.quantize.rtn`, also for `scale`, `fallback_bits` and `stacked`.
      learned_scale: trains scales too.
      scale_rate: learning rate of scales, in units of `learning_rate` times the initial scale.
      norms: trains norms and biases of a block too.
      train: `steps` per block, `learning_rate`, `warmup` and `compute` of `glm_edge.TrainOptions`.
      mix: fraction of the steps on inputs from the original model.

    Raises:
      RecipeError: an option is invalid; on call, a pattern matches nothing or a quantized weight,
        columns do not divide into groups, or a loss is not finite.
      DataError: calibration is missing or lacks a modality.

    References:
      EfficientQAT: Efficient Quantization-Aware Training for Large Language Models (its first
      phase), https://arxiv.org/abs/2407.11062.
    """

    needs: ClassVar[str] = "both"
    needs_model: ClassVar[bool] = True
    unsupported: ClassVar[tuple[str, ...]] = PLAIN

    learned_scale: bool = True
    scale_rate: float = 1.0
    norms: bool = True
    train: TrainOptions = TrainOptions()
    mix: float = 0.0

    def __post_init__(self) -> None:
        self._set(train=TrainOptions.of(NAME, "train", self.train))
        super().__post_init__()
        if self.scale_rate <= 0.0:
            raise RecipeError(f"{NAME}: scale_rate must be positive")
        if not 0.0 <= self.mix <= 1.0:
            raise RecipeError(f"{NAME}: mix must be in 0..1")
        check_training(NAME, self.train)

    def compress_stage(self, work: StageContext) -> Replaced:
        if not work.selected:
            return {}, []
        rounding = self.config
        student = dict(work.leaves)
        for path in work.selected:
            student[path] = fake(path, student[path], rounding, work.layouts[path])

        def trains(path: str, leaf: Any) -> bool:
            return path in work.selected or (self.norms and not boxes.is_matrix(path, leaf))

        trainable, frozen = split(student, trains, self.learned_scale)
        lr_scale = lr_scale_of(trainable, self.scale_rate)
        trained, losses = train_block(NAME, work, trainable, frozen, lr_scale, self.train, self.mix)
        replaced, rows = {}, []
        for path, leaf in boxes.combine(trained, frozen).items():
            before = work.leaves[path]
            if path in work.selected:
                replaced[path] = finalize(path, leaf, before, work.layouts[path])
                error = leaves.relative_error(before, replaced[path])
                note = f"block error {losses[0]:.2g} to {losses[1]:.2g}"
                rows.append(leaves.row(NAME, path, before, replaced[path], error, note))
                work.advance(path)
            elif jax.tree.leaves(trainable[path]):
                replaced[path] = jax.tree.map(lambda new, old: new.astype(old.dtype), leaf, before)
        return replaced, rows


blockwise = Blockwise


def check_training(name: str, training: TrainOptions) -> None:
    """Refuse options of a training that blocks do not support; raise RecipeError."""
    default = TrainOptions()
    for option in ("weight_decay", "clip_norm", "accumulate", "state_dir"):
        if getattr(training, option) != getattr(default, option):
            raise RecipeError(
                f"{name}: train= takes steps, learning_rate, warmup and compute, not {option}"
            )


def train_block(
    name: str,
    work: StageContext,
    trainable: Leaves,
    frozen: Leaves,
    lr_scale: Leaves,
    training: TrainOptions,
    mix: float,
    frozen_at: Callable[[Leaves, float], Leaves] | None = None,
) -> tuple[Leaves, tuple[float, float]]:
    """Train one block on the outputs of the original block.

    Args:
      name: name of the transform for messages.
      work: context of the stage, with inputs of both models.
      trainable: trainable arrays by path.
      frozen: frozen arrays by path.
      lr_scale: factor of the learning rate per trainable array.
      training: steps, learning rate, warm-up and type of products.
      mix: fraction of the steps on inputs from the original model.
      frozen_at: function of the frozen arrays and the fraction of finished steps that returns the
        frozen arrays of a step; None leaves them unchanged.

    Returns:
      Trained arrays by path, and the mean errors of the first and of the last steps.

    Raises:
      RecipeError: there is nothing to learn, or a loss is not finite.
    """
    stage = work.stage
    module = stage.module
    if training.compute is not None and hasattr(module, "compute"):
        module = module.clone(compute=training.compute)
    forward = stage.forward
    if isinstance(forward, Through):
        forward = Through(dataclasses.replace(forward.model, model=module))
    pairs = _pairs(work)
    if stage.name == "model" and "batch" in (work.states or [{}])[0] and not pairs:
        raise RecipeError(
            f"{name}: calibration has no apply=, so there are no logits to learn; pass "
            "Calibration(batches, apply=...)"
        )
    if not pairs:
        raise RecipeError(
            f"{name}: no calibration batch reaches {stage.name}; add batches that contain its "
            "input, or narrow where"
        )
    training_arrays = jax.tree.map(
        lambda array: jnp.array(array, jnp.float32, copy=True), trainable
    )
    training_arrays, frozen, lr_scale, borrowed = (
        _within(stage, tree) for tree in (training_arrays, frozen, lr_scale, work.borrowed)
    )
    state = _OPTIMIZER.init(training_arrays)
    draws = np.random.default_rng(0 if work.rng is None else _seed(work.rng)).random(training.steps)
    errors, data = [], in_order(pairs, work.rng)
    rates = schedule(training.steps, training.learning_rate, training.warmup)
    for step, (rate, draw) in enumerate(zip(rates, draws, strict=True)):
        inputs, original, target = next(data)
        current = frozen if frozen_at is None else frozen_at(frozen, step / training.steps)
        training_arrays, state, error = block_step(
            module,
            forward,
            _output_key(stage),
            stage.of_tokens,
            training_arrays,
            state,
            rate,
            lr_scale,
            current,
            borrowed,
            original if draw < mix else inputs,
            target,
        )
        errors.append(error)
    curve = np.asarray(jax.device_get(errors))
    if not np.isfinite(curve).all():
        raise RecipeError(f"{name}: the loss of {stage.name} is not finite; lower learning_rate")
    few = max(1, min(len(pairs), training.steps // 4))
    trained = {path: training_arrays[_inner(stage, path)] for path in trainable}
    return trained, (float(curve[:few].mean()), float(curve[-few:].mean()))


def _within(stage: Stage, leaves: Leaves) -> Leaves:
    """Rename leaves to paths within the stage, so that equal layers share a compiled program."""
    return {_inner(stage, path): leaf for path, leaf in leaves.items()}


def _inner(stage: Stage, path: str) -> str:
    return path[len(stage.root) + 1 :] if stage.root else path


def _pairs(work: StageContext) -> list[tuple[State, State, Any]]:
    """List (inputs of the quantized model, inputs and output of the original) per batch."""
    key, originals = _output_key(work.stage), work.uncompressed
    name = "x" if key == "logits" else key
    return [
        (now, before, after[name])
        for now, before, after in zip(work.states, originals.states, originals.run(), strict=True)
        if work.stage.reads in now and name in after
    ]


def _output_key(stage: Stage) -> str:
    """Return the state entry of a stage's output: activations, logits, or encoder features."""
    root, _, last = stage.name.rpartition("/")
    if last in ("head", "model"):
        return "logits"
    return root if last == "end" else "x"


def _seed(rng: Array) -> int:
    return int(jax.random.bits(jax.random.fold_in(rng, 1)))


@functools.partial(
    jax.jit,
    static_argnames=("module", "forward", "key", "of_tokens"),
    donate_argnames=("trainable", "state"),
)
def block_step(
    module: nn.Module,
    forward: Callable[..., State],
    key: str,
    of_tokens: bool,
    trainable: Leaves,
    state: optax.OptState,
    rate: Array,
    lr_scale: Leaves,
    frozen: Leaves,
    borrowed: Leaves,
    inputs: State,
    target: Any,
) -> tuple[Leaves, optax.OptState, Array]:
    """Update the trainable arrays of a block by one optimizer step on one batch.

    Args:
      module: module of the block.
      forward: function that runs the block on a state.
      key: entry of the output in the state; `logits` selects the KL divergence.
      of_tokens: True if rows are tokens, so that padding is excluded.
      trainable: trainable arrays by path, donated.
      state: state of the optimizer, donated.
      rate: learning rate of this step, a scalar.
      lr_scale: factor of the learning rate per trainable array.
      frozen: frozen arrays by path.
      borrowed: parameters of earlier stages by path.
      inputs: state before the block.
      target: output of the original block.

    Returns:
      `(trainable, state, error)`, with the error before the step.
    """

    def loss(trainable: Leaves) -> Array:
        params = nested({**borrowed, **boxes.combine(trainable, frozen)})
        outputs = advance(module, forward, params, inputs)["x" if key == "logits" else key]
        valid = inputs.get("valid") if of_tokens else None
        return block_error(outputs, target, key == "logits", valid)

    error, gradient = jax.value_and_grad(loss)(trainable)
    updates, state = _OPTIMIZER.update(gradient, state, trainable)
    updates = jax.tree.map(lambda update, factor: rate * factor * update, updates, lr_scale)
    return optax.apply_updates(trainable, updates), state, error


def block_error(outputs: Any, target: Any, logits: bool, valid: Array | None = None) -> Array:
    """Compute the KL divergence of logits, or the squared error relative to the target's power.

    Args:
      outputs: [..., D] activations or logits, or a list of such for images of several sizes.
      target: outputs of the original block, in the same structure.
      logits: computes the KL divergence from the target's predictions.
      valid: bool in the shape of the leading (token) axes, False at padding; None means all valid.

    Returns:
      A scalar.
    """
    if logits:
        wanted = jax.nn.log_softmax(target)
        lost = wanted - jax.nn.log_softmax(outputs)
        return _mean(jnp.sum(jnp.exp(wanted) * lost, axis=-1), valid)
    pairs = list(zip(jax.tree.leaves(outputs), jax.tree.leaves(target), strict=True))
    wrong = [_mean(jnp.square(one - other), valid) for one, other in pairs]
    square = [_mean(jnp.square(other), valid) for _, other in pairs]
    # Images of several sizes are weighted by their count of values.
    sizes = [other.size for _, other in pairs]
    if len(pairs) == 1:
        return wrong[0] / jnp.maximum(square[0], 1e-30)
    wrong, square = (
        sum(mean * size for mean, size in zip(means, sizes, strict=True)) / sum(sizes)
        for means in (wrong, square)
    )
    return wrong / jnp.maximum(square, 1e-30)


def _mean(values: Array, valid: Array | None) -> Array:
    if valid is None or values.shape[: valid.ndim] != valid.shape:
        return jnp.mean(values)
    weights = valid.reshape(valid.shape + (1,) * (values.ndim - valid.ndim))
    each = values.size // valid.size
    return jnp.sum(jnp.where(weights, values, 0.0)) / (each * jnp.maximum(jnp.sum(valid), 1))
