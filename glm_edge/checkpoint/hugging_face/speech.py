"""GLM-ASR (`glmasr`) and the encoder of Whisper (`whisper`)."""

import re
from typing import Any

from glm_edge.checkpoint.hugging_face.decoders import (
    ROTARY_BUFFERS,
    decoder_config,
    decoder_entries,
    ignored_head,
    read_tokens,
    write_decoder,
    write_tokens,
)
from glm_edge.checkpoint.hugging_face.fields import Fields
from glm_edge.checkpoint.hugging_face.member import Entry, Member, convolution, same
from glm_edge.configs import GLMConfig, SpeechConfig
from glm_edge.errors import ConfigError
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.models.speech import SpeechEncoder

HEAD = "language_model.lm_head"
_GLM_ASR_LAYER = {
    "input_norm": "input_layernorm",
    "attention/q_proj": "self_attn.q_proj",
    "attention/v_proj": "self_attn.v_proj",
    "attention/o_proj": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_WHISPER_LAYER = {
    "input_norm": "self_attn_layer_norm",
    "attention/q_proj": "self_attn.q_proj",
    "attention/v_proj": "self_attn.v_proj",
    "attention/o_proj": "self_attn.out_proj",
    "post_attention_norm": "final_layer_norm",
    "fc1": "fc1",
    "fc2": "fc2",
}


def _encoder_entries(
    config: SpeechConfig, ours: str, prefix: str, layer_names: dict[str, str], norm: str
) -> list[Entry]:
    both = ("weight", "bias")
    entries = [
        *convolution(f"{ours}conv1", f"{prefix}conv1", (3,)),
        *convolution(f"{ours}conv2", f"{prefix}conv2", (3,)),
        *same(f"{ours}norm", f"{prefix}{norm}", *both),
    ]
    for layer in range(config.num_layers):
        path, tensor = f"{ours}layers/{layer}", f"{prefix}layers.{layer}"
        for name, stored in layer_names.items():
            entries += same(f"{path}/{name}", f"{tensor}.{stored}", *both)
        entries += same(f"{path}/attention/k_proj", f"{tensor}.self_attn.k_proj")
    return entries


def _read_glm_asr_encoder(fields: Fields, hidden: int) -> SpeechConfig:
    fields.expect("hidden_act", "gelu", default="gelu")
    width, neurons = fields.get("hidden_size", int), fields.get("intermediate_size", int)
    heads = fields.get("num_attention_heads", int)
    if neurons % width:
        raise ConfigError(
            f"{fields.where}: field 'intermediate_size' is {neurons}; it must be a multiple of "
            f"hidden_size {width}, since so many frames are merged"
        )
    fields.expect("num_key_value_heads", heads)
    fields.expect("head_dim", width // heads)
    rope = fields.rope()
    config = SpeechConfig(
        mel_bins=fields.get("num_mel_bins", int, 128),
        num_frames=2 * fields.get("max_position_embeddings", int, 1500),
        hidden_size=width,
        num_layers=fields.get("num_hidden_layers", int),
        num_heads=heads,
        intermediate_size=neurons,
        projector_size=2 * hidden,
        merge_size=neurons // width,
        rope_theta=rope.get("rope_theta", float, 10000.0),
        partial_rotary_factor=rope.get("partial_rotary_factor", float, 0.5),
    )
    rope.finish()
    fields.finish()
    return config


def _read_glm_asr(fields: Fields, name: str) -> GLMConfig:
    text = fields.section("text_config")
    fields.expect("projector_hidden_act", "gelu")
    text.expect("model_type", "llama")
    for bias in ("attention_bias", "mlp_bias"):
        text.expect(bias, False)
    text.expect("pretraining_tp", 1)
    tied = text.get("tie_word_embeddings", bool, True)
    decoder = decoder_config(
        text,
        context=8192,
        rotary_interleaved=False,
        tie_embeddings=fields.get("tie_word_embeddings", bool, tied),
    )
    inner, outer = read_tokens(text), read_tokens(fields)
    text.finish()
    return GLMConfig(
        name=name,
        decoder=decoder,
        speech=_read_glm_asr_encoder(fields.section("audio_config"), decoder.hidden_size),
        audio_token_id=fields.get("audio_token_id", int),
        eos_token_ids=inner["eos_token_ids"] or outer["eos_token_ids"],
        pad_token_id=inner["pad_token_id"]
        if inner["pad_token_id"] is not None
        else outer["pad_token_id"],
    )


def _write_glm_asr(config: GLMConfig) -> dict[str, Any]:
    speech, decoder = config.speech, config.decoder
    return {
        "architectures": ["GlmAsrForConditionalGeneration"],
        "model_type": "glmasr",
        "audio_config": {
            "model_type": "glmasr_encoder",
            "hidden_size": speech.hidden_size,
            "intermediate_size": speech.intermediate_size,
            "num_hidden_layers": speech.num_layers,
            "num_attention_heads": speech.num_heads,
            "num_mel_bins": speech.mel_bins,
            "max_position_embeddings": speech.num_frames // 2,
            "hidden_act": "gelu",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": speech.rope_theta,
                "partial_rotary_factor": speech.partial_rotary_factor,
            },
        },
        "text_config": {
            **write_decoder(decoder, "llama"),
            **write_tokens(config),
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": decoder.tie_embeddings,
        },
        "audio_token_id": config.audio_token_id,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": decoder.tie_embeddings,
    }


def _glm_asr_entries(config: GLMConfig) -> list[Entry]:
    entries = decoder_entries(config.decoder, "language_model.model.", HEAD, fused_mlp=False)
    entries += _encoder_entries(config.speech, "speech/", "audio_tower.", _GLM_ASR_LAYER, "norm")
    for name in ("linear_1", "linear_2"):
        entries += same(f"speech/{name}", f"multi_modal_projector.{name}", "weight", "bias")
    return entries


GLM_ASR = Member(
    read_config=_read_glm_asr,
    write_config=_write_glm_asr,
    build=MultimodalGLM,
    entries=_glm_asr_entries,
    renames=(
        # Inside transformers 5.
        (r"^model\.(audio_tower|multi_modal_projector)\.", r"\1."),
        (r"^model\.language_model\.", "language_model.model."),
        # The first upload.
        (r"^audio_encoder\.whisper\.", "audio_tower."),
        (r"^audio_encoder\.adapting\.0\.", "multi_modal_projector.linear_1."),
        (r"^audio_encoder\.adapting\.2\.", "multi_modal_projector.linear_2."),
        (r"^audio_encoder\.layer_norm\.", "audio_tower.norm."),
        (r"^(audio_tower\.layers\.\d+)\.self_attn\.out_proj\.", r"\1.self_attn.o_proj."),
        (r"^(audio_tower\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.input_layernorm."),
        (r"^(audio_tower\.layers\.\d+)\.final_layer_norm\.", r"\1.post_attention_layernorm."),
        (r"^(audio_tower\.layers\.\d+)\.(fc[12])\.", r"\1.mlp.\2."),
        (r"^audio_tower\.layer_norm\.", "audio_tower.norm."),
        (r"^model\.", "language_model.model."),
        (r"^lm_head\.", f"{HEAD}."),
    ),
    ignored=lambda config: "|".join(
        (
            ignored_head(config, re.escape(f"{HEAD}.weight")),
            r"audio_encoder\.(proj|audio_bos_eos_token)\..*",
            r"audio_tower\.embed_positions\.weight",
        )
    ),
)


def _read_whisper(fields: Fields, name: str) -> SpeechConfig:
    fields.expect("activation_function", "gelu", default="gelu")
    fields.expect("scale_embedding", False)
    for unused in _WHISPER_UNUSED:
        fields.take(unused)
    config = SpeechConfig(
        mel_bins=fields.get("num_mel_bins", int, 80),
        num_frames=2 * fields.get("max_source_positions", int, 1500),
        hidden_size=fields.get("d_model", int),
        num_layers=fields.get("encoder_layers", int),
        num_heads=fields.get("encoder_attention_heads", int),
        intermediate_size=fields.get("encoder_ffn_dim", int),
        projector_size=0,
        merge_size=1,
        learned_positions=True,
        partial_rotary_factor=0.0,
    )
    fields.finish()
    return config


# Of the decoder, of training and of word timestamps.
_WHISPER_UNUSED = (
    "activation_dropout",
    "alignment_heads",
    "apply_spec_augment",
    "classifier_proj_size",
    "decoder_attention_heads",
    "decoder_ffn_dim",
    "decoder_layerdrop",
    "decoder_layers",
    "encoder_layerdrop",
    "init_std",
    "mask_feature_length",
    "mask_feature_min_masks",
    "mask_feature_prob",
    "mask_time_length",
    "mask_time_min_masks",
    "mask_time_prob",
    "max_target_positions",
    "median_filter_width",
    "num_hidden_layers",
    "tie_word_embeddings",
    "use_weighted_layer_sum",
    "vocab_size",
)


def _write_whisper(config: SpeechConfig) -> dict[str, Any]:
    return {
        "architectures": ["WhisperEncoder"],
        "model_type": "whisper",
        "num_mel_bins": config.mel_bins,
        "max_source_positions": config.num_frames // 2,
        "d_model": config.hidden_size,
        "encoder_layers": config.num_layers,
        "encoder_attention_heads": config.num_heads,
        "encoder_ffn_dim": config.intermediate_size,
        "activation_function": "gelu",
    }


def _whisper_entries(config: SpeechConfig) -> list[Entry]:
    entries = _encoder_entries(config, "", "", _WHISPER_LAYER, "layer_norm")
    return [*entries, Entry(("position",), ("embed_positions.weight",))]


WHISPER = Member(
    read_config=_read_whisper,
    write_config=_write_whisper,
    build=SpeechEncoder,
    entries=_whisper_entries,
    renames=((r"^(model\.)?encoder\.", ""),),
    ignored=lambda config: rf"{ROTARY_BUFFERS}|(model\.)?decoder\..*|proj_out\.weight",
)
