"""Preprocessing: files, samples and conversations as model inputs."""

from glm_edge.preprocess.audio import load_wav, prepare_audio, prepare_recording, resample
from glm_edge.preprocess.chat import family_template, render, split_thinking
from glm_edge.preprocess.image import load_image, prepare_images, resize
from glm_edge.preprocess.inputs import Inputs
from glm_edge.preprocess.patches import from_patches, to_patches
from glm_edge.preprocess.processing import (
    GLM4V,
    GLM4V_VIDEO,
    GLM_ASR,
    GLM_EDGE_V,
    AudioProcessing,
    ImageProcessing,
    VideoProcessing,
)
from glm_edge.preprocess.processor import Processor
from glm_edge.preprocess.resizing import resize_uint8, smart_resize
from glm_edge.preprocess.tokens import prompt_ids
from glm_edge.preprocess.vision import Video, prepare_image, prepare_video, sample_frames

__all__ = [
    "GLM4V",
    "GLM4V_VIDEO",
    "GLM_ASR",
    "GLM_EDGE_V",
    "AudioProcessing",
    "ImageProcessing",
    "Inputs",
    "Processor",
    "Video",
    "VideoProcessing",
    "family_template",
    "from_patches",
    "load_image",
    "load_wav",
    "prepare_audio",
    "prepare_image",
    "prepare_images",
    "prepare_recording",
    "prepare_video",
    "prompt_ids",
    "render",
    "resample",
    "resize",
    "resize_uint8",
    "sample_frames",
    "smart_resize",
    "split_thinking",
    "to_patches",
]


def __dir__() -> list[str]:
    return __all__
