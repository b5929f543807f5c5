"""Model configurations as frozen dataclasses, and presets."""

from glm_edge.configs.architecture import (
    MAX_FRAMES,
    MAX_IMAGE_PIXELS,
    MAX_IMAGE_SIDE,
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
    "MAX_FRAMES",
    "MAX_IMAGE_PIXELS",
    "MAX_IMAGE_SIDE",
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
