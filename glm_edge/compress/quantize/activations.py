"""Static int8 grids for the inputs of quantized matrices."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from glm_edge.compress.quantize.leaves import row
from glm_edge.compress.quantize.options import spelled_out
from glm_edge.compress.rounding import activations as ranges
from glm_edge.compress.stages import RANGE, ROWS
from glm_edge.compress.stagewise import (
    Replaced,
    StageWork,
    apply_by_stage,
    register_stagewise,
)
from glm_edge.compress.transform import Context, Result, Transform, check_pattern
from glm_edge.errors import RecipeError
from glm_edge.params import Quantized
from glm_edge.params.tree import Params

NAME = "quantize.activations"


def activations(
    method: str = "minmax",
    percentile: float = 99.99,
    where: str | None = None,
    symmetric: bool = False,
) -> Transform:
    """Chooses a static int8 grid for the activations that meet each quantized matrix.

    A model computes on these grids when its `compute` is `int8_static`; put this after what rounds
    the weights. Matrices whose inputs are not seen (a tied head) keep a grid for each row.

    Args:
      method: `minmax`, `percentile`, `mse` or `entropy`, see
        `glm_edge.compress.rounding.activations.choose_range`.
      percentile: share of the values, in percent, that the method of that name keeps.
      where: regular expression searched in each path; None is every quantized matrix.
      symmetric: zero point zero.

    Returns:
      The transform; it needs calibration.

    Raises:
      RecipeError: an option has no meaning; on call, nothing that the pattern names is quantized,
        or activations are not finite.
      DataError: on call, calibration is missing.

    References:
      Integer Quantization for Deep Learning Inference, https://arxiv.org/abs/2004.09602.
    """
    check_pattern(NAME, "where", where)
    if method not in ranges.METHODS:
        known = ", ".join(ranges.METHODS)
        raise RecipeError(f"{NAME}: method must be one of {known}, not {method!r}")
    number = isinstance(percentile, int | float) and not isinstance(percentile, bool)
    if not number or not 50 < percentile <= 100:
        raise RecipeError(f"{NAME}: percentile must be above 50 and up to 100, not {percentile!r}")
    if not isinstance(symmetric, bool):
        raise RecipeError(f"{NAME}: symmetric must be True or False, not {symmetric!r}")
    return Transform(NAME, spelled_out(locals(), "known", "number"))


def _calibrate_stage(work: StageWork, method: str, percentile: float, symmetric: bool) -> Replaced:
    named = [path for path in work.named if isinstance(work.leaves[path], Quantized)]
    groups = [tuple(path for path in group if path in named) for group in work.readers()]
    # What reads the same rows gets the same grid, and is measured once.
    groups = [group for group in groups if group]
    firsts = [group[0] for group in groups]
    if not firsts:
        return {}, []
    seen = {}
    for path, found in work.collect(RANGE, paths=firsts).items():
        low, high = float(jnp.min(found["low"])), float(jnp.max(found["high"]))
        if not np.isfinite([low, high]).all():
            raise RecipeError(f"{NAME}: calibration gives {path} inputs that are not finite")
        seen[path] = ranges.widened(low, high, symmetric)
    counts = dict.fromkeys(firsts, 0)
    for view in work.batches() if method != "minmax" else ():
        for path, rows in view.collect(ROWS, paths=firsts).items():
            # int64, since a long calibration has more values than int32 counts.
            counts[path] = counts[path] + np.asarray(ranges.histogram(rows, *seen[path]), np.int64)
    replaced, rows = {}, []
    for group in groups:
        low, high = seen[group[0]]
        ends = ranges.choose_range(counts[group[0]], low, high, method, percentile, symmetric)
        scale, zero = ranges.int8_grid(*ends, symmetric)
        for path in group:
            before = work.leaves[path]
            after = before.replace(input_scale=jnp.asarray(scale), input_zero=jnp.asarray(zero))
            replaced[path] = after
            note = f"inputs {ends[0]:.4g} to {ends[1]:.4g}, seen {low:.4g} to {high:.4g}"
            rows.append(row(NAME, path, before, after, None, note))
    return replaced, rows


def _apply(model: nn.Module, params: Params, context: Context, **options: Any) -> Result:
    found = apply_by_stage(NAME, model, params, context, **options)
    if not found[2].rows:
        raise RecipeError(
            f"{NAME}: where={options['where']!r} names no quantized matrix whose inputs are seen; "
            "quantize first"
        )
    return found


register_stagewise(NAME, activations, _calibrate_stage, needs="inputs", rounds=False, apply=_apply)
