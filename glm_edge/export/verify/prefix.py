"""A fixed beginning of prompts, whose rows of the cache are computed once and stored in a file.

Shapes: `P` tokens of the prefix, `T` tokens, `S` cache slots, `K` key/value heads, `H` head
dimension.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glm_edge.checkpoint.safetensors import DTYPES, SafetensorsFile, write_safetensors
from glm_edge.errors import CheckpointError, DataError, ExportError
from glm_edge.export.common.interface import CACHE
from glm_edge.writers import check_target, write_whole

if TYPE_CHECKING:
    from glm_edge.export.verify.runner import SignatureRunner

# Tensors of a file beside the rows: the SHA-256 of the model, and the tokens.
MODEL, TOKENS = "model_sha256", "tokens"
DIGEST_BYTES = 32
SUFFIX = ".prefix.safetensors"
# Hexadecimal digits of each hash in a file's name.
NAME_DIGITS = 12


@dataclass(frozen=True, eq=False)
class Prefix:
    """Rows of the cache for the tokens that prompts begin with.

    Attributes:
      tokens: token ids, int32 [P].
      rows: float32 [1, K, P, H] for keys and [1, K, H, P] for values, by name of the cache input.
        Those of a file are mapped into memory, so that processes share them.
      digest: SHA-256 of the exported model; None for a runner without a file, whose later use with
        another model of the same layout is not noticed.
      path: path of the file, or None.
    """

    tokens: np.ndarray
    rows: Mapping[str, np.ndarray]
    digest: bytes | None
    path: Path | None = None


def keep(runner: "SignatureRunner", tokens: Any, path: str | Path | None) -> Prefix:
    """Compute or open a prefix; see `SignatureRunner.keep_prefix`.

    Args:
      runner: runner of the model.
      tokens: token ids of text, int [P].
      path: path of the file, or None.

    Returns:
      The prefix.

    Raises:
      DataError: there is no token, a token is unknown or a placeholder, or they do not fit the
        cache.
      ExportError: the file is damaged, or belongs to another model or other tokens; or the runner
        has no file of a model.
      OutputError: the file cannot be written.
    """
    tokens = _text_tokens(runner, tokens)
    if path is None:
        known = None if runner.path is None else runner.model_digest()
        return Prefix(tokens, _rows(runner, tokens), known)
    path, digest = Path(path), runner.model_digest()
    if path.exists():
        return _opened(runner, tokens, path, digest)
    check_target(path, overwrite=False)
    rows = _rows(runner, tokens)
    stored = {**rows, TOKENS: tokens, MODEL: np.frombuffer(digest, np.uint8)}
    write_whole(path, lambda temporary: write_safetensors(temporary, stored))
    return _opened(runner, tokens, path, digest)


def path_beside(runner: "SignatureRunner", tokens: Any) -> Path:
    """Name the file of a prefix beside its model; see `SignatureRunner.prefix_path`.

    Args:
      runner: runner of the model.
      tokens: token ids, int [P].

    Returns:
      The path.

    Raises:
      DataError: as for `keep`.
      ExportError: the runner has no file of a model.
    """
    tokens = _text_tokens(runner, tokens)
    hashes = runner.model_digest(), hashlib.sha256(tokens.astype("<i4").tobytes()).digest()
    model, text = (digest.hex()[:NAME_DIGITS] for digest in hashes)
    path = Path(runner.path or "")
    return path.with_name(f"{path.name}.{model}-{text}{SUFFIX}")


def start(
    prefix: Prefix, runner: "SignatureRunner", tokens: np.ndarray, cache: dict[str, np.ndarray]
) -> int:
    """Write the rows of a prefix to an empty cache.

    Args:
      prefix: the prefix.
      runner: runner that reads the cache.
      tokens: token ids of the prompt, int32 [T].
      cache: cache of `empty_cache`, which is changed.

    Returns:
      The slot from which tokens must run. The last token of the prompt always runs, for its logits.

    Raises:
      DataError: the prompt does not begin with the prefix.
      ExportError: the prefix belongs to another model.
    """
    count = len(prefix.tokens)
    if not np.array_equal(tokens[:count], prefix.tokens):
        raise DataError(
            f"tokens: the prompt does not begin with the {count} tokens of the prefix; pass the "
            "prefix of its system prompt, or none"
        )
    where = "prefix" if prefix.path is None else f"{prefix.path}"
    if prefix.digest is not None and prefix.digest != runner.model_digest():
        raise ExportError(f"{where}: the prefix of another model than {_name(runner)}")
    _check_layout(where, prefix.rows, runner, count)
    for name, rows in prefix.rows.items():
        cache[name][_span(name, count)] = rows
    return min(count, len(tokens) - 1)


def _text_tokens(runner: "SignatureRunner", tokens: Any) -> np.ndarray:
    tokens, size = np.array(tokens, np.int32).reshape(-1), runner.config.decoder.vocab_size
    if not tokens.size or tokens.min() < 0 or tokens.max() >= size:
        raise DataError(f"tokens: must contain at least one token, all from 0 to {size - 1}")
    placeholders = {runner.config.image_token_id, runner.config.audio_token_id}
    if media := [token for token in tokens.tolist() if token in placeholders]:
        raise DataError(
            f"tokens: {media[0]} is a placeholder of an image or a recording; a prefix is text, "
            "the same in every prompt"
        )
    return tokens


def _rows(runner: "SignatureRunner", tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Run the tokens, and copy their rows out of the cache."""
    _, cache = runner.extend(runner.embed(tokens), 0, runner.empty_cache())
    count = len(tokens)
    return {name: np.array(np.asarray(full)[_span(name, count)]) for name, full in cache.items()}


