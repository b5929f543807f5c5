"""Checked reading of config.json, in the spellings of transformers 4 and 5."""

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

# Fields that describe training, generation, tokens or software, but do not change the model.
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
    """A JSON object that records which fields were read, to detect unknown ones."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        """Wrap an object.

        Args:
          values: JSON object.
          where: file (and section) for messages.
        """
        self.values = values
        self.where = where
        self._taken: set[str] = set()

    def take(self, name: str, default: Any = None) -> Any:
        """Return a field without checks, or `default` if it is absent or null."""
        self._taken.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def get(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Return a field as a positive `int`, a positive `float` or a `bool`.

        Args:
          name: name of the field.
          kind: `int`, `float` or `bool`.
          default: value of an absent or null field; without it, the field is required.

        Returns:
          The value.

        Raises:
          ConfigError: the field is missing or has the wrong type.
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
        """Return a field that must divide another one, as heads divide a width.

        Args:
          name: name of the field.
          of: name of the other field.
          total: value of the other field.
          *default: value of an absent or null field; without it, the field is required.

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
        """Return a field that must have one of the known values.

        Args:
          name: name of the field.
          *known: accepted values; None is always accepted.
          default: value of an absent or null field.

        Returns:
          The value.

        Raises:
          ConfigError: the field has an unsupported value.
        """
        value = self.take(name, default)
        if value is not None and not any(type(value) is type(k) and value == k for k in known):
            raise ConfigError(
                f"{self.where}: field {name!r} is {value!r:.60}, which is unsupported; it must "
                f"be {' or '.join(repr(k) for k in known) or 'absent'}"
            )
        return value

    def optional_section(self, name: str) -> "Fields | None":
        """Return a field that holds an object, or None where it is absent or null.

        Raises:
          ConfigError: it holds something else.
        """
        return None if self.take(name) is None else self.section(name)

    def section(self, name: str) -> "Fields":
        """Return a field that is an object.

        Args:
          name: name of the field.
          required: refuses an absent field; otherwise it returns None.

        Returns:
          The fields of the object, or None.

        Raises:
          ConfigError: the field is missing, or is not an object.
        """
        value = self.take(name)
        if not isinstance(value, dict):
            fault = "is missing" if value is None else f"is a {type(value).__name__}"
            raise ConfigError(f"{self.where}: field {name!r} {fault}; it must be an object")
        return Fields(value, f"{self.where}: {name}")

    def repeats(self, section: "Fields") -> None:
        """Mark fields as read that repeat a field of a section with the same value."""
        for name, value in self.values.items():
            if name in section.values and section.values[name] == value:
                self._taken.add(name)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Return the token ids of a field with one id, a list of ids, or null."""
        return token_ids(self.take(name), f"{self.where}: field {name!r}")

    def token_id(self, name: str) -> int | None:
        """Return the token id of a field with one id or null."""
        ids = self.token_ids(name)
        if len(ids) > 1:
            raise ConfigError(f"{self.where}: field {name!r} is {list(ids)}; it must be one id")
        return ids[0] if ids else None

    def rope(self, *types: str) -> "Fields":
        """Read rotary fields from `rope_parameters` (5), `rope_scaling` (4) and the top level.

        Args:
          *types: accepted values of `rope_type` in addition to `default`.

        Returns:
          The merged fields; earlier sources override later ones.

        Raises:
          ConfigError: a section is not an object, or the type is unsupported.
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
        # Old files contain the type twice; `mrope` was the default type with sections.
        rope.expect("type", "default", "mrope", *types)
        return rope

    def finish(self) -> None:
        """Refuse fields that were not read, unless they are off or do not change the model.

        Raises:
          ConfigError: a field is unsupported. The message names it.
        """
        for name, value in self.values.items():
            known = name in self._taken or name in WITHOUT_EFFECT or name.startswith("_")
            if not known and value not in (None, False, [], {}):
                raise ConfigError(
                    f"{self.where}: field {name!r:.60} ({value!r:.60}) is unsupported; a model "
                    "that needs it would be computed wrongly"
                )
