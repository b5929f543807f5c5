"""Stop tokens, from the files of a checkpoint that may name them."""

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
    """Reads the tokens that end an answer.

    The first that names any counts, as in transformers: generation_config.json, then config.json,
    then its `text_config`.

    Args:
      directory: of the checkpoint.
      *sections: objects of config.json in that order, which may hold `eos_token_id`.

    Returns:
      Their ids; empty where no file names one.

    Raises:
      CheckpointError: generation_config.json is damaged.
      ConfigError: a file names something else than token ids.
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
    """Reads a field that holds a token id, several, or none.

    Args:
      value: of the field; None is none.
      where: file and field, for messages.

    Returns:
      The ids, each once.

    Raises:
      ConfigError: it holds something else.
    """
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if len(ids) > MAX_IDS or not all(type(i) is int and 0 <= i < MAX_ID for i in ids):
        raise ConfigError(f"{where} is {value!r:.60}; it must be token ids")
    return tuple(dict.fromkeys(ids))


def with_stop_tokens(config: Any, directory: Path) -> Any:
    """Gives a model's configuration the stop tokens that its directory names.

    Args:
      config: of a GLM, as config.json says; that of an encoder is returned as it is.
      directory: of the checkpoint.

    Returns:
      The configuration.

    Raises:
      CheckpointError: generation_config.json is damaged.
      ConfigError: it names something else than token ids.
    """
    if not isinstance(config, GLMConfig):
        return config
    ids = read_stop_tokens(directory, {FIELD: config.eos_token_ids})
    return dataclasses.replace(config, eos_token_ids=ids)
