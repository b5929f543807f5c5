"""Processor and tokenizer configuration of a Hugging Face directory."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from glm_edge import files
from glm_edge.configs.stop_tokens import token_ids
from glm_edge.errors import ConfigError
from glm_edge.files import file_inside
from glm_edge.preprocess.processing import (
    GLM4V,
    GLM4V_VIDEO,
    GLM_ASR,
    GLM_EDGE_V,
    AudioProcessing,
    ImageProcessing,
    VideoProcessing,
)

GLM_EDGE_VOCAB = 59264
FAMILY_OF_TYPE = {"glm4": "glm_4_0414", "glm4v": "glm_4_1v", "glmasr": "glm_asr"}
SMART_TYPES = ("glm4v", "glm46v", "glm_ocr")
LARGEST_NUMBER = 1e300
RESAMPLE_CODES = {2: "bilinear", 3: "bicubic"}
# Sizing and default filter of Hugging Face processors. A suffix Fast or Pil is ignored.
IMAGE_PROCESSORS = {
    "Glm4vImageProcessor": ("smart", "bicubic"),
    "Glm46VImageProcessor": ("smart", "bicubic"),
    "SiglipImageProcessor": ("stretch", "bicubic"),
    "MllamaImageProcessor": ("pad", "bilinear"),
}
VIDEO_PROCESSOR = "Glm4vVideoProcessor"
AUDIO_PROCESSOR = "WhisperFeatureExtractor"
AUDIO_FIELDS = {
    "mel_bins": "feature_size",
    "sample_rate": "sampling_rate",
    "fft_size": "n_fft",
    "hop_length": "hop_length",
    "chunk_s": "chunk_length",
}


Processing = TypeVar("Processing", bound=ImageProcessing)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Args:
      path: file path.

    Returns:
      The fields, empty if the file does not exist.

    Raises:
      CheckpointError: the file cannot be read, is not a regular file inside the directory, or is
        not a JSON object.
    """
    if not os.path.lexists(path):
        return {}
    return files.read_json(file_inside(path.parent, path.name))


def read_image_processing(directory: Path, base: ImageProcessing) -> ImageProcessing:
    """Read a checkpoint's image preprocessing.

    Args:
      directory: directory with `processor_config.json`, `preprocessor_config.json` or neither.
      base: default parameters for absent fields.

    Returns:
      The parameters.

    Raises:
      CheckpointError: a file is damaged.
      ConfigError: a field has an unsupported value, or contradicts config.json.
    """
    return _image_fields(*_section(directory, "image_processor"), base)


def read_video_processing(directory: Path, base: VideoProcessing) -> VideoProcessing | None:
    """Read a checkpoint's video preprocessing; None if its sampling method is unknown.

    Arguments and exceptions as in `read_image_processing`.
    """
    fields, where = _section(directory, "video_processor", "video_preprocessor_config.json")
    kind = fields.get("video_processor_type", VIDEO_PROCESSOR)
    if kind != VIDEO_PROCESSOR:
        return None
    processing = _image_fields(fields, where, base)
    return _replaced(
        processing,
        where,
        fps=_number(fields, where, "fps", base.fps),
        max_duration_s=_number(fields, where, "max_duration", base.max_duration_s),
    )


def read_audio_processing(directory: Path, base: AudioProcessing) -> AudioProcessing:
    """Read a checkpoint's audio preprocessing.

    Arguments and exceptions as in `read_image_processing`.
    """
    fields, where = _section(directory, "feature_extractor")
    _expect(fields, where, "feature_extractor_type", AUDIO_PROCESSOR)
    if "feature_extractor_type" in fields:
        base = _replaced(base, where, silence=False, max_s=GLM_ASR.max_s)
    for field in ("dither", "padding_value", "do_normalize"):
        _expect(fields, where, field, 0)
    values: dict[str, Any] = {
        field: _integer(fields, where, AUDIO_FIELDS[field], getattr(base, field))
        for field in ("mel_bins", "sample_rate", "fft_size", "hop_length")
    }
    values["chunk_s"] = _number(fields, where, AUDIO_FIELDS["chunk_s"], base.chunk_s)
    if values["mel_bins"] != base.mel_bins:
        raise ConfigError(
            f"{where}: field 'feature_size' is {values['mel_bins']}; "
            f"config.json's encoder reads {base.mel_bins} mel bins"
        )
    file = directory / "processor_config.json"
    values["max_s"] = _number(read_json(file), str(file), "max_audio_len", base.max_s)
    return _replaced(base, where, **values)


