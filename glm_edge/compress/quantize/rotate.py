"""QuaRot: rotation of hidden states, which spreads outliers for low-bit formats."""

import dataclasses
import zlib
from dataclasses import field
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import folding
from glm_edge.compress.layerwise.runner import (
    LayerwiseTransform,
    Replaced,
    StageContext,
    apply_layerwise,
)
from glm_edge.compress.layerwise.stages import Leaves
from glm_edge.compress.quantize.parameter import BAND, row
from glm_edge.compress.quantize.solvers import hadamard
from glm_edge.compress.quantize.solvers.hadamard import Rotation
from glm_edge.compress.report import Row
from glm_edge.compress.transform import Context, Result, register
from glm_edge.configs import GLMConfig, SpeechConfig, TextConfig, VisionConfig
from glm_edge.errors import RecipeError
from glm_edge.params.tree import Params

NAME = "quantize.rotate"


@register(NAME)
class Rotate(LayerwiseTransform):
    """Rotates the decoder's residual stream and the values of its heads; the function is unchanged.

    Norm weights are folded into the matrices that follow and become ones, since only a norm without
    weights commutes with a rotation. Matrices that write to the residual stream (embedding, output
    and down projections, the encoders' last matrices and tables) are rotated; matrices that read it
    are rotated back. A tied model receives an untied head, `head/weight`, because the final norm
    folds into the head but not the embedding. Rotate before quantizing and pruning.

        recipe = ge.chain(ge.quantize.rotate(), ge.quantize.rtn("int4-g32"))
        model, params, report = recipe(model, params)

    Attributes:
      residual: rotates the residual stream; impossible with norms after attention and feed-forward
        (`sandwich_norm`).
      heads: rotates the values of each key/value head.
      encoders: rotates the values of the encoders' heads too.
      seed: seed of the random rotations.

    Raises:
      RecipeError: an option is invalid; on call, the model cannot be rotated, or is pruned or
        quantized already.

    References:
      QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, https://arxiv.org/abs/2404.00456.
    """

    exact: ClassVar[bool] = True
    rounds: ClassVar[bool] = False
    needs_model: ClassVar[bool] = True

    residual: bool = field(default=True, kw_only=False)
    heads: bool = True
    encoders: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.residual or self.heads or self.encoders):
            raise RecipeError(f"{NAME}: nothing to rotate; choose residual, heads or encoders")
        if not 0 <= self.seed < 2**32:
            raise RecipeError(
                f"{NAME}: seed must be an integer in 0..2^32 - 1, not {self.seed!r:.60}"
            )

    def compress_stage(self, work: StageContext) -> Replaced:
        config: Any = getattr(work.model, "config", None)
        leaves = dict(work.leaves)
        key = jax.random.key(self.seed)
        notes: dict[str, list[str]] = {}
        where = f"{NAME}: {type(work.model).__name__}"
        if self.residual:
            stream = folding.residual(config, where)
            _rotate_residual(stream, config.decoder.hidden_size, key, leaves, notes)
        for fold in folding.folds(config, where):
            inside = fold.consumers[0] in leaves and fold.kind == "value"
            if inside and (
                self.heads if fold.producers[0].startswith("decoder/") else self.encoders
            ):
                _rotate_values(fold, key, leaves, notes)
        rows = [_row(path, work.leaves[path], leaves[path], notes[path]) for path in notes]
        for path in work.selected:
            work.advance(path)
        return {path: leaves[path] for path in notes}, rows

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        config = getattr(model, "config", None)
        encoder = isinstance(config, VisionConfig | SpeechConfig | TextConfig)
        if encoder and not (self.residual or self.encoders):
            raise RecipeError(
                f"{NAME}: {type(model).__name__} is an encoder, and heads= rotates only decoders; "
                "pass encoders=True"
            )
        if not (self.residual and isinstance(config, GLMConfig)):
            return apply_layerwise(self, model, params, context)
        folding.residual(_untied(config))
        if not config.decoder.tie_embeddings:
            return apply_layerwise(self, model, params, context)
        embedding = params["embed"]["weight"]
        _check_plain("embed/weight", embedding)
        # A tied model is untied first.
        own_head = model.clone(config=_untied(config))
        # A copy of the buffer, since donating one parameter must not invalidate the other.
        with_head = {**params, "head": {"weight": jnp.array(embedding, copy=True)}}
        model, rotated, report = apply_layerwise(self, own_head, with_head, context)
        note = "the tied head became a separate matrix"
        totals: dict[str, Any] = {
            "bytes_before": boxes.stored_bytes(params),
            "count_before": boxes.count(params),
            "notes": (*report.notes, note),
        }
        return model, rotated, dataclasses.replace(report, **totals)


