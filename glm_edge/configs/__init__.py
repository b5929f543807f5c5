"""Frozen dataclasses that say what a model is, and presets."""

from glm_edge.configs.architecture import (
    DecoderConfig,
    GLMConfig,
    SpeechConfig,
    TextConfig,
    VisionConfig,
    from_dict,
    to_dict,
)
from glm_edge.configs.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "DecoderConfig",
    "GLMConfig",
    "SpeechConfig",
    "TextConfig",
    "VisionConfig",
    "from_dict",
    "preset",
    "to_dict",
]


def __dir__() -> list[str]:
    return __all__
