"""A small multimodal model, random parameters, and Hugging Face directories written by hand."""

import faulthandler
import json
import signal
import sys
import tracemalloc

import jax
import numpy as np
import pytest

from glm_edge.checkpoint.safetensors import write_safetensors
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import nested
from tests.checkpoint.mutations import SECONDS, give_up
from tests.tiny_models import tiny_config


@pytest.fixture(scope="session")
def model():
    return MultimodalGLM(
        tiny_config(
            {"num_heads": (4, 2), "intermediate_size": (40, 24)},
            {
                "image_size": (16, 8),
                "intermediate_size": 16,
                "projector_size": 16,
                "position_grid": (4, 2),
            },
            {"mel_bins": 4, "intermediate_size": 16, "projector_size": 16},
            eos_token_ids=(0,),
        )
    )


@pytest.fixture
def params(model):
    rng = np.random.default_rng(0)
    return nested(
        {
            path: jax.device_put(rng.normal(size=shape).astype(np.float32))
            for path, shape in expected_shapes(model).items()
        }
    )


GLM_FIELDS = {
    "model_type": "glm",
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 20,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
    "eos_token_id": [2, 9],
    "pad_token_id": 2,
}


def glm_tensors(fields: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random float32 tensors of a `glm`, by their Hugging Face names."""
    width, neurons = fields["hidden_size"], fields["intermediate_size"]
    heads = fields["num_attention_heads"] * fields["head_dim"]
    kv_heads = fields["num_key_value_heads"] * fields["head_dim"]

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.normal(size=(rows, columns)) * 1.5 * columns**-0.5).astype(np.float32)

    def norm() -> np.ndarray:
        return rng.uniform(0.5, 1.5, width).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(fields["vocab_size"], width),
        "model.norm.weight": norm(),
    }
    for layer in range(fields["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": norm(),
            prefix + "post_attention_layernorm.weight": norm(),
            prefix + "self_attn.q_proj.weight": matrix(heads, width),
            prefix + "self_attn.k_proj.weight": matrix(kv_heads, width),
            prefix + "self_attn.v_proj.weight": matrix(kv_heads, width),
            prefix + "self_attn.o_proj.weight": matrix(width, heads),
            prefix + "mlp.gate_up_proj.weight": matrix(2 * neurons, width),
            prefix + "mlp.down_proj.weight": matrix(width, neurons),
        }
        if fields["attention_bias"]:
            for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                bias = rng.normal(size=rows).astype(np.float32)
                tensors[f"{prefix}self_attn.{name}_proj.bias"] = bias
    if not fields["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(fields["vocab_size"], width)
    return tensors


@pytest.fixture
def fields():
    return dict(GLM_FIELDS)


@pytest.fixture
def tensors(fields):
    return glm_tensors(fields, np.random.default_rng(1))


@pytest.fixture
def make_tensors():
    return glm_tensors


@pytest.fixture
def write_hugging_face(tmp_path):
    """Returns a function that writes `(fields, tensors, shards)` as a directory."""

    def write(fields: dict, tensors: dict[str, np.ndarray], shards: int = 1):
        directory = tmp_path / "hf"
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(fields))
        if shards == 1:
            write_safetensors(directory / "model.safetensors", tensors)
            return directory
        weight_map = {}
        for shard in range(shards):
            name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = {key: tensors[key] for key in sorted(tensors)[shard::shards]}
            write_safetensors(directory / name, part)
            weight_map |= dict.fromkeys(part, name)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return directory

    return write


@pytest.fixture
def watch():
    """Traces memory, and ends a hang inside the system, which no Python handler interrupts."""
    previous = signal.signal(signal.SIGALRM, give_up)
    # Once, and around the watching thread: its start and end crash while tracing is switched.
    tracemalloc.start()
    faulthandler.dump_traceback_later(60 * SECONDS, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()
    tracemalloc.stop()
    signal.signal(signal.SIGALRM, previous)
