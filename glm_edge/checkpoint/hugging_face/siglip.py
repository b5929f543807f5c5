"""SigLIP (`siglip_vision_model`, `siglip`), and GLM-Edge-V (`glm` with a vision_config)."""

from typing import Any

import numpy as np

from glm_edge.checkpoint.hugging_face.decoders import (
    GLM_EPS,
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
    join,
    same,
    split,
)
from glm_edge.checkpoint.hugging_face.vision import square_grid
from glm_edge.configs import GLMConfig, VisionConfig
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.models.vision import VisionEncoder

_PROJECTIONS = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "out_proj"}


def _siglip_config(fields: Fields, **adapter: Any) -> VisionConfig:
    fields.expect("hidden_act", "gelu_pytorch_tanh")
    patch = fields.get("patch_size", int, 16)
    grid = square_grid(fields, patch, 224)
    merge = adapter.get("merge_size", 1)
    hidden = fields.get("hidden_size", int, 768)
    config = VisionConfig(
        image_size=tuple(extent // merge * merge * patch for extent in grid),
        hidden_size=hidden,
        num_layers=fields.get("num_hidden_layers", int, 12),
        num_heads=fields.divisor("num_attention_heads", "hidden_size", hidden, 12),
        intermediate_size=fields.get("intermediate_size", int, 3072),
        patch_size=patch,
        patch_stride=patch,
        temporal_patch_size=1,
        channels=fields.get("num_channels", int, 3),
        position_grid=grid,
        rotary=False,
        norm="layer",
        norm_eps=fields.get("layer_norm_eps", float, 1e-6),
        post_conv_norm=False,
        attention_bias=True,
        projection_bias=True,
        gated_mlp=False,
        pooling_head=fields.get("vision_use_head", bool, True),
        **{"merge_size": 1, "projector_size": 0, **adapter},
    )
    fields.finish()
    return config


def _write_siglip(config: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "image_size": config.position_grid[0] * config.patch_size,
        "patch_size": config.patch_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "num_channels": config.channels,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": config.norm_eps,
        "vision_use_head": config.pooling_head,
    }


def _siglip_entries(config: VisionConfig, ours: str, prefix: str) -> list[TensorMapping]:
    both, kernel = ("weight", "bias"), (config.patch_size, config.patch_size)
    entries = convolution(f"{ours}patch", f"{prefix}embeddings.patch_embedding", kernel)
    table = f"{prefix}embeddings.position_embedding.weight"
    entries.append(TensorMapping((f"{ours}position",), (table,)))
    for index in range(config.num_layers):
        layer, stored = f"{ours}layers/{index}", f"{prefix}encoder.layers.{index}"
        entries += same(f"{layer}/input_norm", f"{stored}.layer_norm1", *both)
        entries += same(f"{layer}/post_attention_norm", f"{stored}.layer_norm2", *both)
        for name, stored_name in _PROJECTIONS.items():
            entries += same(f"{layer}/attention/{name}", f"{stored}.self_attn.{stored_name}", *both)
        for name in ("fc1", "fc2"):
            entries += same(f"{layer}/mlp/{name}", f"{stored}.mlp.{name}", *both)
    entries += same(f"{ours}norm", f"{prefix}post_layernorm", *both)
    if not config.pooling_head:
        return entries
    pool, head = f"{ours}pool", f"{prefix}head"
    entries.append(TensorMapping((f"{pool}/probe",), (f"{head}.probe",), _flatten, _add_two_axes))
    for field in both:
        heads = tuple(f"{pool}/{name}_proj/{field}" for name in "qkv")
        entries.append(split(heads, f"{head}.attention.in_proj_{field}"))
    entries += same(f"{pool}/o_proj", f"{head}.attention.out_proj", *both)
    entries += same(f"{pool}/norm", f"{head}.layernorm", *both)
    for name in ("fc1", "fc2"):
        entries += same(f"{pool}/mlp/{name}", f"{head}.mlp.{name}", *both)
    return entries


def _flatten(array: np.ndarray) -> Arrays:
    return (array.reshape(-1),)


def _add_two_axes(array: np.ndarray) -> Arrays:
    return (array[None, None],)


def _read_siglip(fields: Fields, name: str) -> VisionConfig:
    # A dual encoder stores the tower's fields in a section; its text encoder is not read.
    section = fields.optional_section("vision_config")
    if section is None:
        return _siglip_config(fields)
    fields.take("text_config")
    return _siglip_config(section)


SIGLIP = FamilyMember(
    read_config=_read_siglip,
    write_config=lambda config: {
        "architectures": ["SiglipVisionModel"],
        **_write_siglip(config),
    },
    build=VisionEncoder,
    entries=lambda config: _siglip_entries(config, "", ""),
    renames=((r"^(model\.)?vision_model\.", ""),),
    ignored=lambda config: r"(model\.)?text_model\..*|logit_scale|logit_bias|.*position_ids",
)


def _read_edge_v(fields: Fields, name: str) -> GLMConfig:
    decoder = decoder_config(
        fields,
        context=131072,
        eps=GLM_EPS,
        partial=0.5,
        head_dim=fields.get("head_dim", int),
        attention_bias=fields.get("attention_bias", bool, True),
        tie_embeddings=fields.get("tie_word_embeddings", bool, False),
    )
    vision = _siglip_config(
        fields.section("vision_config"),
        merge_size=2,
        projector_size=decoder.intermediate_size,
        boundary_embeddings=True,
    )
    begin, end = fields.get("boi_token_id", int), fields.get("eoi_token_id", int)
    return GLMConfig(
        name=name,
        decoder=decoder,
        vision=vision,
        image_token_id=begin,
        image_boundary_ids=(begin, end),
        **read_tokens(fields),
    )


def _write_edge_v(config: GLMConfig) -> dict[str, Any]:
    begin, end = config.image_boundary_ids
    return {
        "architectures": ["GlmForCausalLM"],
        **write_decoder(config.decoder, "glm"),
        "attention_bias": config.decoder.attention_bias,
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "vision_config": _write_siglip(config.vision_tower),
        "boi_token_id": begin,
        "eoi_token_id": end,
        **write_tokens(config),
    }


def _edge_v_entries(config: GLMConfig) -> list[TensorMapping]:
    adapter = "model.vision.adapter"
    linear = f"{adapter}.linear_proj"
    gate_up = (f"{linear}.gate_proj.weight", f"{linear}.dense_h_to_4h.weight")
    return [
        *decoder_entries(config.decoder, "model.", "lm_head"),
        *_siglip_entries(config.vision_tower, "vision/", "model.vision.vit.model.vision_model."),
        *convolution("vision/merge", f"{adapter}.conv", (2, 2)),
        *same("vision/projector/proj", f"{linear}.linear_proj"),
        *same("vision/projector/norm", f"{linear}.norm1", "weight", "bias"),
        join("vision/projector/mlp/gate_up_proj/weight", gate_up),
        *same("vision/projector/mlp/down_proj", f"{linear}.dense_4h_to_h"),
        TensorMapping(("vision/begin",), (f"{adapter}.boi",), _flatten, _add_two_axes),
        TensorMapping(("vision/end",), (f"{adapter}.eoi",), _flatten, _add_two_axes),
    ]


GLM_EDGE_V = FamilyMember(
    read_config=_read_edge_v,
    write_config=_write_edge_v,
    build=MultimodalGLM,
    entries=_edge_v_entries,
    ignored=lambda config: f"{ignored_head(config)}|.*position_ids",
)
