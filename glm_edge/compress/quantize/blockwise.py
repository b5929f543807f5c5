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
    """Trains each block, read as if it were quantized, to give what the original block gives.

    Blocks are trained one after the other, each on what the quantized ones before it give, by
    squared error against the original's activations on its own inputs (for logits, by KL). Memory
    holds one block. Follow it by `qat` or `distill_scales` to train end to end.

    Attributes:
      format: of the weights, such as `int4-g32`, see `glm_edge.params.Format`; zero points keep
        their first values.
      where: see `glm_edge.quantize.rtn`, as are `scale`, `fallback_bits` and `stacked`.
      learned_scale: scales train too.
      scale_rate: their learning rate, in units of `learning_rate` times what each scale was.
      norms: norms and biases of a block train too.
      train: `steps` for each block, `learning_rate`, `warmup` and `compute` of
        `glm_edge.TrainOptions`.
      mix: fraction of the steps that read the original's inputs instead.

    Raises:
      RecipeError: an option has no meaning; on call, a pattern matches nothing or a quantized
        weight, columns are not whole groups, or a loss is not finite.
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
        default = TrainOptions()
        for name in ("weight_decay", "clip_norm", "accumulate", "state_dir"):
            if getattr(self.train, name) != getattr(default, name):
                raise RecipeError(
                    f"{NAME}: train= takes steps, learning_rate, warmup and compute, not {name}"
                )

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
        trained, losses = _train(
            work, trainable, frozen, lr_scale_of(trainable, self.scale_rate), self.train, self.mix
        )
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


def _train(
    work: StageContext,
    trainable: Leaves,
    frozen: Leaves,
    lr_scale: Leaves,
    training: TrainOptions,
    mix: float,
) -> tuple[Leaves, tuple[float, float]]:
    """Trains one block; returns what trained, and the mean error of the first and last steps."""
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
            f"{NAME}: calibration has no apply=; pass Calibration(batches, apply=...), whose "
            "logits the rounded model learns to give"
        )
    if not pairs:
        raise RecipeError(
            f"{NAME}: no calibration batch reaches {stage.name}; add batches that hold its input, "
            "or narrow where"
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
    for rate, draw in zip(rates, draws, strict=True):
        inputs, original, target = next(data)
        training_arrays, state, error = block_step(
            module,
            forward,
            _output_key(stage),
            stage.of_tokens,
            training_arrays,
            state,
            rate,
            lr_scale,
            frozen,
            borrowed,
            original if draw < mix else inputs,
            target,
        )
        errors.append(error)
    curve = np.asarray(jax.device_get(errors))
    if not np.isfinite(curve).all():
        raise RecipeError(f"{NAME}: the loss of {stage.name} is not finite; lower learning_rate")
    few = max(1, min(len(pairs), training.steps // 4))
    trained = {path: training_arrays[_inner(stage, path)] for path in trainable}
    return trained, (float(curve[:few].mean()), float(curve[-few:].mean()))


def _within(stage: Stage, leaves: Leaves) -> Leaves:
    """Leaves by their path within the stage, so that layers that are alike share a program."""
    return {_inner(stage, path): leaf for path, leaf in leaves.items()}


def _inner(stage: Stage, path: str) -> str:
    return path[len(stage.root) + 1 :] if stage.root else path


def _pairs(work: StageContext) -> list[tuple[State, State, Any]]:
    """For each batch: inputs of the rounded stream, of the original's, and the latter's output."""
    key, originals = _output_key(work.stage), work.uncompressed
    name = "x" if key == "logits" else key
    return [
        (now, before, after[name])
        for now, before, after in zip(work.states, originals.states, originals.run(), strict=True)
        if work.stage.reads in now and name in after
    ]


def _output_key(stage: Stage) -> str:
    """Entry of a state that the stage gives: activations, logits, or features of an encoder."""
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
    """One step of the optimizer on one batch of a block.

    Returns:
      `(trainable, state, error)`, the error before the step.
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
    """KL from the target's predictions, or squared error in units of the target's square.

    Args:
      outputs: [..., D] activations or logits; a list of such for images of several sizes.
      target: likewise.
      logits: compares predictions.
      valid: bool, of the leading axes of an array of tokens, False at padding; None is all.
    """
    if logits:
        wanted = jax.nn.log_softmax(target)
        lost = wanted - jax.nn.log_softmax(outputs)
        return _mean(jnp.sum(jnp.exp(wanted) * lost, axis=-1), valid)
    pairs = list(zip(jax.tree.leaves(outputs), jax.tree.leaves(target), strict=True))
    wrong = [_mean(jnp.square(one - other), valid) for one, other in pairs]
    square = [_mean(jnp.square(other), valid) for _, other in pairs]
    # Of several sizes, each counts with its values.
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
