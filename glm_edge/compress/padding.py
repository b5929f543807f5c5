"""Detection and removal of padding in calibration batches.

Padding is detected by the first rule that applies:

1. `valid` of the batch, if present.
2. `pad_token_id` of the model: runs of this token at both ends of a row are padding.
3. `loss_mask`, if the model has no pad token: a token that fills one end of some row with two or
   more positions of weight zero is the pad token of the batch. Runs of it with weight zero at the
   ends of rows are padding. Placeholders of images and audio do not qualify; if several tokens
   qualify, there is no padding.

Rules 2 and 3 never treat a position with nonzero `loss_mask` as padding. The same applies to a pad
token that is also a stop token, if its prediction has nonzero weight. Zeros in the middle of a row,
and a prompt of different tokens at its beginning, are therefore not padding. Pass `valid` if this
rule does not match the data.

Letters of shapes: `B` rows, `T` tokens.
"""

from typing import Any

import numpy as np

from glm_edge.errors import DataError


def valid_tokens(config: Any, batch: dict[str, Any], tokens: np.ndarray, where: str) -> np.ndarray:
    """Mark the tokens that are not padding, by the rules of the module's docstring.

    Args:
      config: configuration of the model, or None.
      batch: batch with optional `valid` and `loss_mask`.
      tokens: int [B, T].
      where: name of the batch for messages.

    Returns:
      bool [B, T], False at padding.

    Raises:
      DataError: `valid` has a wrong shape or type.
    """
    if batch.get("valid") is not None:
        valid = np.asarray(batch["valid"])
        if valid.shape != tokens.shape or (
            valid.dtype != bool and not np.isin(valid, (0, 1)).all()
        ):
            raise DataError(
                f"{where}: valid must be booleans {tokens.shape} like tokens, found {valid.dtype} "
                f"{valid.shape}"
            )
        return valid.astype(bool)
    weights = batch.get("loss_mask")
    weights = None if weights is None else np.asarray(weights)
    placeholders = [
        token
        for token in (getattr(config, f"{kind}_token_id", None) for kind in ("image", "audio"))
        if token is not None
    ]
    pad = getattr(config, "pad_token_id", None)
    if pad is None and weights is not None:
        pad = _repeated(tokens, weights, placeholders)
    if pad is None or pad in placeholders:
        return np.ones(tokens.shape, bool)
    padding = tokens == pad
    if weights is not None:
        padding &= weights == 0
        if pad in getattr(config, "eos_token_ids", ()):
            # A trained stop token is predicted one position earlier.
            padding[:, 1:] &= weights[:, :-1] == 0
    return ~(_leading(padding) | _leading(padding[:, ::-1])[:, ::-1])


def _leading(flags: np.ndarray) -> np.ndarray:
    """Mark the run of True values at the beginning of each row."""
    return np.logical_and.accumulate(flags, axis=1)


def _repeated(tokens: np.ndarray, weights: np.ndarray, placeholders: list[int]) -> int | None:
    """Return the only token with a run of two or more zero weights at an end of a row, or None."""
    tried = set()
    for ends in (tokens, tokens[:, ::-1]):
        zeros = (weights if ends is tokens else weights[:, ::-1]) == 0
        runs = _leading(zeros & (ends == ends[:, :1])).sum(axis=1)
        tried |= set(ends[runs >= 2, 0].tolist())
    tried -= set(placeholders)
    return tried.pop() if len(tried) == 1 else None


def without_padding(
    batch: dict[str, Any], valid: np.ndarray, filler: int, where: str
) -> dict[str, Any]:
    """Move the valid tokens of each row to its beginning, and truncate unused columns.

    Rows of equal length lose their padding completely. In a causal model, valid tokens do not
    attend to the padding after shorter rows.

    Args:
      batch: numpy arrays: `tokens` [B, T] and further arrays of the batch.
      valid: bool [B, T], False at padding.
      filler: token for padding after shorter rows.
      where: name of the batch for messages.

    Returns:
      The batch without empty rows; `valid` is present only if lengths differ.

    Raises:
      DataError: all tokens are padding.
    """
    batch = {name: value for name, value in batch.items() if name != "valid"}
    if valid.all():
        return batch
    rows = np.asarray(valid.any(axis=1))
    if not rows.any():
        raise DataError(f"{where}: contains only padding")
    shape = valid.shape
    valid = valid[rows]
    counts = valid.sum(axis=1)
    # At least two tokens, since a batch predicts at least one.
    length = max(2, int(counts.max()))
    order = np.argsort(~valid, axis=1, kind="stable")[:, :length]
    moved = np.arange(length) < counts[:, None]

    def take(name: str) -> np.ndarray:
        return np.take_along_axis(np.asarray(batch[name])[rows], order, axis=1)

    result = {**batch, "tokens": np.where(moved, take("tokens"), filler)}
    if "loss_mask" in batch:
        result["loss_mask"] = take("loss_mask") * moved
    if "positions" in batch:
        result["positions"] = _moved_positions(np.asarray(batch["positions"]), rows, order, moved)
    if "mask" in batch:
        mask = _moved_mask(np.asarray(batch["mask"]), shape, rows, order, where)
        # A padding query attends to all keys, so that its softmax is defined.
        result["mask"] = mask | ~moved[:, None, :, None]
    for name in ("images", "audio"):
        if name in batch and _of_rows(name, batch):
            result[name] = np.asarray(batch[name])[rows]
    if not moved.all():
        result["valid"] = moved
    return result


def _of_rows(name: str, batch: dict[str, Any]) -> bool:
    """Test for images or recordings per row, not in reading order."""
    return not isinstance(batch[name], list | tuple) and not (
        name == "audio" and "audio_frames" in batch
    )


def _moved_positions(
    positions: np.ndarray, rows: np.ndarray, order: np.ndarray, moved: np.ndarray
) -> np.ndarray:
    positions = np.broadcast_to(
        positions, (*positions.shape[:-2], *rows.shape, positions.shape[-1])
    )
    taken = np.take_along_axis(
        positions[..., rows, :],
        np.broadcast_to(order, (*positions.shape[:-2], *order.shape)),
        axis=-1,
    )
    return np.where(moved, taken, 0)


def _moved_mask(
    mask: np.ndarray, shape: tuple[int, ...], rows: np.ndarray, order: np.ndarray, where: str
) -> np.ndarray:
    """Permute queries and keys of a mask that is broadcastable to [B, 1, T, T]."""
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    full = (shape[0], mask.shape[1], shape[1], shape[1])
    try:
        mask = np.broadcast_to(mask, full)[rows]
    except ValueError as error:
        raise DataError(
            f"{where}: mask must broadcast to {list(full)}, found {list(mask.shape)}"
        ) from error
    mask = np.take_along_axis(mask, order[:, None, :, None], axis=2)
    return np.take_along_axis(mask, order[:, None, None, :], axis=3)
