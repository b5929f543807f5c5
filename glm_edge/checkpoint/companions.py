"""Companion files of the weights: tokenizer, chat template, processors, generation settings."""

import os
from pathlib import Path

from glm_edge.errors import CheckpointError
from glm_edge.files import file_inside, read_bytes
from glm_edge.gguf_file import GGUFFile, find_gguf
from glm_edge.preprocess.gguf_tokenizer import companion_files, describes_tokenizer
from glm_edge.preprocess.tokenizer_files import TOKENIZER
from glm_edge.writers import no_directory

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
# A vocabulary of 150,000 tokens takes 20 MB of JSON.
MAX_COMPANION_BYTES = 1 << 27


def companion_paths(directory: str | os.PathLike) -> dict[str, Path]:
    """Find the tokenizer, chat template, processor and generation files of a checkpoint.

    Args:
      directory: checkpoint directory.

    Returns:
      Paths of existing files by name.

    Raises:
      CheckpointError: the directory does not exist, or a companion is not a regular file inside it.
    """
    directory = Path(directory)
    if not os.path.isdir(directory):
        raise CheckpointError(no_directory(directory))
    return {
        name: file_inside(directory, name)
        for name in COMPANIONS
        if os.path.lexists(directory / name)
    }


def read_companions(directory: str | os.PathLike) -> dict[str, bytes]:
    """Read the files of `companion_paths`, or write those that a GGUF file describes.

    Args:
      directory: checkpoint directory, or a GGUF file.

    Returns:
      Bytes by file name.

    Raises:
      CheckpointError: `companion_paths` fails, or a file cannot be read or is too large.
    """
    file = find_gguf(directory)
    if file is not None:
        return companion_files(GGUFFile(file))
    paths = companion_paths(directory)
    return {name: read_bytes(path, MAX_COMPANION_BYTES) for name, path in paths.items()}


def has_tokenizer(path: str | os.PathLike) -> bool:
    """Test for a checkpoint directory, or a GGUF file, with a tokenizer.

    Args:
      path: checkpoint directory, or a GGUF file.

    Returns:
      True if `glm_edge.load_tokenizer` has something to read.

    Raises:
      CheckpointError: a GGUF file is damaged.
    """
    file = find_gguf(path)
    if file is not None:
        return describes_tokenizer(GGUFFile(file))
    return os.path.lexists(Path(path) / TOKENIZER)