def _section(directory: Path, name: str, *files: str) -> tuple[dict[str, Any], str]:
    """Read the fields and the file of one processor; transformers 5 nests all in one file."""
    shared = directory / "processor_config.json"
    nested = read_json(shared).get(name)
    if nested is not None:
        if not isinstance(nested, dict):
            raise ConfigError(f"{shared}: field {name!r} must be an object")
        return nested, f"{shared}: {name}"
    for file in (*files, "preprocessor_config.json"):
        fields = read_json(directory / file)
        if fields:
            return fields, str(directory / file)
    return {}, str(directory / "preprocessor_config.json")


def _image_fields(fields: dict[str, Any], where: str, base: Processing) -> Processing:
    if not fields:
        return base
    values: dict[str, Any] = {}
    kind = fields.get("image_processor_type")
    if kind is not None:
        stem = str(kind).removesuffix("Fast").removesuffix("Pil")
        if stem not in IMAGE_PROCESSORS:
            known = ", ".join(IMAGE_PROCESSORS)
            raise ConfigError(f"{where}: field 'image_processor_type' is {kind!r}; known: {known}")
        values["sizing"], values["resample"] = IMAGE_PROCESSORS[stem]
        values["eight_bit"] = True
    for field in ("do_resize", "do_rescale", "do_normalize"):
        _expect(fields, where, field, True)
    _expect(fields, where, "do_center_crop", False)
    if values.get("sizing") == "pad" and fields.get("max_image_tiles") != 1:
        raise ConfigError(
            f"{where}: field 'max_image_tiles' is {fields.get('max_image_tiles')!r}; it must be 1"
        )
    factor = fields.get("rescale_factor")
    if factor is not None and not (
        _is_number(factor) and math.isclose(factor, 1 / 255, rel_tol=1e-6)
    ):
        raise ConfigError(f"{where}: field 'rescale_factor' is {factor!r}; it must be 1/255")
    code = fields.get("resample")
    if code is not None:
        if code not in list(RESAMPLE_CODES):
            raise ConfigError(
                f"{where}: field 'resample' is {code!r}; it must be 2 (bilinear) or 3 (bicubic)"
            )
        values["resample"] = RESAMPLE_CODES[code]
    for field, name in (("mean", "image_mean"), ("std", "image_std")):
        numbers = fields.get(name)
        if numbers is not None:
            channels = len(base.mean)
            if not isinstance(numbers, list) or not all(map(_is_number, numbers)):
                raise ConfigError(f"{where}: field {name!r} is {numbers!r:.90}; it must be numbers")
            if len(numbers) != channels:
                raise ConfigError(
                    f"{where}: field {name!r} has {len(numbers)} numbers; images have {channels} "
                    "channels"
                )
            values[field] = tuple(map(float, numbers))
    for field in ("patch_size", "temporal_patch_size", "merge_size"):
        _expect(fields, where, field, getattr(base, field))
    values.update(_size_fields(fields, where, values.get("sizing", base.sizing)))
    return _replaced(base, where, **values)


def _size_fields(fields: dict[str, Any], where: str, sizing: str) -> dict[str, Any]:
    size = fields.get("size")
    if size is None:
        return {}
    if sizing == "smart":
        names, field_names = ("shortest_edge", "longest_edge"), ("min_pixels", "max_pixels")
    else:
        names, field_names = ("height", "width"), None
    if not isinstance(size, dict) or not all(type(size.get(name)) is int for name in names):
        raise ConfigError(
            f"{where}: field 'size' is {size!r:.90}; it must set {names[0]} and {names[1]} as "
            "integers of pixels"
        )
    values = tuple(size[name] for name in names)
    if min(values) < 1:
        raise ConfigError(f"{where}: field 'size' is {size!r:.90}; it must be positive")
    return dict(zip(field_names, values, strict=True)) if field_names else {"size": values}


def _replaced(base: Any, where: str, **values: Any) -> Any:
    """Replace fields of a dataclass; add the file to the message of its check."""
    try:
        return dataclasses.replace(base, **values)
    except ConfigError as error:
        stored = [name for ours, name in AUDIO_FIELDS.items() if f" {ours} " in str(error)]
        called = f"; its name in the file is {stored[0]!r}" if stored else ""
        raise ConfigError(f"{where}: {error}{called}") from error


def _is_number(value: Any) -> bool:
    # An integer of JSON may exceed the range of a float.
    return type(value) in (int, float) and abs(value) < LARGEST_NUMBER


