"""Named configurations."""

from typing import Any

from glm_edge.configs.architecture import DecoderConfig, GLMConfig, SpeechConfig, VisionConfig
from glm_edge.errors import ConfigError


def preset(name: str) -> GLMConfig:
    """Return a named configuration.

    Args:
      name: `nano` (shipped with weights), `tiny` (86 M parameters), `mobile` (340 M), `large`
        (GLM-Edge-1.5B's shape) or `phone_9b` (GLM-4.1V-9B's shape with GLM-ASR's encoder).

    Returns:
      The configuration, a frozen dataclass.

    Raises:
      ConfigError: no preset has this name.

    Example:
      >>> preset("large").decoder.hidden_size
      2048
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


_GLM_EDGE_TOKENS: dict[str, Any] = {
    "image_token_id": 59256,
    "audio_token_id": 59260,
    "eos_token_ids": (59246, 59253, 59255),
    "pad_token_id": 59246,
}

PRESETS = {
    "nano": GLMConfig(
        name="nano",
        decoder=DecoderConfig(
            vocab_size=2304,
            hidden_size=256,
            num_layers=4,
            num_heads=8,
            num_kv_heads=2,
            head_dim=32,
            intermediate_size=512,
            partial_rotary_factor=0.5,
            max_position_embeddings=512,
        ),
        vision=VisionConfig(
            image_size=(192, 96),
            hidden_size=128,
            num_layers=3,
            num_heads=4,
            intermediate_size=256,
            projector_size=256,
            patch_size=16,
            patch_stride=8,
            temporal_patch_size=1,
            position_grid=(24, 12),
            window=(4, 12),
            global_layers=(2,),
            separable_positions=True,
        ),
        speech=SpeechConfig(
            mel_bins=40,
            num_frames=160,
            hidden_size=128,
            num_layers=3,
            num_heads=4,
            intermediate_size=384,
            projector_size=256,
            sample_rate=8000,
            fft_size=200,
            hop_length=80,
        ),
        image_token_id=5,
        audio_token_id=8,
        eos_token_ids=(0,),
        pad_token_id=10,
    ),
    "tiny": GLMConfig(
        name="tiny",
        decoder=DecoderConfig(
            vocab_size=59264,
            hidden_size=512,
            num_layers=10,
            num_heads=8,
            num_kv_heads=2,
            head_dim=64,
            intermediate_size=1536,
            max_position_embeddings=4096,
        ),
        vision=VisionConfig(
            image_size=(448, 224),
            hidden_size=384,
            num_layers=8,
            num_heads=6,
            intermediate_size=1024,
            projector_size=1024,
            position_grid=(32, 16),
        ),
        speech=SpeechConfig(
            mel_bins=80,
            num_frames=3000,
            hidden_size=384,
            num_layers=4,
            num_heads=6,
            intermediate_size=1536,
            projector_size=1024,
        ),
        **_GLM_EDGE_TOKENS,
    ),
    "mobile": GLMConfig(
        name="mobile",
        decoder=DecoderConfig(
            vocab_size=59264,
            hidden_size=1024,
            num_layers=16,
            num_heads=16,
            num_kv_heads=4,
            head_dim=64,
            intermediate_size=3072,
        ),
        vision=VisionConfig(
            image_size=(672, 336),
            hidden_size=512,
            num_layers=12,
            num_heads=8,
            intermediate_size=1536,
            projector_size=3072,
            position_grid=(24, 24),
        ),
        speech=SpeechConfig(
            mel_bins=128,
            num_frames=3000,
            hidden_size=512,
            num_layers=6,
            num_heads=8,
            intermediate_size=2048,
            projector_size=2048,
        ),
        **_GLM_EDGE_TOKENS,
    ),
    "large": GLMConfig(
        name="large",
        decoder=DecoderConfig(
            vocab_size=59264,
            hidden_size=2048,
            num_layers=28,
            num_heads=16,
            num_kv_heads=4,
            head_dim=128,
            intermediate_size=6144,
        ),
        eos_token_ids=(59246, 59253, 59255),
        pad_token_id=59246,
    ),
    "phone_9b": GLMConfig(
        name="phone_9b",
        decoder=DecoderConfig(
            vocab_size=151552,
            hidden_size=4096,
            num_layers=40,
            num_heads=32,
            num_kv_heads=2,
            head_dim=128,
            intermediate_size=13696,
            partial_rotary_factor=0.5,
            attention_bias=True,
            sandwich_norm=True,
            mrope_section=(8, 12, 12),
            tie_embeddings=False,
        ),
        vision=VisionConfig(
            image_size=(672, 336),
            hidden_size=1536,
            num_layers=24,
            num_heads=12,
            intermediate_size=4096,
            projector_size=13696,
        ),
        speech=SpeechConfig(
            mel_bins=128,
            num_frames=3000,
            hidden_size=1280,
            num_layers=32,
            num_heads=20,
            intermediate_size=5120,
            projector_size=8192,
        ),
        image_token_id=151343,
        audio_token_id=151344,
        eos_token_ids=(151329, 151336, 151338, 151348),
        pad_token_id=151329,
    ),
}
