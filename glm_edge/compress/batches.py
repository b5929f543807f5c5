"""Calibration batches of a GLM, and losses of its next-token predictions.

A batch is a dict of arrays (`B` rows of `T` tokens), for scoring and for distillation, or the
result of `glm_edge.Processor`:

- `tokens`: int [B, T].
- `valid`: bool [B, T], optional, False at padding. Without it, `glm_edge.compress.padding` detects
  padding. Padding is excluded from attention, positions, statistics and losses; on either side, it
  does not change results.
- `loss_mask`: [B, T], optional, weight of the prediction of token `t + 1` at position `t` (the last
  column is unused). Without it, all predictions have weight 1, except of padding and of image and
  audio placeholders.
- `images`: optional, [B, height, width, channels] or [B, K, ...], or a list of the images of all
  rows in reading order: [height, width, channels] of any size, or [frames, height, width, channels]
  of a video.
- `audio`: optional, [B, frames, mel_bins] or [B, K, ...]; or, with `audio_frames` int [N], chunks
  [N, frames, mel_bins] of all rows in reading order.
- `positions` and `mask`: optional, as the model defines them.
- `domain`: optional, a string that names the source of the batch, such as `wiki`, see
  `glm_edge.compress.domains`. Models do not read it.

Other models read any pytree of arrays through functions, see `glm_edge.Calibration`.
"""

import functools
import inspect
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.compress import calibration as calibrations
from glm_edge.compress.calibration import Called, check_without, has_length, is_empty
from glm_edge.compress.domains import KEY as DOMAIN
from glm_edge.compress.domains import without_domain
from glm_edge.compress.padding import valid_tokens, without_padding
from glm_edge.errors import DataError, RecipeError
from glm_edge.models.multimodal import MultimodalGLM, audio_features, feature_counts
from glm_edge.params.tree import Params

Batch = dict[str, Any]
Item = TypeVar("Item")
# Lower limit of the total weight of a batch, against division by zero.
NO_WEIGHT = 1e-6
INPUTS = ("images", "audio", "positions", "mask", "audio_frames")
KINDS = ("text", "images", "audio")
KEYS = ("tokens", "loss_mask", *INPUTS, "valid", DOMAIN)


