"""Outputs of a loaded model for the inputs of a case, in the reference's names and layouts."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

import glm_edge as ge
from experiments.golden.cases import Arrays
from glm_edge.configs import GLMConfig, VisionConfig
from glm_edge.errors import DataError
from glm_edge.generate import prompt_mask
from glm_edge.models.multimodal import MultimodalGLM, audio_features
from glm_edge.models.speech import SpeechEncoder
from glm_edge.models.text import TextEncoder
from glm_edge.models.vision import VisionEncoder
from glm_edge.preprocess.patches import from_patches


def compute(model: nn.Module, params: Any, inputs: Arrays, greedy_steps: int) -> Arrays:
    """Run a model on the inputs of one subcase.

    Args:
      model: model from `glm_edge.load`.
      params: its parameters.
      inputs: arrays by transformers' argument names.
      greedy_steps: number of tokens that the reference generated greedily, 0 for none.

    Returns:
      Outputs by name; `plain_greedy_ids` and `plain_greedy_logits` come from a complete forward
      pass per step, `greedy_ids` and `greedy_logits` from `generate`.

    Raises:
      DataError: the inputs do not fit this kind of model.
    """
    if isinstance(model, MultimodalGLM):
        outputs = _multimodal(model, params, inputs, greedy_steps)
    else:
        outputs = _encoder(model, params, inputs)
    return {name: np.asarray(value) for name, value in outputs.items()}


@functools.partial(jax.jit, static_argnames=("model", "method"))
def _apply(model: nn.Module, variables: Any, *args: Any, method: Any = None, **options: Any) -> Any:
    return model.apply(variables, *args, method=method, **options)


@jax.jit
def _causal_mask(valid: np.ndarray) -> jax.Array:
    return prompt_mask(valid, jnp.arange(valid.shape[1]))


def _encoder(model: nn.Module, params: Any, inputs: Arrays) -> Arrays:
    run = functools.partial(_apply, model, {"params": params})
    if isinstance(model, VisionEncoder):
        return _vision_alone(*run(_channels_last(_take(inputs, "pixel_values"))))
    if isinstance(model, SpeechEncoder):
        mel = np.swapaxes(_take(inputs, "input_features"), 1, 2)
        return _convolutions("hidden", run(mel)[1])
    assert isinstance(model, TextEncoder)
    tokens = _take(inputs, "input_ids")
    output, aux = run(tokens, inputs.get("attention_mask"), inputs.get("token_type_ids"))
    outputs = {**_hidden(aux["hidden"]), "hidden.final": aux["hidden"][-1]}
    if model.config.num_labels:
        outputs["logits"] = output
    return outputs | ({"pooler_output": aux["pooled"]} if "pooled" in aux else {})


def _multimodal(model: MultimodalGLM, params: Any, inputs: Arrays, greedy_steps: int) -> Arrays:
    tokens = _take(inputs, "input_ids")
    valid = inputs.get("attention_mask", np.ones_like(tokens)).astype(bool)
    images, packed = _images(model.config, inputs)
    audio, audio_frames = _audio(inputs)
    variables = {"params": params}
    positions, following = jax.device_get(
        _apply(model, variables, tokens, valid, images, method="start_positions")
    )
    outputs = {"position_ids": positions, "rope_delta": (following - valid.sum(1))[:, None]}
    if "position_ids" in inputs:
        outputs["position_ids"] = positions = inputs["position_ids"]
    logits, aux = _apply(
        model,
        variables,
        tokens,
        images,
        audio,
        positions=positions,
        mask=_causal_mask(valid),
        audio_frames=audio_frames,
    )
    outputs |= {"logits": logits, "hidden.final": aux["final"], **_hidden(aux["hidden"])}
    if images is not None:
        outputs |= _vision_in_order(model, variables, images, packed)
    if audio is not None:
        outputs |= _speech(model, variables, audio, audio_frames)
    if greedy_steps:
        media = {"images": images, "audio": audio, "audio_frames": audio_frames}
        generated = ge.generate.generate(
            model,
            params,
            {"tokens": tokens, "valid": valid, **media},
            max_new_tokens=greedy_steps,
            stop_tokens=(),
            return_logits=True,
        )
        outputs |= {"greedy_ids": generated.tokens, "greedy_logits": generated.logits}
        outputs |= _plain_greedy(model, variables, tokens, valid, media, positions, greedy_steps)
    return outputs


def _plain_greedy(
    model: MultimodalGLM,
    variables: Any,
    tokens: np.ndarray,
    valid: np.ndarray,
    media: dict[str, Any],
    positions: Any,
    steps: int,
) -> Arrays:
    """Generate greedily by complete forward passes that mask the slots of later tokens."""
    batch, length = tokens.shape
    following = np.asarray(positions)[..., -1:] + 1
    if model.config.decoder.mrope_section:
        following = np.broadcast_to(following.max(0), following.shape)
    positions = np.concatenate([positions, following + np.arange(steps)], axis=-1)
    attended = np.concatenate([valid, np.ones((batch, steps), bool)], axis=1)
    mask = _causal_mask(attended)

    def forward(module: MultimodalGLM, new: Any) -> Any:
        prompt, _ = module.embed_inputs(tokens, **media)
        x = jnp.concatenate([prompt, module.embed(new)], axis=1)
        return module.predict(module.decoder(x, positions, mask)[0])

    run = jax.jit(functools.partial(model.apply, method=forward))
    new = np.zeros((batch, steps), np.int32)
    scores = np.zeros((batch, steps, model.config.decoder.vocab_size), np.float32)
    for step in range(steps):
        scores[:, step] = np.asarray(run(variables, new))[:, length + step - 1]
        new[:, step] = scores[:, step].argmax(-1)
    return {"plain_greedy_ids": new, "plain_greedy_logits": scores}


def _images(config: GLMConfig, inputs: Arrays) -> tuple[list[np.ndarray] | None, bool]:
    """Return images in reading order, and whether the reference packed their patches."""
    vision, outputs = config.vision, []
    for pixels, grid in (
        ("pixel_values", "image_grid_thw"),
        ("pixel_values_videos", "video_grid_thw"),
    ):
        if pixels in inputs and grid in inputs:
            outputs += from_patches(
                inputs[pixels],
                inputs[grid],
                vision.patch_size,
                vision.temporal_patch_size,
                vision.merge_size,
                vision.channels,
            )
    if outputs or "pixel_values" not in inputs:
        return outputs or None, True
    return list(_channels_last(inputs["pixel_values"])), False


def _audio(inputs: Arrays) -> tuple[np.ndarray | None, np.ndarray | None]:
    if "input_features" not in inputs:
        return None, None
    mel = np.swapaxes(inputs["input_features"], 1, 2)
    mask = inputs.get("input_features_mask", np.ones(mel.shape[:2]))
    return mel, mask.sum(axis=1).astype(np.int32)


def _vision_in_order(
    model: MultimodalGLM, variables: Any, images: list[np.ndarray], packed: bool
) -> Arrays:
    """Return the tower's outputs with the patches of all images concatenated."""
    config, names, parts = model.config.vision, [], []
    for image in images:
        frames = image[None]
        if image.ndim == 4:
            frames = image.reshape(-1, config.temporal_patch_size, *image.shape[-3:])
        features, aux = _encode_images(model, variables, frames)
        if not packed:
            parts.append({"vision.features": np.asarray(features)})
            continue
        grid = config.grid_of(image.shape[-3:-1])
        blocks = [f"vision.block{index}" for index in range(config.num_layers)]
        names = ["vision.patch_embed", "vision.embeddings", *blocks, "vision.post_layernorm"]
        values = [aux["patches"], *aux["hidden"], aux["final"]]
        ordered = [_merge_blocks(value, grid, config) for value in values]
        merged = np.asarray(features).reshape(-1, features.shape[-1])
        parts.append({**dict(zip(names, ordered, strict=True)), "vision.merged": merged})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@functools.partial(jax.jit, static_argnums=0)
