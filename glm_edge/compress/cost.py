"""Cost of running a model: floating-point operations from its configuration, and latency.

Letters: `D` hidden size, `L` tokens of an encoder, `S` attended tokens.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.compress.report import Latency
from glm_edge.configs import DecoderConfig, GLMConfig, SpeechConfig, TextConfig, VisionConfig
from glm_edge.errors import RecipeError
from glm_edge.models.glm import init_cache
from glm_edge.params.tree import Params

CONTEXT = 128
Model = tuple[nn.Module, Params]


def flops(model: nn.Module, context: int = CONTEXT) -> dict[str, int] | None:
    """Count floating-point operations of products, two per multiplication by a weight.

    Norms, activations, softmax and the resampling of position tables are excluded; they are below
    2 % for phone-sized models. Masked zeros are included, since they are multiplied.

    Args:
      model: a GLM or one of its encoders.
      context: context length of a decoded token, or sentence length of a text encoder, in tokens.

    Returns:
      FLOPs by kind of work: `token` (one decoding step, including the head), `image` and `clip`
      (one input of the default size, including the projector) as far as the model reads them, or
      `sentence` for a text encoder. None for another module.

    Example:
      >>> model, params = ge.load(ge.shipped("nano"))
      >>> sorted(ge.cost.flops(model))
      ['clip', 'image', 'token']
    """
    config, out = getattr(model, "config", None), getattr(model, "out_features", 0)
    if isinstance(config, GLMConfig):
        decoder = config.decoder
        counts = {"token": _decoder_flops(decoder, context)}
        if config.vision is not None:
            counts["image"] = _vision_flops(config.vision, decoder.hidden_size)
        if config.speech is not None:
            counts["clip"] = _speech_flops(config.speech, decoder.hidden_size)
        return counts
    if isinstance(config, VisionConfig):
        return {"image": _vision_flops(config, out)}
    if isinstance(config, SpeechConfig):
        return {"clip": _speech_flops(config, out)}
    if isinstance(config, TextConfig):
        return {"sentence": _text_flops(config, context)}
    return None


def _text_flops(config: TextConfig, context: int) -> int:
    length, width = min(context, config.max_position_embeddings), config.hidden_size
    ends = width * (width * (config.pooler is not None) + config.num_labels)
    return _layers_flops(config, length, length, 2) + 2 * ends


def _decoder_flops(config: DecoderConfig, slots: int) -> int:
    width, total = config.hidden_size, 2 * config.hidden_size * config.vocab_size
    for layer in range(config.num_layers):
        queries = config.heads(layer) * config.head_dim
        keys = config.kv_heads(layer) * config.head_dim
        total += 2 * width * (2 * queries + 2 * keys) + 4 * queries * slots
        total += 2 * 3 * width * config.neurons(layer)
    return total


def _layers_flops(config: Any, tokens: int, slots: Any, matrices: int) -> int:
    """Count an encoder's layers; `slots` is the count of attended tokens, or a list per layer."""
    total = 0
    for layer in range(config.num_layers):
        attended = slots if isinstance(slots, int) else slots[layer]
        queries = config.heads(layer) * config.head_size
        keys = config.kv_heads(layer) * config.head_size
        total += tokens * (4 * config.hidden_size * (queries + keys) + 4 * queries * attended)
        total += tokens * 2 * matrices * config.hidden_size * config.neurons(layer)
    return total


def _vision_flops(config: VisionConfig, out: int) -> int:
    width, length = config.hidden_size, config.grid[0] * config.grid[1]
    window = length if config.window is None else config.window[0] * config.window[1]
    slots = [length if i in config.global_layers else window for i in range(config.num_layers)]
    pixels = config.patch_size**2 * config.channels * config.temporal_patch_size
    total = 2 * length * pixels * width
    total += _layers_flops(config, length, slots, 3 if config.gated_mlp else 2)
    if config.pooling_head:
        heads = config.heads(config.num_layers) * config.head_size
        total += 4 * width * heads * (1 + length) + 4 * heads * length
        total += 4 * width * config.neurons(config.num_layers)
    if config.projector_size:
        merged = length // config.merge_size**2
        total += 2 * merged * out * (config.merge_size**2 * width + out + 3 * config.projector_size)
    return total


