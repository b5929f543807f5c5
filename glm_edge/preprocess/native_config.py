"""Processor configuration of a native directory: prompts, images and recordings."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm_edge.configs import GLMConfig, SpeechConfig, VisionConfig, from_dict
from glm_edge.errors import ConfigError
from glm_edge.preprocess import processor_config
from glm_edge.preprocess.processing import (
    GLM4V,
    GLM4V_VIDEO,
    GLM_EDGE_V,
    AudioProcessing,
    ImageProcessing,
)

FORMAT = "glm_edge"


def read_config(fields: Mapping[str, Any], where: str) -> GLMConfig:
    """Read the model's configuration.

    Args:
      fields: fields of config.json.
      where: file for messages.

    Returns:
      The configuration.

    Raises:
      ConfigError: the configuration is malformed, or describes an encoder, which has no prompts.
    """
    architecture = fields.get("architecture", "MultimodalGLM")
    if architecture != "MultimodalGLM":
        raise ConfigError(f"{where}: a {architecture!r} has no conversations; a GLM is needed")
    if not isinstance(fields.get("config"), dict):
        raise ConfigError(f"{where}: field 'config' must be an object of fields")
    try:
        return from_dict(fields["config"])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(f"{where}: a field has the wrong type: {error}") from error


def read_encoders(directory: Path, config: GLMConfig, tokenizer: Any) -> dict[str, Any]:
    """Read the preprocessing of images, videos and recordings, and their placeholders.

    Models with the architecture of GLM-4.1V or GLM-Edge-V use the preprocessing of those families.
    Other models read images stretched to their size, with values in 0..1, and one recording padded
    with silence to their length. Files of a Hugging Face processor in the directory override this.

    Args:
      directory: checkpoint directory.
      config: configuration of the model.
      tokenizer: tokenizer of the checkpoint.

    Returns:
      `Processor` fields of the modalities of the model: `image`, `video`, `audio` and their
      placeholders.

    Raises:
      CheckpointError: a file is damaged.
      ConfigError: a field has an unsupported value, or files are inconsistent.
    """
    where = str(directory / "config.json")
    try:
        return _read_encoders(directory, config, tokenizer, where)
    except ConfigError as error:
        if str(error).startswith(str(directory)):
            raise
        raise ConfigError(f"{where}: {error}") from error


def _read_encoders(
    directory: Path, config: GLMConfig, tokenizer: Any, where: str
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if config.vision is not None:
        values["image"] = processor_config.read_image_processing(directory, _image_base(config))
        values["image_token"] = _token(config, where, tokenizer, "image_token_id")
        if config.video_token_id is not None:
            video = dataclasses.replace(GLM4V_VIDEO, **_sides(config.vision))
            values["video"] = processor_config.read_video_processing(directory, video)
            values["video_token"] = _token(config, where, tokenizer, "video_token_id")
    if config.speech is not None:
        base = _audio_base(config.speech)
        values["audio"] = processor_config.read_audio_processing(directory, base)
        values["audio_token"] = _token(config, where, tokenizer, "audio_token_id")
    return values


def _image_base(config: GLMConfig) -> ImageProcessing:
    vision = config.vision_tower
    if config.decoder.mrope_section:
        return dataclasses.replace(GLM4V, **_sides(vision))
    if vision.boundary_embeddings:
        return dataclasses.replace(GLM_EDGE_V, size=vision.image_size, **_sides(vision))
    return ImageProcessing(
        sizing="stretch",
        size=vision.image_size,
        eight_bit=False,
        mean=(0.0,) * vision.channels,
        std=(1.0,) * vision.channels,
        **_sides(vision),
    )


def _sides(vision: VisionConfig) -> dict[str, Any]:
    return {
        # Patches may overlap, and features are a stride apart.
        "patch_size": vision.patch_stride,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.merge_size,
    }


def _audio_base(speech: SpeechConfig) -> AudioProcessing:
    seconds = speech.num_frames * speech.hop_length / speech.sample_rate
    return AudioProcessing(
        mel_bins=speech.mel_bins,
        sample_rate=speech.sample_rate,
        fft_size=speech.fft_size,
        hop_length=speech.hop_length,
        chunk_s=seconds,
        max_s=seconds,
        merge_size=speech.merge_size,
        silence=True,
    )


def _token(config: GLMConfig, where: str, tokenizer: Any, name: str) -> str:
    token = tokenizer.id_to_token(getattr(config, name))
    if token is None:
        raise ConfigError(
            f"{where}: field {name!r} is {getattr(config, name)}, an id that tokenizer.json "
            "does not contain"
        )
    return token
