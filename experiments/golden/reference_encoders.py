"""Random hyperparameters of small stand-alone encoders, one function per member of the family."""

from collections.abc import Callable
from typing import Any

from experiments.golden.reference_plans import Draw, Plan


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
    width = heads * draw.of(8, 6, 16)
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


ENCODERS: dict[str, Callable[[Draw], Plan]] = {
    "siglip": _siglip,
    "whisper": _whisper,
    "bert": _bert,
    "distilbert": _distilbert,
}
