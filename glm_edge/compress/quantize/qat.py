"""Quantization-aware training with fake-quantized weights."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from glm_edge import params as boxes
from glm_edge.compress.distill.loop import train
from glm_edge.compress.distill.options import DistillOptions, as_teacher
from glm_edge.compress.layerwise.runner import layouts_in
from glm_edge.compress.options import Options, TrainOptions
from glm_edge.compress.quantize import parameter as leaves
from glm_edge.compress.quantize.options import QuantizeConfig, WeightTransform
from glm_edge.compress.quantize.solvers import scales as grids
from glm_edge.compress.quantize.solvers.scales import Grid
from glm_edge.compress.report import Report
from glm_edge.compress.transform import ARRAYS, Context, Result, check_pattern, register
from glm_edge.errors import RecipeError
from glm_edge.params import FakeQuantized, Masked, Quantized
from glm_edge.params.formats import PLAIN
from glm_edge.params.layouts import AS_ROWS, Layout
from glm_edge.params.patterns import compiled
from glm_edge.params.tree import Params

NAME = "quantize.qat"


@dataclass(frozen=True, kw_only=True, repr=False)
class Trainable(Options):
    """Parameters that quantization-aware training updates.

    Attributes:
      where: regular expression searched in each path; None means every quantized weight, and norms
        and biases under the same roots (`decoder`, `vision`, …).
      learned_scale: trains scales too.
      scale_rate: learning rate of scales, in units of `learning_rate` times the initial scale.

    Raises:
      RecipeError: `where` is not a regular expression, or `scale_rate` is not positive.
    """

    where: str | None = None
    learned_scale: bool = True
    scale_rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        check_pattern(name, "where", self.where)
        if self.scale_rate <= 0.0:
            raise RecipeError(f"{name}: scale_rate must be positive, not {self.scale_rate!r}")


@register(NAME)
class QAT(WeightTransform):
    """Trains fake-quantized weights, then quantizes them.

    Gradients pass straight through the rounding where it does not clip; scales learn as in learned
    step size quantization. The loss is that of `glm_edge.compress.distill`. A `Quantized` weight,
    as after GPTQ, starts from its dense values, and keeps its scales if it has the same format.
    Masked weights keep their zeros. The dense weights of the result equal those of the last forward
    pass, bit for bit.

        recipe = ge.quantize.qat("int4-g32", train=ge.TrainOptions(steps=1000))
        model, params, report = recipe(model, params, calibration=batches, rng=key)

    Attributes:
      format: format of the weights, such as `int4-g32`, see `glm_edge.params.Format`. Zero points
        keep their initial values.
      where: see `glm_edge.quantize.rtn`, also for `scale`, `fallback_bits` and `stacked`; None
        selects every matrix.
      trainable: trained parameters, see `glm_edge.compress.Trainable`.
      teacher: `(model, params)`; None means the input model of the chain, or no teacher if
        `alpha` is 0.
      train: steps, learning rate and further options, see `glm_edge.TrainOptions`.
      temperature: temperature of both predictions.
      alpha: weight of the teacher's loss, in 0..1; the labels' loss has weight `1 - alpha`.

    Raises:
      RecipeError: an option is invalid; on call, a pattern matches nothing, columns do not divide
        into groups, or weights or the loss are not finite.
      DataError: calibration is missing or malformed.

    References:
      Learned Step Size Quantization, https://arxiv.org/abs/1902.08153.
      LLM-QAT: Data-Free Quantization Aware Training, https://arxiv.org/abs/2305.17888.
    """

    needs_model: ClassVar[bool] = True
    unsupported: ClassVar[tuple[str, ...]] = PLAIN

    trainable: Trainable = Trainable()
    teacher: tuple[nn.Module, Params] | None = field(default=None, metadata=ARRAYS)
    train: TrainOptions = TrainOptions(steps=1000, warmup=0.05)
    temperature: float = 1.0
    alpha: float = 1.0

    def __post_init__(self) -> None:
        self._set(
            trainable=Trainable.of(NAME, "trainable", self.trainable),
            teacher=as_teacher(NAME, self.teacher),
            train=TrainOptions.of(NAME, "train", self.train),
        )
        super().__post_init__()
        DistillOptions(self.temperature, self.alpha).check(NAME)

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        rounding = self.config
        selected = frozenset(boxes.select(params, self.where))
        layouts = layouts_in(
            NAME, model, dict(boxes.path_items(params)), context.calibration, self.stacked
        )

        def prepare(path: str, leaf: Any) -> Any:
            return fake(path, leaf, rounding, layouts[path]) if path in selected else leaf

        student = boxes.map_with_path(prepare, params)
        wanted = _trains(selected, self.trainable.where)
        trainable, frozen = split(student, wanted, self.trainable.learned_scale)
        options = DistillOptions(self.temperature, self.alpha)
        done = train(
            NAME,
            model,
            trainable,
            frozen,
            self.teacher or (context.original if options.needs_teacher else None),
            self.train,
            context,
            lr_scale_of(trainable, self.trainable.scale_rate),
            options,
        )
        trained = boxes.combine(done.trainable, frozen)

        def finish(path: str, leaf: Any, before: Any) -> Any:
            if path in selected:
                return finalize(path, leaf, before, layouts[path])
            return leaf if boxes.is_box(leaf) else leaf.astype(before.dtype)

        old = dict(boxes.path_items(params))
        rounded = boxes.map_with_path(lambda path, leaf: finish(path, leaf, old[path]), trained)
        new = dict(boxes.path_items(rounded))
        rows = [
            leaves.row(
                NAME, path, old[path], new[path], leaves.relative_error(old[path], new[path])
            )
            for path in old
            if path in selected
        ]
        return model, rounded, Report.of(rows, params, rounded, curve=done.curve, notes=done.notes)


qat = QAT


def fake(path: str, leaf: Any, rounding: QuantizeConfig, layout: Layout = AS_ROWS) -> Any:
    """Box a parameter for quantization-aware training.

    Args:
      path: path of the parameter.
      leaf: array, `Masked` or `Quantized`.
      rounding: target format; a `Quantized` leaf of the same format keeps its scales.
      layout: layout of the parameter.

    Returns:
      `FakeQuantized`, inside a `Masked` for a masked weight.

    Raises:
      RecipeError: the weight is not finite, or its columns do not divide into groups.
    """
    format = rounding.format_of(path, layout.extent(leaf.shape)[1])
    matrix = leaves.dense_rows(path, leaf, layout)
    if isinstance(leaf, Quantized) and leaf.format == format:
        grid = Grid(leaf.scale, leaf.zero)
    else:
        grid = grids.choose(matrix, format, rounding.scale)
    dtype = str(leaves.leaf_dtype(leaf))
    box = boxes.fake_quantized(matrix, *grid, format, dtype=dtype)
    box = box.replace(**layout.kernel(leaf.shape))
    return boxes.mask(box, leaf.mask) if isinstance(leaf, Masked) else box


def split(
    student: Params, wanted: Callable[[str, Any], bool], learned_scale: bool
) -> tuple[Params, Params]:
    """Split a tree as `glm_edge.params.partition`, with selected leaves in the first tree only.

    Args:
      student: parameters, some of them `FakeQuantized`.
      wanted: function of path and leaf that returns True for trained parameters.
      learned_scale: also trains the scales of trained parameters.

    Returns:
      `(trainable, frozen)`, the arguments of `glm_edge.params.combine`.

    Raises:
      RecipeError: no parameter can train.
    """
    chosen = {path for path, leaf in boxes.path_items(student) if wanted(path, leaf)}
    trainable, frozen = boxes.partition(student)

    def trains_of(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return jax.tree.map(lambda _: None, leaf)
        return leaf if learned_scale else _without_scale(leaf)

    chosen_arrays = boxes.map_with_path(trains_of, trainable)
    if not jax.tree.leaves(chosen_arrays):
        raise RecipeError(f"{NAME}: where= of trainable= matches no trainable parameter")
    excluded = jax.tree.map(
        lambda before, after: before if after is None else None,
        trainable,
        chosen_arrays,
        is_leaf=lambda node: node is None,
    )
    return chosen_arrays, boxes.combine(excluded, frozen)


def _trains(selected: Collection[str], pattern: str | None) -> Callable[[str, Any], bool]:
    """Test for a match of the pattern, or a rounded weight with its norms and biases."""
    if pattern is not None:
        return lambda path, leaf: compiled(pattern).search(path)
    roots = {path.split("/", 1)[0] for path in selected}
    return lambda path, leaf: (
        path in selected or (path.split("/", 1)[0] in roots and not boxes.is_matrix(path, leaf))
    )


def _without_scale(leaf: Any) -> Any:
    if isinstance(leaf, Masked) and boxes.is_box(leaf.value):
        return leaf.replace(value=_without_scale(leaf.value))
    return leaf.replace(scale=None) if isinstance(leaf, FakeQuantized) else leaf


def lr_scale_of(trainable: Params, scale_rate: float) -> Params:
    """Compute factors of the learning rate: `scale_rate` times the value for scales, else one."""

    def lr_scale(path: tuple[Any, ...], array: Any) -> Any:
        field = getattr(path[-1], "name", None)
        return scale_rate * jnp.abs(array) if field == "scale" else jnp.float32(1.0)

    return jax.tree_util.tree_map_with_path(lr_scale, trainable)


def finalize(path: str, leaf: Any, before: Any, layout: Layout = AS_ROWS) -> Quantized:
    """Convert a trained box to a packed box with the same dense weight.

    Args:
      path: path of the parameter.
      leaf: `FakeQuantized`, or a `Masked` around it.
      before: original parameter, for its mask.
      layout: layout of the parameter.

    Returns:
      The packed box.

    Raises:
      RecipeError: the trained weight is not finite, or its format cannot represent the zeros of a
        mask.
    """
    box = leaf
    if isinstance(leaf, Masked):
        box = leaf.value
        matrix = leaves.as_rows(leaf, layout)
        box = box.replace(value=jnp.where(matrix == 0, 0.0, box.value))
    quantized = box.finalize()
    if not np.isfinite(np.float32(quantized.scale)).all():
        raise RecipeError(f"{path}: a scale exceeds the range of {box.format.scale_dtype}")
    return leaves.box_of(
        path,
        before,
        quantized.codes(),
        Grid(quantized.scale, quantized.zero),
        box.format,
        layout,
    )
