"""Distillation of the scales, norms and biases of a quantized model with fixed integers."""

from dataclasses import field
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from glm_edge import params as boxes
from glm_edge.compress.distill.loop import train
from glm_edge.compress.distill.options import DistillOptions, as_teacher
from glm_edge.compress.options import TrainOptions
from glm_edge.compress.quantize.parameter import relative_error, row
from glm_edge.compress.report import Report
from glm_edge.compress.transform import (
    ARRAYS,
    Context,
    Result,
    Transform,
    check_pattern,
    register,
)
from glm_edge.errors import RecipeError
from glm_edge.kernels.quantization import round_scale
from glm_edge.params import Quantized
from glm_edge.params.patterns import compiled
from glm_edge.params.tree import Params

NAME = "quantize.distill_scales"


@register(NAME)
class DistillScales(Transform):
    """Trains the scales of a quantized model on its teacher's predictions; integers stay fixed.

    Floating zero points train too. The loss is that of `glm_edge.compress.distill`. The learning
    rate of a scale is multiplied by its initial value. Trained arrays keep their stored types.

        recipe = ge.chain(ge.quantize.gptq("int4-g32"), ge.quantize.distill_scales())
        model, params, report = recipe(model, params, calibration=batches, rng=key)

    Attributes:
      where: regular expression searched in each path of the quantized weights; None selects all.
      norms: also trains norms and biases under the same roots (`decoder`, `vision`, …).
      teacher: `(model, params)`; None means the input model of the chain, or no teacher if
        `alpha` is 0.
      train: steps, learning rate and further options, see `glm_edge.TrainOptions`.
      temperature: temperature of both predictions.
      alpha: weight of the teacher's loss, in 0..1; the labels' loss has weight `1 - alpha`.

    Raises:
      RecipeError: an option is invalid; on call, no quantized weight matches, there is no teacher,
        or the loss is not finite.
      DataError: calibration is missing or malformed.

    References:
      EfficientQAT: Efficient Quantization-Aware Training for Large Language Models (its second
      phase), https://arxiv.org/abs/2407.11062.
    """

    needs_model: ClassVar[bool] = True

    where: str | None = field(default=None, kw_only=False)
    norms: bool = True
    teacher: tuple[nn.Module, Params] | None = field(default=None, metadata=ARRAYS)
    train: TrainOptions = TrainOptions()
    temperature: float = 1.0
    alpha: float = 1.0

    def __post_init__(self) -> None:
        self._set(
            teacher=as_teacher(NAME, self.teacher), train=TrainOptions.of(NAME, "train", self.train)
        )
        super().__post_init__()
        check_pattern(NAME, "where", self.where)
        DistillOptions(self.temperature, self.alpha).check(NAME)
        if self.train.weight_decay:
            raise RecipeError(f"{NAME}: scales have no decay; remove weight_decay from train=")

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        options = DistillOptions(self.temperature, self.alpha)
        if options.needs_teacher and self.teacher is None and context.original[1] is params:
            raise RecipeError(
                f"{NAME}: the model would be its own teacher; pass teacher=(model, params), or "
                "chain it after a quantizing transform"
            )
        old = dict(boxes.path_items(params))
        chosen = {
            path
            for path, leaf in old.items()
            if isinstance(leaf, Quantized) and compiled(self.where).search(path)
        }
        if not chosen:
            raise RecipeError(f"{NAME}: where={self.where!r} matches no quantized weight")
        roots = {path.split("/", 1)[0] for path in chosen} if self.norms else set()
        moving = chosen | {
            path
            for path, leaf in old.items()
            if path.split("/", 1)[0] in roots
            and not boxes.is_box(leaf)
            and not boxes.is_matrix(path, leaf)
        }
        floating, stored = boxes.partition(params, scales=True)
        trainable = _only(floating, moving)
        frozen = boxes.combine(_only(floating, set(old) - moving), stored)
        done = train(
            NAME,
            model,
            trainable,
            frozen,
            self.teacher or (context.original if options.needs_teacher else None),
            self.train,
            context,
            jax.tree_util.tree_map_with_path(_lr_scale, trainable),
            options,
        )
        narrowed = jax.tree_util.tree_map_with_path(_stored, done.trainable, trainable)
        _check_finite(narrowed)
        tuned = boxes.combine(narrowed, frozen)
        rows = [
            row(NAME, path, old[path], leaf, relative_error(old[path], leaf), "scales trained")
            for path, leaf in boxes.path_items(tuned)
            if path in chosen
        ]
        return model, tuned, Report.of(rows, params, tuned, curve=done.curve, notes=done.notes)


distill_scales = DistillScales


def _only(tree: Params, paths: set[str]) -> Params:
    """Replace the arrays at all other paths by None."""
    return boxes.map_with_path(
        lambda path, leaf: leaf if path in paths else jax.tree.map(lambda _: None, leaf), tree
    )


def _lr_scale(path: tuple[Any, ...], array: Any) -> Any:
    return jnp.abs(array.astype(jnp.float32)) if _is_scale(path) else jnp.float32(1.0)


def _stored(path: tuple[Any, ...], array: Any, before: Any) -> Any:
    if _is_scale(path):
        return round_scale(array, str(before.dtype))
    return array.astype(before.dtype)


def _is_scale(path: tuple[Any, ...]) -> bool:
    return getattr(path[-1], "name", None) == "scale"


def _check_finite(trained: Params) -> None:
    for path, leaf in boxes.path_items(trained):
        if not all(bool(jnp.isfinite(array).all()) for array in jax.tree.leaves(leaf)):
            raise RecipeError(f"{path}: trained values exceed the range of their type")
