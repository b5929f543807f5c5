"""Configurations of Hugging Face GLMs: transformers 4 and 5 spellings of config.json."""

from typing import Any

from glm_edge.configs import DecoderConfig, GLMConfig
from glm_edge.errors import ConfigError

_REQUIRED = object()
_NUMBERS = {int: "a positive integer", float: "a positive number", bool: "true or false"}


class Fields:
    """A config.json whose fields are checked as they are read."""

    def __init__(self, values: dict[str, Any], where: str):
        """Wraps an object.

        Args:
          values: the JSON object.
          where: file (and part of it), for messages.
        """
        self.values = values
        self.where = where

    def get(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Returns a field as `int` (positive), `float` (positive) or `bool`.

        Args:
          name: of the field.
          kind: one of those types.
          default: where the field is absent or null; without one it is required.

        Returns:
          The value.

        Raises:
          ConfigError: the field is missing or not of that type.
        """
        value = self.values.get(name)
        if value is None:
            if default is _REQUIRED:
                raise ConfigError(
                    f"{self.where}: field {name!r} is missing; it must be {_NUMBERS[kind]}"
                )
            return default
        accepted = (int, float) if kind is float else (kind,)
        if type(value) not in accepted or (kind is not bool and not 0 < value < float("inf")):
            raise ConfigError(
                f"{self.where}: field {name!r} is {value!r}; it must be {_NUMBERS[kind]}"
            )
        return kind(value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Returns a field that holds a token id, several, or none."""
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise ConfigError(f"{self.where}: field {name!r} is {value!r}; it must be token ids")
        return tuple(ids)

    def rope(self) -> "Fields":
        """Rotary fields: `rope_parameters` (5), then `rope_scaling` (4), then the top level."""
        merged = {name: self.values.get(name) for name in ("rope_theta", "partial_rotary_factor")}
        for part in ("rope_scaling", "rope_parameters"):
            nested = self.values.get(part)
            if nested is None:
                continue
            if not isinstance(nested, dict):
                raise ConfigError(f"{self.where}: field {part!r} must be an object")
            merged.update({name: value for name, value in nested.items() if value is not None})
            kind = nested.get("rope_type", nested.get("type", "default"))
            if kind not in ("default", None):
                raise ConfigError(
                    f"{self.where}: field {part}.rope_type is {kind!r}; only 'default' is known"
                )
        return Fields(merged, self.where)


def glm_config(values: dict[str, Any], where: str, name: str) -> GLMConfig:
    """Reads the config.json of a `glm` (GLM-Edge, GLM-4-9B-Chat).

    Widths and depths must be given; the others default as in transformers' GlmConfig.

    Args:
      values: the JSON object.
      where: file, for messages.
      name: of the model.

    Returns:
      The configuration.

    Raises:
      ConfigError: a field is missing, malformed, or asks for what this library does not have.
    """
    fields = Fields(values, where)
    for field, known in (
        ("hidden_act", "silu"),
        ("vision_config", None),
        ("quantization_config", None),
    ):
        if values.get(field) not in (None, known):
            expected = "absent" if known is None else repr(known)
            raise ConfigError(
                f"{where}: field {field!r} is not known for model_type 'glm'; it must be {expected}"
            )
    rope = fields.rope()
    try:
        return GLMConfig(
            name=name,
            decoder=DecoderConfig(
                vocab_size=fields.get("vocab_size", int),
                hidden_size=fields.get("hidden_size", int),
                num_layers=fields.get("num_hidden_layers", int),
                num_heads=fields.get("num_attention_heads", int),
                num_kv_heads=fields.get("num_key_value_heads", int),
                head_dim=fields.get("head_dim", int),
                intermediate_size=fields.get("intermediate_size", int),
                rms_norm_eps=fields.get("rms_norm_eps", float, 1.5625e-7),
                rope_theta=rope.get("rope_theta", float, 10000.0),
                partial_rotary_factor=rope.get("partial_rotary_factor", float, 0.5),
                attention_bias=fields.get("attention_bias", bool, True),
                tie_embeddings=fields.get("tie_word_embeddings", bool, False),
                max_position_embeddings=fields.get("max_position_embeddings", int, 131072),
            ),
            eos_token_ids=fields.token_ids("eos_token_id"),
            pad_token_id=next(iter(fields.token_ids("pad_token_id")), None),
        )
    except ConfigError as error:
        raise error if str(error).startswith(where) else ConfigError(f"{where}: {error}") from error
