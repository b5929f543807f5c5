"""Small models of random weights, rounded in numpy."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from glm_edge import params as boxes
from glm_edge.params import Format

CONFIG = "config.json"
TINY = json.loads((Path(__file__).parents[2] / "checkpoint" / "tiny_configs.json").read_text())
FIELDS = {
    "model_type": "glm4",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "eos_token_id": [2, 3],
    "pad_token_id": 2,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 9000.0,
        "partial_rotary_factor": 0.5,
    },
}
DECODER = r"^decoder/"
FORMATS = (
    "int4-g32",
    "int4-g16-affine",
    "int8-channel",
    "int8-channel-affine-scale=bfloat16",
    "int4-channel-scale=float16",
    "int8-g32",
)
MIXED = {r"^decoder/.*attention": "int8-channel", r"^decoder/.*mlp": "int4-g32"}
# Formats of the default run; the others are slow tests.
QUICK = ("int4-g32", "int4-g16-affine", MIXED)


def boxed(params, format: str | dict[str, str], where: str = DECODER, dtype: str = "float32"):
    """Round the matrices of a tree in numpy: one format, or one per pattern."""
    formats = {where: format} if isinstance(format, str) else format

    def box(path, leaf):
        chosen = [text for pattern, text in formats.items() if re.search(pattern, path)]
        if not chosen or not boxes.is_matrix(path, leaf):
            return leaf
        return rounded(leaf, Format.parse(chosen[0]), dtype)

    return boxes.map_with_path(box, params)


def rounded(leaf, form: Format, dtype: str = "float32"):
    weight = np.asarray(leaf, np.float32)
    groups = form.scale_shape(weight.shape)[1]
    low, high = -(2 ** (int(form.bits) - 1)), 2 ** (int(form.bits) - 1) - 1
    if form.qtype.startswith(("ternary", "nf4")):
        low, high = -1, 1
    grouped = weight.reshape(len(weight), groups, -1)
    if form.symmetric:
        scale, zero = np.abs(grouped).max(-1) / -low, None
    else:
        scale = (grouped.max(-1) - grouped.min(-1)) / (high - low)
        zero = np.clip(np.round(low - grouped.min(-1) / scale), low, high)
    if form.group_size == "tensor":
        scale = scale.max(keepdims=True)
    scale = np.asarray(jnp.asarray(scale, form.scale_dtype))
    steps = grouped / scale.astype(np.float32)[..., None] + (0 if zero is None else zero[..., None])
    codes = np.clip(np.round(steps), low, high).astype(np.int8).reshape(weight.shape)
    return boxes.quantized(
        jnp.asarray(codes), jnp.asarray(scale),
        None if zero is None else jnp.asarray(zero, jnp.int8), form, dtype=dtype,
    )  # fmt: skip


def quantization_of(directory: Path):
    return json.loads((directory / CONFIG).read_text())["quantization_config"]