rotate = Rotate


def _untied(config: GLMConfig) -> GLMConfig:
    decoder = dataclasses.replace(config.decoder, tie_embeddings=False)
    return dataclasses.replace(config, decoder=decoder)


def _rotate_residual(
    stream: folding.Residual, width: int, key: Array, leaves: Leaves, notes: dict[str, list[str]]
) -> None:
    rotation = hadamard.random_rotation(key, width)
    for norm, matrices in stream.reads:
        if norm not in leaves:
            continue
        _check_plain(norm, leaves[norm])
        weight = leaves[norm].astype(jnp.float32)
        for path in matrices:
            _check_plain(path, leaves[path])
            leaves[path] = _by_bands(leaves[path], rotation, weight)
            notes.setdefault(path, []).append("norm folded, columns rotated")
        leaves[norm] = jnp.ones_like(leaves[norm])
        notes.setdefault(norm, []).append("folded")
    for path in stream.writes:
        if path in leaves:
            _check_plain(path, leaves[path])
            leaves[path] = _turn_rows(leaves[path], rotation)
            notes.setdefault(path, []).append("rows rotated")
    for path in stream.tables:
        if path in leaves:
            _check_plain(path, leaves[path])
            leaves[path] = _by_bands(leaves[path], rotation)
            notes.setdefault(path, []).append("rotated")


def _rotate_values(
    fold: folding.Fold, key: Array, leaves: Leaves, notes: dict[str, list[str]]
) -> None:
    count, repeats, width = fold.blocks
    # Each layer has its own rotation, equal in memory and in streaming.
    layer_key = jax.random.fold_in(key, zlib.crc32(fold.consumers[0].encode()))
    rotation = hadamard.random_rotation(layer_key, width)
    for path in fold.producers:
        leaf = leaves[path]
        _check_plain(path, leaf)
        by_head = leaf.reshape(count, width, -1)
        leaves[path] = _turn_middle(by_head, rotation).reshape(leaf.shape).astype(leaf.dtype)
        notes.setdefault(path, []).append("values of each head rotated")
    for path in fold.consumers:
        leaf = leaves[path]
        _check_plain(path, leaf)
        by_head = leaf.reshape(leaf.shape[0], count * repeats, width)
        turned = hadamard.rotate(by_head, rotation)
        leaves[path] = turned.reshape(leaf.shape).astype(leaf.dtype)
        notes.setdefault(path, []).append("columns of each head rotated")


def _by_bands(leaf: Array, rotation: Rotation, norm: Array | None = None) -> Array:
    """Multiply rows by the norm's weight and the rotation in float32, in bands of rows."""
    rows = leaf.reshape(-1, leaf.shape[-1])
    band = max(1, BAND // rows.shape[1])
    parts = [_turned(rows[i : i + band], rotation, norm) for i in range(0, len(rows), band)]
    turned = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    return turned.reshape(leaf.shape)


@jax.jit
def _turned(rows: Array, rotation: Rotation, norm: Array | None) -> Array:
    widened = rows.astype(jnp.float32)
    widened = widened if norm is None else widened * norm
    return hadamard.rotate(widened, rotation).astype(rows.dtype)


@jax.jit
def _turn_rows(matrix: Array, rotation: Rotation) -> Array:
    return hadamard.rotate(matrix.T, rotation).T.astype(matrix.dtype)


def _turn_middle(stack: Array, rotation: Rotation) -> Array:
    return jnp.swapaxes(hadamard.rotate(jnp.swapaxes(stack, -1, -2), rotation), -1, -2)


def _check_plain(path: str, leaf: Any) -> None:
    if isinstance(leaf, boxes.Masked):
        raise RecipeError(f"{NAME}: {path} is pruned, and zeros do not stay; rotate, then prune")
    if boxes.is_box(leaf):
        raise RecipeError(f"{NAME}: {path} is quantized; rotate before quantizing")
    if not np.isfinite(np.asarray(leaf)).all():
        raise RecipeError(f"{NAME}: {path}: NaN or infinity in the weights")


def _row(path: str, before: Array, after: Array, done: list[str]) -> Row:
    note = ", ".join(done)
    if after.ndim == 2:
        change = f"{float(hadamard.kurtosis(before)):.2f} -> {float(hadamard.kurtosis(after)):.2f}"
        note = f"{note}, kurtosis {change}"
    return row(NAME, path, before, after, None, note)
