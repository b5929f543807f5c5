"""Reparameterization: norms folded into adjacent matrices and kernels, with the same function."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import folding
from glm_edge.compress.layerwise.runner import (
    LayerwiseTransform,
    Replaced,
    StageContext,
    apply_layerwise,
)
from glm_edge.compress.quantize.parameter import relative_error
from glm_edge.compress.quantize.parameter import row as row_of
from glm_edge.compress.report import Report, Row
from glm_edge.compress.transform import Context, Result, register
from glm_edge.errors import RecipeError
from glm_edge.models.cnn import NORM_EPS
from glm_edge.params.tree import Params

NAME = "reparameterize"
STATISTICS = "batch_stats"
DENSE, POINT, IDENTITY = "branch_3x3", "branch_1x1", "branch_identity"
Leaves = Mapping[str, Any]


@register(NAME)
class Reparameterize(LayerwiseTransform):
    """Folds norms and merges parallel branches; the model's function is unchanged.

    - `glm_edge.models.cnn`, called with variables, `{"params": …, "batch_stats": …}`: every batch
      norm is folded into the convolution before it, and RepVGG's three branches become one 3x3
      kernel with a bias. The result is the model with `deploy` and its variables,
      `{"params": …}`. A masked kernel keeps its mask, except in RepVGG's branches.
    - A GLM or a standalone encoder: the weight of every RMS norm is folded into the columns of the
      matrices that read it, and becomes one. The norm before a tied head stays. Layer norms stay
      too, since columns cannot represent their shift.

    Reparameterize before quantizing.

        model, variables, report = ge.reparameterize()(cnn, variables)

    Raises:
      RecipeError: on call, the model is unsupported, is deployed already, has no statistics, or a
        weight is quantized.

    References:
      RepVGG: Making VGG-style ConvNets Great Again, https://arxiv.org/abs/2101.03697; Quantization
      and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference (folding of
      batch norms), https://arxiv.org/abs/1712.05877.
    """

    exact: ClassVar[bool] = True
    rounds: ClassVar[bool] = False
    needs_model: ClassVar[bool] = True
    takes_variables: ClassVar[bool] = True

    def compress_stage(self, work: StageContext) -> Replaced:
        replaced: dict[str, Any] = {}
        rows: list[Row] = []
        for fold in folding.folds(
            getattr(work.model, "config", None), f"{NAME}: {type(work.model).__name__}"
        ):
            norm = fold.producers[0]
            if fold.kind != "norm" or len(fold.producers) > 1 or norm not in work.leaves:
                continue
            factor = fold.spread(work.leaves[norm].astype(jnp.float32))
            for path in fold.consumers:
                leaf = work.leaves[path]
                _check_scales(path, leaf)
                replaced[path] = folding.multiply(leaf, factor)
                error = relative_error(leaf, replaced[path])
                rows.append(row_of(NAME, path, leaf, replaced[path], error, f"{norm} folded"))
            replaced[norm] = jnp.ones_like(work.leaves[norm])
        for path in work.selected:
            work.advance(path)
        return replaced, rows

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        if not hasattr(model, "deploy"):
            return apply_layerwise(self, model, params, context)
        if model.deploy:
            raise RecipeError(f"{NAME}: this {type(model).__name__} is deployed already")
        if STATISTICS not in params or "params" not in params:
            raise RecipeError(
                f'{NAME}: a {type(model).__name__} needs its variables, {{"params": …, '
                f'"{STATISTICS}": …}}; found {", ".join(map(repr, params)) or "nothing"}'
            )
        rows: list[Row] = []
        deployed = {"params": _deployed(params["params"], params[STATISTICS], "params", rows)}
        for done, row in enumerate(rows, start=1):
            context.advance(f"{NAME}: {row.path}", done, len(rows))
        statistics = boxes.count(params[STATISTICS])
        note = f"counts before include {statistics:,} running statistics, now part of the biases"
        return model.clone(deploy=True), deployed, Report.of(rows, params, deployed, notes=(note,))


reparameterize = Reparameterize


def fold_batch_norm(
    kernel: Any, bias: Array | None, norm: Leaves, statistics: Leaves, eps: float = NORM_EPS
) -> tuple[Any, Array]:
    """Fold a batch norm into the convolution (or product) before it.

    Args:
      kernel: array or `Masked` [..., out].
      bias: [out], or None.
      norm: `scale` and `bias`, [out] each.
      statistics: `mean` and `var`, [out] each.
      eps: epsilon of the norm.

    Returns:
      `(kernel, bias)` of an equivalent convolution without the norm.
    """
    # w' = w scale / sqrt(var + eps), b' = norm bias - (mean - b) scale / sqrt(var + eps).
    factor = norm["scale"] * jax.lax.rsqrt(statistics["var"] + eps)
    mean = statistics["mean"] if bias is None else statistics["mean"] - bias
    return folding.multiply(kernel, factor), norm["bias"] - factor * mean


def join_branches(*branches: tuple[Array, Array]) -> tuple[Array, Array]:
    """Add parallel size-preserving convolutions of equal stride to a single convolution.

    Args:
      *branches: pairs `(kernel, bias)`, [height, width, in / groups, out] with odd sizes, and
        [out].

    Returns:
      `(kernel, bias)` with the largest kernel size.
    """
    size = max(kernel.shape[0] for kernel, _ in branches)
    padded = []
    for kernel, _ in branches:
        border = (size - kernel.shape[0]) // 2
        padded.append(jnp.pad(kernel, ((border, border), (border, border), (0, 0), (0, 0))))
    biases = [bias for _, bias in branches]
    return sum(padded[1:], start=padded[0]), sum(biases[1:], start=biases[0])


def identity_kernel(channels: int, groups: int = 1) -> Array:
    """Build the identity 1x1 convolution, [1, 1, channels / groups, channels]."""
    inside = channels // groups
    return jnp.tile(jnp.eye(inside, dtype=jnp.float32), (1, groups))[None, None]


def _deployed(params: Any, statistics: Params, path: str, rows: list[Row]) -> Params:
    """Build the parameters of the deployed model, and append a row per folded norm to `rows`."""
    if DENSE in params:
        kernel, bias = _merged(params, statistics, path)
        action = "branches joined, norms folded"
        after: Params = {"merged": {"conv": {"kernel": kernel, "bias": bias}}}
    elif set(params) == {"conv", "norm"}:
        kernel, bias = _folded(params, statistics, path)
        action, after = "norm folded", {"conv": {"kernel": kernel, "bias": bias}}
    else:
        return {
            name: _deployed(child, statistics.get(name, {}), f"{path}/{name}", rows)
            if isinstance(child, Mapping)
            else child
            for name, child in params.items()
        }
    before, stored = boxes.stored_bytes((params, statistics)), boxes.stored_bytes(after)
    bits = 8 * stored / boxes.count(after)
    fraction = float(kernel.mask.mean()) if isinstance(kernel, boxes.Masked) else 1.0
    rows.append(Row(NAME, path, action, fraction, bits, before, stored))
    return after


def _folded(params: Params, statistics: Params, path: str) -> tuple[Any, Array]:
    kernel = params["conv"]["kernel"]
    _check_scales(f"{path}/conv/kernel", kernel)
    return fold_batch_norm(kernel, params["conv"].get("bias"), params["norm"], statistics["norm"])


def _merged(params: Params, statistics: Params, path: str) -> tuple[Array, Array]:
    branches = []
    for name in (DENSE, POINT):
        at = f"{path}/{name}"
        if isinstance(params[name]["conv"]["kernel"], boxes.Masked):
            raise RecipeError(
                f"{NAME}: {at} is masked, and masks of branches cannot merge; reparameterize first"
            )
        branches.append(_folded(params[name], statistics[name], at))
    if IDENTITY in params:
        inside, channels = branches[0][0].shape[-2:]
        kernel = identity_kernel(channels, channels // inside)
        branches.append(fold_batch_norm(kernel, None, params[IDENTITY], statistics[IDENTITY]))
    return join_branches(*branches)


def _check_scales(path: str, leaf: Any) -> None:
    if boxes.is_box(leaf) and not isinstance(leaf, boxes.Masked):
        raise RecipeError(f"{NAME}: {path} is quantized; reparameterize before quantizing")
