"""Quantized checkpoints written from the published layouts, one integer of Python per row.

Nothing here is shared with the library: a row of codes is one long integer, whose bytes are the
words. On the matrices of `draw`, the bytes equal those of `pack_original` in GPTQModel 7.7.0 (2, 3,
4 and 8 bits) and of `WQLinear_GEMM.from_linear` in AutoAWQ 0.2.9, whose packages need a GPU's
compiler or older libraries.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from glm_edge.checkpoint.safetensors import write_safetensors

FIELDS = {
    "model_type": "glm",
    "vocab_size": 37,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
    "torch_dtype": "float16",
}
MODULES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (32, 32),
    "self_attn.v_proj": (32, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_up_proj": (128, 32),
    "mlp.down_proj": (32, 64),
}
# Order in which AutoAWQ stores eight outputs in a word.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes, bits: int) -> np.ndarray:
    """Pack one row of unsigned codes into little-endian words of 32 bits."""
    number = sum(int(code) << (bits * index) for index, code in enumerate(codes))
    size = -(-len(codes) * bits // 32) * 4
    return np.frombuffer(number.to_bytes(size, "little"), "<i4")


def draw(shape: tuple[int, int], bits: int, group_size: int, seed: Any) -> dict[str, np.ndarray]:
    """Draw unsigned codes and zero points and float16 scales of a matrix [out, in].

    A zero point is at least 1: the first convention of GPTQ cannot store 0 without a carry.
    """
    rng = np.random.default_rng(seed)
    groups = 1 if group_size == -1 else shape[1] // group_size
    return {
        "codes": rng.integers(0, 2**bits, shape),
        "zeros": rng.integers(1, 2**bits, (shape[0], groups)),
        "scales": rng.uniform(0.01, 0.1, (shape[0], groups)).astype(np.float16),
    }


def dequantized(drawn: dict[str, np.ndarray]) -> np.ndarray:
    """Compute `scale * (code - zero)` in float32."""
    codes, groups = drawn["codes"], drawn["zeros"].shape[1]
    grouped = codes.reshape(len(codes), groups, -1).astype(np.float32)
    grouped = (grouped - drawn["zeros"][..., None]) * drawn["scales"].astype(np.float32)[..., None]
    return grouped.reshape(codes.shape)


def gptq(drawn: dict[str, np.ndarray], bits: int, offset: int) -> dict[str, np.ndarray]:
    """Return the tensors of a GPTQ module; `offset` is 1 for the first convention, else 0."""
    codes, zeros = drawn["codes"], drawn["zeros"] - offset
    columns, groups = codes.shape[1], zeros.shape[1]
    return {
        "qweight": np.stack([words(row, bits) for row in codes], axis=1),
        "qzeros": np.stack([words(row, bits) for row in zeros.T]),
        "scales": np.ascontiguousarray(drawn["scales"].T),
        "g_idx": np.repeat(np.arange(groups), columns // groups).astype(np.int32),
    }


def awq(drawn: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors of an AWQ module in the layout gemm."""

    def pack(matrix):
        return np.stack(
            [
                np.concatenate(
                    [words(row[at : at + 8][list(AWQ_ORDER)], 4) for at in range(0, len(row), 8)]
                )
                for row in matrix.T
            ]
        )

    scales = np.ascontiguousarray(drawn["scales"].T)
    return {"qweight": pack(drawn["codes"]), "qzeros": pack(drawn["zeros"]), "scales": scales}


def dense_tensors(fields: dict[str, Any]) -> dict[str, np.ndarray]:
    """Draw embedding and norms."""
    rng, width = np.random.default_rng(7), fields["hidden_size"]
    tensors = {
        "model.embed_tokens.weight": rng.normal(size=(fields["vocab_size"], width)),
        "model.norm.weight": rng.uniform(0.5, 1, width),
    }
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.0.{norm}.weight"] = rng.uniform(0.5, 1, width)
    return {name: array.astype(np.float16) for name, array in tensors.items()}


def write(
    directory: Path,
    quantization: dict[str, Any],
    modules: dict[str, dict[str, np.ndarray]],
    fields: dict[str, Any] | None = None,
) -> Path:
    """Write a directory of one layer.

    Args:
      directory: directory to create.
      quantization: value of `quantization_config`.
      modules: tensors by suffix, by name of the module in the layer.
      fields: fields of config.json to change.
    """
    directory.mkdir(exist_ok=True)
    fields = FIELDS | (fields or {})
    tensors = dense_tensors(fields)
    for module, parts in modules.items():
        tensors |= {f"model.layers.0.{module}.{name}": array for name, array in parts.items()}
    write_safetensors(directory / "model.safetensors", tensors)
    config = fields | {"quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    return directory
