"""Stop tokens, read from generation_config.json or config.json."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm_edge.configs.architecture import GLMConfig
from glm_edge.errors import ConfigError
from glm_edge.files import file_inside, read_json

GENERATION_CONFIG = "generation_config.json"
FIELD = "eos_token_id"
MAX_ID = 1 << 31
MAX_IDS = 1000


def read_stop_tokens(directory: Path, *sections: Mapping[str, Any]) -> tuple[int, ...]:
    """Read the tokens that end an answer.

    As in transformers, the first file with a stop token wins: generation_config.json, then
    config.json, then its `text_config`.

    Args:
      directory: checkpoint directory.
      *sections: objects of config.json in that order, with or without `eos_token_id`.

    Returns:
      Stop token ids, empty if no file names one.

    Raises:
      CheckpointError: generation_config.json is damaged.
      ConfigError: `eos_token_id` is not one or more token ids.
    """
    sources: list[tuple[str, Mapping[str, Any]]]
    sources = [("config.json", section) for section in sections]
    if os.path.lexists(directory / GENERATION_CONFIG):
        first = read_json(file_inside(directory, GENERATION_CONFIG))
        sources.insert(0, (GENERATION_CONFIG, first))
    for name, fields in sources:
        if ids := token_ids(fields.get(FIELD), f"{directory / name}: field {FIELD!r}"):
            return ids
    return ()


def token_ids(value: Any, where: str) -> tuple[int, ...]:
    """Read a field with one token id, a list of token ids, or None.

    Args:
      value: field value.
      where: file and field for messages.

    Returns:
      The ids without duplicates; empty for None.

    Raises:
      ConfigError: the value is of another type, or an id is out of range.
    """
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if len(ids) > MAX_IDS or not all(type(i) is int and 0 <= i < MAX_ID for i in ids):
        raise ConfigError(f"{where} is {value!r:.60}; it must be a token id or a list of token ids")
    return tuple(dict.fromkeys(ids))


def with_stop_tokens(config: Any, directory: Path) -> Any:
    """Add the stop tokens of a checkpoint directory to a model's configuration.

    Args:
      config: configuration from config.json. Encoder configurations are returned unchanged.
      directory: checkpoint directory.

    Returns:
      The configuration with `eos_token_ids` set.

    Raises:
      CheckpointError: generation_config.json is damaged.
      ConfigError: `eos_token_id` is not one or more token ids.
    """
    if not isinstance(config, GLMConfig):
        return config
    ids = read_stop_tokens(directory, {FIELD: config.eos_token_ids})
    return dataclasses.replace(config, eos_token_ids=ids)
