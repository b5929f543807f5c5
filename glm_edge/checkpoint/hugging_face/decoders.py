"""GLM-Edge, GLM-4-9B-Chat and GLM-4-0414 (`glm`, `glm4`), and decoders of other members."""

from typing import Any

from glm_edge.checkpoint.hugging_face.fields import Fields
from glm_edge.checkpoint.hugging_face.member import FamilyMember, TensorMapping, join, same
from glm_edge.configs import DecoderConfig, GLMConfig
from glm_edge.errors import ConfigError
from glm_edge.models.multimodal import MultimodalGLM

ROTARY_BUFFERS = r".*rotary_(pos_)?emb\.inv_freq"
GLM_EPS = 1.5625e-7


def decoder_config(
    fields: Fields,
    context: int,
    eps: float = 1e-5,
    partial: float = 1.0,
    mrope_section: tuple[int, ...] = (),
    **settled: Any,
) -> DecoderConfig:
    """Read the fields that all decoders share; widths and depth are required.

    Args:
      fields: fields of the decoder.
      context: default of `max_position_embeddings`.
      eps: default of `rms_norm_eps`.
      partial: default of `partial_rotary_factor`.
      mrope_section: default sections of three-dimensional rotary positions; empty if this
        `model_type` has none.
      **settled: fields of `DecoderConfig` that the `model_type` determines.

    Returns:
      The configuration.

    Raises:
      ConfigError: a field is missing, malformed or unsupported.
    """
    for name in ("quantization_config", "sliding_window"):
        fields.expect(name)
    fields.expect("hidden_act", "silu")
    rope = fields.rope()
    section = rope.take("mrope_section", list(mrope_section))
    known = isinstance(section, list) and all(type(n) is int and n >= 0 for n in section)
    if not known or (mrope_section and not section):
        raise ConfigError(
            f"{rope.where}: field 'mrope_section' is {section!r:.60}; it must be a list of integers"
        )
    if section and not mrope_section:
        raise ConfigError(f"{rope.where}: field 'mrope_section' is unsupported for this model_type")
    hidden, heads = fields.get("hidden_size", int), fields.get("num_attention_heads", int)
    settled.setdefault("head_dim", fields.get("head_dim", int, max(1, hidden // heads)))
    # Null means the count of query heads; the default of an absent field differs per class.
    kv_default = [heads] if "num_key_value_heads" in fields.values else []
    config = DecoderConfig(
        vocab_size=fields.get("vocab_size", int),
        hidden_size=hidden,
        num_layers=fields.get("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=fields.divisor(
            "num_key_value_heads", "num_attention_heads", heads, *kv_default
        ),
        intermediate_size=fields.get("intermediate_size", int),
        rms_norm_eps=fields.get("rms_norm_eps", float, eps),
        rope_theta=rope.get("rope_theta", float, 10000.0),
        partial_rotary_factor=rope.get("partial_rotary_factor", float, partial),
        mrope_section=tuple(section),
        max_position_embeddings=fields.get("max_position_embeddings", int, context),
        **settled,
    )
    rope.finish()
    return config


def write_decoder(config: DecoderConfig, model_type: str) -> dict[str, Any]:
    """Write the fields that `decoder_config` reads.

    Args:
      config: configuration of the decoder.
      model_type: value of the field `model_type`.

    Returns:
      JSON-ready fields.

    Raises:
      ConfigError: widths differ per layer, which config.json cannot express.
    """
    widths = (config.num_heads, config.num_kv_heads, config.intermediate_size)
    if not all(isinstance(width, int) for width in widths):
        raise ConfigError("a Hugging Face config.json has one width for all layers")
    rope = {
        "rope_type": "default",
        "rope_theta": config.rope_theta,
        "partial_rotary_factor": config.partial_rotary_factor,
    }
    if config.mrope_section:
        rope["mrope_section"] = list(config.mrope_section)
    return {
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": rope,
    }


def decoder_entries(
    config: DecoderConfig, prefix: str, head: str, fused_mlp: bool = True
) -> list[TensorMapping]:
    """List a decoder's parameters.

    Args:
      config: configuration of the decoder.
      prefix: prefix of tensor names, such as `model.`.
      head: name of the output head.
      fused_mlp: False if gate and up are two tensors.

    Returns:
      Entries of `embed`, `decoder` and `head`.
    """
    entries = same("embed", f"{prefix}embed_tokens") + same("decoder/norm", f"{prefix}norm")
    if not config.tie_embeddings:
        entries += same("head", head)
    norms = {"input_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
    if config.sandwich_norm:
        norms["post_self_attention_norm"] = "post_self_attn_layernorm"
        norms["post_mlp_norm"] = "post_mlp_layernorm"
    biased = ("weight", "bias") if config.attention_bias else ("weight",)
    for layer in range(config.num_layers):
        ours, stored = f"decoder/layers/{layer}", f"{prefix}layers.{layer}"
        for name, stored_name in norms.items():
            entries += same(f"{ours}/{name}", f"{stored}.{stored_name}")
        for name in ("q_proj", "k_proj", "v_proj"):
            entries += same(f"{ours}/attention/{name}", f"{stored}.self_attn.{name}", *biased)
        entries += same(f"{ours}/attention/o_proj", f"{stored}.self_attn.o_proj")
        entries += same(f"{ours}/mlp/down_proj", f"{stored}.mlp.down_proj")
        if fused_mlp:
            entries += same(f"{ours}/mlp/gate_up_proj", f"{stored}.mlp.gate_up_proj")
        else:
            parts = (f"{stored}.mlp.gate_proj.weight", f"{stored}.mlp.up_proj.weight")
            entries.append(join(f"{ours}/mlp/gate_up_proj/weight", parts))
    return entries


def read_tokens(*sections: Fields) -> dict[str, Any]:
    """Read stop and padding tokens from the first section that names them.

    As in transformers, config.json itself overrides its `text_config`. generation_config.json
    overrides both, and is read with the directory.

    Args:
      *sections: sections in order of precedence.

    Returns:
      The fields `eos_token_ids` and `pad_token_id` of `GLMConfig`.
    """
    stops = [section.token_ids("eos_token_id") for section in sections]
    pads = [section.token_id("pad_token_id") for section in sections]
    return {
        "eos_token_ids": next(filter(None, stops), ()),
        "pad_token_id": next((pad for pad in pads if pad is not None), None),
    }


def write_tokens(config: GLMConfig) -> dict[str, Any]:
    """Write the fields that `read_tokens` reads."""
    return {"eos_token_id": list(config.eos_token_ids), "pad_token_id": config.pad_token_id}


def _text_member(model_type: str, architecture: str, sandwich_norm: bool) -> FamilyMember:
    def read_config(fields: Fields, name: str) -> GLMConfig:
        decoder = decoder_config(
            fields,
            context=131072,
            eps=GLM_EPS,
            partial=0.5,
            head_dim=fields.get("head_dim", int),
            sandwich_norm=sandwich_norm,
            attention_bias=fields.get("attention_bias", bool, True),
            tie_embeddings=fields.get("tie_word_embeddings", bool, False),
        )
        return GLMConfig(name=name, decoder=decoder, **read_tokens(fields))

    def write_config(config: GLMConfig) -> dict[str, Any]:
        return {
            "architectures": [architecture],
            **write_decoder(config.decoder, model_type),
            "attention_bias": config.decoder.attention_bias,
            "tie_word_embeddings": config.decoder.tie_embeddings,
            **write_tokens(config),
        }

    return FamilyMember(
        read_config=read_config,
        write_config=write_config,
        build=MultimodalGLM,
        entries=lambda config: decoder_entries(config.decoder, "model.", "lm_head"),
        ignored=ignored_head,
    )


def ignored_head(config: GLMConfig, head: str = r"lm_head\.weight") -> str:
    """Return a pattern for rotary buffers of old files, and for a tied model's stored head."""
    return f"{ROTARY_BUFFERS}|{head}" if config.decoder.tie_embeddings else ROTARY_BUFFERS


GLM = _text_member("glm", "GlmForCausalLM", sandwich_norm=False)
GLM4 = _text_member("glm4", "Glm4ForCausalLM", sandwich_norm=True)
