"""GLM-4.1V and GLM-OCR (`glm4v`, `glm46v`, `glm_ocr`), GLM-Edge-V (`glm` with vision), SigLIP."""

from typing import Any

import numpy as np

from glm_edge.checkpoint.hugging_face.decoders import (
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
    Entry,
    Member,
    convolution,
    join,
    same,
    split,
)
from glm_edge.configs import GLMConfig, VisionConfig
from glm_edge.errors import ConfigError
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.models.vision import VisionEncoder

MROPE_SECTION = (8, 12, 12)
IMAGE_TOKENS = ("image_start_token_id", "image_end_token_id")
VIDEO_TOKENS = ("video_start_token_id", "video_end_token_id")


def _square(fields: Fields, patch_size: int, default: int | None = None) -> tuple[int, int]:
    """Patches (rows, columns) of the square image whose positions the tower has learned."""
    side = fields.get("image_size", int, *([] if default is None else [default])) // patch_size
    if not side:
        raise ConfigError(
            f"{fields.where}: field 'image_size' must hold a patch of {patch_size} pixels"
        )
    return side, side


def _tower_config(fields: Fields, ocr: bool) -> VisionConfig:
    fields.expect("hidden_act", "silu")
    patch, merge = fields.get("patch_size", int), fields.get("spatial_merge_size", int, 2)
    width, out = fields.get("intermediate_size", int), fields.get("out_hidden_size", int)
    bias = fields.get("attention_bias", bool, ocr)
    grid = _square(fields, patch, 336)
    rope = fields.rope("axial")
    config = VisionConfig(
        image_size=tuple(max(1, extent // merge) * merge * patch for extent in grid),
        hidden_size=fields.get("hidden_size", int),
        num_layers=fields.get("depth", int),
        num_heads=fields.get("num_heads", int),
        # GLM-4.1V's blocks are as wide as the decoder and its projector has the width of the
        # field; GLM-OCR's blocks have it, and its projector is three times the decoder's width.
        intermediate_size=width if ocr else out,
        projector_size=3 * out if ocr else width,
        patch_size=patch,
        patch_stride=patch,
        temporal_patch_size=fields.get("temporal_patch_size", int, 2),
        channels=fields.get("in_channels", int, 3),
        merge_size=merge,
        position_grid=grid,
        learned_positions=not ocr,
        post_conv_norm=not ocr,
        qk_norm=ocr,
        norm_eps=fields.get("rms_norm_eps", float, 1e-5),
        rope_theta=rope.get("rope_theta", float, 10000.0),
        attention_bias=bias,
        projection_bias=bias and ocr,
    )
    rope.finish()
    fields.finish()
    return config


def _write_tower(config: VisionConfig, out: int, model_type: str, ocr: bool) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "image_size": config.position_grid[0] * config.patch_size,
        "hidden_size": config.hidden_size,
        "depth": config.num_layers,
        "num_heads": config.num_heads,
        "intermediate_size": config.intermediate_size if ocr else config.projector_size,
        "out_hidden_size": out,
        "patch_size": config.patch_size,
        "spatial_merge_size": config.merge_size,
        "temporal_patch_size": config.temporal_patch_size,
        "in_channels": config.channels,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.attention_bias,
        "rope_parameters": {"rope_type": "axial", "rope_theta": config.rope_theta},
    }


def _tower_entries(config: VisionConfig, prefix: str) -> list[Entry]:
    kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
    entries = convolution("vision/patch", f"{prefix}patch_embed.proj", kernel)
    if config.post_conv_norm:
        entries += same("vision/post_conv_norm", f"{prefix}post_conv_layernorm")
    if config.learned_positions:
        table = f"{prefix}embeddings.position_embedding.weight"
        entries.append(Entry(("vision/position",), (table,)))
    biased = ("weight", "bias") if config.projection_bias else ("weight",)
    for layer in range(config.num_layers):
        ours, stored = f"vision/layers/{layer}", f"{prefix}blocks.{layer}"
        entries += same(f"{ours}/input_norm", f"{stored}.norm1")
        entries += same(f"{ours}/post_attention_norm", f"{stored}.norm2")
        for field in ("weight", "bias") if config.attention_bias else ("weight",):
            heads = tuple(f"{ours}/attention/{name}_proj/{field}" for name in "qkv")
            entries.append(split(heads, f"{stored}.attn.qkv.{field}"))
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                entries += same(f"{ours}/attention/{name}", f"{stored}.attn.{name}")
        entries += same(f"{ours}/attention/o_proj", f"{stored}.attn.proj", *biased)
        entries += same(f"{ours}/mlp/down_proj", f"{stored}.mlp.down_proj", *biased)
        entries += _gate_up(f"{ours}/mlp", f"{stored}.mlp", biased)
    entries += same("vision/norm", f"{prefix}post_layernorm")
    entries += convolution("vision/merge", f"{prefix}downsample", (config.merge_size,) * 2)
    merger = f"{prefix}merger"
    entries += same("vision/projector/proj", f"{merger}.proj")
    entries += same("vision/projector/norm", f"{merger}.post_projection_norm", "weight", "bias")
    entries += same("vision/projector/mlp/down_proj", f"{merger}.down_proj")
    return entries + _gate_up("vision/projector/mlp", merger, ("weight",))


def _gate_up(ours: str, stored: str, kinds: tuple[str, ...]) -> list[Entry]:
    return [
        join(
            f"{ours}/gate_up_proj/{kind}",
            (f"{stored}.gate_proj.{kind}", f"{stored}.up_proj.{kind}"),
        )
        for kind in kinds
    ]


def _multimodal_member(model_type: str, architecture: str, ocr: bool) -> Member:
    text_type = "glm_ocr_text" if ocr else "glm4v_text"
    vision_type = "glm_ocr_vision" if ocr else "glm4v_vision"

    def read_config(fields: Fields, name: str) -> GLMConfig:
        text, vision = fields.section("text_config"), fields.section("vision_config")
        decoder = decoder_config(
            text,
            context=131072 if ocr else 32768,
            mrope_section=MROPE_SECTION,
            sandwich_norm=True,
            attention_bias=not ocr,
            tie_embeddings=fields.get("tie_word_embeddings", bool, False),
        )
        # The tower's bias and the decoder's are settled by the model_type, whatever the file says.
        for settled in ("attention_bias", "tie_word_embeddings"):
            text.take(settled)
        if not ocr and decoder.head_dim * decoder.num_heads != decoder.hidden_size:
            raise ConfigError(
                f"{text.where}: field 'head_dim' must be hidden_size / num_attention_heads"
            )
        out = vision.get("out_hidden_size", int)
        if out != decoder.hidden_size:
            raise ConfigError(
                f"{vision.where}: field 'out_hidden_size' is {out}; it must be the decoder's "
                f"hidden_size, {decoder.hidden_size}"
            )
        # Stop tokens stand in the text's section, in older files also or only outside it.
        outer, inner = read_tokens(fields), read_tokens(text)
        text.finish()
        return GLMConfig(
            name=name,
            decoder=decoder,
            vision=_tower_config(vision, ocr),
            image_token_id=fields.get("image_token_id", int),
            video_token_id=fields.token_id("video_token_id"),
            image_boundary_ids=_pair(fields, IMAGE_TOKENS),
            video_boundary_ids=_pair(fields, VIDEO_TOKENS),
            eos_token_ids=inner["eos_token_ids"] or outer["eos_token_ids"],
            pad_token_id=outer["pad_token_id"]
            if inner["pad_token_id"] is None
            else inner["pad_token_id"],
        )

    def write_config(config: GLMConfig) -> dict[str, Any]:
        text = {**write_decoder(config.decoder, text_type), **write_tokens(config)}
        return {
            "architectures": [architecture],
            "model_type": model_type,
            "text_config": text,
            "vision_config": _write_tower(
                config.vision, config.decoder.hidden_size, vision_type, ocr
            ),
            "tie_word_embeddings": config.decoder.tie_embeddings,
            "image_token_id": config.image_token_id,
            "video_token_id": config.video_token_id,
            **dict(zip(IMAGE_TOKENS, config.image_boundary_ids, strict=False)),
            **dict(zip(VIDEO_TOKENS, config.video_boundary_ids, strict=False)),
        }

    def entries(config: GLMConfig) -> list[Entry]:
        decoder = decoder_entries(config.decoder, "model.language_model.", "lm_head")
        return decoder + _tower_entries(config.vision, "model.visual.")

    def ignored(config: GLMConfig) -> str:
        # The layer after the last predicts several tokens at once and is no part of the decoder.
        extra = rf"model\.language_model\.layers\.{config.decoder.num_layers}\..*"
        return f"{ignored_head(config)}|{extra}" if ocr else ignored_head(config)

    return Member(
        read_config=read_config,
        write_config=write_config,
        build=MultimodalGLM,
        entries=entries,
        renames=(
            (r"^visual\.", "model.visual."),
            (r"^language_model\.model\.", "model.language_model."),
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^model\.(?!visual\.|language_model\.)", "model.language_model."),
        ),
        ignored=ignored,
    )


def _pair(fields: Fields, names: tuple[str, str]) -> tuple[int, ...]:
    ids = [fields.token_id(name) for name in names]
    return () if None in ids else tuple(ids)


GLM4V = _multimodal_member("glm4v", "Glm4vForConditionalGeneration", ocr=False)
GLM46V = _multimodal_member("glm46v", "Glm46VForConditionalGeneration", ocr=False)
GLM_OCR = _multimodal_member("glm_ocr", "GlmOcrForConditionalGeneration", ocr=True)


def _siglip_config(fields: Fields, **adapter: Any) -> VisionConfig:
    fields.expect("hidden_act", "gelu_pytorch_tanh")
    patch = fields.get("patch_size", int)
    grid = _square(fields, patch)
    merge = adapter.get("merge_size", 1)
    config = VisionConfig(
        image_size=tuple(extent // merge * merge * patch for extent in grid),
        hidden_size=fields.get("hidden_size", int),
        num_layers=fields.get("num_hidden_layers", int),
        num_heads=fields.get("num_attention_heads", int),
        intermediate_size=fields.get("intermediate_size", int),
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


def _siglip_entries(config: VisionConfig, ours: str, prefix: str) -> list[Entry]:
    both, kernel = ("weight", "bias"), (config.patch_size, config.patch_size)
    entries = convolution(f"{ours}patch", f"{prefix}embeddings.patch_embedding", kernel)
    table = f"{prefix}embeddings.position_embedding.weight"
    entries.append(Entry((f"{ours}position",), (table,)))
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
    entries.append(Entry((f"{pool}/probe",), (f"{head}.probe",), _flatten, _add_two_axes))
    for field in both:
        heads = tuple(f"{pool}/{name}_proj/{field}" for name in "qkv")
        entries.append(split(heads, f"{head}.attention.in_proj_{field}"))
    entries += same(f"{pool}/o_proj", f"{head}.attention.out_proj", *both)
    entries += same(f"{pool}/norm", f"{head}.layernorm", *both)
    for name in ("fc1", "fc2"):
        entries += same(f"{pool}/mlp/{name}", f"{head}.mlp.{name}", *both)
    return entries


_PROJECTIONS = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "out_proj"}


def _flatten(array: np.ndarray) -> Arrays:
    return (array.reshape(-1),)


def _add_two_axes(array: np.ndarray) -> Arrays:
    return (array[None, None],)


def _read_siglip(fields: Fields, name: str) -> VisionConfig:
    # A dual encoder keeps the tower's fields in a section; its text half is left out.
    section = fields.section("vision_config", required=False)
    return _siglip_config(section or fields)


SIGLIP = Member(
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
        eps=1.5625e-7,
        partial=0.5,
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
        "vision_config": _write_siglip(config.vision),
        "boi_token_id": begin,
        "eoi_token_id": end,
        **write_tokens(config),
    }


def _edge_v_entries(config: GLMConfig) -> list[Entry]:
    adapter = "model.vision.adapter"
    linear = f"{adapter}.linear_proj"
    gate_up = (f"{linear}.gate_proj.weight", f"{linear}.dense_h_to_4h.weight")
    return [
        *decoder_entries(config.decoder, "model.", "lm_head"),
        *_siglip_entries(config.vision, "vision/", "model.vision.vit.model.vision_model."),
        *convolution("vision/merge", f"{adapter}.conv", (2, 2)),
        *same("vision/projector/proj", f"{linear}.linear_proj"),
        *same("vision/projector/norm", f"{linear}.norm1", "weight", "bias"),
        join("vision/projector/mlp/gate_up_proj/weight", gate_up),
        *same("vision/projector/mlp/down_proj", f"{linear}.dense_4h_to_h"),
        Entry(("vision/begin",), (f"{adapter}.boi",), _flatten, _add_two_axes),
        Entry(("vision/end",), (f"{adapter}.eoi",), _flatten, _add_two_axes),
    ]


GLM_EDGE_V = Member(
    read_config=_read_edge_v,
    write_config=_write_edge_v,
    build=MultimodalGLM,
    entries=_edge_v_entries,
    ignored=lambda config: f"{ignored_head(config)}|.*position_ids",
)
