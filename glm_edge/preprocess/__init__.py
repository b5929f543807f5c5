"""From files and samples to what the models read: images, speech, prompts."""

from glm_edge.preprocess.audio import load_wav, prepare_audio, resample
from glm_edge.preprocess.image import load_image, prepare_images, resize
from glm_edge.preprocess.tokens import prompt_ids

__all__ = [
    "load_image",
    "load_wav",
    "prepare_audio",
    "prepare_images",
    "prompt_ids",
    "resample",
    "resize",
]