def _speech_flops(config: SpeechConfig, out: int) -> int:
    width, length = config.hidden_size, config.num_frames // 2
    total = 2 * config.num_frames * 3 * config.mel_bins * width + 2 * length * 3 * width * width
    total += _layers_flops(config, length, length, 2)
    if config.projector_size:
        merged = length // config.merge_size
        total += 2 * merged * config.projector_size * (config.merge_size * width + out)
    return total


def measure(
    before: Model, after: Model, rounds: int = 15, calls: int = 4, context: int = CONTEXT
) -> tuple[Latency, ...]:
    """Measure the latency of two models: a decoding step of one row, one image, clip or sentence.

    Each round times both models, in alternating order, so that other load on the machine affects
    both. The speedup compares times of the same round. No transform measures latency by itself; a
    report shows it after `report.with_latency(measure((model, params), (smaller, shrunk)))`.

    Args:
      before: original model and parameters.
      after: compressed model and parameters.
      rounds: count of timed rounds, after one warm-up round.
      calls: count of calls per timing.
      context: tokens in the cache before the decoding step.

    Returns:
      One entry per kind of work of both models, for `Report.with_latency`.

    Raises:
      RecipeError: the models share no kind of work.
    """
    sides = [_work(*model, context) for model in (before, after)]
    shared = [work for work in sides[0] if work in sides[1]]
    if not shared:
        raise RecipeError("cost.measure: the models share no kind of input to time")
    rows = []
    for work in shared:
        seconds = np.zeros((rounds + 1, 2))
        for turn in range(rounds + 1):
            for side in (0, 1) if turn % 2 else (1, 0):
                start = time.perf_counter()
                for _ in range(calls):
                    jax.block_until_ready(sides[side][work]())
                seconds[turn, side] = (time.perf_counter() - start) / calls
        seconds = seconds[1:]
        low, middle, high = np.quantile(seconds[:, 0] / seconds[:, 1], [0.25, 0.5, 0.75])
        before_ms, after_ms = (float(1e3 * median) for median in np.median(seconds, axis=0))
        rows.append(
            Latency(work, before_ms, after_ms, float(middle), float(low), float(high), rounds)
        )
    return tuple(rows)


def _work(model: nn.Module, params: Params, context: int) -> dict[str, Callable[[], Any]]:
    """Build a callable per kind of work of a model."""
    config, work = getattr(model, "config", None), {}
    encodes = isinstance(config, VisionConfig | SpeechConfig)
    vision = config if isinstance(config, VisionConfig) else getattr(config, "vision", None)
    speech = config if isinstance(config, SpeechConfig) else getattr(config, "speech", None)
    run = jax.jit(
        lambda params, x, method: model.apply({"params": params}, x, method=method),
        static_argnames="method",
    )
    if isinstance(config, GLMConfig):
        work["token"] = _decoding(model, params, context)
    if isinstance(config, TextConfig):
        tokens = jnp.zeros((1, min(context, config.max_position_embeddings)), jnp.int32)
        work["sentence"] = functools.partial(run, params, tokens, None)
    if vision is not None:
        image = jnp.zeros((1, *vision.image_size, vision.channels))
        work["image"] = functools.partial(run, params, image, None if encodes else "encode_images")
    if speech is not None:
        mel = jnp.zeros((1, speech.num_frames, speech.mel_bins))
        work["clip"] = functools.partial(run, params, mel, None if encodes else "encode_audio")
    return work


def _decoding(model: nn.Module, params: Params, context: int) -> Callable[[], Any]:
    """Build a greedy decoding step of one row at a fixed slot of the cache."""
    cache = init_cache(model.config.decoder, 1, 2 * context)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params: Params, layers: Params, token: Array) -> tuple[Array, Params]:
        cache = {"layers": layers, "length": jnp.int32(context)}
        logits, aux = model.apply({"params": params}, token, cache=cache)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), aux["cache"]["layers"]

    state = [jnp.zeros((1, 1), jnp.int32), cache["layers"]]

    def once() -> Any:
        state[:] = step(params, state[1], state[0])
        return state[0]

    return once


__all__ = ["flops", "measure"]


def __dir__() -> list[str]:
    return __all__
