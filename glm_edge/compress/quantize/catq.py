"""CAT-Q: ternary weights by learned modulation and softened ternarization, block by block."""

from dataclasses import field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress.layerwise.runner import Replaced, StageContext
from glm_edge.compress.layerwise.stages import Leaves
from glm_edge.compress.options import TrainOptions
from glm_edge.compress.quantize import parameter as leaves
from glm_edge.compress.quantize.blockwise import check_training, train_block
from glm_edge.compress.quantize.options import Quantizer
from glm_edge.compress.quantize.qat import split
from glm_edge.compress.quantize.solvers import scales as grids
from glm_edge.compress.quantize.solvers.softened import SHARPNESS, Softened
from glm_edge.compress.transform import register
from glm_edge.errors import RecipeError
from glm_edge.params import Format, Masked
from glm_edge.params.formats import QTYPES
from glm_edge.params.layouts import Layout

NAME = "quantize.catq"
# Learning rate of weights, in units of `learning_rate` times the mean scale of their matrix.
_WEIGHT_RATE = 0.1


@register(NAME)
class CATQ(Quantizer):
    """Trains scale, offset and threshold of each ternary group through a hardening transition.

    Blocks are trained one after the other to reproduce the outputs of the original block, as in
    `glm_edge.quantize.blockwise`. A weight first passes unchanged. During the first `softened`
    steps it moves to one of three levels along a transition that becomes steeper. The remaining
    steps train on hard levels. The paper calibrates with 512 samples.

        recipe = ge.quantize.catq("ternary-g32", train=ge.TrainOptions(steps=400))
        model, params, report = recipe(model, params, calibration=batches, rng=key)

    Attributes:
      format: `ternary` with any grouping. An affine format stores the learned offset; a symmetric
        one uses it to choose codes only, as published.
      where: see `glm_edge.quantize.rtn`, also for `scale` (of the initial grid), `fallback_bits`
        and `stacked`.
      weights: trains the weights too; the paper trains a low-rank update.
      softened: fraction of the steps with the transition, gamma of the paper.
      sharpness: steepness at the end of the transition, `s_0` of the paper.
      train: `steps` per block, `learning_rate`, `warmup` and `compute` of `glm_edge.TrainOptions`.

    Raises:
      RecipeError: an option is invalid; on call, a pattern matches nothing or a quantized weight,
        columns do not divide into groups, or a loss is not finite.
      DataError: calibration is missing or lacks a modality.

    References:
      CAT-Q: Cost-efficient and Accurate Ternary Quantization for LLMs,
      https://arxiv.org/abs/2606.26650. Its window of several layers is one block here.
    """

    needs: ClassVar[str] = "both"
    needs_model: ClassVar[bool] = True
    unsupported: ClassVar[tuple[str, ...]] = tuple(q for q in QTYPES if q != "ternary")

    format: Format | str = field(default=Format("ternary"), kw_only=False)
    weights: bool = True
    softened: float = 0.8
    sharpness: float = SHARPNESS
    train: TrainOptions = TrainOptions(steps=400, learning_rate=0.01)

    def __post_init__(self) -> None:
        self._set(train=TrainOptions.of(NAME, "train", self.train))
        super().__post_init__()
        check_training(NAME, self.train)
        if not 0.0 < self.softened <= 1.0:
            raise RecipeError(f"{NAME}: softened must be in 0..1 and not 0, not {self.softened!r}")
        if self.sharpness <= 0.0:
            raise RecipeError(f"{NAME}: sharpness must be positive, not {self.sharpness!r}")

    def compress_stage(self, work: StageContext) -> Replaced:
        if not work.selected:
            return {}, []
        formats = {p: self.config.format_of(p, work.columns(p)) for p in work.selected}
        student = dict(work.leaves)
        replaced: Leaves = {}
        rows = []
        learned = {path for path, format in formats.items() if format.qtype == "ternary"}
        for path in learned:
            student[path] = self._softened(path, student[path], work.layouts[path])
        if learned:
            trainable, frozen = split(student, lambda path, _: path in learned, True)
            trained, losses = train_block(
                NAME, work, trainable, frozen, _rates(student, trainable), self.train, 0.0, self._at
            )
            student = boxes.combine(trained, frozen)
        for path in work.selected:
            before, layout = work.leaves[path], work.layouts[path]
            if path in learned:
                box = student[path].value if isinstance(before, Masked) else student[path]
                mask = layout.rows(before.mask) if isinstance(before, Masked) else None
                codes, grid = box.hardened(mask)
                replaced[path] = leaves.box_of(path, before, codes, grid, formats[path], layout)
                note = f"block error {losses[1]:.2g}"
            else:
                replaced[path], _ = leaves.quantize_leaf(
                    path, before, formats[path], self.scale, layout
                )
                note = "fallback"
            error = leaves.relative_error(before, replaced[path])
            rows.append(leaves.row(NAME, path, before, replaced[path], error, note))
            work.advance(path)
        return replaced, rows

    def _softened(self, path: str, leaf: Any, layout: Layout) -> Any:
        format = self.config.format
        matrix = leaves.dense_rows(path, leaf, layout)
        grid = grids.choose(matrix, format, self.scale)
        dtype = str(leaves.leaf_dtype(leaf))
        box = Softened.of(matrix, grid, format, self.weights, self.sharpness, dtype)
        box = box.replace(**layout.kernel(leaf.shape))
        return Masked(box, leaf.mask) if isinstance(leaf, Masked) else box

    def _at(self, frozen: Leaves, done: float) -> Leaves:
        """Set the hardness of every weight after a fraction of the steps."""
        hardness = min(done / self.softened, 1.0)
        return {path: _hardened(leaf, hardness) for path, leaf in frozen.items()}


catq = CATQ


def _hardened(leaf: Any, hardness: float) -> Any:
    if isinstance(leaf, Masked) and isinstance(leaf.value, Softened):
        return leaf.replace(value=_hardened(leaf.value, hardness))
    if not isinstance(leaf, Softened):
        return leaf
    return leaf.replace(hardness=jnp.full(leaf.hardness.shape, hardness, jnp.float32))


def _rates(student: Leaves, trainable: Leaves) -> Leaves:
    """Compute factors of the learning rate: one for factors, and the mean scale for weights."""

    def rate(path: tuple[Any, ...], _: Array) -> Array:
        name = getattr(path[-1], "name", None)
        if name != "value":
            return jnp.float32(1.0)
        leaf = student[path[0].key]
        box = leaf.value if isinstance(leaf, Masked) else leaf
        return _WEIGHT_RATE * jnp.mean(box.scale)

    return jax.tree_util.tree_map_with_path(rate, trainable)
