"""GLM-ASR (`glmasr`), its first published form, and Whisper's encoder (`whisper`)."""

import dataclasses
import re
from typing import Any

import numpy as np

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
from glm_edge.checkpoint.hugging_face.member import (
    Arrays,
    FamilyMember,
    TensorMapping,
    convolution,
    same,
)
from glm_edge.configs import DecoderConfig, GLMConfig, SpeechConfig
from glm_edge.errors import ConfigError
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.models.speech import SpeechEncoder

HEAD = "language_model.lm_head"
MERGED_FRAMES = 4
_GLM_ASR_LAYER = {
    "input_norm": "input_layernorm",
    "attention/q_proj": "self_attn.q_proj",
    "attention/k_proj": "self_attn.k_proj",
    "attention/v_proj": "self_attn.v_proj",
    "attention/o_proj": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_WHISPER_LAYER = {
    "input_norm": "self_attn_layer_norm",
    "attention/q_proj": "self_attn.q_proj",
    "attention/k_proj": "self_attn.k_proj",
    "attention/v_proj": "self_attn.v_proj",
    "attention/o_proj": "self_attn.out_proj",
    "post_attention_norm": "final_layer_norm",
    "fc1": "fc1",
    "fc2": "fc2",
}


def _encoder_entries(
    config: SpeechConfig,
    ours: str,
    prefix: str,
    layer_names: dict[str, str],
    norm: str,
    interleaved: bool = False,
) -> list[TensorMapping]:
    both = ("weight", "bias")
    entries = [
        *convolution(f"{ours}conv1", f"{prefix}conv1", (3,)),
        *convolution(f"{ours}conv2", f"{prefix}conv2", (3,)),
        *same(f"{ours}norm", norm, *both),
    ]
    for layer in range(config.num_layers):
        layer_entries = []
        for name, stored in layer_names.items():
            path, tensor = f"{ours}layers/{layer}/{name}", f"{prefix}layers.{layer}.{stored}"
            layer_entries += same(path, tensor, *(both if name != "attention/k_proj" else both[:1]))
        if interleaved:
            layer_entries = [_half_split(config, entry) for entry in layer_entries]
        entries += layer_entries
    return entries


def _half_split(config: SpeechConfig, entry: TensorMapping) -> TensorMapping:
    """Reorder query and key rows from adjacent rotary pairs to pairs half a head apart."""
    if not re.search(r"/[qk]_proj/", entry.paths[0]):
        return entry
    pairs = np.arange(config.rotary_dim).reshape(-1, 2).T.reshape(-1)
    head = np.arange(config.head_size)
    head[: config.rotary_dim] = pairs
    order = (np.arange(config.heads(0))[:, None] * head.size + head).reshape(-1)

    def read(stored: np.ndarray) -> Arrays:
        if len(stored) != order.size:
            raise ValueError(f"{order.size} rows are needed")
        return (stored[order],)

    def write(array: np.ndarray) -> Arrays:
        return (array[np.argsort(order)],)

    return TensorMapping(entry.paths, entry.names, read, write)


def _read_glm_asr_encoder(fields: Fields, hidden: int) -> SpeechConfig:
    fields.expect("hidden_act", "gelu", default="gelu")
    width, neurons = fields.get("hidden_size", int), fields.get("intermediate_size", int)
    heads, head_dim = fields.get("num_attention_heads", int), fields.take("head_dim")
    if head_dim is None:
        fields.divisor("num_attention_heads", "hidden_size", width)
    else:
        head_dim = fields.get("head_dim", int)
    shared = fields.divisor("num_key_value_heads", "num_attention_heads", heads, heads)
    length = fields.get("max_position_embeddings", int, 1500)
    if length % MERGED_FRAMES:
        raise ConfigError(
            f"{fields.where}: field 'max_position_embeddings' is {length}; it must be a multiple "
            f"of {MERGED_FRAMES}, the count of merged frames"
        )
    # The reference merges intermediate_size / hidden_size frames, but counts features of 4 frames.
    if neurons != MERGED_FRAMES * width:
        raise ConfigError(
            f"{fields.where}: field 'intermediate_size' is {neurons}; it must be {MERGED_FRAMES} x "
            f"hidden_size {width}, since {MERGED_FRAMES} frames are merged"
        )
    rope = fields.rope()
    config = SpeechConfig(
        mel_bins=fields.get("num_mel_bins", int, 128),
        num_frames=2 * length,
        hidden_size=width,
        num_layers=fields.get("num_hidden_layers", int),
        num_heads=heads,
        intermediate_size=neurons,
        projector_size=2 * hidden,
        merge_size=MERGED_FRAMES,
        rope_theta=rope.get("rope_theta", float, 10000.0),
        partial_rotary_factor=rope.get("partial_rotary_factor", float, 0.5),
        head_dim=None if head_dim in (None, width / heads) else head_dim,
        num_kv_heads=None if shared == heads else shared,
    )
    rope.finish()
    fields.finish()
    return config


def _read_llama(text: Fields, tied: bool) -> DecoderConfig:
    text.expect("model_type", "llama")
    for bias in ("attention_bias", "mlp_bias"):
        text.expect(bias, False)
    text.expect("pretraining_tp", 1)
    decoder = decoder_config(text, context=8192, rotary_interleaved=False, tie_embeddings=tied)
    if decoder.partial_rotary_factor != 1:
        raise ConfigError(
            f"{text.where}: field 'partial_rotary_factor' is {decoder.partial_rotary_factor}; it "
            "must be 1, since a llama rotates all dimensions of a head"
        )
    return decoder


def _read_glm_asr(fields: Fields, name: str) -> GLMConfig:
    text, audio = fields.section("text_config"), fields.section("audio_config")
    for section in (text, audio):
        fields.repeats(section)
    fields.expect("projector_hidden_act", "gelu")
    # transformers ignores rope_theta without rope_parameters.
    if not {"rope_parameters", "rope_scaling"} & set(text.values):
        text.expect("rope_theta", 10000, 10000.0)
    # Only the outer field applies; its default differs from that of a standalone decoder.
    text.take("tie_word_embeddings")
    decoder = _read_llama(text, tied=fields.get("tie_word_embeddings", bool, True))
    tokens = read_tokens(fields, text)
    text.finish()
    return GLMConfig(
        name=name,
        decoder=decoder,
        speech=_read_glm_asr_encoder(audio, decoder.hidden_size),
        audio_token_id=fields.get("audio_token_id", int),
        **tokens,
    )


def _present(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _write_glm_asr(config: GLMConfig) -> dict[str, Any]:
    speech, decoder = config.speech_encoder, config.decoder
    return {
        "architectures": ["GlmAsrForConditionalGeneration"],
        "model_type": "glmasr",
        "audio_config": {
            "model_type": "glmasr_encoder",
            "hidden_size": speech.hidden_size,
            "intermediate_size": speech.intermediate_size,
            "num_hidden_layers": speech.num_layers,
            "num_attention_heads": speech.num_heads,
            # Derived values are omitted; readers compute them from the other fields.
            **_present(num_key_value_heads=speech.num_kv_heads, head_dim=speech.head_dim),
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


def _glm_asr_entries(config: GLMConfig) -> list[TensorMapping]:
    speech = config.speech_encoder
    entries = decoder_entries(config.decoder, "language_model.model.", HEAD, fused_mlp=False)
    entries += _encoder_entries(
        speech, "speech/", "audio_tower.", _GLM_ASR_LAYER, "audio_tower.norm"
    )
    for name in ("linear_1", "linear_2"):
        entries += same(f"speech/{name}", f"multi_modal_projector.{name}", "weight", "bias")
    return entries


GLM_ASR = FamilyMember(
    read_config=_read_glm_asr,
    write_config=_write_glm_asr,
    build=MultimodalGLM,
    entries=_glm_asr_entries,
    renames=(
        # Names within transformers 5.
        (r"^model\.(audio_tower|multi_modal_projector)\.", r"\1."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", f"{HEAD}."),
    ),
    ignored=lambda config: ignored_head(config, re.escape(f"{HEAD}.weight")),
    module_renames=(
        (r"^(audio_tower|multi_modal_projector)\.", r"model.\1."),
        (r"^language_model\.model\.", "model.language_model."),
        (rf"^{re.escape(HEAD)}$", "lm_head"),
    ),
)


def _read_whisper(fields: Fields, name: str) -> SpeechConfig:
    fields.expect("activation_function", "gelu", default="gelu")
    fields.expect("scale_embedding", False)
    for unused in _WHISPER_UNUSED:
        fields.take(unused)
    hidden = fields.get("d_model", int)
    config = SpeechConfig(
        mel_bins=fields.get("num_mel_bins", int, 80),
        num_frames=2 * fields.get("max_source_positions", int, 1500),
        hidden_size=hidden,
        num_layers=fields.get("encoder_layers", int),
        num_heads=fields.divisor("encoder_attention_heads", "d_model", hidden),
        intermediate_size=fields.get("encoder_ffn_dim", int),
        projector_size=0,
        merge_size=1,
        learned_positions=True,
        partial_rotary_factor=0.0,
    )
    fields.finish()
    return config


# Fields of the decoder, of training and of word timestamps.
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


def _whisper_entries(config: SpeechConfig) -> list[TensorMapping]:
    entries = _encoder_entries(config, "", "", _WHISPER_LAYER, "layer_norm")
    return [*entries, TensorMapping(("position",), ("embed_positions.weight",))]


WHISPER = FamilyMember(
    read_config=_read_whisper,
    write_config=_write_whisper,
    build=SpeechEncoder,
    entries=_whisper_entries,
    renames=((r"^(model\.)?encoder\.", ""),),
    ignored=lambda config: rf"{ROTARY_BUFFERS}|(model\.)?decoder\..*|proj_out\.weight",
)


def _read_first_glm_asr(fields: Fields, name: str) -> GLMConfig:
    text = fields.section("lm_config")
    fields.expect("adapter_type", "mlp")
    fields.expect("mlp_adapter_act", "gelu")
    if not fields.get("use_rope", bool, False):
        raise ConfigError(f"{fields.where}: field 'use_rope' must be true")
    for unused in ("max_whisper_length", "spec_aug"):
        fields.take(unused)
    decoder = _read_llama(text, tied=text.get("tie_word_embeddings", bool, False))
    tokens = read_tokens(fields, text)
    text.finish()
    # The remote code receives audio positions; later uploads mark them with the padding token.
    audio = fields.token_id("audio_token_id")
    if audio is None:
        audio = tokens["pad_token_id"]
    if audio is None:
        raise ConfigError(
            f"{fields.where}: field 'audio_token_id' is missing; it must be the id of the audio "
            "placeholder"
        )
    speech = dataclasses.replace(
        _read_whisper(fields.section("whisper_config"), name),
        learned_positions=False,
        partial_rotary_factor=0.5,
        projector_size=2 * decoder.hidden_size,
        merge_size=fields.get("merge_factor", int, 2),
    )
    return GLMConfig(
        name=name,
        decoder=decoder,
        speech=speech,
        audio_token_id=audio,
        **tokens,
    )


def _write_first_glm_asr(config: GLMConfig) -> dict[str, Any]:
    raise ConfigError("the first GLM-ASR cannot be written; write it as a glmasr")


def _first_glm_asr_entries(config: GLMConfig) -> list[TensorMapping]:
    prefix = "audio_encoder"
    entries = decoder_entries(config.decoder, "model.", "lm_head", fused_mlp=False)
    entries += _encoder_entries(
        config.speech_encoder,
        "speech/",
        f"{prefix}.whisper.",
        _WHISPER_LAYER,
        f"{prefix}.layer_norm",
        interleaved=True,
    )
    for number, name in ((0, "linear_1"), (2, "linear_2")):
        entries += same(f"speech/{name}", f"{prefix}.adapting.{number}", "weight", "bias")
    return entries


FIRST_GLM_ASR = FamilyMember(
    read_config=_read_first_glm_asr,
    write_config=_write_first_glm_asr,
    build=MultimodalGLM,
    entries=_first_glm_asr_entries,
    # The vectors of boundary tokens are also rows of the embedding; the others are unused.
    ignored=lambda config: "|".join(
        (
            ignored_head(config),
            r"audio_encoder\.(proj|audio_bos_eos_token)\..*",
            r"audio_encoder\.whisper\.embed_positions\.weight",
        )
    ),
)
