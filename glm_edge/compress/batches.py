"""Calibration batches: what a GLM reads, and how well it predicts the next token.

A batch is a dict of arrays (`B` rows of `T` tokens), the same for scoring and for distillation:

- `tokens` int [B, T];
- `loss_mask` [B, T], optional: weight of the prediction that position `t` makes of token `t + 1`
  (the last column is not used). Without it every prediction counts, except of padding and of image
  and audio placeholders;
- `images` [B, height, width, channels] and `audio` [B, frames, mel_bins], optional;
- `positions` and `mask`, optional, as the model takes them.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.errors import DataError, RecipeError
from glm_edge.params.tree import Params

Batch = dict[str, Any]
# In place of the weight of a batch that teaches nothing.
NO_WEIGHT = 1e-6
INPUTS = ("images", "audio", "positions", "mask")
KINDS = ("text", "images", "audio")
KEYS = ("tokens", "loss_mask", *INPUTS)


def apply_batch(
    model: nn.Module, params: Params, batch: Batch, variables: dict[str, Any] | None = None
) -> Array:
    """Runs a model on a batch.

    Args:
      model: called as `model(tokens, **inputs)`; returns logits, alone or first in a tuple.
      params: its parameters.
      batch: see the module's docstring.
      variables: further collections for `apply`.

    Returns:
      Logits [B, T, V], float32.
    """
    inputs = {name: batch[name] for name in INPUTS if batch.get(name) is not None}
    output = model.apply({"params": params, **(variables or {})}, batch["tokens"], **inputs)
    logits = output[0] if isinstance(output, tuple) else output
    return logits.astype(jnp.float32)


def loss_weights(model: nn.Module, batch: Batch) -> Array:
    """Weight of each prediction, float32 [B, T - 1]."""
    if batch.get("loss_mask") is not None:
        return batch["loss_mask"][:, :-1].astype(jnp.float32)
    config = getattr(model, "config", None)
    targets = batch["tokens"][:, 1:]
    taught = jnp.ones(targets.shape, bool)
    for name in ("image_token_id", "audio_token_id", "pad_token_id"):
        token = getattr(config, name, None)
        if token is not None:
            taught &= targets != token
    return taught.astype(jnp.float32)


def cross_entropy(logits: Array, tokens: Array) -> Array:
    """Loss of each prediction of the next token, in nats.

    Args:
      logits: [B, T, V].
      tokens: [B, T].

    Returns:
      [B, T - 1].

    Raises:
      RecipeError: logits are those of a classifier.
    """
    check_predictions("the model", logits, tokens)
    scores = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]


def check_predictions(whose: str, logits: Array, tokens: Array) -> None:
    """Raises RecipeError unless logits are [B, T, V]; `whose` is for the message."""
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise RecipeError(
            f"{whose} gives logits {list(logits.shape)} for tokens {list(tokens.shape)}; they must "
            "predict the next token at every position, [B, T, V], and a classifier's do not"
        )


def weighted_mean(values: Array, weights: Array) -> Array:
    """Mean of values [B, T - 1] by the weights of predictions; zero where nothing is taught."""
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), NO_WEIGHT)


def row_losses(
    model: nn.Module, params: Params, batch: Batch, variables: dict[str, Any] | None = None
) -> Array:
    """Mean loss of each row over what is taught in it, [B]; zero where nothing is."""
    weights = loss_weights(model, batch)
    losses = cross_entropy(apply_batch(model, params, batch, variables), batch["tokens"])
    return jnp.sum(losses * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1.0)


def mean_loss(model: nn.Module, params: Params, batch: Batch) -> Array:
    """Mean loss over everything taught in a batch, a scalar."""
    weights = loss_weights(model, batch)
    losses = cross_entropy(apply_batch(model, params, batch), batch["tokens"])
    return jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def to_device(batch: Batch, where: str = "calibration") -> Batch:
    """Checks a batch and moves it to the device, leaving out what is None.

    Raises:
      DataError: a key is unknown, or an array is missing or of another shape.
    """
    if not isinstance(batch, dict) or batch.get("tokens") is None:
        raise DataError(f"{where}: a batch is a dict with at least 'tokens' [B, T]")
    unknown = sorted(set(batch) - set(KEYS))
    if unknown:
        raise DataError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(KEYS)}")
    tokens = np.asarray(batch["tokens"])
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
    for name in ("images", "audio"):
        rows = np.shape(batch[name])[:1] if batch.get(name) is not None else (len(tokens),)
        if rows != (len(tokens),):
            raise DataError(f"{where}: {name} has {rows} rows, tokens has {len(tokens)}")
    return {name: jnp.asarray(value) for name, value in batch.items() if value is not None}


def check(
    model: nn.Module, calibration: Sequence[Batch] | None, transform: str, without: Sequence[str]
) -> None:
    """Checks that calibration is there and holds what the model reads.

    Args:
      model: with a configuration, or any other.
      calibration: batches.
      transform: name, for messages.
      without: inputs that are known to be missing.

    Raises:
      DataError: there are no batches, one is malformed, token ids lie beyond the vocabulary, or
        no batch holds an input that the model takes.
    """
    if calibration is None or not len(calibration):
        raise DataError(f"{transform} needs calibration= batches, and there are none")
    config = getattr(model, "config", None)
    vocabulary = getattr(getattr(config, "decoder", None), "vocab_size", None)
    seen: set[str] = set()
    for index, batch in enumerate(calibration):
        where = f"{transform}: calibration batch {index}"
        to_device(batch, where)
        seen |= {name for name, value in batch.items() if value is not None}
        tokens = np.asarray(batch["tokens"])
        low, high = tokens.min(initial=0), tokens.max(initial=0)
        if vocabulary is not None and (low < 0 or high >= vocabulary):
            raise DataError(
                f"{where}: token {low if low < 0 else high} is none of the model's {vocabulary}; "
                "was the text cut with another tokenizer?"
            )
    for name, encoder in (("images", "vision"), ("audio", "speech")):
        takes = getattr(config, encoder, None) is not None
        if takes and name not in seen and name not in without:
            raise DataError(
                f"{transform}: the model reads {name} and no calibration batch holds any; add "
                f"some, or pass without=[{name!r}] to calibrate on the rest knowingly"
            )


def missing_modalities(model: nn.Module, seen: Collection[str]) -> tuple[str, ...]:
    """Notes on inputs that a model takes and that no calibration batch held.

    Args:
      model: with a configuration, or any other.
      seen: keys of the batches that were read.
    """
    config = getattr(model, "config", None)
    return tuple(
        f"calibration held no {name}: what the {encoder} encoder gives the decoder was not seen"
        for name, encoder in (("images", "vision"), ("audio", "speech"))
        if getattr(config, encoder, None) is not None and name not in seen
    )


def in_order(calibration: Sequence[Batch], rng: Array | None, skip: int = 0) -> Iterator[Batch]:
    """Yields batches for ever, each once before any comes again.

    Args:
      calibration: batches; those without a length are read in their own order.
      rng: jax key that shuffles each round, or None for the order given.
      skip: batches at the beginning to leave out; whole rounds are not read where there is a
        length.

    Raises:
      DataError: there are none.
    """
    rounds, rest = divmod(skip, len(calibration) or 1) if _sized(calibration) else (0, skip)
    return itertools.islice(_rounds(calibration, rng, rounds), rest, None)


def in_proportion(
    calibration: Sequence[Batch], mixture: Mapping[str, float], rng: Array | None, skip: int = 0
) -> Iterator[Batch]:
    """Yields batches for ever, of each kind its share at any time, to within a batch or so.

    The next kind is the one that is furthest behind its share. Each kind's batches come in an order
    of their own, as `in_order` gives them.

    Args:
      calibration: batches, with a length.
      mixture: share of each kind, in any unit; kinds that it does not name are left out.
      rng: jax key that shuffles each round, or None for the order given.
      skip: batches at the beginning to leave out.

    Raises:
      DataError: no batch is of a kind, or there is no length.
    """
    if not _sized(calibration):
        raise DataError("mixture= needs calibration with a length, such as a list of batches")
    held: dict[str, list[int]] = {kind: [] for kind in KINDS if kind in mixture}
    for index in range(len(calibration)):
        held.get(kind_of(calibration[index]), []).append(index)
    for kind, indices in held.items():
        if not indices:
            raise DataError(f"mixture= asks for {kind}, and no calibration batch is of that kind")
    taken, total = dict.fromkeys(held, 0), sum(mixture.values())

    def next_kind() -> str:
        number = 1 + sum(taken.values())
        kind = max(held, key=lambda kind: mixture[kind] / total * number - taken[kind])
        taken[kind] += 1
        return kind

    for _ in range(skip):
        next_kind()
    keys = {
        kind: None if rng is None else jax.random.fold_in(rng, KINDS.index(kind)) for kind in held
    }
    orders = {kind: in_order(held[kind], keys[kind], taken[kind]) for kind in held}
    while True:
        yield calibration[next(orders[next_kind()])]


def kind_of(batch: Batch) -> str:
    """`audio` for a batch that holds any, else `images` likewise, else `text`."""
    return next((name for name in KINDS[:0:-1] if batch.get(name) is not None), KINDS[0])


def _rounds(calibration: Sequence[Batch], rng: Array | None, first: int) -> Iterator[Batch]:
    for epoch in itertools.count(first):
        read = 0
        for batch in _shuffled(calibration, rng, epoch):
            yield batch
            read += 1
        if not read:
            raise DataError("calibration holds no batches")


def _shuffled(calibration: Any, rng: Array | None, epoch: int) -> Iterator[Batch]:
    if rng is None or not _sized(calibration):
        return iter(calibration)
    order = jax.random.permutation(jax.random.fold_in(rng, epoch), len(calibration))
    return (calibration[index] for index in np.asarray(order).tolist())


def _sized(calibration: Any) -> bool:
    return hasattr(calibration, "__len__")
