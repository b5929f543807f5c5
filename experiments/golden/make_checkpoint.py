"""Writes a checkpoint of a published model's shape with random bfloat16 weights.

    python -m experiments.golden.make_checkpoint --shape=glm_edge_1_5b --out=DIR

The directory has the layout of the Hugging Face hub (config.json, an index, shards of at most
--shard_gb), so that loading can be measured without the published weights. Matrices and biases are
drawn from normal(0, 0.02), norms from normal(1, 0.02). A tensor's values depend only on --seed and
its name, not on --shard_gb. Values are drawn and written in blocks, which needs little memory.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags

from glm_edge.cli.console import bar, launch, refuse_arguments
from glm_edge.files import CONFIG
from glm_edge.writers import new_directory, require_space, write_json

FLAGS = flags.FLAGS
INDEX = "model.safetensors.index.json"
STANDARD_DEVIATION = 0.02
BLOCK_VALUES = 1 << 22
ITEM_BYTES = 2

_COMMON = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "initializer_range": STANDARD_DEVIATION,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "head_dim": 128,
    "rope_theta": 10000.0,
}
_EDGE = _COMMON | {
    "architectures": ["GlmForCausalLM"],
    "model_type": "glm",
    "vocab_size": 59264,
    "num_key_value_heads": 4,
    "partial_rotary_factor": 1.0,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "eos_token_id": [59246, 59253, 59255],
    "pad_token_id": 59246,
}
_GLM_4 = _COMMON | {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "glm_edge_1_5b": _EDGE
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "glm_edge_4b": _EDGE
    | {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 40,
        "num_attention_heads": 24,
        "num_key_value_heads": 6,
        "tie_word_embeddings": False,
    },
    "glm_4_9b": _GLM_4
    | {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-7,
    },
    "glm_4_9b_0414": _GLM_4
    | {
        "architectures": ["Glm4ForCausalLM"],
        "model_type": "glm4",
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
    },
}

Shapes = dict[str, tuple[int, ...]]


def define_flags() -> None:
    """Define this script's flags; other scripts import the functions without them."""
    flags.DEFINE_enum(
        "shape", "glm_edge_1_5b", list(CONFIGS), "Published model whose shapes are used."
    )
    flags.DEFINE_string("out", None, "Output directory.", required=True)
    flags.DEFINE_float("shard_gb", 2.0, "Maximum size of a shard in GB (1e9 bytes).", 1e-3)
    flags.DEFINE_integer("seed", 0, "Seed of the values.", 0)
    flags.DEFINE_bool("overwrite", False, "Replace an existing checkpoint.")


def main(argv: Sequence[str]) -> None:
    refuse_arguments(argv)
    write(CONFIGS[FLAGS.shape], FLAGS.out, FLAGS.shard_gb * 1e9, FLAGS.seed, FLAGS.overwrite)


def write(
    config: dict[str, Any], out: str, shard_bytes: float, seed: int, overwrite: bool = False
) -> Path:
    """Write a checkpoint.

    Args:
      config: fields of config.json.
      out: output directory.
      shard_bytes: maximum size of a shard, unless a single tensor is larger.
      seed: seed of the values.
      overwrite: whether to replace an existing checkpoint.

    Returns:
      The directory.

    Raises:
      OutputError: the disk is too full, or the directory exists or cannot be written.
    """
    shapes = tensor_shapes(config)
    order = {name: rank for rank, name in enumerate(shapes)}
    shards = split(shapes, shard_bytes)
    total = sum(map(_bytes, shapes.values()))
    require_space(Path(out), total + (64 << 20))
    weight_map = {}
    with new_directory(Path(out), overwrite) as directory:
        for number, names in enumerate(shards, start=1):
            file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= dict.fromkeys(names, file_name)
            with (directory / file_name).open("wb") as file:
                file.write(_header({name: shapes[name] for name in names}))
                for name in bar(file_name)(names):
                    rng = np.random.default_rng([seed, order[name]])
                    for block in values(name, shapes[name], rng):
                        file.write(block.view(np.uint8))
            print(f"{number} of {len(shards)} shards written", file=sys.stderr)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / INDEX, index)
        write_json(directory / CONFIG, config)
    print(f"{out}: {total / ITEM_BYTES:,.0f} parameters, {total:,} bytes of tensors")
    return Path(out)


def tensor_shapes(config: dict[str, Any]) -> Shapes:
    """List names and shapes of a `glm` or `glm4` decoder's tensors, as published.

    Args:
      config: fields of config.json.

    Returns:
      Shape by tensor name. A tied head is not stored.
    """
    width, neurons, vocab = (
        config[field] for field in ("hidden_size", "intermediate_size", "vocab_size")
    )
    rows = {
        "q": config["num_attention_heads"] * config["head_dim"],
        "k": config["num_key_value_heads"] * config["head_dim"],
        "v": config["num_key_value_heads"] * config["head_dim"],
    }
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config["model_type"] == "glm4":
        norms += ["post_self_attn_layernorm", "post_mlp_layernorm"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{norm}.weight": (width,) for norm in norms}
        for name, size in rows.items():
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (size, width)
            if config["attention_bias"]:
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (width, rows["q"])
        shapes[f"{prefix}mlp.gate_up_proj.weight"] = (2 * neurons, width)
        shapes[f"{prefix}mlp.down_proj.weight"] = (width, neurons)
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    return shapes


def split(shapes: Shapes, shard_bytes: float) -> list[list[str]]:
    """Split tensors, in order, into shards of at most `shard_bytes` or of one tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if shards[-1] and size + _bytes(shape) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(shape)
    return shards


def values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Draw a tensor's values in blocks.

    Args:
      name: name of the tensor; values of norms are around 1.
      shape: shape of the tensor.
      rng: random generator.

    Yields:
      Consecutive flat bfloat16 arrays.
    """
    count = math.prod(shape)
    mean = 1.0 if "norm" in name else 0.0
    for start in range(0, count, BLOCK_VALUES):
        drawn = rng.standard_normal(min(BLOCK_VALUES, count - start), np.float32)
        drawn *= STANDARD_DEVIATION
        drawn += mean
        yield drawn.astype(jnp.bfloat16)


def _header(shapes: Shapes) -> bytes:
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + _bytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _bytes(shape: tuple[int, ...]) -> int:
    return ITEM_BYTES * math.prod(shape)


if __name__ == "__main__":
    define_flags()
    launch(main)