def _encode_images(model: MultimodalGLM, variables: Any, images: Any) -> Any:
    return model.apply(variables, images, method=lambda module, x: module.vision(x))


def _merge_blocks(x: Any, grid: tuple[int, int], config: VisionConfig) -> np.ndarray:
    size = config.merge_size
    return rearrange(
        np.asarray(x),
        "b (r i c j) d -> (b r c i j) d",
        r=grid[0] // size,
        c=grid[1] // size,
        i=size,
        j=size,
    )


def _vision_alone(features: Any, aux: dict[str, Any]) -> Arrays:
    outputs = {**_hidden(aux["hidden"]), "hidden.final": np.asarray(features)}
    return outputs | ({"pooler_output": np.asarray(aux["pooled"])} if "pooled" in aux else {})


def _speech(model: MultimodalGLM, variables: Any, audio: Any, audio_frames: Any) -> Arrays:
    run = jax.jit(functools.partial(model.apply, method=lambda module, x: module.speech(x)))
    projected, aux = run(variables, audio)
    count = audio_features(audio_frames, model.config.speech.merge_size)
    rows = [np.asarray(chunk)[:n] for chunk, n in zip(projected, count, strict=True)]
    outputs = {"audio.projected": np.asarray(projected), "audio.features": np.concatenate(rows)}
    return outputs | _convolutions("audio", aux)


def _convolutions(prefix: str, aux: dict[str, Any]) -> Arrays:
    outputs = {f"{prefix}.{name}": np.swapaxes(aux[name], 1, 2) for name in ("conv1", "conv2")}
    for name, value in _hidden(aux["hidden"]).items():
        outputs[name.replace("hidden", prefix)] = value
    return outputs | {f"{prefix}.final": np.asarray(aux["final"])}


def _hidden(hidden: list[Any]) -> Arrays:
    names = ["embed", *(f"layer{index}" for index in range(len(hidden) - 1))]
    return {f"hidden.{name}": np.asarray(x) for name, x in zip(names, hidden, strict=True)}


def _channels_last(pixels: np.ndarray) -> np.ndarray:
    return np.moveaxis(pixels, 1, -1)


def _take(inputs: Arrays, name: str) -> np.ndarray:
    if name not in inputs:
        raise DataError(f"inputs contain {', '.join(inputs)}, but this model needs {name}")
    return inputs[name]
