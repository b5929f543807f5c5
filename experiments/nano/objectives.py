"""Objectives of the stages of nano's training."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments.nano.batches import Layout
from glm_edge.configs import SpeechConfig
from glm_edge.kernels.log_mel import log_mel
from glm_edge.kernels.norm import rms_norm
from glm_edge.models.multimodal import MultimodalGLM, place_features

COORDINATE_BINS = 100
COORDINATE_SIGMA = 2.0
ATTENTION_WEIGHT = 0.3
DENSE_WEIGHT = 0.3
SPEECH_WEIGHT = 0.1
POSITION_WEIGHT = 0.5
MATCH_LAYER, READ_LAYER, COPY_LAYER = "1", "2", "2"
READ_SLOTS = (1, 2)


def init_heads(key: Array, width: int, num_classes: int) -> dict[str, Array]:
    """Return initial read-out heads, which exist only during training.

    They predict class, offset and centre of a cell's element, the digit of a recording, and the
    target's coordinates from the hidden states of the question and of the answer.
    """

    def matrix(key: Array, rows: int) -> Array:
        return jax.random.normal(key, (rows, width)) * width**-0.5

    keys = jax.random.split(key, 6)
    return {
        "class": matrix(keys[0], num_classes),
        "offset": matrix(keys[1], 2),
        "centre": matrix(keys[2], 1),
        "digit": matrix(keys[3], 10),
        "matched": matrix(keys[4], 2 * COORDINATE_BINS),
        "read": matrix(keys[5], 2 * COORDINATE_BINS),
    }


def dense_loss(heads: dict[str, Array], features: Array, batch: dict[str, Array]) -> Array:
    """Sum losses of class, offset and centre per cell, with more weight on cells with elements."""
    present = (batch["cell_class"] > 0).astype(jnp.float32)
    weight = 0.2 + 0.8 * present
    by_class = optax.softmax_cross_entropy_with_integer_labels(
        features @ heads["class"].T, batch["cell_class"]
    )
    centre = optax.sigmoid_binary_cross_entropy(
        (features @ heads["centre"].T)[..., 0], batch["cell_centre"].astype(jnp.float32)
    )
    offset = jnp.abs(features @ heads["offset"].T - batch["cell_offset"]).sum(-1)
    return (
        jnp.sum(by_class * weight) / jnp.sum(weight)
        + jnp.sum(centre * weight) / jnp.sum(weight)
        + jnp.sum(offset * present) / jnp.maximum(jnp.sum(present), 1.0)
    )


def vision_features(module: MultimodalGLM, images: Array) -> tuple[Array, Array]:
    """Return image features for the decoder, and the same without positions."""
    features = module.encode_images(images)
    vision = module.vision
    cells = (vision.row[:, None] + vision.column[None]).reshape(-1, features.shape[-1])
    return features, features - cells


def speech_features(module: MultimodalGLM, samples: Array) -> Array:
    """Encode recordings [..., L] to features [..., num_tokens, D]."""
    features = module.encode_audio(speech_mel(module.config.speech, samples))
    return features.reshape(*samples.shape[:-1], *features.shape[1:])


def speech_mel(speech: SpeechConfig, samples: Array) -> Array:
    """Compute log-mel frames [N, frames, bins] of recordings [..., L]."""
    flat = samples.reshape(-1, samples.shape[-1])
    return log_mel(flat, speech.mel_bins, speech.fft_size, speech.hop_length, speech.sample_rate)


def dropout_gates(speech: SpeechConfig, rows: int, rng: Array, rate: float) -> dict[str, Any]:
    """Draw gates of the encoder's neurons and heads that drop some of them (dropout).

    Args:
      speech: configuration of the encoder.
      rows: number of recordings; each has gates of its own.
      rng: random key.
      rate: probability of a zero; the others are scaled up.

    Returns:
      Value of the collection `gates` of a model with the encoder.
    """
    layers = {}
    for layer in range(speech.num_layers):
        keys = jax.random.split(jax.random.fold_in(rng, layer))
        layers[str(layer)] = {
            "neurons": drop(jnp.ones((rows, 1, speech.neurons(layer))), keys[0], rate),
            "attention": {"heads": drop(jnp.ones((rows, speech.heads(layer), 1)), keys[1], rate)},
        }
    return {"speech": {"layers": layers}}


def hide_bands(mel: Array, rng: Array) -> Array:
    """Replace a random band of frames and one of bins by the row's mean (SpecAugment)."""
    batch, frames, bins = mel.shape
    keys = jax.random.split(rng, 4)

    def band(start_key: Array, width_key: Array, extent: int, widest: int) -> Array:
        start = jax.random.randint(start_key, (batch, 1), 0, extent)
        width = jax.random.randint(width_key, (batch, 1), 0, widest)
        index = jnp.arange(extent)
        return (index >= start) & (index < start + width)

    hidden = band(keys[0], keys[1], frames, frames // 8)[:, :, None]
    hidden = hidden | band(keys[2], keys[3], bins, bins // 5)[:, None, :]
    return jnp.where(hidden, mel.mean(axis=(1, 2), keepdims=True), mel)


def text_loss(module: MultimodalGLM, tokens: Array, rng: Array | None, dropout: float) -> Array:
    """Return the mean cross-entropy of the next token in nats, with input dropout."""
    x = module.embed(tokens[:, :-1])
    if rng is not None:
        x = drop(x, rng, dropout)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    final, _, _ = module.decoder(x, positions)
    logits = module.predict(final)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def drop(x: Array, rng: Array, rate: float) -> Array:
    """Zero entries with probability `rate` and scale up the rest."""
    keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


def digit_loss(heads: dict[str, Array], features: Array, digits: Array) -> Array:
    """Return the cross-entropy of the spoken digit, from a recording's mean features."""
    logits = features.mean(axis=-2) @ heads["digit"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, digits).mean()


def soft_labels(labels: Array, vocab_size: int, first_x: int) -> Array:
    """Return target distributions: one-hot, or a Gaussian over its axis' tokens for a coordinate.

    Args:
      labels: token ids [...].
      vocab_size: vocabulary size `V`.
      first_x: id of the first x token; the y tokens follow the x tokens.

    Returns:
      Distributions [..., V] with sum one.
    """
    ids = jnp.arange(vocab_size)
    label = labels[..., None]
    axis = (ids - first_x) // COORDINATE_BINS
    same_axis = (axis == (label - first_x) // COORDINATE_BINS) & (ids >= first_x)
    coordinate = (label >= first_x) & (label < first_x + 2 * COORDINATE_BINS)
    bump = jnp.exp(-0.5 * ((ids - label) / COORDINATE_SIGMA) ** 2) * same_axis
    target = jnp.where(coordinate, bump, ids == label)
    return target / target.sum(axis=-1, keepdims=True)


def screen_logits(
    module: MultimodalGLM, batch: dict[str, Array], layout: Layout
) -> tuple[Array, dict[str, Array]]:
    """Compute logits at labelled slots [B, Q, A, V], and the inputs of auxiliary losses."""
    x = module.embed(batch["tokens"])
    features, unplaced = vision_features(module, batch["images"])
    x = place_features(x, batch["tokens"] == module.config.image_token_id, features)
    encoded = {"cells": unplaced}
    if batch["samples"].shape[1]:
        speech = speech_features(module, batch["samples"])
        encoded["speech"] = speech
        placeholder = batch["tokens"] == module.config.audio_token_id
        x = place_features(x, placeholder, speech.reshape(x.shape[0], -1, x.shape[-1]))
    positions = jnp.broadcast_to(layout.positions, batch["tokens"].shape)
    final, hidden, _ = module.decoder(x, positions, jnp.asarray(layout.mask))
    rows = jnp.arange(x.shape[0])[:, None]
    encoded["matched"] = hidden[int(MATCH_LAYER) + 1][rows, batch["acting"]]
    encoded["read"] = hidden[int(READ_LAYER) + 1][rows, batch["acting"] + READ_SLOTS[0]]
    return module.predict(final[rows[..., None], batch["slots"]]), encoded


def screen_loss(
    module: MultimodalGLM,
    variables: dict[str, Any],
    heads: dict[str, Array],
    batch: dict[str, Array],
    layout: Layout,
    first_x: int,
    rng: Array | None = None,
    dropout: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """Sum the losses of answers, attention to the target and cells.

    Args:
      module: model.
      variables: its variables.
      heads: read-out heads of `init_heads`.
      batch: batch from `ScreenBatches.draw`.
      layout: layout of its rows.
      first_x: id of the first x token.
      rng: random key of the dropout.
      dropout: probability of dropping a neuron or a head of the speech encoder.

    Returns:
      `(loss, parts)`; `parts` contains each term.
    """
    if rng is not None and batch["samples"].shape[1]:
        rows = batch["samples"].shape[0] * batch["samples"].shape[1]
        gates = dropout_gates(module.config.speech_encoder, rows, rng, dropout)
        variables = {**variables, "gates": gates}
    (logits, encoded), sown = module.apply(
        variables, batch, layout, method=screen_logits, mutable=["attention"]
    )
    target = soft_labels(batch["labels"], logits.shape[-1], first_x)
    answer = -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)
    answer = jnp.sum(answer * batch["weights"]) / jnp.sum(batch["weights"])
    parts = {
        "answer": answer,
        "attention": attention_loss(sown["attention"], batch, module.config),
        "copy": copy_loss(sown["attention"], batch),
        "dense": dense_loss(heads, encoded["cells"], batch),
        "matched": position_loss(heads["matched"], encoded["matched"], target, batch, first_x),
        "read": position_loss(heads["read"], encoded["read"], target, batch, first_x),
    }
    attention = parts["attention"] + parts["copy"]
    loss = answer + ATTENTION_WEIGHT * attention + DENSE_WEIGHT * parts["dense"]
    loss = loss + POSITION_WEIGHT * (parts["matched"] + parts["read"])
    if "speech" in encoded:
        parts["digit"] = digit_loss(heads, encoded["speech"], batch["digits"])
        loss = loss + SPEECH_WEIGHT * parts["digit"]
    return loss, parts


def position_loss(
    head: Array, hidden: Array, target: Array, batch: dict[str, Array], first_x: int
) -> Array:
    """Train a hidden state to encode the coordinates of the tap as a large component.

    Args:
      head: linear read-out [2 * COORDINATE_BINS, D].
      hidden: hidden states [B, Q, D] of one layer.
      target: soft labels [B, Q, A, V] of the answers.
      batch: batch from `ScreenBatches.draw`.
      first_x: id of the first x token.

    Returns:
      Mean cross-entropy over both axes of all taps in nats.
    """
    taps = (batch["target"] >= 0).astype(jnp.float32)
    normed = rms_norm(hidden, jnp.ones(hidden.shape[-1]), 1e-5)
    scores = (normed @ head.T).reshape(*hidden.shape[:-1], 2, COORDINATE_BINS)
    bins = target[..., first_x : first_x + 2 * COORDINATE_BINS]
    bins = bins.reshape(*bins.shape[:-1], 2, COORDINATE_BINS)
    x, y = (of_action(bins, batch, slot) for slot in READ_SLOTS)
    labels = jnp.stack([x[..., 0, :], y[..., 1, :]], axis=-2)
    losses = -jnp.sum(labels * jax.nn.log_softmax(scores), axis=-1).mean(axis=-1)
    return jnp.sum(losses * taps) / jnp.maximum(jnp.sum(taps), 1.0)


def attention_loss(sown: dict[str, Any], batch: dict[str, Array], config: Any) -> Array:
    """Train one head to attend from the question to its target, and one from the answer back.

    In one layer, the first query head of the slot before the action attends to the target's cell.
    In the next, the second query head of the slots that predict x and y attends to that slot.
    """
    layers = sown["decoder"]["layers"]
    match = layers[MATCH_LAYER]["attention"]["weights"][0][:, 0, 0]
    read = layers[READ_LAYER]["attention"]["weights"][0][:, 0, 1]
    taps = (batch["target"] >= 0).astype(jnp.float32)
    rows = jnp.arange(match.shape[0])[:, None]
    first_cell = jnp.argmax(batch["tokens"] == config.image_token_id, axis=1)[:, None]
    cell = first_cell + jnp.maximum(batch["target"], 0)
    cell_loss = -jnp.log(match[rows, batch["acting"], cell] + 1e-9)
    for step in READ_SLOTS:
        slot = batch["acting"] + step
        cell_loss = cell_loss - jnp.log(read[rows, slot, batch["acting"]] + 1e-9)
    return jnp.sum(cell_loss * taps) / jnp.maximum(jnp.sum(taps), 1.0)


def copy_loss(sown: dict[str, Any], batch: dict[str, Array]) -> Array:
    """Train one head to attend from the slots of a thought to the words that come next in the task.

    It is the first query head of the second key-value head, in one layer.
    """
    weights = sown["decoder"]["layers"][COPY_LAYER]["attention"]["weights"][0][:, 1, 0]
    known = (batch["source"] >= 0).astype(jnp.float32)
    rows = jnp.arange(weights.shape[0])[:, None, None]
    attended = weights[rows, batch["slots"], jnp.maximum(batch["source"], 0)]
    return -jnp.sum(jnp.log(attended + 1e-9) * known) / jnp.maximum(jnp.sum(known), 1.0)


def of_action(values: Array, batch: dict[str, Array], index: int) -> Array:
    """Return the values [B, Q, ...] of [B, Q, A, ...] at one label of the action."""
    at = (batch["action"] + index).reshape(*batch["action"].shape, *[1] * (values.ndim - 2))
    return jnp.take_along_axis(values, at, axis=2)[:, :, 0]


def taps_in_box(
    logits: Array, batch: dict[str, Array], first_x: int, image_size: tuple[int, int]
) -> tuple[Array, Array]:
    """Find taps inside their box after a right thought.

    Each token is predicted from the true tokens before it.

    Args:
      logits: logits [B, Q, A, V] at the labelled slots.
      batch: batch from `ScreenBatches.draw`.
      first_x: id of the first x token.
      image_size: (height, width) in pixels.

    Returns:
      `(inside, asked)`: bool [B, Q] each, for taps inside their box and for questions with a tap.
    """
    height, width = image_size
    right = logits.argmax(-1) == batch["labels"]
    # The labels of the present thought are at the slots just before the action.
    index = jnp.arange(right.shape[-1])
    before = index < batch["action"][..., None]
    apart = batch["acting"] - batch["action"]
    thought = before & (batch["slots"] - index == apart[..., None])
    right_thought = jnp.all(right | ~thought, axis=-1)
    action = of_action(right, batch, 0) & right_thought
    first_y = first_x + COORDINATE_BINS
    x = of_action(logits, batch, 1)[..., first_x:first_y].argmax(-1)
    y = of_action(logits, batch, 2)[..., first_y : first_y + COORDINATE_BINS].argmax(-1)
    x = (10 * x + 5) / 1000 * width
    y = (10 * y + 5) / 1000 * height
    box = batch["box"]
    inside = (x >= box[..., 0]) & (x <= box[..., 2]) & (y >= box[..., 1]) & (y <= box[..., 3])
    asked = batch["target"] >= 0
    return inside & action & asked, asked
