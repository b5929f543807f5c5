"""GLM-4.1V (`glm4v`, `glm46v`) and GLM-OCR (`glm_ocr`): vision tower and complete model."""

from typing import Any

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
    FamilyMember,
    TensorMapping,
    convolution,
    join,
    same,
    split,
)
from glm_edge.configs import GLMConfig, VisionConfig
from glm_edge.errors import ConfigError
from glm_edge.models.multimodal import MultimodalGLM

MROPE_SECTION = (8, 12, 12)
IMAGE_TOKENS = ("image_start_token_id", "image_end_token_id")
VIDEO_TOKENS = ("video_start_token_id", "video_end_token_id")


def square_grid(fields: Fields, patch_size: int, default: int | None = None) -> tuple[int, int]:
    """Compute the patches (rows, columns) of the square image with learned positions."""
    side = fields.get("image_size", int, *([] if default is None else [default])) // patch_size
    if not side:
        raise ConfigError(
            f"{fields.where}: field 'image_size' must be at least one patch of {patch_size} pixels"
        )
    return side, side


def _tower_config(fields: Fields, ocr: bool) -> VisionConfig:
    fields.expect("hidden_act", "silu")
    patch, merge = fields.get("patch_size", int), fields.get("spatial_merge_size", int, 2)
    width, out = fields.get("intermediate_size", int), fields.get("out_hidden_size", int)
    bias, channels = fields.get("attention_bias", bool, ocr), fields.get("in_channels", int, 3)
    grid, hidden = square_grid(fields, patch, 336), fields.get("hidden_size", int)
    rope = fields.rope("axial")
    config = VisionConfig(
        image_size=tuple(max(1, extent // merge) * merge * patch for extent in grid),
        hidden_size=hidden,
        num_layers=fields.get("depth", int),
        num_heads=fields.divisor("num_heads", "hidden_size", hidden),
        # In GLM-4.1V, blocks have out_hidden_size neurons and the projector intermediate_size. In
        # GLM-OCR, blocks have intermediate_size neurons and the projector channels * out.
        intermediate_size=width if ocr else out,
        projector_size=channels * out if ocr else width,
        patch_size=patch,
        patch_stride=patch,
        temporal_patch_size=fields.get("temporal_patch_size", int, 2),
        channels=channels,
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


def _tower_entries(config: VisionConfig, prefix: str) -> list[TensorMapping]:
    kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
    entries = convolution("vision/patch", f"{prefix}patch_embed.proj", kernel)
    if config.post_conv_norm:
        entries += same("vision/post_conv_norm", f"{prefix}post_conv_layernorm")
    if config.learned_positions:
        table = f"{prefix}embeddings.position_embedding.weight"
        entries.append(TensorMapping(("vision/position",), (table,)))
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


def _gate_up(ours: str, stored: str, kinds: tuple[str, ...]) -> list[TensorMapping]:
    return [
        join(
            f"{ours}/gate_up_proj/{kind}",
            (f"{stored}.gate_proj.{kind}", f"{stored}.up_proj.{kind}"),
        )
        for kind in kinds
    ]


def _multimodal_member(model_type: str, architecture: str, ocr: bool) -> FamilyMember:
    text_type = "glm_ocr_text" if ocr else "glm4v_text"
    vision_type = "glm_ocr_vision" if ocr else "glm4v_vision"

    def read_config(fields: Fields, name: str) -> GLMConfig:
        text, vision = _text_section(fields), fields.section("vision_config")
        tied = [part.get("tie_word_embeddings", bool, False) for part in (fields, text)]
        decoder = decoder_config(
            text,
            context=131072 if ocr else 32768,
            mrope_section=MROPE_SECTION,
            sandwich_norm=True,
            attention_bias=not ocr,
            tie_embeddings=any(tied),
        )
        # The model_type determines the decoder's bias, not this field.
        text.take("attention_bias")
        if ocr:
            text.expect("num_nextn_predict_layers", 0, 1)
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
        # Newer files name stop tokens in the text section, older files also or only outside it.
        tokens = read_tokens(fields, text)
        for token in (*IMAGE_TOKENS, *VIDEO_TOKENS, "image_token_id", "video_token_id"):
            text.take(token)
        if text is not fields:
            text.finish()
        return GLMConfig(
            name=name,
            decoder=decoder,
            vision=_tower_config(vision, ocr),
            image_token_id=fields.get("image_token_id", int),
            video_token_id=fields.token_id("video_token_id"),
            image_boundary_ids=_pair(fields, IMAGE_TOKENS),
            video_boundary_ids=_pair(fields, VIDEO_TOKENS),
            **tokens,
        )

    def write_config(config: GLMConfig) -> dict[str, Any]:
        text = {**write_decoder(config.decoder, text_type), **write_tokens(config)}
        return {
            "architectures": [architecture],
            "model_type": model_type,
            "text_config": text,
            "vision_config": _write_tower(
                config.vision_tower, config.decoder.hidden_size, vision_type, ocr
            ),
            "tie_word_embeddings": config.decoder.tie_embeddings,
            "image_token_id": config.image_token_id,
            "video_token_id": config.video_token_id,
            **dict(zip(IMAGE_TOKENS, config.image_boundary_ids, strict=False)),
            **dict(zip(VIDEO_TOKENS, config.video_boundary_ids, strict=False)),
        }

    def entries(config: GLMConfig) -> list[TensorMapping]:
        decoder = decoder_entries(config.decoder, "model.language_model.", "lm_head")
        return decoder + _tower_entries(config.vision_tower, "model.visual.")

    def ignored(config: GLMConfig) -> str:
        # The layer after the last one predicts several tokens; it is not part of the decoder.
        extra = rf"model\.language_model\.layers\.{config.decoder.num_layers}\..*"
        return f"{ignored_head(config)}|{extra}" if ocr else ignored_head(config)

    return FamilyMember(
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


def _text_section(fields: Fields) -> Fields:
    """Return the decoder's fields: a section, or the top level in early files of GLM-4.1V."""
    alone = "hidden_size" in fields.values
    text = fields.optional_section("text_config") if alone else fields.section("text_config")
    if text is None:
        return fields
    # Files that were loaded and saved again have both.
    fields.repeats(text)
    return text


def _pair(fields: Fields, names: tuple[str, str]) -> tuple[int, ...]:
    ids = [index for name in names if (index := fields.token_id(name)) is not None]
    return tuple(ids) if len(ids) == len(names) else ()


GLM4V = _multimodal_member("glm4v", "Glm4vForConditionalGeneration", ocr=False)
GLM46V = _multimodal_member("glm46v", "Glm46VForConditionalGeneration", ocr=False)
GLM_OCR = _multimodal_member("glm_ocr", "GlmOcrForConditionalGeneration", ocr=True)
