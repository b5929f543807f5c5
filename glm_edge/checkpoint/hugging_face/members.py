"""Registry of the family's members by `model_type`."""

from typing import Any

from glm_edge.checkpoint.hugging_face import chatglm, decoders, siglip, speech, text, vision
from glm_edge.checkpoint.hugging_face.fields import Fields
from glm_edge.checkpoint.hugging_face.member import FamilyMember
from glm_edge.errors import ConfigError

MEMBERS = {
    "glm": decoders.GLM,
    "chatglm": chatglm.CHATGLM,
    "glm4": decoders.GLM4,
    "glm4v": vision.GLM4V,
    "glm46v": vision.GLM46V,
    "glm_ocr": vision.GLM_OCR,
    "glm_edge_v": siglip.GLM_EDGE_V,
    "glmasr": speech.GLM_ASR,
    "glmasr_first": speech.FIRST_GLM_ASR,
    "siglip_vision_model": siglip.SIGLIP,
    "siglip": siglip.SIGLIP,
    "whisper": speech.WHISPER,
    "bert": text.BERT,
    "distilbert": text.DISTILBERT,
}

# Describes stored tensors, and not the model.
QUANTIZATION = "quantization_config"

# Members that share a model_type with another member, and the field that distinguishes them.
VARIANTS = {"glm_edge_v": ("glm", "vision_config"), "glmasr_first": ("glmasr", "whisper_config")}


def read_config(fields: dict[str, Any], where: str, name: str) -> tuple[FamilyMember, Any]:
    """Find the member of a config.json and read its configuration.

    Args:
      fields: fields of config.json. `quantized.config.read_method` reads `quantization_config`.
      where: file for messages.
      name: name of the model.

    Returns:
      `(member, config)`.

    Raises:
      ConfigError: the model_type is unknown, or a field is missing, malformed or unsupported.
    """
    described = {field: value for field, value in fields.items() if field != QUANTIZATION}
    member, reader = MEMBERS[_member_name(fields, where)], Fields(described, where)
    try:
        config = member.read_config(reader, name)
    except ConfigError as error:
        raise error if str(error).startswith(where) else ConfigError(f"{where}: {error}") from error
    reader.finish()
    return member, config


def _member_name(fields: dict[str, Any], where: str) -> str:
    model_type = fields.get("model_type")
    for name, (shared, field) in VARIANTS.items():
        if str(model_type).lower() == shared and fields.get(field) is not None:
            return name
    known = [name for name in MEMBERS if name not in VARIANTS]
    if model_type not in known:
        raise ConfigError(
            f"{where}: model_type {model_type!r:.60} is unknown; known: {', '.join(known)}"
        )
    return model_type


def write_config(config: Any) -> tuple[FamilyMember, dict[str, Any]] | None:
    """Find the member that can express a configuration, and convert it to fields.

    Args:
      config: configuration of a model.

    Returns:
      `(member, fields)` such that `read_config(fields)` returns the configuration, or None if no
      member can express it.
    """
    for member in MEMBERS.values():
        try:
            fields = member.write_config(config)
            if read_config(fields, "config.json", getattr(config, "name", ""))[1] == config:
                return member, fields
        # A configuration of another class lacks fields that this member writes.
        except (ConfigError, AttributeError, TypeError, ValueError):
            continue
    return None
