"""AdaRound: learned rounding of each layer on its calibration inputs."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress.layerwise.runner import (
    Replaced,
    StageContext,
    StageInputs,
)
from glm_edge.compress.layerwise.stages import MARKED_ROWS
from glm_edge.compress.quantize import parameter as leaves
from glm_edge.compress.quantize.options import Quantizer
from glm_edge.compress.quantize.solvers import scales as grids
from glm_edge.compress.quantize.solvers.adaround_solver import METHODS, Layer, learn_rounding
from glm_edge.compress.transform import check_whole, register
from glm_edge.errors import RecipeError
from glm_edge.params import Masked
from glm_edge.params.formats import PLAIN

NAME = "quantize.adaround"


@register(NAME)
class AdaRound(Quantizer):
    """Learns the rounding direction of each weight to reproduce the original layer's outputs.

    Layers are quantized one after the other. Each layer reads inputs from the quantized layers
    before it, and learns the original layer's outputs on the original inputs. An output row whose
    error does not fall below that of rounding to nearest keeps nearest rounding. Matrices without
    calibration inputs, such as embeddings, are rounded to nearest; the report counts them with the
    reason.

        recipe = ge.quantize.adaround("int4-g32", method="descent")
        model, params, report = recipe(model, params, calibration=batches)

    Attributes:
      format: format of the weights, such as `int4-g32`, see `glm_edge.params.Format`.
      where: see `glm_edge.quantize.rtn`, also for `scale`, `fallback_bits` and `stacked`.
      method: `adaround` trains a soft choice between two levels, then runs `descent`, a coordinate
        descent over the codes; `descent` alone is faster.
      steps: optimizer steps of `adaround`.
      learning_rate: learning rate of `adaround`.
      regularization: weight of the term that drives the choices of `adaround` to 0 or 1.
      sweeps: passes of `descent` over all columns.

    Raises:
      RecipeError: an option is invalid; on call, a pattern matches nothing or a quantized weight,
        columns do not divide into groups, or weights are not finite.
      DataError: calibration is missing or lacks a modality.

    References:
      Up or Down? Adaptive Rounding for Post-Training Quantization,
      https://arxiv.org/abs/2004.10568.
      QuantEase: Optimization-based Quantization for Language Models,
      https://arxiv.org/abs/2309.01885.
    """

    needs: ClassVar[str] = "both"
    needs_model: ClassVar[bool] = True
    unsupported: ClassVar[tuple[str, ...]] = (*PLAIN, "ternary34")

    method: str = "adaround"
    steps: int = 500
    learning_rate: float = 0.03
    regularization: float = 5.0
    sweeps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            known = ", ".join(METHODS)
            raise RecipeError(f"{NAME}: method must be one of {known}, not {self.method!r}")
        check_whole(NAME, steps=self.steps, sweeps=self.sweeps)
        if self.learning_rate <= 0.0 or self.regularization < 0.0:
            raise RecipeError(
                f"{NAME}: learning_rate must be positive, regularization not negative"
            )

    def compress_stage(self, work: StageContext) -> Replaced:
        rounding = self.config
        replaced: dict[str, Any] = {}
        dense: dict[str, Array] = {}
        rows = []
        originals = work.uncompressed
        for path in work.selected:
            leaf = work.leaves[path]
            format, layout = rounding.format_of(path, work.columns(path)), work.layouts[path]
            matrix = leaves.dense_rows(path, leaf, layout)
            sums = moments(work, path, dense)
            note = "fallback" if format is not rounding.format else ""
            if sums is None or path not in originals.leaves:
                replaced[path], error = leaves.quantize_leaf(
                    path, leaf, format, rounding.scale, layout
                )
                note = f"to nearest: {work.unseen(path)}"
            else:
                original = leaves.dense_rows(path, originals.leaves[path], layout)
                layer = layer_of(matrix, original, *sums)
                grid = grids.choose(matrix, format, rounding.scale)
                done = learn_rounding(
                    layer,
                    grid,
                    format,
                    self.method,
                    self.steps,
                    self.learning_rate,
                    self.regularization,
                    self.sweeps,
                )
                codes = done.codes
                if isinstance(leaf, Masked):
                    mask = layout.rows(leaf.mask)
                    codes = jnp.where(
                        mask, codes, grids.encode(jnp.zeros_like(matrix), grid, format)
                    )
                replaced[path] = leaves.box_of(path, leaf, codes, grid, format, layout)
                error = leaves.relative_error(leaf, replaced[path])
            # A dense array keeps the tree structure for which the stage was compiled.
            dense[path] = boxes.dense(replaced[path])
            rows.append(leaves.row(NAME, path, leaf, replaced[path], error, note))
            work.advance(path)
        return replaced, rows


adaround = AdaRound


def moments(work: StageContext, path: str, replaced: dict[str, Any]) -> tuple[Array, Array] | None:
    """Compute the means of `x x^T` and `x0 x^T` over the input rows of a weight.

    Args:
      work: context of the stage.
      path: path of the weight.
      replaced: parameters of the stage that are quantized already.

    Returns:
      Two matrices [I, I], with inputs `x` of the quantized model and `x0` of the original model.
      None without inputs. Padding is excluded.
    """
    total, count = None, 0
    originals = work.uncompressed
    for state, first in zip(work.states, originals.states, strict=True):
        now = _rows(dataclasses.replace(work, states=[state]), path, replaced)
        before = _rows(dataclasses.replace(originals, states=[first]), path, {})
        if now is None or before is None:
            continue
        sums = _products(now["rows"], before["rows"])
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        count += int(now["valid"].sum())
    return None if total is None else (total[0] / count, total[1] / count)


def _rows(view: StageInputs, path: str, replaced: dict[str, Any]) -> dict[str, Array] | None:
    return view.collect(MARKED_ROWS, replaced).get(path)


@jax.jit
def _products(now: Array, before: Array) -> tuple[Array, Array]:
    return now.T @ now, before.T @ now


@jax.jit
def layer_of(weight: Array, original: Array, gram: Array, cross: Array) -> Layer:
    """Build the statistics of a layer that should reproduce the original layer's outputs.

    Args:
      weight: `W`, float32 [O, I].
      original: weight `W0` of the original model, float32 [O, I].
      gram: mean of `x x^T`, [I, I].
      cross: mean of `x0 x^T`, [I, I].

    Returns:
      The layer, with the drift `W E[x x^T] - W0 E[x0 x^T]`.
    """
    return Layer(weight, gram, weight @ gram - original @ cross)
