"""Tokenizer, chat template and named tokens of a GGUF file, as the files of a directory."""

import json
from typing import Any

import tokenizers

from glm_edge.configs.stop_tokens import FIELD, GENERATION_CONFIG, token_ids
from glm_edge.errors import CheckpointError
from glm_edge.gguf_file import GGUFFile
from glm_edge.preprocess.sandbox import MAX_TEMPLATE
from glm_edge.preprocess.tokenizer_files import TOKENIZER, parse_tokenizer

CONFIG = "tokenizer_config.json"
TEMPLATE = "tokenizer.chat_template"
PREFIX = "tokenizer.ggml."
# Splits before the merges of a byte-level BPE, by `tokenizer.ggml.pre`.
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_SPLITS = {
    "gpt-2": [_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
}
# Tokens of these types are never results of merges: control tokens, and tokens of the user.
_CONTROL, _USER_DEFINED = 3, 4
# Names of tokens in tokenizer_config.json and in a GGUF file.
NAMED_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "pad_token": "padding",
    "unk_token": "unknown",
}


def describes_tokenizer(file: GGUFFile) -> bool:
    """Test for a file with a tokenizer, of any kind."""
    return f"{PREFIX}model" in file.metadata


def read_gguf_tokenizer(file: GGUFFile) -> tokenizers.Tokenizer:
    """Build the tokenizer that a GGUF file describes.

    Args:
      file: the file.

    Returns:
      The tokenizer.

    Raises:
      CheckpointError: the tokenizer is missing, damaged or of an unsupported kind.
      ConfigError: a field is not a token id.
    """
    return parse_tokenizer(tokenizer_json(file), str(file.path))


def tokenizer_json(file: GGUFFile) -> bytes:
    """Convert the tokenizer of a GGUF file to the content of a tokenizer.json.

    Args:
      file: the file.

    Returns:
      UTF-8 JSON.

    Raises:
      CheckpointError: the tokenizer is missing, damaged or of an unsupported kind.
      ConfigError: a field is not a token id.
    """
    where, kind = str(file.path), file.metadata.get(f"{PREFIX}model")
    if kind is None:
        raise CheckpointError(f"{where}: has no tokenizer; the field '{PREFIX}model' is missing")
    splits = file.metadata.get(f"{PREFIX}pre")
    known = f"model 'gpt2' with pre {' or '.join(map(repr, _SPLITS))}"
    if kind != "gpt2" or not isinstance(splits, str) or splits not in _SPLITS:
        raise CheckpointError(
            f"{where}: has a tokenizer of model {kind!r:.60} with pre {splits!r:.60}, which is "
            f"unsupported; supported: {known}"
        )
    tokens, merges = (_strings(file, name) for name in ("tokens", "merges"))
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise CheckpointError(f"{where}: token {twice[:80]!r} appears twice in its vocabulary")
    pairs = [merge.split(" ") for merge in merges]
    odd = next((merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2), None)
    if odd is not None:
        raise CheckpointError(f"{where}: merge {odd[:80]!r} must be two tokens and a space")
    fields = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(file, tokens),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _SPLITS[splits]},
        "post_processor": _post_processor(file, tokens),
        "decoder": _BYTES,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": pairs,
        },
    }
    return json.dumps(fields, ensure_ascii=False).encode()


def chat_template(file: GGUFFile) -> str | None:
    """Return the chat template of a GGUF file.

    Args:
      file: the file.

    Returns:
      Jinja source, or None without a template.

    Raises:
      CheckpointError: it is not a text, or too long.
    """
    template = file.metadata.get(TEMPLATE)
    if template is None:
        return None
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
        raise CheckpointError(
            f"{file.path}: field {TEMPLATE!r} must be a text of at most {MAX_TEMPLATE} characters"
        )
    return template


def token_id(file: GGUFFile, name: str) -> int | None:
    """Return the id of a named token.

    Args:
      file: the file.
      name: name of the token in the file, such as `bos`.

    Returns:
      The id, or None if the file does not name this token.

    Raises:
      ConfigError: the field is not a token id.
    """
    key = f"{PREFIX}{name}_token_id"
    ids = token_ids(file.metadata.get(key), f"{file.path}: field {key!r}")
    return ids[0] if ids else None


def stop_tokens(file: GGUFFile) -> tuple[int, ...]:
    """Return the tokens that end an answer: the end of a text, then the end of a turn.

    Args:
      file: the file.

    Returns:
      Token ids without duplicates.

    Raises:
      ConfigError: a field is not a token id.
    """
    ids = [token_id(file, name) for name in ("eos", "eot")]
    return tuple(dict.fromkeys(index for index in ids if index is not None))


def named_tokens(file: GGUFFile) -> dict[str, str]:
    """Return the texts of named tokens.

    Args:
      file: the file.

    Returns:
      Texts by names of tokenizer_config.json, without those that the file does not name.

    Raises:
      CheckpointError: an id is not one of the vocabulary.
      ConfigError: a field is not a token id.
    """
    tokens, named = _strings(file, "tokens"), {}
    for name, stored in NAMED_TOKENS.items():
        index = token_id(file, stored)
        if index is not None:
            named[name] = _text(file, tokens, stored, index)
    return named


def companion_files(file: GGUFFile) -> dict[str, bytes]:
    """Write the tokenizer, chat template and stop tokens as files of a checkpoint directory.

    Args:
      file: the file.

    Returns:
      Bytes by file name; empty if the file has no tokenizer.

    Raises:
      CheckpointError: the tokenizer is damaged or of an unsupported kind.
      ConfigError: a field is not a token id.
    """
    if not describes_tokenizer(file):
        return {}
    names: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **named_tokens(file)}
    template = chat_template(file)
    if template is not None:
        names["chat_template"] = template
    files = {TOKENIZER: tokenizer_json(file), CONFIG: _json(names)}
    if stops := stop_tokens(file):
        files[GENERATION_CONFIG] = _json({FIELD: list(stops)})
    return files


def _json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=1, ensure_ascii=False) + "\n").encode()


def _strings(file: GGUFFile, name: str) -> list[str]:
    values = file.metadata.get(f"{PREFIX}{name}")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"{file.path}: field '{PREFIX}{name}' must be a list of texts")
    return values


def _text(file: GGUFFile, tokens: list[str], name: str, index: int) -> str:
    if index >= len(tokens):
        raise CheckpointError(
            f"{file.path}: field '{PREFIX}{name}_token_id' is {index}, but the vocabulary has "
            f"{len(tokens)} tokens"
        )
    return tokens[index]


def _added_tokens(file: GGUFFile, tokens: list[str]) -> list[dict[str, Any]]:
    kinds = file.metadata.get(f"{PREFIX}token_type", [1] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise CheckpointError(
            f"{file.path}: field '{PREFIX}token_type' must have one type per token"
        )
    return [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _post_processor(file: GGUFFile, tokens: list[str]) -> dict[str, Any] | None:
    """Describe the tokens that are added before and after a text."""
    added = {}
    for name in ("bos", "eos"):
        if file.metadata.get(f"{PREFIX}add_{name}_token") is True:
            index = token_id(file, name)
            if index is not None:
                added[name] = (_text(file, tokens, name, index), index)
    if not added:
        return None
    pieces: dict[str, Any] = {"text": {"Sequence": {"id": "A", "type_id": 0}}}
    for name, (token, _) in added.items():
        pieces[name] = {"SpecialToken": {"id": token, "type_id": 0}}
    single = [pieces[name] for name in ("bos", "text", "eos") if name in pieces]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            token: {"id": token, "ids": [index], "tokens": [token]}
            for token, index in added.values()
        },
    }
