"""Signatures that the LiteRT-LM runtime calls, derived from those of a `.tflite` file.

The runtime passes only embedded (or plain) tokens, their slots, a mask and the cache to a step.
Other inputs are computed in the graph or appended to existing ones. The graph computes log-mel
frames from raw samples. Three-dimensional rotary positions are extra channels of an image's
features.

Shapes: `T` tokens, `S` cache slots, `D` hidden size, `M` features of one image or chunk of speech,
`F` log-mel frames of a chunk, `V` vocabulary size.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.configs import GLMConfig, VisionConfig
from glm_edge.export.common.signatures import Inputs, Signature, signatures
from glm_edge.export.common.sizes import DECODE
from glm_edge.kernels.log_mel import mel_filters
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.preprocess.processing import AudioProcessing, ImageProcessing

# Channels after an embedding: one minus the advance of its token, then its time, row and column
# relative to the position that it would have as text.
CARRIED = 4


def takes_embeddings(config: GLMConfig) -> bool:
    """Return True if the decoder reads embeddings, as models with encoders require.

    Args:
      config: configuration of the model.

    Returns:
      True for a model with encoders.
    """
    return config.vision is not None or config.speech is not None


def carries_positions(config: GLMConfig) -> bool:
    """Return True if embeddings include offsets of three-dimensional rotary positions.

    Args:
      config: configuration of the model.

    Returns:
      True for a model with encoders and three-dimensional rotary positions.
    """
    return bool(config.decoder.mrope_section) and takes_embeddings(config)


def token_embedding(model: MultimodalGLM, params: Any, token: int) -> np.ndarray:
    """Compute the embedding [D] of one token.

    Args:
      model: the model.
      params: its parameters.
      token: token id.

    Returns:
      The embedding, float32 [D].
    """
    embed = next(s for s in signatures(model, (), 1) if s.name == "embed")
    tokens = jnp.full((1, 1), token, jnp.int32)
    return np.asarray(embed.function(params, {"tokens": tokens})["embeddings"][0, 0])


def decoder_signatures(
    model: MultimodalGLM,
    prefill_lengths: Iterable[int],
    cache_slots: int,
    answer_end: np.ndarray | None = None,
) -> list[Signature]:
    """Make `decode` and `prefill_<T>` of the section PREFILL_DECODE.

    They equal those of `common.signatures.signatures`, without logits in prefill, with two
    differences. A model without encoders takes `tokens` [1, T]. A model with three-dimensional
    rotary positions takes no `positions`. Without encoders, all three positions are the slot. With
    encoders, `embeddings` are [1, T, D + 4], and an additional cache, `kv_cache_k_<layers>`
    [1, 1, S, 1] with an unused `v`, stores the difference between the token count and the advance
    of each image.

    Args:
      model: the model.
      prefill_lengths: token counts `T` of the prefill signatures.
      cache_slots: number `S` of cache slots.
      answer_end: embedding [D] that replaces rows of zeros. The runtime feeds such a row for the
        last token of an answer, which it never embeds. None keeps the zeros; without encoders the
        runtime feeds the token itself.

    Returns:
      The signatures.
    """
    config = model.config
    offered = signatures(model, prefill_lengths, cache_slots)
    embedders = {s.inputs["tokens"].shape[1]: s for s in offered if s.name.startswith("embed")}
    steps = [s for s in offered if s.name == DECODE or s.name.startswith("prefill")]
    if takes_embeddings(config) and answer_end is not None:
        steps = [_with_answer_end(step, answer_end) for step in steps]
    if carries_positions(config):
        return [_from_carried(step, config.decoder.num_layers, cache_slots) for step in steps]
    if takes_embeddings(config):
        return steps
    return [_from_tokens(step, embedders[_length(step)]) for step in steps]


def embedder(model: MultimodalGLM) -> Signature:
    """Make EMBEDDER: `tokens` [1, 1] to `embeddings` [1, 1, D], or [1, 1, D + 4] with offsets.

    Args:
      model: the model.

    Returns:
      The signature.
    """
    config = model.config
    embed = next(s for s in signatures(model, (), 1) if s.name == "embed")
    if not carries_positions(config):
        return embed

    def function(params: Any, inputs: Inputs) -> dict[str, Array]:
        return {"embeddings": _carry_nothing(embed.function(params, inputs)["embeddings"])}

    return dataclasses.replace(embed, function=function)


def vision_encoder(
    model: MultimodalGLM, processing: ImageProcessing, image_size: tuple[int, int]
) -> Signature:
    """Make VISION_ENCODER for images of one size.

    Args:
      model: the model.
      processing: image settings, whose mean and std normalise pixels.
      image_size: (height, width) in pixels to which the runtime stretches every image.

    Returns:
      Signature from `images` [1, height, width, channels] in 0..1 to `features` [1, M, D], or
      [1, M, D + 4].
    """
    config = model.config.vision_tower
    mean, std = (np.array(x, np.float32) for x in (processing.mean, processing.std))
    carried = _carried(config, image_size) if carries_positions(model.config) else None

    def function(params: Any, inputs: Inputs) -> dict[str, Array]:
        pixels = (inputs["images"] - mean) / std
        features: Any = model.apply({"params": params}, pixels, method=MultimodalGLM.encode_images)
        if carried is not None:
            features = jnp.concatenate([features, jnp.asarray(carried)[None]], axis=-1)
        return {"features": features}

    images = jax.ShapeDtypeStruct((1, *image_size, config.channels), jnp.float32)
    return Signature("vision", {"images": images}, function, ("vision",))


def speech_encoder(model: MultimodalGLM, processing: AudioProcessing) -> Signature:
    """Make AUDIO_ENCODER_HW for chunks of raw samples.

    Args:
      model: the model.
      processing: settings of the log-mel frames, and whether silent frames count.

    Returns:
      Signature from `src_inputs` [1, F, hop_length], samples in -1..1, and `mask` bool [1, F], True
      at frames with sound, to `features` [1, M, D] and `mask_out` bool [1, M], True at valid
      features.
    """
    frames = model.config.speech_encoder.num_frames
    every = 2 * processing.merge_size

    def function(params: Any, inputs: Inputs) -> dict[str, Array]:
        mel = log_mel_of_samples(inputs["src_inputs"], processing)
        features: Any = model.apply({"params": params}, mel, method=MultimodalGLM.encode_audio)
        if carries_positions(model.config):
            features = _carry_nothing(features)
        # A feature is valid if the second last frame that its convolution and merge read is valid.
        counted = inputs["mask"][:, every - 2 :: every]
        if processing.silence:
            counted = jnp.broadcast_to(inputs["mask"][:, :1], counted.shape)
        # The runtime swaps the buffers of an input and an output that share a name.
        return {"features": features, "mask_out": counted}

    inputs = {
        "src_inputs": jax.ShapeDtypeStruct((1, frames, processing.hop_length), jnp.float32),
        "mask": jax.ShapeDtypeStruct((1, frames), jnp.bool_),
    }
    return Signature("speech", inputs, function, ("speech",))


def speech_adapter(model: MultimodalGLM) -> Signature:
    """Make AUDIO_ADAPTER: `features` [1, M, D] where `mask` bool [1, M] is true, else zeros.

    Without this section, the runtime delays a recording until a chunk is full, so the model would
    hear its last part in the next prompt.

    Args:
      model: the model.

    Returns:
      The signature.
    """
    features = model.config.speech_encoder.num_tokens
    width = model.config.decoder.hidden_size + CARRIED * carries_positions(model.config)
    inputs = {
        "features": jax.ShapeDtypeStruct((1, features, width), jnp.float32),
        "mask": jax.ShapeDtypeStruct((1, features), jnp.bool_),
    }

    def function(_: Any, values: Inputs) -> dict[str, Array]:
        return {"embeddings": jnp.where(values["mask"][..., None], values["features"], 0.0)}

    return Signature("adapter", inputs, function, ())


def log_mel_of_samples(samples: Array, processing: AudioProcessing) -> Array:
    """Compute the spectrogram of `glm_edge.kernels.log_mel` by matrix products, without an FFT.

    Args:
      samples: raw samples [1, F, hop_length] in -1..1.
      processing: settings of the transform and the mel filters.

    Returns:
      Log-mel frames [1, F, mel_bins].
    """
    size, hop, frames = processing.fft_size, processing.hop_length, samples.shape[1]
    blocks = -(-size // hop)
    padded = jnp.pad(samples.reshape(1, -1), ((0, 0), (size // 2, size // 2)), mode="reflect")
    padded = jnp.pad(padded, ((0, 0), (0, (frames + blocks) * hop - padded.shape[1])))
    padded = padded.reshape(1, frames + blocks, hop)
    windows = jnp.concatenate([padded[:, i : i + frames] for i in range(blocks)], axis=-1)

    time, bins = np.arange(size), np.arange(size // 2 + 1)[:, None]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * time / size)
    # Reduced modulo the period first, so that large products do not lose precision.
    turn = 2 * np.pi * (bins * time % size) / size
    waves = np.concatenate([np.cos(turn), np.sin(turn)]) * window
    waves = np.pad(waves, ((0, 0), (0, blocks * hop - size))).astype(np.float32)
    real, imaginary = jnp.split(jnp.einsum("btn,kn->btk", windows, waves), 2, axis=-1)
    filters = mel_filters(processing.mel_bins, size, processing.sample_rate)
    mel = jnp.einsum("btk,mk->btm", real**2 + imaginary**2, filters)
    mel = jnp.log(jnp.maximum(mel, 1e-10)) * np.float32(1 / np.log(10.0))
    return (jnp.maximum(mel, mel.max(axis=(1, 2), keepdims=True) - 8.0) + 4.0) / 4.0


def _carry_nothing(embedded: Array) -> Array:
    return jnp.pad(embedded, ((0, 0), (0, 0), (0, CARRIED)))


def _length(step: Signature) -> int:
    return step.inputs["input_pos"].shape[0]


def _from_tokens(step: Signature, embed: Signature) -> Signature:
    inputs = dict(step.inputs)
    del inputs["embeddings"]
    three = inputs.pop("positions", None)

    def function(params: Any, values: Inputs) -> dict[str, Array]:
        step_values = {name: values[name] for name in inputs}
        if three is not None:
            step_values["positions"] = jnp.broadcast_to(values["input_pos"], three.shape)
        return step.function(params, {**step_values, **embed.function(params, values)})

    inputs = {"tokens": embed.inputs["tokens"], **inputs}
    return dataclasses.replace(step, inputs=inputs, function=function)


def _with_answer_end(step: Signature, row: np.ndarray) -> Signature:
    """Replace rows of zeros in the embeddings with the embedding of the answer's end."""

    def function(params: Any, values: Inputs) -> dict[str, Array]:
        embedded = values["embeddings"]
        # 1 for a row of zeros, else 0, with operations that XNNPACK supports.
        size = jnp.abs(embedded).sum(axis=-1, keepdims=True)
        missing = 1.0 - jnp.minimum(1.0, np.float32(1e20) * size)
        return step.function(params, {**values, "embeddings": embedded + missing * row})

    return dataclasses.replace(step, function=function)


