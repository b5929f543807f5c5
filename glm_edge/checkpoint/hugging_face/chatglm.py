"""The remote-code dialect of ChatGLM3 and GLM-4-9B (`chatglm`), which can only be read."""

from typing import Any

import numpy as np

from glm_edge.checkpoint.hugging_face.decoders import ROTARY_BUFFERS, read_tokens
from glm_edge.checkpoint.hugging_face.fields import Fields
from glm_edge.checkpoint.hugging_face.member import Arrays, FamilyMember, TensorMapping, same
from glm_edge.configs import DecoderConfig, GLMConfig
from glm_edge.errors import ConfigError
from glm_edge.models.multimodal import MultimodalGLM

# Values that transformers' `glm` implies; other values are unsupported.
_SETTLED = {
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "original_rope": True,
    "post_layer_norm": True,
    "prefix_projection": False,
    "rmsnorm": True,
}
# Fields of training and of 16-bit arithmetic.
_UNUSED = (
    "apply_query_key_layer_scaling",
    "attention_softmax_in_fp32",
    "bias_dropout_fusion",
    "classifier_dropout",
    "fp32_residual_connection",
)


def _read_config(fields: Fields, name: str) -> GLMConfig:
    for field, value in _SETTLED.items():
        fields.expect(field, value)
    for field in _UNUSED:
        fields.take(field)
    vocab, layers = fields.get("padded_vocab_size", int), fields.get("num_layers", int)
    fields.expect("vocab_size", vocab)
    fields.expect("num_hidden_layers", layers)
    hidden, heads = fields.get("hidden_size", int), fields.get("num_attention_heads", int)
    groups = fields.get("multi_query_group_num", int, 1)
    decoder = DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=groups if fields.get("multi_query_attention", bool, False) else heads,
        head_dim=fields.get("kv_channels", int, 128),
        intermediate_size=fields.get("ffn_hidden_size", int),
        rms_norm_eps=fields.get("layernorm_epsilon", float, 1e-5),
        rope_theta=10000.0 * fields.get("rope_ratio", float, 1.0),
        partial_rotary_factor=0.5,
        attention_bias=fields.get("add_qkv_bias", bool, False),
        tie_embeddings=fields.get("tie_word_embeddings", bool, False),
        max_position_embeddings=fields.get("seq_length", int, 2048),
    )
    return GLMConfig(name=name, decoder=decoder, **read_tokens(fields))


def _write_config(config: GLMConfig) -> dict[str, Any]:
    raise ConfigError("a chatglm cannot be written; write it as a glm")


def _query_key_value(config: DecoderConfig, ours: str, name: str) -> TensorMapping:
    queries = config.heads(0) * config.head_dim
    keys = config.kv_heads(0) * config.head_dim

    def read(fused: np.ndarray) -> Arrays:
        if len(fused) != queries + 2 * keys:
            raise ValueError(f"{queries} + 2 x {keys} rows are needed")
        return tuple(np.split(fused, [queries, queries + keys]))

    def write(*parts: np.ndarray) -> Arrays:
        return (np.concatenate(parts),)

    field = name.rpartition(".")[2]
    paths = tuple(f"{ours}/{part}_proj/{field}" for part in "qkv")
    return TensorMapping(paths, (name,), read, write)


def _entries(config: GLMConfig) -> list[TensorMapping]:
    decoder = config.decoder
    entries = same("embed", "transformer.embedding.word_embeddings")
    entries += same("decoder/norm", "transformer.encoder.final_layernorm")
    if not decoder.tie_embeddings:
        entries += same("head", "transformer.output_layer")
    for layer in range(decoder.num_layers):
        ours, stored = f"decoder/layers/{layer}", f"transformer.encoder.layers.{layer}"
        entries += same(f"{ours}/input_norm", f"{stored}.input_layernorm")
        entries += same(f"{ours}/post_attention_norm", f"{stored}.post_attention_layernorm")
        for field in ("weight", "bias") if decoder.attention_bias else ("weight",):
            fused = f"{stored}.self_attention.query_key_value.{field}"
            entries.append(_query_key_value(decoder, f"{ours}/attention", fused))
        entries += same(f"{ours}/attention/o_proj", f"{stored}.self_attention.dense")
        entries += same(f"{ours}/mlp/gate_up_proj", f"{stored}.mlp.dense_h_to_4h")
        entries += same(f"{ours}/mlp/down_proj", f"{stored}.mlp.dense_4h_to_h")
    return entries


def _ignored(config: GLMConfig) -> str:
    tied = r"|transformer\.output_layer\.weight" if config.decoder.tie_embeddings else ""
    return ROTARY_BUFFERS + tied


CHATGLM = FamilyMember(
    read_config=_read_config,
    write_config=_write_config,
    build=MultimodalGLM,
    entries=_entries,
    ignored=_ignored,
)
