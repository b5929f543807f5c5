"""Random hyperparameters of small reference models, one function a member of the family."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

EOS = [2, 7]
PAD = 2
# Ids at the end of the vocabulary that stand for media.
SPECIAL_IDS = 6

Rows = list[list[Any]]


@dataclass
class Plan:
    """A reference model and what it is given.

    Attributes:
      architecture: class of transformers.
      config: arguments of its configuration.
      style: 4 or 5, the version of transformers whose config.json is written.
      dtype: of the stored weights.
      shards: files that hold them.
      stored_head: a tied model stores its head again.
      extra_layer: the file holds a layer after the last, as GLM-OCR's does.
      renames: `(pattern, replacement)` of the stored names, another dialect of the file.
      subcases: what is computed, by name: rows of tokens and media, or shapes of inputs.
    """

    architecture: str
    config: dict[str, Any]
    subcases: dict[str, Any]
    style: int = 5
    dtype: str = "float32"
    shards: int = 1
    stored_head: bool = False
    extra_layer: bool = False
    renames: list[tuple[str, str]] = field(default_factory=list)


class Draw:
    """Draws hyperparameters; where they shall be tiny, the first option is taken every time."""

    def __init__(self, rng: np.random.Generator, tiny: bool):
        self.rng = rng
        self.tiny = tiny

    def of(self, first: Any, *others: Any) -> Any:
        """One of the options."""
        options = (first, *others)
        return first if self.tiny else options[int(self.rng.integers(len(options)))]

    def count(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return low if self.tiny else int(self.rng.integers(low, high + 1))

    def files(self, tiny_dtype: str = "bfloat16") -> dict[str, Any]:
        """How the weights lie in files."""
        others = ("float32", "float16", "bfloat16")
        return {"dtype": self.of(tiny_dtype, *others), "shards": self.of(1, 1, 2, 5)}


def plan(member: str, draw: Draw) -> Plan:
    """Draws a model of a member of the family.

    Args:
      member: one of `MEMBERS`.
      draw: for the choices.

    Returns:
      The plan.
    """
    return MEMBERS[member](draw)


def _rotary(draw: Draw, style: int, **more: Any) -> dict[str, Any]:
    del style
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
        "rope_parameters": _rotary(draw, style, partial_rotary_factor=partial),
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
    """Numbers of frequencies, mostly three, that sum to half the rotary dimensions."""
    number = min(half, draw.of(3, 3, 1, 2, 4, 5, 6))
    cuts = sorted(draw.rng.choice(np.arange(1, half), number - 1, replace=False).tolist())
    return [end - start for start, end in zip([0, *cuts], [*cuts, half], strict=True)]


def _media(draw: Draw) -> dict[str, Rows]:
    def image() -> tuple[Any, ...]:
        return ("image", draw.count(1, 4), draw.count(1, 4))

    def text() -> int:
        return draw.count(1, 5)

    frames, rows, columns = draw.count(2, 3), draw.count(1, 3), draw.count(2, 3)
    video = ("video", frames, rows, columns)
    if draw.tiny:
        return {
            "images": [[2, ("image", 1, 2), 1], [1, ("image", 2, 1), 0, ("image", 1, 1), 2]],
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
    text["rope_parameters"] = _rotary(
        draw, style, partial_rotary_factor=partial, mrope_section=sections
    )
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


_OLD_VISION_NAMES = [(r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")]


def _glm4v(draw: Draw) -> Plan:
    return _with_vision(draw, ocr=False)


def _glm_ocr(draw: Draw) -> Plan:
    return _with_vision(draw, ocr=True)


def _glmasr(draw: Draw) -> Plan:
    style = draw.of(5, 4, 5)
    text = _decoder(draw, draw.of(8, 12, 16))
    text["rope_parameters"] = _rotary(draw, style)
    text["model_type"] = "llama"
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
        "rope_parameters": _rotary(draw, style, partial_rotary_factor=partial),
    }
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
        "one": [[draw.count(1, 4), ("audio", frames, [draw.count(8, frames)]), 3]],
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


def _siglip(draw: Draw) -> Plan:
    patch, heads = draw.of(4, 3, 6, 8), draw.of(2, 1, 3)
    grid, beyond = draw.of(3, 2, 5, 7), draw.of(1, 0, patch - 1)
    channels = draw.of(3, 3, 1)
    side = grid * patch + beyond
    vision = {
        "hidden_size": heads * draw.of(8, 5, 16),
        "num_attention_heads": heads,
        "num_hidden_layers": draw.of(1, 2, 3),
        "intermediate_size": draw.of(20, 33, 64),
        "image_size": side,
        "patch_size": patch,
        "num_channels": channels,
        "layer_norm_eps": draw.of(1e-6, 1e-5, 1e-2),
        "vision_use_head": draw.of(True, True, False),
    }
    sizes = {
        "native": (draw.of(1, 2, 3), side, side),
        "wide": (1, patch * draw.count(2, 4), patch * draw.count(4, 9) + beyond),
        "small": (2, patch, patch + draw.of(0, 1)),
    }
    if draw.tiny:
        del sizes["small"]
    subcases = {
        name: {"pixel_values": (count, channels, height, width)}
        for name, (count, height, width) in sizes.items()
    }
    style = draw.of(5, 4, 5)
    if draw.of("alone", "alone", "dual") == "dual" and vision["vision_use_head"]:
        text = {
            "hidden_size": vision["hidden_size"],
            "num_attention_heads": heads,
            "num_hidden_layers": 1,
            "intermediate_size": 12,
            "vocab_size": 40,
            "max_position_embeddings": 8,
        }
        config = {"vision_config": vision, "text_config": text}
        return Plan("SiglipModel", config, subcases, style, **draw.files())
    renames = [(r"^", "vision_model.")] if style == 4 else []
    return Plan("SiglipVisionModel", vision, subcases, style, renames=renames, **draw.files())


def _whisper(draw: Draw) -> Plan:
    heads, positions = draw.of(2, 1, 3), draw.of(7, 12, 25)
    width = heads * draw.of(8, 5, 16)
    config = {
        "d_model": width,
        "encoder_attention_heads": heads,
        "encoder_layers": draw.of(2, 1, 3),
        "encoder_ffn_dim": draw.of(20, 33, 64),
        "decoder_attention_heads": 1,
        "decoder_layers": 1,
        "decoder_ffn_dim": 12,
        "num_mel_bins": draw.of(5, 8, 20),
        "max_source_positions": positions,
        "max_target_positions": 8,
        "vocab_size": 40,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "scale_embedding": draw.of(False, False, True),
    }
    shape = (draw.count(2, 4), config["num_mel_bins"], 2 * positions)
    architecture = draw.of("WhisperForConditionalGeneration", "WhisperModel", "WhisperEncoder")
    subcases = {"mel": {"input_features": shape}}
    return Plan(architecture, config, subcases, draw.of(5, 4), **draw.files())


def _sentences(draw: Draw) -> dict[str, Any]:
    single = {"input_ids": draw.count(1, 12)}
    if draw.tiny:
        return {"batch": {"lengths": [3, 6]}}
    return {"single": single, "batch": {"lengths": [draw.count(1, 12) for _ in range(3)]}}


def _labels(draw: Draw) -> dict[int, str]:
    return {index: f"intent {index}" for index in range(draw.of(3, 1, 2, 5))}


def _bert(draw: Draw) -> Plan:
    heads = draw.of(2, 1, 3)
    architecture = draw.of(
        "BertForSequenceClassification", "BertModel", "BertForMaskedLM", "BertForPreTraining"
    )
    config = {
        "vocab_size": draw.of(60, 97),
        "hidden_size": heads * draw.of(8, 5, 16),
        "num_attention_heads": heads,
        "num_hidden_layers": draw.of(2, 1, 3),
        "intermediate_size": draw.of(20, 33, 64),
        "max_position_embeddings": draw.of(16, 12, 40),
        "type_vocab_size": draw.of(2, 1, 3),
        "layer_norm_eps": draw.of(1e-12, 1e-5),
        "pad_token_id": 0,
    }
    if architecture == "BertForSequenceClassification":
        config["id2label"] = _labels(draw)
    old = [(r"LayerNorm\.weight$", "LayerNorm.gamma"), (r"LayerNorm\.bias$", "LayerNorm.beta")]
    renames = [*draw.of([], [], old), *draw.of([], [], [(r"^bert\.", "")])]
    return Plan(
        architecture, config, _sentences(draw), draw.of(5, 4), renames=renames, **draw.files()
    )


def _distilbert(draw: Draw) -> Plan:
    heads = draw.of(2, 1, 3)
    architecture = draw.of(
        "DistilBertForSequenceClassification", "DistilBertModel", "DistilBertForMaskedLM"
    )
    config = {
        "vocab_size": draw.of(60, 97),
        "dim": heads * draw.of(8, 5, 16),
        "n_heads": heads,
        "n_layers": draw.of(2, 1, 3),
        "hidden_dim": draw.of(20, 33, 64),
        "max_position_embeddings": draw.of(16, 12, 40),
        "sinusoidal_pos_embds": draw.of(False, True),
        "pad_token_id": 0,
    }
    if architecture == "DistilBertForSequenceClassification":
        config["id2label"] = _labels(draw)
    renames = draw.of([], [], [(r"^distilbert\.", "")])
    return Plan(
        architecture, config, _sentences(draw), draw.of(5, 4), renames=renames, **draw.files()
    )


MEMBERS: dict[str, Callable[[Draw], Plan]] = {
    "glm": _glm,
    "glm4": _glm4,
    "glm4v": _glm4v,
    "glm_ocr": _glm_ocr,
    "glmasr": _glmasr,
    "siglip": _siglip,
    "whisper": _whisper,
    "bert": _bert,
    "distilbert": _distilbert,
}