def _carried(config: VisionConfig, image_size: Sequence[int]) -> np.ndarray:
    """Compute the additional channels [M, 4] of an image's features; see `CARRIED`."""
    height, width = image_size
    rows, columns = (extent // config.merge_size for extent in config.grid_of((height, width)))
    token = np.arange(rows * columns)
    row, column = np.divmod(token, columns)
    short = np.zeros(len(token))
    short[-1] = len(token) - max(rows, columns)
    return np.stack([short, -token, row - token, column - token], axis=1).astype(np.float32)


def _from_carried(step: Signature, layers: int, slots: int) -> Signature:
    """Compute positions as slots minus the slots that images use beyond their advance."""
    inputs = dict(step.inputs)
    embeddings = inputs["embeddings"].shape
    width = embeddings[-1]
    del inputs["positions"]
    names = tuple(inputs)
    short, partner = f"kv_cache_k_{layers}", f"kv_cache_v_{layers}"
    inputs["embeddings"] = jax.ShapeDtypeStruct((*embeddings[:-1], width + CARRIED), jnp.float32)
    inputs[short] = jax.ShapeDtypeStruct((1, 1, slots, 1), jnp.float32)
    inputs[partner] = jax.ShapeDtypeStruct((1, 1, 1, slots), jnp.float32)

    def function(params: Any, values: Inputs) -> dict[str, Array]:
        embedded, slot = values["embeddings"], values["input_pos"]
        carried = embedded[0, :, width:]
        start = (0, 0, slot[0], 0)
        shortfalls = jax.lax.dynamic_update_slice(values[short], carried[None, None, :, :1], start)
        before = (jnp.arange(slots) < slot[:, None]).astype(jnp.float32)
        text = slot.astype(jnp.float32) - (before * shortfalls[0, 0, :, 0]).sum(axis=-1)
        step_values = {name: values[name] for name in names}
        step_values["embeddings"] = embedded[..., :width]
        step_values["positions"] = (text + carried[:, 1:].T).astype(jnp.int32)
        outputs = step.function(params, step_values)
        # The runtime expects every cache input as an output.
        return {**outputs, short: shortfalls, partner: values[partner] * 1.0}

    return dataclasses.replace(step, inputs=inputs, function=function)