def _opened(runner: "SignatureRunner", tokens: np.ndarray, path: Path, digest: bytes) -> Prefix:
    """Map the file of a prefix into memory, if it belongs to the model and the tokens."""
    remedy = "delete it, so that it is made anew, or choose another path"
    try:
        file = SafetensorsFile(path)
        infos = file.tensors
        for name in (MODEL, TOKENS):
            if name not in infos:
                raise ExportError(f"{path}: not the file of a prefix: {name} is missing")
        if infos[MODEL].bytes != DIGEST_BYTES or file.read(MODEL).tobytes() != digest:
            raise ExportError(f"{path}: the prefix of another model than {_name(runner)}; {remedy}")
        if not np.array_equal(file.read(TOKENS), tokens):
            raise ExportError(
                f"{path}: the prefix of other tokens than these {len(tokens)}; {remedy}"
            )
        rows = {
            # An empty tensor, of a layer without heads, cannot be mapped.
            name: np.memmap(path, DTYPES[info.dtype], "r", info.begin, info.shape)
            if info.bytes
            else file.read(name)
            for name, info in infos.items()
            if name not in (MODEL, TOKENS)
        }
    except CheckpointError as error:
        raise ExportError(f"{path}: damaged or not the file of a prefix; {remedy}") from error
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror}") from error
    _check_layout(f"{path}", rows, runner, len(tokens))
    return Prefix(tokens, rows, digest, path)


def _check_layout(
    where: str, rows: Mapping[str, np.ndarray], runner: "SignatureRunner", count: int
) -> None:
    """Refuse rows that the cache of a runner has no place for."""
    if count > runner.cache_slots:
        raise ExportError(
            f"{where}: {count} tokens do not fit the {runner.cache_slots} slots of the cache"
        )
    expected = _layout(runner, count)
    for name in sorted(expected.keys() | rows.keys()):
        stored = rows.get(name)
        actual = "missing" if stored is None else f"{stored.dtype} {list(stored.shape)}"
        wanted = f"float32 {list(expected[name])}" if name in expected else "missing"
        if actual != wanted:
            raise ExportError(
                f"{where}: rows of another cache layout: {name} is {actual}, but {wanted} in the "
                f"cache of {_name(runner)}"
            )


def _layout(runner: "SignatureRunner", count: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the rows of `count` tokens by name."""
    shapes = {}
    for name, full in runner.empty_cache().items():
        shape = list(full.shape)
        shape[_axis(name)] = count
        shapes[name] = tuple(shape)
    return shapes


def _axis(name: str) -> int:
    """Return the axis of slots: keys are [1, K, S, H], values [1, K, H, S]."""
    return 2 if name.startswith(f"{CACHE}k") else 3


def _span(name: str, count: int) -> tuple[slice, ...]:
    """Index the first slots of a cache array."""
    return (*[slice(None)] * _axis(name), slice(count))


def _name(runner: "SignatureRunner") -> str:
    return str(runner.path or runner.config.name)
