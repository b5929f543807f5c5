"""Random hyperparameters of small models with a decoder, one function per member of the family."""

from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.golden.reference_plans import EOS, PAD, Draw, Plan, Rows

_OLD_VISION_NAMES = [(r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")]


def _rotary(draw: Draw, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "default",
        "rope_theta": draw.of(10000.0, 500.0, 1e6, 37.5),
        **more,
    }


def _decoder(draw: Draw, head_dim: int) -> dict[str, Any]:
    kv_heads = draw.of(1, 2, 3)
    return {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw.of(2, 1, 3),
        "hidden_size": draw.of(16, 24, 40, 54, 72),
        "head_dim": head_dim,
        "intermediate_size": draw.of(24, 17, 50, 96),
        "num_hidden_layers": draw.of(2, 1, 3, 4),
        "vocab_size": draw.of(40, 97, 130, 257),
        "max_position_embeddings": 256,
        "rms_norm_eps": draw.of(1e-5, 1.5625e-7, 1e-6, 1e-2),
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
    }


def _lengths(draw: Draw) -> dict[str, Rows]:
    if draw.tiny:
        return {"batch": [[5], [7]]}
    rows = [[draw.count(1, 14)] for _ in range(draw.count(2, 4))]
    return {"single": [[draw.count(1, 16)]], "batch": rows}


def _text(draw: Draw, architecture: str, tied: bool) -> Plan:
    style = draw.of(4 if tied else 5, 4, 5)
    head_dim = draw.of(8, 4, 12, 16, 20)
    partial = draw.of(0.5 if not tied else 1.0, 0.5, 1.0, *([0.25] if head_dim % 8 == 0 else []))
    config = _decoder(draw, head_dim) | {
        "rope_parameters": _rotary(draw, partial_rotary_factor=partial),
        "tie_word_embeddings": draw.of(tied, True, False),
        "attention_bias": draw.of(not tied, True, False),
    }
    stored_head = config["tie_word_embeddings"] and draw.of(False, True, False)
    return Plan(
        architecture, config, _lengths(draw), style, stored_head=stored_head, **draw.files()
    )


def _glm(draw: Draw) -> Plan:
    return _text(draw, "GlmForCausalLM", tied=True)


def _glm4(draw: Draw) -> Plan:
    return _text(draw, "Glm4ForCausalLM", tied=False)


def _sections(draw: Draw, half: int) -> list[int]:
    """Return section sizes, mostly three, that sum to half the rotary dimensions."""
    number = min(half, draw.of(3, 3, 1, 2, 4, 5, 6))
    cuts = sorted(draw.rng.choice(np.arange(1, half), number - 1, replace=False).tolist())
    sections = [end - start for start, end in zip([0, *cuts], [*cuts, half], strict=True)]
    return draw.of(sections, sections, [0, *sections])


def _media(draw: Draw) -> dict[str, Rows]:
    def image() -> tuple[Any, ...]:
        return ("image", draw.count(1, 4), draw.count(1, 4))

    def text() -> int:
        return draw.count(1, 5)

    frames, rows, columns = draw.count(2, 3), draw.count(1, 3), draw.count(2, 3)
    video = ("video", frames, rows, columns)
    if draw.tiny:
        return {
            "images": [[2, ("image", 1, 2), 1], [1, ("image", 2, 1), 0, ("image", 1, 2), 2]],
            "video": [[2, video, 1]],
        }
    between = draw.of(0, 1, 3)
    return {
        "one": [[text(), image(), text()]],
        "several": [[text(), image(), between, image(), between, image(), text()]],
        "batch": [[text(), image(), text()], [text(), image(), 0, image(), text()], [text()]],
        "text": [[text() + 3], [text()]],
        "video": [[text(), video, text()]],
        "videos": [[0, ("video", 1, 2, 1), text()], [text(), video, 2, video, text()]],
    }


def _with_vision(draw: Draw, ocr: bool) -> Plan:
    style = draw.of(5, 4, 5)
    head_dim = draw.of(8, 12, 16, 20)
    partial = draw.of(0.5 if not ocr else 1.0, 0.5, 1.0, *([0.25] if head_dim == 16 else []))
    half = int(head_dim * partial) // 2
    text = _decoder(draw, head_dim)
    text["num_hidden_layers"] = draw.of(1, 2, 3)
    if not ocr:
        text["hidden_size"] = text["num_attention_heads"] * head_dim
        del text["head_dim"]
    text["vocab_size"] = vocabulary = draw.of(40, 90, 160, 301)
    sections = _sections(draw, half)
    text["rope_parameters"] = _rotary(draw, partial_rotary_factor=partial, mrope_section=sections)
    patch = draw.of(2, 3, 4, 7)
    heads = draw.of(1, 2, 3)
    side = patch * draw.of(2, 3, 4, 5) + draw.of(0, 0, patch - 1)
    vision = {
        "hidden_size": heads * draw.of(8, 4, 12),
        "num_heads": heads,
        "depth": draw.of(1, 2, 3),
        "intermediate_size": draw.of(12, 20, 31),
        "out_hidden_size": text["hidden_size"],
        "image_size": side,
        "patch_size": patch,
        "spatial_merge_size": draw.of(2, 1, 2, 3),
        "temporal_patch_size": draw.of(2, 1, 2, 3),
        "in_channels": draw.of(3, 3, 1, 4),
        "attention_bias": draw.of(ocr, True, False),
        "rms_norm_eps": draw.of(1e-5, 1e-6, 1e-2),
    }
    theta = 10000.0 if style == 4 else draw.of(10000.0, 100.0)
    vision["rope_parameters"] = {"rope_type": "axial", "rope_theta": theta}
    names = ("image", "image_start", "image_end", "video", "video_start", "video_end")
    config = {
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": draw.of(False, True),
        **{f"{name}_token_id": vocabulary - 1 - index for index, name in enumerate(names)},
    }
    renames = draw.of([], _OLD_VISION_NAMES) if style == 4 else []
    subcases = _media(draw)
    if ocr and draw.tiny:
        del subcases["video"]
    return Plan(
        "GlmOcrForConditionalGeneration" if ocr else "Glm4vForConditionalGeneration",
        config,
        subcases,
        style,
        stored_head=config["tie_word_embeddings"] and draw.of(False, True),
        extra_layer=ocr and draw.of(True, False),
        renames=renames,
        **draw.files(),
    )


def _glm4v(draw: Draw) -> Plan:
    return _with_vision(draw, ocr=False)


def _glm_ocr(draw: Draw) -> Plan:
    return _with_vision(draw, ocr=True)


def _glmasr(draw: Draw, grouped: bool = False) -> Plan:
    style = draw.of(5, 4, 5)
    text = _decoder(draw, draw.of(8, 12, 16))
    text["rope_parameters"] = _rotary(draw)
    if style == 4:
        text["rope_parameters"]["rope_theta"] = 10000.0
    text["model_type"] = "llama"
    text["hidden_size"] = text["num_attention_heads"] * draw.of(8, 10, 20)
    text["tie_word_embeddings"] = tied = draw.of(True, True, False)
    heads, head_dim = draw.of(1, 2, 3), draw.of(8, 12, 16)
    partial = draw.of(0.5, 0.5, 1.0, *([0.25] if head_dim != 12 else []))
    length = draw.of(16, 24, 32)
    audio = {
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_hidden_layers": draw.of(1, 2, 3),
        "intermediate_size": 4 * heads * head_dim,
        "num_mel_bins": draw.of(4, 5, 16),
        "max_position_embeddings": length,
        "rope_parameters": _rotary(draw, partial_rotary_factor=partial),
    }
    if grouped:
        # Query heads share keys and values, and the hidden size differs from the total size of the
        # heads.
        audio |= {"num_attention_heads": 4, "num_key_value_heads": draw.of(2, 1)}
        audio["head_dim"] = head_dim
    config = {
        "text_config": text,
        "audio_config": audio,
        "audio_token_id": text["vocab_size"] - 1,
        "tie_word_embeddings": tied,
    }
    frames = 2 * draw.of(length, length, length // 2)

    def sound(chunks: int = 1) -> tuple[Any, ...]:
        full = [frames] * (chunks - 1)
        return ("audio", frames, [*full, draw.count(frames // 2, frames)])

    subcases = {
        "batch": [
            [2, sound(), draw.count(1, 6)],
            [draw.count(1, 4), sound(2), draw.count(1, 4)],
        ],
        "one": [[draw.count(1, 4), ("audio", frames, [draw.count(1, frames)]), 3]],
        "several": [[1, sound(3), 2, sound(2), 2]],
        "text": [[draw.count(1, 9)]],
    }
    if draw.tiny:
        subcases = {"batch": subcases["batch"]}
    return Plan(
        "GlmAsrForConditionalGeneration",
        config,
        subcases,
        style,
        stored_head=tied and draw.of(False, True),
        **draw.files(),
    )


def _glm_edge_v(draw: Draw) -> Plan:
    drawn = _text(draw, "GlmEdgeV", tied=True)
    heads, patch, grid = draw.of(1, 2, 3), draw.of(2, 3, 6), draw.of(2, 4, 6)
    vision = {
        "hidden_size": heads * draw.of(8, 5, 16),
        "num_attention_heads": heads,
        "num_hidden_layers": draw.of(1, 2, 3),
        "intermediate_size": draw.of(20, 33, 64),
        "image_size": patch * grid,
        "patch_size": patch,
        "num_channels": draw.of(3, 3, 1),
        "layer_norm_eps": draw.of(1e-6, 1e-5, 1e-2),
        "vision_use_head": draw.of(False, True),
    }
    last = drawn.config["vocab_size"] - 1
    drawn.config |= {"vision_config": vision, "boi_token_id": last, "eoi_token_id": last - 1}
    image = ("whole image", patch * grid, (grid // 2) ** 2 + 2)
    drawn.subcases = {
        "one": [[draw.count(0, 4), image, draw.count(1, 4)]],
        "batch": [[draw.count(0, 4), image, 2], [draw.count(1, 6), image, 1]],
        "text": [[draw.count(1, 8)]],
    }
    if draw.tiny:
        del drawn.subcases["one"], drawn.subcases["text"]
    drawn.stored_head = False
    return drawn


DECODERS: dict[str, Callable[[Draw], Plan]] = {
    "glm": _glm,
    "glm4": _glm4,
    "glm4v": _glm4v,
    "glm_ocr": _glm_ocr,
    "glmasr": _glmasr,
    "glmasr_grouped": lambda draw: _glmasr(draw, grouped=True),
    "glm_edge_v": _glm_edge_v,
}
