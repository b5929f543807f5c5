"""Work of a model: operations and bytes of a decoded token, a prompt, an image and a recording.

Operations are those that `ge.cost.flops` counts, two per multiplication by a weight. Bytes are the
stored bytes of `compress.allocate.knapsack.bytes_with`, so packed codes, scales and zero points.

References:
  LLM Inference Unveiled: Survey and Roofline Model Insights, https://arxiv.org/abs/2402.16363.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from glm_edge import params as boxes
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.compress import cost
from glm_edge.compress.allocate.knapsack import bytes_with
from glm_edge.configs import GLMConfig
from glm_edge.errors import ConfigError, DataError
from glm_edge.models.glm import init_cache
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Format
from glm_edge.params.tree import Params, nested

EMBEDDING = "embed/"
HEAD = "head/"
ACTIVATION_BYTES = 4


@dataclass(frozen=True)
class Op:
    """One operator, or several that run as one.

    Attributes:
      name: name, such as `layers/3/mlp`.
      ops: operations of its products.
      weight_bytes: stored weights that it reads.
      cache_bytes: keys and values that it reads and writes.
      activation_bytes: inputs and outputs.
      layers: count of layers that it contains, each with a fixed time.
    """

    name: str
    ops: int
    weight_bytes: int
    cache_bytes: int = 0
    activation_bytes: int = 0
    layers: int = 0

    @property
    def bytes(self) -> int:
        """Weights and cache, the traffic that does not stay in caches of the chip."""
        return self.weight_bytes + self.cache_bytes


@dataclass(frozen=True)
class Work:
    """Sums over operators.

    Attributes:
      ops: operations of products.
      weight_bytes: stored weights that are read.
      cache_bytes: keys and values that are read and written.
      layers: count of layers.
    """

    ops: int
    weight_bytes: int
    cache_bytes: int
    layers: int

    @property
    def bytes(self) -> int:
        """Weights and cache."""
        return self.weight_bytes + self.cache_bytes


def total(ops: Sequence[Op]) -> Work:
    """Sum the operators of a list."""
    return Work(
        sum(op.ops for op in ops),
        sum(op.weight_bytes for op in ops),
        sum(op.cache_bytes for op in ops),
        sum(op.layers for op in ops),
    )


def abstract_params(config: GLMConfig) -> Params:
    """Return abstract bfloat16 parameters of a configuration, without allocating a weight."""
    shapes = expected_shapes(MultimodalGLM(config))
    return nested({path: jax.ShapeDtypeStruct(shapes[path], jnp.bfloat16) for path in shapes})


def bytes_by_path(params: Params, formats: Mapping[str, Format] | None = None) -> dict[str, int]:
    """Count the stored bytes of every parameter.

    Args:
      params: concrete or abstract arrays and boxes.
      formats: formats of some matrices by path, such as those of a plan; others keep theirs.

    Returns:
      Bytes by path.
    """
    items = boxes.path_items(params)
    return {path: bytes_with({path: leaf}, formats or {}) for path, leaf in items}


def decode_ops(
    config: GLMConfig, sizes: Mapping[str, int], context: int, cache_dtype: str = "float32"
) -> list[Op]:
    """List the operators of one decoded token.

    Args:
      config: configuration, with the widths of every layer.
      sizes: stored bytes by path of parameter, from `bytes_by_path`.
      context: tokens that the token attends to, itself included.
      cache_dtype: type of keys and values, as `init_cache` accepts.

    Returns:
      The operators in order: lookup, attention and feed-forward network of each layer, head.

    Raises:
      DataError: context is below 1 or above the model's `max_position_embeddings`.
      ConfigError: `sizes` has no embedding.
    """
    return _decoder_ops(config, sizes, 1, context, cache_dtype)


def prefill_ops(
    config: GLMConfig, sizes: Mapping[str, int], tokens: int, cache_dtype: str = "float32"
) -> list[Op]:
    """List the operators of a prompt; only its last token needs the head.

    Args:
      config: as in `decode_ops`.
      sizes: as in `decode_ops`.
      tokens: length of the prompt, those of images and recordings included.
      cache_dtype: as in `decode_ops`.

    Returns:
      The operators in order.

    Raises:
      DataError: `tokens` is below 1 or above the model's `max_position_embeddings`.
      ConfigError: `sizes` has no embedding.
    """
    return _decoder_ops(config, sizes, tokens, tokens, cache_dtype)


def _decoder_ops(
    config: GLMConfig, sizes: Mapping[str, int], tokens: int, context: int, cache_dtype: str
) -> list[Op]:
    decoder = config.decoder
    limit = decoder.max_position_embeddings
    if not 1 <= context <= limit:
        raise DataError(f"workload: context {context} must be in 1..{limit} tokens")
    table = _bytes_below(sizes, EMBEDDING)
    if not table:
        raise ConfigError(f"workload: sizes have no parameter below {EMBEDDING!r}")
    width, itemsize = decoder.hidden_size, ACTIVATION_BYTES
    rows = -(-table // decoder.vocab_size) * tokens
    ops = [Op("embed", 0, min(rows, table), activation_bytes=tokens * width * itemsize)]
    # The sum of attended tokens: `context` for the last token, one less for each before it.
    attended = tokens * context - tokens * (tokens - 1) // 2
    slot_bytes = cache_bytes_per_token(config, cache_dtype)
    for layer in range(decoder.num_layers):
        queries = decoder.heads(layer) * decoder.head_dim
        keys = decoder.kv_heads(layer) * decoder.head_dim
        neurons = decoder.neurons(layer)
        prefix = f"decoder/layers/{layer}/"
        mlp = _bytes_below(sizes, f"{prefix}mlp/")
        # A prompt's keys stay on the chip while they are attended to, so each is moved once.
        slots = (context + 1) if tokens == 1 else tokens
        ops.append(
            Op(
                f"layers/{layer}/attention",
                2 * width * (2 * queries + 2 * keys) * tokens + 4 * queries * attended,
                _bytes_below(sizes, prefix) - mlp,
                slot_bytes[layer] * slots,
                tokens * itemsize * (2 * width + 2 * queries + 2 * keys),
                1,
            )
        )
        mlp_ops = 2 * 3 * width * neurons * tokens
        activations = tokens * itemsize * (2 * width + 3 * neurons)
        ops.append(Op(f"layers/{layer}/mlp", mlp_ops, mlp, activation_bytes=activations))
    norm = _bytes_below(sizes, "decoder/") - _bytes_below(sizes, "decoder/layers/")
    head = table if decoder.tie_embeddings else _bytes_below(sizes, HEAD)
    logits = itemsize * (width + decoder.vocab_size)
    ops.append(Op("head", 2 * width * decoder.vocab_size, norm + head, activation_bytes=logits))
    return ops


def cache_bytes_per_token(config: GLMConfig, cache_dtype: str = "float32") -> list[int]:
    """Count the bytes of keys and values per token, by layer."""
    cache = jax.eval_shape(lambda: init_cache(config.decoder, 1, 1, cache_dtype))
    return [boxes.stored_bytes(layer) for layer in cache["layers"]]


def image_ops(config: GLMConfig, sizes: Mapping[str, int]) -> list[Op]:
    """List the operator of one image of the default size: the tower with its projector.

    Args:
      config: configuration of a model that sees.
      sizes: as in `decode_ops`.

    Returns:
      One operator.

    Raises:
      ConfigError: the model has no vision.
    """
    return [_encoder_op(config, sizes, "vision", "image", config.vision_tower.num_layers)]


def clip_ops(config: GLMConfig, sizes: Mapping[str, int]) -> list[Op]:
    """List the operator of one recording of the default length: the encoder with its projector.

    Args:
      config: configuration of a model that hears.
      sizes: as in `decode_ops`.

    Returns:
      One operator.

    Raises:
      ConfigError: the model has no speech encoder.
    """
    return [_encoder_op(config, sizes, "speech", "clip", config.speech_encoder.num_layers)]


def _encoder_op(
    config: GLMConfig, sizes: Mapping[str, int], name: str, kind: str, layers: int
) -> Op:
    counts = cost.flops(MultimodalGLM(config)) or {}
    return Op(name, counts[kind], _bytes_below(sizes, f"{name}/"), layers=layers)


def _bytes_below(sizes: Mapping[str, int], prefix: str) -> int:
    return sum(size for path, size in sizes.items() if path.startswith(prefix))


def peak_bytes(
    config: GLMConfig, sizes: Mapping[str, int], context: int, cache_dtype: str = "float32"
) -> dict[str, int]:
    """Count the bytes that a model needs while it answers.

    Args:
      config: as in `decode_ops`.
      sizes: as in `decode_ops`.
      context: slots of the cache, in tokens.
      cache_dtype: as in `decode_ops`.

    Returns:
      `weights`, `cache`, and `activations` of the widest operator of the prompt.
    """
    widest = max(op.activation_bytes for op in prefill_ops(config, sizes, context, cache_dtype))
    return {
        "weights": sum(sizes.values()),
        "cache": context * sum(cache_bytes_per_token(config, cache_dtype)),
        "activations": widest,
    }
