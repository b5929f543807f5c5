"""Equivalent scaling: factors per channel that move between matrices without changing the function.

A norm, a value projection or the `up` half of a gated network produces channels that linear maps
consume. Dividing the producer of a channel and multiplying the columns that consume it by the same
factor leaves the model's function unchanged. No factor can move through GELU, which is between
`fc1` and `fc2`, and between a projector's norm and its network. Queries and keys are multiplied
with each other, not with a weight, so their channels have no fold.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge import params as boxes
from glm_edge.configs import (
    DecoderConfig,
    GLMConfig,
    SpeechConfig,
    TextConfig,
    VisionConfig,
)
from glm_edge.configs.architecture import ModelConfig
from glm_edge.errors import RecipeError

KINDS = ("norm", "value", "neurons", "linear")
Leaves = Mapping[str, Any]


@dataclass(frozen=True)
class Fold:
    """One set of channels, with the parameters that produce and consume them.

    Attributes:
      kind: `norm` (of the layer's input), `value` (of attention), `neurons` (the `up` half of a
        gated network) or `linear` (one matrix follows another).
      producers: paths of vectors and matrices; their rows from `start` produce the channels.
      start: first producing row.
      consumers: paths of matrices `[out, columns]`.
      blocks: repetition of channels in columns, `(count, repeats, width)`. Columns
        `width * (repeats * i + r) + c`, for every `r < repeats`, read channel `width * i + c`.
    """

    kind: str
    producers: tuple[str, ...]
    start: int
    consumers: tuple[str, ...]
    blocks: tuple[int, int, int]

    @property
    def channels(self) -> int:
        """Count of channels, and of factors."""
        return self.blocks[0] * self.blocks[2]

    def spread(self, factor: Array) -> Array:
        """Expand factors of the channels, [channels], to the columns, [columns]."""
        return _spread(factor, self.blocks)

    def repeated(self, columns: Array) -> Array:
        """Group values of the columns, [columns], by channel, [repeats, channels]."""
        return _repeated(columns, self.blocks)

    def within(self, leaves: Leaves) -> bool:
        """Test that `leaves` contains all parameters as arrays or `Masked`."""
        return all(
            path in leaves and _scales(leaves[path]) for path in (*self.producers, *self.consumers)
        )


@dataclass(frozen=True)
class Residual:
    """Parameters around a decoder's residual stream, which a rotation changes together.

    Attributes:
      reads: pairs `(norm, matrices)` of the path of an RMS norm's weight, and the paths of the
        matrices [out, D] that read its output.
      writes: paths of matrices [D, in] whose products are added to the stream.
      tables: paths of arrays [..., D] whose rows are added to the stream.
    """

    reads: tuple[tuple[str, tuple[str, ...]], ...]
    writes: tuple[str, ...]
    tables: tuple[str, ...]


def folds(config: ModelConfig | None, where: str = "model") -> tuple[Fold, ...]:
    """List every fold of a model, in the order of its layers.

    Within a layer, folds of matrices come before folds of norms, so that factors of a norm are
    computed from the final matrices.

    Args:
      config: configuration of a GLM or a standalone encoder.
      where: transform and class of the model for messages.

    Returns:
      The folds, with paths of the model's parameters.

    Raises:
      RecipeError: no folds are known for this class of model.
    """
    if isinstance(config, VisionConfig):
        return _of_vision(config, "", None)
    if isinstance(config, SpeechConfig):
        return _of_speech(config, "")
    if isinstance(config, TextConfig):
        return _of_text(config)
    if not isinstance(config, GLMConfig):
        raise RecipeError(
            f"{where}: no factor is known to move between its matrices; supported are the GLMs and "
            "the encoders of glm_edge.models"
        )
    all_folds: tuple[Fold, ...] = ()
    if config.vision is not None:
        all_folds += _of_vision(config.vision, "vision/", config.decoder.hidden_size)
    if config.speech is not None:
        all_folds += _of_speech(config.speech, "speech/")
    for layer in range(config.decoder.num_layers):
        all_folds += _of_decoder_layer(config.decoder, layer)
    if not config.decoder.tie_embeddings:
        all_folds += (_norm("decoder/norm", ("head/weight",), config.decoder.hidden_size),)
    return all_folds


def residual(config: ModelConfig | None, where: str = "model") -> Residual:
    """List the parameters around the residual stream of a GLM's decoder.

    Args:
      config: configuration of a GLM with an untied head.
      where: transform and class of the model for messages.

    Returns:
      The parameters.

    Raises:
      RecipeError: the stream cannot be rotated; the message states the reason.
    """
    if not isinstance(config, GLMConfig):
        encoder = isinstance(config, VisionConfig | SpeechConfig | TextConfig)
        instead = "; pass residual=False, encoders=True to rotate the values of its heads alone"
        raise RecipeError(
            f"{where}: only a GLM of glm_edge.models has a residual stream that can be rotated"
            f"{instead if encoder else ''}"
        )
    if config.decoder.sandwich_norm:
        raise RecipeError(
            f"{config.name}: norms after attention and feed-forward (sandwich_norm) scale the "
            "channels that are added to the residual stream, so it cannot be rotated; "
            "residual=False still rotates heads"
        )
    if config.decoder.tie_embeddings:
        raise RecipeError(
            f"{config.name}: the final norm folds into the head, which this model shares with its "
            "embedding (tie_embeddings); rotate it in memory, which unties the head, or pass "
            "residual=False"
        )
    tables, writes = ["embed/weight"], []
    if config.vision is not None:
        _check_projector(config.name, "vision", config.vision)
        writes += ["vision/projector/mlp/down_proj/weight"]
        tables += ["vision/begin", "vision/end"] if config.vision.boundary_embeddings else []
        tables += ["vision/row", "vision/column"] if config.vision.separable_positions else []
    if config.speech is not None:
        _check_projector(config.name, "speech", config.speech)
        writes, tables = [*writes, "speech/linear_2/weight"], [*tables, "speech/linear_2/bias"]
    reads: list[tuple[str, tuple[str, ...]]] = []
    for index in range(config.decoder.num_layers):
        layer = f"decoder/layers/{index}"
        qkv = tuple(f"{layer}/attention/{name}_proj/weight" for name in "qkv")
        reads.append((f"{layer}/input_norm/weight", qkv))
        reads.append((f"{layer}/post_attention_norm/weight", (f"{layer}/mlp/gate_up_proj/weight",)))
        writes += [f"{layer}/attention/o_proj/weight", f"{layer}/mlp/down_proj/weight"]
    reads.append(("decoder/norm/weight", ("head/weight",)))
    return Residual(tuple(reads), tuple(writes), tuple(tables))


def _check_projector(name: str, encoder: str, config: VisionConfig | SpeechConfig) -> None:
    if not config.projector_size:
        raise RecipeError(
            f"{name}: its {encoder} encoder has no projector, so its norm writes to the residual "
            "stream, which then cannot be rotated; residual=False still rotates heads"
        )


def move(fold: Fold, leaves: Leaves, factor: Array) -> dict[str, Any]:
    """Divide producers by a factor and multiply the consumers' columns by it.

    A norm in a narrow type rounds the quotient. Consumers are multiplied by the rounded ratio, so
    that the function stays exact.

    Args:
      fold: channels to scale.
      leaves: arrays or `Masked` by path.
      factor: [channels], positive.

    Returns:
      The changed leaves by path, in their original types.
    """
    factor = jnp.asarray(factor, jnp.float32)
    changed = {path: divide_rows(leaves[path], fold.start, factor) for path in fold.producers}
    if fold.kind == "norm":
        factor = _stored_ratio(leaves[fold.producers[0]], changed[fold.producers[0]], factor)
    columns = fold.spread(factor)
    return changed | {path: multiply(leaves[path], columns) for path in fold.consumers}


def divide_rows(leaf: Any, start: int, factor: Array) -> Any:
    """Divide the rows of a matrix, or entries of a vector, from `start` on."""
    return multiply(leaf, _divisors(factor, start, leaf.shape))


@functools.partial(jax.jit, static_argnames=("start", "shape"))
def _divisors(factor: Array, start: int, shape: tuple[int, ...]) -> Array:
    """Compute one over the factor at the rows from `start` on, else one, [rows, 1, …]."""
    rows = jnp.ones(shape[0], jnp.float32).at[start : start + factor.size].divide(factor)
    return rows.reshape(-1, *[1] * (len(shape) - 1))


@functools.partial(jax.jit, static_argnames="blocks")
def _spread(factor: Array, blocks: tuple[int, int, int]) -> Array:
    channels = jnp.reshape(factor, (blocks[0], 1, blocks[2]))
    return jnp.broadcast_to(channels, blocks).reshape(-1)


@functools.partial(jax.jit, static_argnames="blocks")
def _repeated(columns: Array, blocks: tuple[int, int, int]) -> Array:
    return jnp.moveaxis(jnp.reshape(columns, blocks), 1, 0).reshape(blocks[1], -1)


@jax.jit
def multiply(leaf: Any, factor: Array) -> Any:
    """Multiply an array or `Masked` by a broadcast factor in float32; the type stays."""
    values = leaf.value if isinstance(leaf, boxes.Masked) else leaf
    scaled = (values.astype(jnp.float32) * factor).astype(values.dtype)
    return leaf.replace(value=scaled) if isinstance(leaf, boxes.Masked) else scaled


@jax.jit
def _stored_ratio(before: Array, after: Array, factor: Array) -> Array:
    wide = before.astype(jnp.float32), after.astype(jnp.float32)
    usable = (wide[0] != 0) & (wide[1] != 0) & jnp.isfinite(wide[1])
    return jnp.where(usable, wide[0] / jnp.where(usable, wide[1], 1.0), factor)


def _scales(leaf: Any) -> bool:
    return isinstance(leaf, boxes.Masked) or not boxes.is_box(leaf)


def _norm(
    norm: str, consumers: tuple[str, ...], width: int, bias: bool = False, repeats: int = 1
) -> Fold:
    names = ("weight", "bias") if bias else ("weight",)
    producers = tuple(f"{norm}/{name}" for name in names)
    return Fold("norm", producers, 0, consumers, (1, repeats, width))


def _linear(producer: str, bias: bool) -> tuple[str, ...]:
    return (f"{producer}/weight", f"{producer}/bias") if bias else (f"{producer}/weight",)


def _attention(
    layer: str, width: int, layer_norm: bool, bias: bool, heads: tuple[int, int, int]
) -> tuple[Fold, ...]:
    attention = f"{layer}/attention"
    read = tuple(f"{attention}/{name}_proj/weight" for name in "qkv")
    values = _linear(f"{attention}/v_proj", bias)
    return (
        Fold("value", values, 0, (f"{attention}/o_proj/weight",), heads),
        _norm(f"{layer}/input_norm", read, width, layer_norm),
    )


def _gated(mlp: str, neurons: int, bias: bool) -> Fold:
    up = _linear(f"{mlp}/gate_up_proj", bias)
    return Fold("neurons", up, neurons, (f"{mlp}/down_proj/weight",), (1, 1, neurons))


def _of_decoder_layer(config: DecoderConfig, index: int) -> tuple[Fold, ...]:
    layer, width = f"decoder/layers/{index}", config.hidden_size
    kv_heads = config.kv_heads(index)
    heads = (kv_heads, config.heads(index) // kv_heads, config.head_dim)
    return (
        *_attention(layer, width, False, config.attention_bias, heads),
        _gated(f"{layer}/mlp", config.neurons(index), False),
        _norm(f"{layer}/post_attention_norm", (f"{layer}/mlp/gate_up_proj/weight",), width),
    )


def _of_vision(config: VisionConfig, root: str, features: int | None) -> tuple[Fold, ...]:
    width, layer_norm = config.hidden_size, config.norm == "layer"
    vision_folds: list[Fold] = []
    for index in range(config.num_layers):
        layer = f"{root}layers/{index}"
        heads = (config.heads(index), 1, config.head_size)
        first = "gate_up_proj" if config.gated_mlp else "fc1"
        vision_folds += _attention(layer, width, layer_norm, config.attention_bias, heads)
        if config.gated_mlp:
            vision_folds += (_gated(f"{layer}/mlp", config.neurons(index), config.projection_bias),)
        read = (f"{layer}/mlp/{first}/weight",)
        vision_folds += (_norm(f"{layer}/post_attention_norm", read, width, layer_norm),)
    # Without a projector, the normed patches are the tower's output.
    if not config.projector_size:
        return tuple(vision_folds)
    if features is not None:
        merged = _linear(f"{root}merge", True)
        blocks = (1, 1, features)
        vision_folds += (Fold("linear", merged, 0, (f"{root}projector/proj/weight",), blocks),)
    vision_folds += (_gated(f"{root}projector/mlp", config.projector_size, False),)
    if not config.pooling_head:
        repeats = config.merge_size**2
        vision_folds += (
            _norm(f"{root}norm", (f"{root}merge/weight",), width, layer_norm, repeats),
        )
    return tuple(vision_folds)


def _of_speech(config: SpeechConfig, root: str) -> tuple[Fold, ...]:
    width = config.hidden_size
    speech_folds: list[Fold] = []
    for index in range(config.num_layers):
        layer, shared = f"{root}layers/{index}", config.kv_heads(index)
        heads = (shared, config.heads(index) // shared, config.head_size)
        speech_folds += _attention(layer, width, True, True, heads)
        speech_folds += (
            _norm(f"{layer}/post_attention_norm", (f"{layer}/fc1/weight",), width, True),
        )
    if config.projector_size:
        read = (f"{root}linear_1/weight",)
        speech_folds += (_norm(f"{root}norm", read, width, True, config.merge_size),)
    return tuple(speech_folds)


def _of_text(config: TextConfig) -> tuple[Fold, ...]:
    # Post-norm layers: the output of a norm is also the residual stream, so norms have no fold.
    return tuple(
        Fold(
            "value",
            _linear(f"layers/{i}/v_proj", True),
            0,
            (f"layers/{i}/o_proj/weight",),
            (config.heads(i), 1, config.head_size),
        )
        for i in range(config.num_layers)
    )