def _number(fields: dict[str, Any], where: str, name: str, default: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if not _is_number(value) or value <= 0:
        raise ConfigError(f"{where}: field {name!r} is {value!r}; it must be a positive number")
    return value


def _expect(fields: dict[str, Any], where: str, name: str, known: Any) -> None:
    value = fields.get(name)
    if value is not None and value != known:
        raise ConfigError(f"{where}: field {name!r} is {value!r}; it must be {known!r}")


def read_family(config: Mapping[str, Any]) -> str | None:
    """Infer the family, and thereby the prompt format, of a model.

    Args:
      config: fields of config.json.

    Returns:
      One of `glm_edge.preprocess.chat.FAMILIES`, or None for an unknown model.
    """
    kind = config.get("model_type")
    if kind != "glm":
        return FAMILY_OF_TYPE.get(str(kind))
    if config.get("vision_config"):
        return "glm_edge_v"
    return "glm_edge" if config.get("vocab_size") == GLM_EDGE_VOCAB else "glm_4"


def read_encoders(directory: Path, config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Read the preprocessing of images, videos and recordings, and their placeholders.

    Args:
      directory: checkpoint directory.
      config: fields of config.json.
      tokenizer: tokenizer of the checkpoint.

    Returns:
      `Processor` fields of the modalities of the model: `image`, `video`, `audio`, `image_token`
      and `audio_token`.

    Raises:
      CheckpointError: a file is damaged.
      ConfigError: a field has an unsupported value, or files are inconsistent.
    """
    kind, where = config["model_type"], str(directory / "config.json")
    vision, speech = (_part(config, where, name) for name in ("vision_config", "audio_config"))
    values: dict[str, Any] = {}
    if kind in SMART_TYPES:
        names = {"merge_size": "spatial_merge_size"}
        sides = {
            field: _integer(vision, where, names.get(field, field), getattr(GLM4V, field))
            for field in ("patch_size", "temporal_patch_size", "merge_size")
        }
        values["image"] = read_image_processing(directory, _replaced(GLM4V, where, **sides))
        if kind == "glm4v":
            base = _replaced(GLM4V_VIDEO, where, **sides)
            values["video"] = read_video_processing(directory, base)
        values["image_token"] = _token(config, where, tokenizer, "image_token_id", "<|image|>")
    elif kind == "glm" and vision:
        side = _integer(vision, where, "image_size", GLM_EDGE_V.fixed_size[0])
        patch_size = _integer(vision, where, "patch_size", GLM_EDGE_V.patch_size)
        base = _replaced(GLM_EDGE_V, where, size=(side, side), patch_size=patch_size)
        values["image"] = read_image_processing(directory, base)
        if values["image"].size != base.size:
            raise ConfigError(
                f"{directory}: the processor prepares images of {values['image'].size} pixels, but "
                f"the tower reads {base.size}"
            )
        token = _token(config, where, tokenizer, "boi_token_id", "<|begin_of_image|>")
        values["image_token"] = token
    elif kind == "glmasr":
        bins = _integer(speech, where, "num_mel_bins", GLM_ASR.mel_bins)
        base = _replaced(GLM_ASR, where, mel_bins=bins)
        values["audio"] = read_audio_processing(directory, base)
        values["audio_token"] = _token(config, where, tokenizer, "audio_token_id", "<|pad|>")
    return values


def read_pad_token_id(config: Mapping[str, Any], names: Mapping[str, Any], tokenizer: Any) -> int:
    """Read the padding token: config.json's, tokenizer_config.json's, or the end-of-text token.

    Args:
      config: fields of config.json.
      names: fields of tokenizer_config.json.
      tokenizer: tokenizer of the checkpoint.

    Returns:
      Token id, 0 if no file names one.

    Raises:
      ConfigError: a field is not a token id.
    """
    for source in sections(config):
        if ids := token_ids(source.get("pad_token_id"), "config.json: field 'pad_token_id'"):
            return ids[0]
    token = token_text(names.get("pad_token")) or token_text(names.get("eos_token"))
    return (tokenizer.token_to_id(token) if token else None) or 0


def sections(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """List the objects of config.json that may name tokens, in order of precedence."""
    text = config.get("text_config")
    return [config, text] if isinstance(text, Mapping) else [config]


def token_text(token: Any) -> str | None:
    """Return the text of a special token of tokenizer_config.json, a string or an object."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _part(config: Mapping[str, Any], where: str, name: str) -> Mapping[str, Any]:
    part = config.get(name) or {}
    if not isinstance(part, Mapping):
        raise ConfigError(f"{where}: field {name!r} must be an object")
    return part


def _integer(fields: Mapping[str, Any], where: str, name: str, default: int) -> int:
    value = fields.get(name)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise ConfigError(f"{where}: field {name!r} is {value!r}; it must be a positive integer")
    return value


def _token(config: Mapping[str, Any], where: str, tokenizer: Any, name: str, token: str) -> str:
    index, expected = tokenizer.token_to_id(token), config.get(name)
    if index is None or expected not in (None, index):
        raise ConfigError(
            f"{where}: field {name!r} is {expected}, but {token} has id {index} in tokenizer.json"
        )
    return token
