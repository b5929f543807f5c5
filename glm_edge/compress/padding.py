"""Padding of calibration batches: where it is, and the same batch without it.

A row of `valid` is, from the surest sign to the last:

1. `valid` of the batch, where it is there.
2. The model's `pad_token_id`: the runs of this token at the two ends of a row are padding.
3. `loss_mask`, where the model names no pad token: a token that fills one end of some row with two
   or more positions of weight zero is the pad token of the batch, and runs of it with weight zero
   at the ends of rows are padding. Placeholders of images and audio are none, and where several
   tokens qualify, nothing is padding.

What `loss_mask` weighs is never padding by 2 or 3: neither a position whose prediction counts, nor
a pad token that also stops the model where its own prediction counts. So zeros in the middle of a
row, and a prompt of different tokens at its beginning, are not padding. Pass `valid` where this
rule does not say what is meant.

Letters of shapes: `B` rows, `T` tokens.
"""

from typing import Any

import numpy as np

from glm_edge.errors import DataError


def valid_tokens(config: Any, batch: dict[str, Any], tokens: np.ndarray, where: str) -> np.ndarray:
    """Marks the tokens that are not padding, by the rule of the module.

    Args:
      config: of the model, or None.
      batch: with `valid` and `loss_mask`, or without.
      tokens: integers [B, T].
      where: for messages.

    Returns:
      bool [B, T].

    Raises:
      DataError: `valid` has another shape or type.
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
            # The end of an answer that is taught: its prediction is made one position before.
            padding[:, 1:] &= weights[:, :-1] == 0
    return ~(_leading(padding) | _leading(padding[:, ::-1])[:, ::-1])


def _leading(flags: np.ndarray) -> np.ndarray:
    """True in the run of True at the beginning of each row."""
    return np.logical_and.accumulate(flags, axis=1)


def _repeated(tokens: np.ndarray, weights: np.ndarray, placeholders: list[int]) -> int | None:
    """The only token that fills an end of a row with two or more positions of weight zero."""
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
    """Moves the valid tokens of each row to its beginning and cuts what no row fills.

    Rows of one length thus lose their padding altogether, on whichever side it was. In a causal
    model no valid token sees what is left behind the shorter rows.

    Args:
      batch: arrays of the host: `tokens` [B, T] and what goes with them.
      valid: bool [B, T].
      filler: token to put behind the shorter rows.
      where: for messages.

    Returns:
      The batch without rows that held nothing; with `valid` only where lengths differ.

    Raises:
      DataError: everything is padding.
    """
    batch = {name: value for name, value in batch.items() if name != "valid"}
    if valid.all():
        return batch
    rows = np.asarray(valid.any(axis=1))
    if not rows.any():
        raise DataError(f"{where}: holds nothing but padding")
    shape = valid.shape
    valid = valid[rows]
    counts = valid.sum(axis=1)
    # Two, since a batch predicts at least one token.
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
        # A query of padding sees something, so that its softmax is defined.
        result["mask"] = mask | ~moved[:, None, :, None]
    for name in ("images", "audio"):
        if name in batch and _of_rows(name, batch):
            result[name] = np.asarray(batch[name])[rows]
    if not moved.all():
        result["valid"] = moved
    return result


def _of_rows(name: str, batch: dict[str, Any]) -> bool:
    """True where images or recordings are given row by row, not in reading order."""
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
    """Queries and keys of a mask that is broadcastable to [B, 1, T, T], where they are now."""
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