def inputs_of(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return the inputs of a model besides tokens, by name of its arguments."""
    inputs = {name: batch[name] for name in INPUTS if batch.get(name) is not None}
    if batch.get("valid") is not None and reads_valid(model):
        inputs["valid"] = batch["valid"]
    return inputs


def reads_valid(model: nn.Module) -> bool:
    """Test for a model with an argument `valid`, such as `TextEncoder`."""
    kind: Any = type(model)
    return _reads_valid(kind)


@functools.cache
def _reads_valid(kind: type) -> bool:
    return "valid" in inspect.signature(kind.__call__).parameters


def apply_batch(
    model: nn.Module | Called, params: Params, batch: Batch, variables: dict[str, Any] | None = None
) -> Array:
    """Run a model on a batch.

    Args:
      model: module that maps `(tokens, **inputs)` to logits, alone or first in a tuple; or a
        `Called`, which has its own function.
      params: parameters of the model.
      batch: see the module's docstring.
      variables: further collections for `apply`.

    Returns:
      float32 logits [B, T, V], or [..., N] for a `Called`.
    """
    if isinstance(model, Called):
        return model.logits(params, batch)
    inputs = inputs_of(model, batch)
    output = model.apply({"params": params, **(variables or {})}, batch["tokens"], **inputs)
    logits = output[0] if isinstance(output, tuple) else output
    return logits.astype(jnp.float32)


def loss_weights(model: nn.Module, batch: Batch) -> Array:
    """Compute the weight of each next-token prediction.

    Args:
      model: model that reads the batch, for its special tokens.
      batch: batch from `to_device`.

    Returns:
      float32 [B, T - 1].
    """
    if batch.get("loss_mask") is not None:
        taught = batch["loss_mask"][:, :-1].astype(jnp.float32)
    else:
        config = getattr(model, "config", None)
        targets = batch["tokens"][:, 1:]
        taught = jnp.ones(targets.shape, bool)
        for name in ("image_token_id", "audio_token_id", "pad_token_id"):
            token = getattr(config, name, None)
            if token is not None:
                taught &= targets != token
    if batch.get("valid") is not None:
        taught = taught * batch["valid"][:, 1:]
    return taught.astype(jnp.float32)


def cross_entropy(logits: Array, tokens: Array) -> Array:
    """Compute the loss of each next-token prediction.

    Args:
      logits: [B, T, V].
      tokens: int [B, T].

    Returns:
      [B, T - 1] in nats.

    Raises:
      RecipeError: logits are not [B, T, V], as those of a classifier.
    """
    check_predictions("the model", logits, tokens)
    scores = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]


def check_predictions(whose: str, logits: Array, tokens: Array) -> None:
    """Check that logits are [B, T, V]; raise RecipeError, which names `whose`, otherwise."""
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise RecipeError(
            f"{whose} returns logits {list(logits.shape)} for tokens {list(tokens.shape)}; they "
            "must predict the next token at every position, [B, T, V]; for a classifier, pass "
            "calibration=glm_edge.Calibration(batches, apply=..., loss=...)"
        )


def weighted_mean(values: Array, weights: Array) -> Array:
    """Average values [B, T - 1] by the weights of predictions; zero if all weights are zero."""
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), NO_WEIGHT)


def row_losses(
    model: nn.Module | Called, params: Params, batch: Batch, variables: dict[str, Any] | None = None
) -> Array:
    """Compute the weighted mean loss per row.

    Args:
      model: module or `Called`.
      params: parameters of the model.
      batch: batch from `to_device`.
      variables: further collections for `apply`.

    Returns:
      float32 [B] in nats; zero for a row whose weights are all zero.
    """
    if isinstance(model, Called):
        return model.row_losses(params, batch)
    weights = loss_weights(model, batch)
    losses = cross_entropy(apply_batch(model, params, batch, variables), batch["tokens"])
    return jnp.sum(losses * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1.0)


def mean_loss(model: nn.Module | Called, params: Params, batch: Batch) -> Array:
    """Compute the weighted mean loss of a batch.

    Args:
      model: module or `Called`.
      params: parameters of the model.
      batch: batch from `to_device`.

    Returns:
      A scalar in nats.
    """
    if isinstance(model, Called):
        return jnp.mean(model.row_losses(params, batch))
    weights = loss_weights(model, batch)
    losses = cross_entropy(apply_batch(model, params, batch), batch["tokens"])
    return jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def count_rows(batch: Batch) -> int:
    """Count the rows of a batch from `to_device`."""
    if "tokens" in batch:
        return batch["tokens"].shape[0]
    return calibrations.rows_of(batch["batch"])


def to_device(model: Any, batch: Any, where: str = "calibration") -> Batch:
    """Check a batch, remove padding and move it to the device.

    Args:
      model: model that reads the batch, for its special tokens; or a `Called`.
      batch: see the module's docstring.
      where: name of the batch for messages.

    Returns:
      The batch without None values and without its domain. Rows begin with their first valid token
      and have the length of the longest row; `valid` is present only if lengths differ.

    Raises:
      DataError: a key is unknown, or an array is missing or has a wrong shape or type.
    """
    if isinstance(model, Called):
        return calibrations.to_device(model, batch, where)
    if not isinstance(batch, Mapping) or batch.get("tokens") is None:
        raise DataError(
            f"{where}: a batch is a dict with at least 'tokens' [B, T]; for batches of any other "
            "shape pass calibration=glm_edge.Calibration(batches, apply=..., loss=...)"
        )
    batch = {name: value for name, value in dict(batch).items() if value is not None}
    batch = without_domain(batch, where)
    unknown = sorted(set(batch) - set(KEYS), key=str)
    if unknown:
        raise DataError(
            f"{where}: unknown key {unknown[0]!r}; known: {', '.join(KEYS)}. Models with other "
            "inputs need glm_edge.Calibration(batches, apply=..., loss=...)"
        )
    tokens = _numbers(batch["tokens"], "tokens", where)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.shape[1] < 2:
        raise DataError(
            f"{where}: tokens must be integers [B, T] with T >= 2, found {tokens.dtype} "
            f"{tokens.shape}"
        )
    weights = batch.get("loss_mask")
    if weights is not None and np.shape(weights) != tokens.shape:
        raise DataError(
            f"{where}: loss_mask must be {tokens.shape} like tokens, found {np.shape(weights)}"
        )
    config = getattr(model, "config", None)
    _check_images(config, batch, len(tokens), where)
    if isinstance(batch.get("images"), list | tuple):
        batch["images"] = [
            image if isinstance(image, jax.Array) else np.asarray(image)
            for image in batch["images"]
        ]
    _check_audio(config, batch, len(tokens), where)
    if "mask" in batch and _numbers(batch["mask"], "mask", where).dtype.kind not in "bui":
        raise DataError(f"{where}: mask must be booleans, found {np.asarray(batch['mask']).dtype}")
    valid = valid_tokens(config, batch, tokens, where)
    _check_vocabulary(config, tokens[valid], where)
    compact = without_padding(batch, valid, _filler(config), where)
    if isinstance(model, MultimodalGLM):
        _check_placeholders(config, compact, where)
    return {
        name: [jnp.asarray(image) for image in value]
        if isinstance(value, list | tuple) and name == "images"
        else jnp.asarray(value)
        for name, value in compact.items()
    }


def _numbers(value: Any, name: str, where: str) -> np.ndarray:
    """Convert a value to a numeric numpy array."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError(f"{where}: {name} is not one array: its parts differ in shape") from error
    if array.dtype.kind not in "biufV":
        raise DataError(f"{where}: {name} must be numbers, found {array.dtype}")
    return array


def _shape(value: Any, name: str, where: str) -> tuple[int, ...]:
    """Return the shape of an array without a transfer from its device."""
    return tuple(value.shape) if hasattr(value, "shape") else _numbers(value, name, where).shape


def _check_images(config: Any, batch: Batch, rows: int, where: str) -> None:
    if "images" not in batch:
        return
    images, vision = batch["images"], getattr(config, "vision", None)
    if isinstance(images, list | tuple):
        shapes = [_shape(image, f"images[{i}]", where) for i, image in enumerate(images)]
        layout, axes = "[height, width, channels], or [frames, ...] of a video,", (3, 4)
        if not shapes:
            raise DataError(f"{where}: images is an empty list; remove it or pass None")
    else:
        shapes = [_shape(images, "images", where)]
        layout, axes = "[B, height, width, channels] or [B, K, ...]", (4, 5)
        if shapes[0][:1] != (rows,):
            raise DataError(
                f"{where}: images has {shapes[0][:1]} rows, tokens has {rows}; if rows differ in "
                "their count of images, pass a list in reading order"
            )
    if vision is None:
        return
    for shape in shapes:
        if len(shape) not in axes or shape[-1] != vision.channels:
            raise DataError(
                f"{where}: images must be {layout} with {vision.channels} channels, found "
                f"{list(shape)}"
            )


def _check_audio(config: Any, batch: Batch, rows: int, where: str) -> None:
    if "audio_frames" in batch and "audio" not in batch:
        raise DataError(f"{where}: audio_frames without audio")
    if "audio" not in batch:
        return
    shape, speech = _shape(batch["audio"], "audio", where), getattr(config, "speech", None)
    axes: tuple[int, ...] = (3, 4)
    layout = "[B, frames, mel_bins] or [B, K, ...]"
    if "audio_frames" in batch:
        frames = _numbers(batch["audio_frames"], "audio_frames", where)
        axes, layout = (3,), "[N, frames, mel_bins]"
        if frames.shape != shape[:1] or frames.dtype.kind not in "iu":
            raise DataError(
                f"{where}: audio_frames must be integers {list(shape[:1])}, one per chunk of "
                f"audio, found {frames.dtype} {list(frames.shape)}"
            )
    elif shape[:1] != (rows,):
        raise DataError(
            f"{where}: audio has {shape[:1]} rows, tokens has {rows}; chunks in reading order need "
            "audio_frames"
        )
    if speech is not None and (len(shape) not in axes or shape[-1] != speech.mel_bins):
        raise DataError(
            f"{where}: audio must be {layout} with {speech.mel_bins} mel_bins, found {list(shape)}"
        )


def _check_vocabulary(config: Any, tokens: np.ndarray, where: str) -> None:
    vocabulary = getattr(getattr(config, "decoder", None), "vocab_size", None)
    low, high = tokens.min(initial=0), tokens.max(initial=0)
    if vocabulary is not None and (low < 0 or high >= vocabulary):
        raise DataError(
            f"{where}: token {low if low < 0 else high} is not in the model's vocabulary of "
            f"{vocabulary}; was another tokenizer used?"
        )


def _placeholders(config: Any) -> dict[str, int | None]:
    return {
        "images": getattr(config, "image_token_id", None),
        "audio": getattr(config, "audio_token_id", None),
    }


def _filler(config: Any) -> int:
    """Return a token for padding that is not a placeholder."""
    tokens = (getattr(config, "pad_token_id", None), 0, 1, 2)
    placeholders = tuple(_placeholders(config).values())
    return next(token for token in tokens if token is not None and token not in placeholders)


def _features(config: Any, batch: Batch, name: str) -> np.ndarray:
    """Count features per image or recording in reading order, or per row if equal for all rows."""
    value = batch[name]
    if name == "images" and isinstance(value, list | tuple):
        return np.asarray(feature_counts(value, config.vision))
    if name == "images":
        shape = _shape(value, name, "")
        items = [np.broadcast_to(np.float32(0), shape[-3:])] * (shape[1] if len(shape) == 5 else 1)
        return np.asarray([sum(feature_counts(items, config.vision))])
    frames, merge = _shape(value, name, "")[-2], config.speech.merge_size
    if "audio_frames" in batch:
        return np.asarray(audio_features(np.asarray(batch["audio_frames"]), merge))
    chunks = _shape(value, name, "")[1] if np.ndim(value) == 4 else 1
    return np.asarray([chunks * audio_features(frames, merge)])


def _check_placeholders(config: Any, batch: Batch, where: str) -> None:
    """Check that the count of placeholders equals the count of features."""
    valid = batch.get("valid", True)
    for name, token in _placeholders(config).items():
        encoder = "vision" if name == "images" else "speech"
        if token is None or name not in batch or getattr(config, encoder) is None:
            continue
        counts = ((np.asarray(batch["tokens"]) == token) & valid).sum(axis=1)
        features = _features(config, batch, name)
        if _in_reading_order(batch, name):
            if counts.sum() != features.sum():
                raise DataError(
                    f"{where}: tokens have {counts.sum()} placeholders of {name} (token {token}), "
                    f"but {len(features)} {name} have {features.sum()} features"
                )
        elif not np.isin(counts, (0, features[0])).all():
            row = int(np.argmax(~np.isin(counts, (0, features[0]))))
            raise DataError(
                f"{where}: row {row} has {counts[row]} placeholders of {name} (token {token}), but "
                f"its {name} have {features[0]} features"
            )


def _in_reading_order(batch: Batch, name: str) -> bool:
    """Test for images or recordings of all rows in reading order, not per row."""
    return isinstance(batch[name], list | tuple) or (name == "audio" and "audio_frames" in batch)


def single_rows(model: nn.Module, batch: Batch) -> list[Batch] | None:
    """Split a batch into batches of one row, each with its images and recordings.

    Args:
      model: model that reads the batch.
      batch: batch from `to_device`.

    Returns:
      One batch per row, or None if every array has a row axis and needs no special split.
    """
    names = [n for n in ("images", "audio") if n in batch and _in_reading_order(batch, n)]
    if not names:
        return None
    rows = len(batch["tokens"])
    apart = [_row(batch, index, rows, names) for index in range(rows)]
    for name in names:
        token = _placeholders(model.config)[name]
        counts = (np.asarray(batch["tokens"]) == token) & np.asarray(batch.get("valid", True))
        ends = np.cumsum(_features(model.config, batch, name))
        stops = np.searchsorted(ends, np.cumsum(counts.sum(axis=1)), side="right")
        for index, (start, stop) in enumerate(zip([0, *stops[:-1]], stops, strict=True)):
            if stop > start:
                apart[index][name] = batch[name][start:stop]
                if name == "audio":
                    apart[index]["audio_frames"] = batch["audio_frames"][start:stop]
    return apart


def _row(batch: Batch, index: int, rows: int, without: Sequence[str]) -> Batch:
    axes = {"positions": -2, "mask": -4}
    row = {}
    for name, value in batch.items():
        if name in without or (name == "audio_frames" and "audio" in without):
            continue
        axis = value.ndim + axes[name] if name in axes else 0
        shared = axis < 0 or value.shape[axis] != rows
        row[name] = value if shared else jax.lax.slice_in_dim(value, index, index + 1, axis=axis)
    return row


def check(
    model: nn.Module, calibration: Any, transform: str, without: Sequence[str] = ()
) -> tuple[str, ...]:
    """Check that calibration is present and contains all inputs of the model.

    Args:
      model: Linen module, with or without a configuration.
      calibration: batches, or `glm_edge.Calibration`.
      transform: name of the transform for messages.
      without: inputs that calibration intentionally lacks.

    Returns:
      Notes for the report.

    Raises:
      DataError: there are no batches, a batch is malformed, a token id exceeds the vocabulary, no
        batch contains an input of the model, or `without` names an unknown input.
    """
    check_without(without)
    calibrations.check_list(calibration, f"{transform}: calibration")
    if isinstance(calibration, Iterator):
        raise DataError(
            f"{transform}: calibration is an iterator that can be read only once; pass a list"
        )
    if is_empty(calibration):
        raise DataError(f"{transform} needs calibration= batches, but there are none")
    reader = calibrations.called(model, calibration)
    config = getattr(model, "config", None)
    keys: set[str] = set()
    ragged = False
    for index, batch in enumerate(calibration):
        where = f"{transform}: calibration batch {index}"
        ragged |= "valid" in to_device(reader, batch, where)
        keys |= keys_of(batch)
    for name, encoder in (("images", "vision"), ("audio", "speech")):
        takes = getattr(config, encoder, None) is not None and not isinstance(reader, Called)
        if takes and name not in keys and name not in without:
            raise DataError(
                f"{transform}: the model reads {name}, but no calibration batch contains any; add "
                f"some, or pass without=[{name!r}] to calibrate without {name}"
            )
    return padding_notes(model, ragged)


def padding_notes(model: nn.Module, ragged: bool) -> tuple[str, ...]:
    """Return a note if padding may influence the model.

    Args:
      model: model that reads the batches.
      ragged: True if rows of a batch differ in length.

    Returns:
      Notes for the report.
    """
    if ragged and not isinstance(model, MultimodalGLM) and not reads_valid(model):
        return (
            f"rows of calibration differ in length, and {type(model).__name__} has no valid=: if "
            "its attention is not causal, it reads the padding after shorter rows",
        )
    return ()


def keys_of(batch: Any) -> set[str]:
    """Return the names of a batch's arrays that are not None."""
    if not isinstance(batch, Mapping):
        return set()
    return {str(name) for name in batch if batch[name] is not None}


def missing_modalities(model: nn.Module, keys: Collection[str]) -> tuple[str, ...]:
    """Return notes on inputs of a model that no calibration batch contained.

    Args:
      model: Linen module, with or without a configuration.
      keys: keys of all batches.

    Returns:
      Notes for the report.
    """
    config = getattr(model, "config", None)
    return tuple(
        f"calibration had no {name}: outputs of the {encoder} encoder were not calibrated"
        for name, encoder in (("images", "vision"), ("audio", "speech"))
        if getattr(config, encoder, None) is not None and name not in keys
    )


def in_order(calibration: Sequence[Item], rng: Array | None, skip: int = 0) -> Iterator[Item]:
    """Yield batches endlessly, in rounds that contain each batch once.

    Args:
      calibration: batches; without a known length, they keep their order.
      rng: jax key that shuffles each round, or None for the original order.
      skip: count of batches to skip at the beginning; with a known length, complete rounds are not
        read.

    Returns:
      Endless iterator over batches.

    Raises:
      DataError: there are no batches.
    """
    rounds, remainder = (
        divmod(skip, len(calibration) or 1) if has_length(calibration) else (0, skip)
    )
    return itertools.islice(_rounds(calibration, rng, rounds), remainder, None)


def in_proportion(
    calibration: Sequence[Batch], mixture: Mapping[str, float], rng: Array | None, skip: int = 0
) -> Iterator[Batch]:
    """Yield batches endlessly, with a fixed share per kind at any time, up to about one batch.

    The next kind is the one furthest below its share. The batches of each kind are ordered
    separately by `in_order`.

    Args:
      calibration: batches with a known length.
      mixture: share of each kind, in any unit. Kinds that are not named are excluded.
      rng: jax key that shuffles each round, or None for the original order.
      skip: count of batches to skip at the beginning.

    Yields:
      Batches.

    Raises:
      DataError: a kind has no batch, or the length is unknown.
    """
    if not has_length(calibration):
        raise DataError("mixture= needs calibration with a length, such as a list of batches")
    indices_by_kind: dict[str, list[int]] = {kind: [] for kind in KINDS if kind in mixture}
    for index in range(len(calibration)):
        indices_by_kind.get(kind_of(calibration[index]), []).append(index)
    for kind, indices in indices_by_kind.items():
        if not indices:
            raise DataError(f"mixture= includes {kind}, but no calibration batch is of that kind")
    taken, total = dict.fromkeys(indices_by_kind, 0), sum(mixture.values())

    def next_kind() -> str:
        number = 1 + sum(taken.values())
        kind = max(indices_by_kind, key=lambda kind: mixture[kind] / total * number - taken[kind])
        taken[kind] += 1
        return kind

    for _ in range(skip):
        next_kind()
    keys = {
        kind: None if rng is None else jax.random.fold_in(rng, KINDS.index(kind))
        for kind in indices_by_kind
    }
    orders = {
        kind: in_order(indices_by_kind[kind], keys[kind], taken[kind]) for kind in indices_by_kind
    }
    while True:
        yield calibration[next(orders[next_kind()])]


def kind_of(batch: Any) -> str:
    """Return `audio` for a batch with audio, otherwise `images` with images, otherwise `text`."""
    names = keys_of(batch)
    return next((name for name in KINDS[:0:-1] if name in names), KINDS[0])


def _rounds(calibration: Sequence[Item], rng: Array | None, first: int) -> Iterator[Item]:
    for epoch in itertools.count(first):
        read = 0
        for batch in _shuffled(calibration, rng, epoch):
            yield batch
            read += 1
        if not read:
            raise DataError("calibration contains no batches")


def _shuffled(calibration: Sequence[Item], rng: Array | None, epoch: int) -> Iterator[Item]:
    if rng is None or not has_length(calibration):
        return iter(calibration)
    order = jax.random.permutation(jax.random.fold_in(rng, epoch), len(calibration))
    return (calibration[index] for index in np.asarray(order).tolist())
