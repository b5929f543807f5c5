"""Tiny models that tests share: configurations, and parameters that no program has to draw."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from glm_edge.configs import DecoderConfig, GLMConfig, SpeechConfig, VisionConfig
from glm_edge.models.multimodal import MultimodalGLM

IMAGE, AUDIO, PAD = 5, 8, 10

DECODER = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
}
VISION = {
    "image_size": (16, 16),
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "intermediate_size": 32,
    "projector_size": 32,
    "patch_size": 4,
    "patch_stride": 4,
    "temporal_patch_size": 1,
    "position_grid": (4, 4),
}
SPEECH = {
    "mel_bins": 8,
    "num_frames": 16,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "intermediate_size": 32,
    "projector_size": 32,
}

# Standard deviations of vectors and tables that the models draw, by the last name of their path.
DRAWN = {"position": 0.02, "probe": 0.02, "begin": 0.02, "end": 0.02, "row": 0.3, "column": 0.3}


def tiny_config(
    decoder: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    speech: dict[str, Any] | None = None,
    **fields: Any,
) -> GLMConfig:
    """Changes the tiny configurations above.

    Args:
      decoder: fields to change.
      vision: fields to change; None leaves the encoder out.
      speech: fields to change; None leaves the encoder out.
      **fields: other fields of the configuration.
    """
    fields = {"name": "small", "image_token_id": IMAGE, "audio_token_id": AUDIO} | fields
    return GLMConfig(
        decoder=DecoderConfig(**DECODER | (decoder or {})),
        vision=None if vision is None else VisionConfig(**VISION | vision),
        speech=None if speech is None else SpeechConfig(**SPEECH | speech),
        **fields,
    )


def init(module: nn.Module, *inputs: Any, seed: int = 0) -> dict[str, Any]:
    """Draws variables with the distributions of `module.init`, without compiling a program.

    Args:
      module: a module whose parameters have the usual names: `weight` is `[..., out, in]` and
        `kernel` `[..., in, out]`.
      *inputs: arguments of its call.
      seed: of the values.

    Returns:
      The variables by collection.

    Raises:
      ValueError: a parameter has another name.
    """
    shapes = jax.eval_shape(module.init, jax.random.key(seed), *inputs)
    rng = np.random.default_rng(seed)
    return jax.device_put(jax.tree.map_with_path(functools.partial(_draw, rng), shapes))


def init_away_from_constants(module: nn.Module, *inputs: Any) -> dict[str, Any]:
    """Draw parameters of which none, norms and biases included, has its initial constant."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.normal(size=leaf.shape)
        if len(leaf.shape) > 1:
            return (values / leaf.shape[-1] ** 0.5).astype(np.float32)
        return (1 + 0.3 * values).astype(np.float32)

    return jax.device_put(jax.tree.map(draw, shapes))


def init_glm(config: GLMConfig, seed: int = 0) -> tuple[MultimodalGLM, Any]:
    """Makes a multimodal model and its parameters."""
    model = MultimodalGLM(config)
    return model, init(model, np.zeros((1, 2), np.int32), seed=seed)["params"]


def _draw(rng: np.random.Generator, path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
    name, shape = path[-1].key, leaf.shape
    if name in ("bias", "mean"):
        values = np.zeros(shape)
    elif name in ("scale", "var") or (name == "weight" and len(shape) == 1):
        values = np.ones(shape)
    elif name not in ("weight", "kernel", "embedding", *DRAWN):
        raise ValueError(f"no distribution is known for {jax.tree_util.keystr(path)}")
    else:
        fan_in = shape[-1] if name in ("weight", "embedding") else math.prod(shape[:-1])
        values = rng.normal(0.0, DRAWN.get(name, fan_in**-0.5), shape)
    return np.asarray(values, leaf.dtype)
