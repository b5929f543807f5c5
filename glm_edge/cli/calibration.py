"""Calibration batches from a file."""

from typing import Any

import numpy as np
from tokenizers import Tokenizer

from glm_edge.cli import corpora
from glm_edge.errors import DataError

Batch = dict[str, Any]


def from_file(
    path: str, tokenizer: Tokenizer | None, count: int, length: int, batch: int
) -> list[Batch]:
    """Reads calibration batches.

    Args:
      path: UTF-8 text, or an .npz file of arrays with as many rows each.
      tokenizer: of the model; only text needs it.
      count: windows of text, taken evenly from it.
      length: tokens of a window of text.
      batch: rows of a batch.

    Returns:
      Batches of `tokens` [batch, length] and of what else an .npz file holds.

    Raises:
      DataError: the file cannot be read, is too short, or there is no tokenizer.
    """
    if path.endswith(".npz"):
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as arrays: {error}") from error
        rows = {len(array) for array in arrays.values() if array.ndim}
        if len(rows) != 1:
            raise DataError(f"{path}: all arrays must have the same number of rows")
        starts = range(0, rows.pop(), batch)
        return [{k: v[i : i + batch] for k, v in arrays.items()} for i in starts]
    if tokenizer is None:
        raise DataError(f"{path}: text needs the model's tokenizer.json; or give an .npz file")
    ids = corpora.encode_text(tokenizer, corpora.read_text(path))
    if len(ids) < length:
        raise DataError(f"{path}: {len(ids)} tokens are fewer than one window of {length}")
    windows = ids[: len(ids) // length * length].reshape(-1, length).astype(np.int32)
    chosen = windows[np.unique(np.linspace(0, len(windows) - 1, count).astype(int))]
    return [{"tokens": chosen[i : i + batch]} for i in range(0, len(chosen), batch)]
