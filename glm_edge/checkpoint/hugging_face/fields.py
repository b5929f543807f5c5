"""Fields of config.json, checked as they are read, in the spellings of transformers 4 and 5."""

from typing import Any

from glm_edge.configs.stop_tokens import token_ids
from glm_edge.errors import ConfigError

_REQUIRED = object()
MAX_NUMBER = 2**31
_KINDS = {
    int: "a positive integer",
    float: "a positive number",
    bool: "true or false",
}

# Fields that describe training, generation, tokens or the software, never the function computed.
WITHOUT_EFFECT = frozenset(
    (
        "add_cross_attention",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dropout",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_decoder_ids",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "hidden_dropout",
        "hidden_dropout_prob",
        "id2label",
        "initializer_factor",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "keys_to_ignore_at_inference",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "model_type",
        "name_or_path",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_labels",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pad_token_id",
        "prefix",
        "problem_type",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    )
)


class Fields:
    """A JSON object whose fields are taken one by one, so that unknown ones can be named."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        """Wraps an object.

        Args:
          values: the JSON object.
          where: file (and part of it), for messages.
        """
        self.values = values
        self.where = where
        self._taken: set[str] = set()

    def take(self, name: str, default: Any = None) -> Any:
        """Returns a field as it is; `default` where it is absent or null."""
        self._taken.add(name)
        value = self.values.get(name)
        return default if value is None else value

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
        value = self.take(name)
        if value is None:
            if default is _REQUIRED:
                raise ConfigError(
                    f"{self.where}: field {name!r} is missing; it must be {_KINDS[kind]}"
                )
            return default
        accepted = (int, float) if kind is float else (kind,)
        if type(value) not in accepted or (kind is not bool and not 0 < value < MAX_NUMBER):
            raise ConfigError(
                f"{self.where}: field {name!r} is {value!r:.60}; it must be {_KINDS[kind]}"
            )
        return kind(value)

    def divisor(self, name: str, of: str, total: int, *default: int) -> int:
        """Returns a field that must divide another one, as heads divide a width.

        Args:
          name: of the field.
          of: name of the other.
          total: its value.
          *default: where the field is absent or null; without one it is required.

        Returns:
          The value.

        Raises:
          ConfigError: the field is missing, malformed, or does not divide the other.
        """
        value = self.get(name, int, *default)
        if total % value:
            raise ConfigError(
                f"{self.where}: field {name!r} is {value}; it must divide {of!r}, which is {total}"
            )
        return value

    def expect(self, name: str, *known: Any, default: Any = None) -> Any:
        """Returns a field that must hold one of the known values, or `default` where absent.

        Raises:
          ConfigError: the field asks for something this library does not have.
        """
        value = self.take(name, default)
        if value is not None and not any(type(value) is type(k) and value == k for k in known):
            raise ConfigError(
                f"{self.where}: field {name!r} is {value!r:.60}, which is not known here; it must "
                f"be {' or '.join(repr(k) for k in known) or 'absent'}"
            )
        return value

    def optional_section(self, name: str) -> "Fields | None":
        """Returns a field that holds an object, or None where it is absent or null.

        Raises:
          ConfigError: it holds something else.
        """
        return None if self.take(name) is None else self.section(name)

    def section(self, name: str) -> "Fields":
        """Returns a field that holds an object.

        Raises:
          ConfigError: it is missing or holds something else.
        """
        value = self.take(name)
        if not isinstance(value, dict):
            fault = "is missing" if value is None else f"is a {type(value).__name__}"
            raise ConfigError(f"{self.where}: field {name!r} {fault}; it must be an object")
        return Fields(value, f"{self.where}: {name}")

    def repeats(self, section: "Fields") -> None:
        """Takes fields that say the same as those of a section, as some files do."""
        for name, value in self.values.items():
            if name in section.values and section.values[name] == value:
                self._taken.add(name)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Returns a field that holds a token id, several, or none."""
        return token_ids(self.take(name), f"{self.where}: field {name!r}")

    def token_id(self, name: str) -> int | None:
        """Returns a field that holds one token id or none."""
        ids = self.token_ids(name)
        if len(ids) > 1:
            raise ConfigError(f"{self.where}: field {name!r} is {list(ids)}; it must be one id")
        return ids[0] if ids else None

    def rope(self, *types: str) -> "Fields":
        """Reads rotary fields: `rope_parameters` (5), then `rope_scaling` (4), then the top level.

        Args:
          *types: values of `rope_type` that are known; `default` always is.
        """
        merged = {name: self.take(name) for name in ("rope_theta", "partial_rotary_factor")}
        where = self.where
        for part in ("rope_scaling", "rope_parameters"):
            nested = self.take(part)
            if nested is None:
                continue
            if not isinstance(nested, dict):
                raise ConfigError(f"{self.where}: field {part!r} must be an object")
            merged.update({name: value for name, value in nested.items() if value is not None})
            where = f"{self.where}: {part}"
        rope = Fields(merged, where)
        rope.expect("rope_type", "default", *types)
        # Old files name the same type twice; `mrope` was the default type with sections.
        rope.expect("type", "default", "mrope", *types)
        return rope

    def finish(self) -> None:
        """Refuses fields that nobody took, unless they are off or cannot change the function.

        Raises:
          ConfigError: such a field, by name.
        """
        for name, value in self.values.items():
            known = name in self._taken or name in WITHOUT_EFFECT or name.startswith("_")
            if not known and value not in (None, False, [], {}):
                raise ConfigError(
                    f"{self.where}: field {name!r:.60} ({value!r:.60}) is not known here; a model "
                    "that needs it would be computed wrongly"
                )
