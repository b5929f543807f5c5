"""Training of a speech encoder to recognise spoken digits.

Letters: `B` recordings, `L` samples, `T` frames, `M` mel bins.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.nano import objectives, stages
from experiments.nano.batches import by_speaker, fit, speech_batch
from experiments.nano.phone_screens.speech import Utterance
from glm_edge import configs
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.models.speech import SpeechEncoder

ENCODERS = ("nano", "cnn")
SHARES = {"people": 0.6, "espeak": 0.2, "flite": 0.2}


@dataclasses.dataclass(frozen=True)
class DigitTraining:
    """Options of the training.

    Args:
      steps: number of steps.
      batch: recordings per step.
      peak_rate: peak of the learning rate.
      weight_decay: decay of the matrices.
      dropout: probability of dropping a neuron or a head.
      spec_augment: whether to hide a band of frames and one of bins.
    """

    steps: int = 4000
    batch: int = 48
    peak_rate: float = 1.5e-3
    weight_decay: float = 0.05
    dropout: float = 0.1
    spec_augment: bool = False


class DigitCNN(nn.Module):
    """A small convolutional network, the comparison for nano's encoder."""

    @nn.compact
    def __call__(self, mel: Array) -> Array:
        """Compute features [B, T / 8, 48] of log-mel frames [B, T, M]."""
        x = mel
        for index in range(4):
            x = nn.Conv(48, (5,), strides=(2 if index else 1,))(x)
            x = nn.relu(nn.GroupNorm(num_groups=8)(x))
        return x


class Encoder:
    """An encoder with a linear read-out of its mean features.

    Args:
      kind: one of `ENCODERS`.
      config: configuration of the model, of which the speech encoder is trained.
    """

    def __init__(self, kind: str, config: configs.GLMConfig):
        self.kind, self.config, self.speech = kind, config, config.speech_encoder
        self.model = MultimodalGLM(config, compute="bfloat16")

    @property
    def num_samples(self) -> int:
        """Number of samples per recording."""
        return self.speech.num_frames * self.speech.hop_length

    def initial(self, seed: int) -> dict[str, Any]:
        """Draw the state to start from."""
        keys = jax.random.split(jax.random.key(seed))
        frames = jnp.zeros((1, self.speech.num_frames, self.speech.mel_bins))
        width = self.config.decoder.hidden_size
        if self.kind == "cnn":
            module, name, width = DigitCNN(), "cnn", 48
        else:
            module, name = SpeechEncoder(self.speech, width), "speech"
        params = jax.jit(module.init)(keys[0], frames)["params"]
        digit = jax.random.normal(keys[1], (10, width)) * width**-0.5
        return {"params": {name: params}, "heads": {"digit": digit}}

    def features(
        self, state: dict[str, Any], samples: Array, rng: Array | None, options: DigitTraining
    ) -> Array:
        """Encode recordings [B, L]; `rng` regularizes, None does not."""
        mel = objectives.speech_mel(self.speech, samples)
        gates = {}
        if rng is not None:
            keys = jax.random.split(rng)
            if options.spec_augment:
                mel = objectives.hide_bands(mel, keys[0])
            if options.dropout:
                gates = objectives.dropout_gates(
                    self.speech, mel.shape[0], keys[1], options.dropout
                )
        if self.kind == "cnn":
            return DigitCNN().apply({"params": state["params"]["cnn"]}, mel)
        variables = {"params": state["params"], "gates": gates}
        return self.model.apply(variables, mel, method=MultimodalGLM.encode_audio)


def train(
    name: str,
    directory: Path,
    encoder: Encoder,
    state: dict[str, Any],
    groups: dict[str, Sequence[Utterance]],
    options: DigitTraining,
    seed: int,
) -> dict[str, Any]:
    """Train an encoder, or resume its training.

    Args:
      name: name of the stage, see `stages.run_stage`.
      directory: folder of the stage's files.
      encoder: encoder to train.
      state: state to start from.
      groups: recordings to learn from by kind, a key of `SHARES`; empty kinds are left out.
      options: options of the training.
      seed: seed of batches and dropout.

    Returns:
      The trained state.
    """
    kinds = [kind for kind, utterances in groups.items() if utterances]
    speakers = [by_speaker(groups[kind]) for kind in kinds]
    shares = np.array([SHARES[kind] for kind in kinds])

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        portions = shares / shares.sum()
        return speech_batch(rng, speakers, portions, options.batch, encoder.num_samples)

    def loss(state, batch, rng):
        samples, spoken = batch
        features = encoder.features(state, samples, rng, options)
        logits = features.mean(axis=-2) @ state["heads"]["digit"].T
        value = optax.softmax_cross_entropy_with_integer_labels(logits, spoken).mean()
        return value, {"loss": value, "accuracy": jnp.mean(logits.argmax(-1) == spoken)}

    return stages.run_stage(
        name,
        directory,
        stages.Schedule(options.steps, options.peak_rate, seed=seed),
        state,
        stages.make_optimizer(options.weight_decay, lambda part: 1.0),
        {"speech": (draw, loss)},
    )


def recognised(
    encoder: Encoder, state: dict[str, Any], utterances: Sequence[Utterance], batch: int = 100
) -> np.ndarray:
    """Recognise recordings without augmentation.

    Args:
      encoder: trained encoder.
      state: its state.
      utterances: recordings.
      batch: recordings per call.

    Returns:
      True for each recording whose digit is right, bool [N].
    """
    right = []
    for start in range(0, len(utterances), batch):
        part = utterances[start : start + batch]
        samples = np.zeros((batch, encoder.num_samples), np.float32)
        for row, utterance in enumerate(part):
            samples[row] = fit(utterance.samples, encoder.num_samples)
        digits = np.asarray(_digits(encoder, state, samples))[: len(part)]
        right.append(digits == [u.digit for u in part])
    return np.concatenate(right)


@functools.partial(jax.jit, static_argnums=0)
def _digits(encoder: Encoder, state: dict[str, Any], samples: Array) -> Array:
    features = encoder.features(state, samples, None, DigitTraining())
    return (features.mean(axis=-2) @ state["heads"]["digit"].T).argmax(-1)
