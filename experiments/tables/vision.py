"""Digits as a vision task: data, and training of small classifiers."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array

from experiments.nano.phone_screens import digits as mnist
from experiments.tables import learning
from experiments.tables.learning import Examples, Training, Variables
from glm_edge.compress import prune
from glm_edge.errors import require
from glm_edge.models.cnn import CNN, preset

# Largest shift as a fraction of the side; standard deviations of angle, scale and noise.
SHIFT, ANGLE, SCALE, NOISE = 0.15, 0.12, 0.08, 0.03

flags.disclaim_key_flags()


class Digits(NamedTuple):
    """Training and test data: images [E, H, W, 1] in 0..1 and labels [E]."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def size(self) -> tuple[int, int, int]:
        """`(H, W, 1)`."""
        return self.train_images.shape[1:]

    @property
    def train(self) -> Examples:
        """Training part."""
        return {"images": self.train_images, "labels": self.train_labels}

    @property
    def test(self) -> Examples:
        """Test part."""
        return {"images": self.test_images, "labels": self.test_labels}

    def for_tuning(self) -> "Digits":
        """Split the training part: four fifths to train, the last fifth in place of the test."""
        cut = len(self.train_labels) * 4 // 5
        images, labels = self.train_images, self.train_labels
        return Digits(
            f"{self.name}, tuning", images[:cut], labels[:cut], images[cut:], labels[cut:]
        )


def define_flags() -> None:
    """Define the flag of the MNIST folder."""
    flags.DEFINE_string(
        "digits_dir", None, "Folder of MNIST files; default: scikit-learn's digits, no download."
    )


def load(digits_dir: str | None) -> Digits:
    """Read digits.

    Args:
      digits_dir: folder of MNIST files, see `nano.phone_screens.digits.mnist_folder`. None uses
        scikit-learn's 8x8 digits, whose last quarter has different writers.

    Returns:
      The digits.

    Raises:
      DataError: the folder does not contain MNIST files.
      MissingExtraError: scikit-learn is not installed.
    """
    if digits_dir:
        train, test = (_arrays(mnist.mnist_folder(digits_dir, s)) for s in ("train", "eval"))
        return Digits("MNIST 28x28", *train, *test)
    data = require("sklearn.datasets", extra="data").load_digits()
    images = data.images.astype(np.float32)[..., None] / 16.0
    cut = len(images) * 3 // 4
    labels = data.target.astype(np.int32)
    return Digits("scikit-learn digits 8x8", images[:cut], labels[:cut], images[cut:], labels[cut:])


def _arrays(digits: mnist.DigitImages) -> tuple[np.ndarray, np.ndarray]:
    images = np.concatenate(digits.images).astype(np.float32)[..., None] / 255.0
    return images, np.repeat(np.arange(10), [len(stack) for stack in digits.images])


def classifier(name: str, data: Digits) -> CNN:
    """Return a preset of `glm_edge.models.cnn` for these images."""
    return CNN(dataclasses.replace(preset(name), image_size=data.size))


def jitter(key: Array, batch: dict[str, Array]) -> dict[str, Array]:
    """Shift, rotate and scale each image [B, H, W, 1] at random, and add noise."""
    images = batch["images"]
    rows, height, width, _ = images.shape
    shift, angle, scale, noise = jax.random.split(key, 4)
    shifts = SHIFT * height * jax.random.uniform(shift, (rows, 2), minval=-1.0, maxval=1.0)
    angles = ANGLE * jax.random.normal(angle, (rows,))
    scales = jnp.exp(SCALE * jax.random.normal(scale, (rows,)))
    middle = jnp.array([height - 1, width - 1]) / 2.0
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), axis=-1)

    def moved(image: Array, shift: Array, angle: Array, scale: Array) -> Array:
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        turn = scale * jnp.array([[cos, -sin], [sin, cos]])
        read = (grid - middle) @ turn.T + middle + shift
        # Positions outside the image read 0.
        return jax.scipy.ndimage.map_coordinates(image[..., 0], (read[..., 0], read[..., 1]), 1)

    drawn = jax.vmap(moved)(images, shifts, angles, scales)[..., None]
    drawn = jnp.clip(drawn + NOISE * jax.random.normal(noise, images.shape), 0.0, 1.0)
    return {**batch, "images": drawn}


def percent_right(classes: np.ndarray, data: Digits) -> float:
    """Return the percentage of correctly classified test images."""
    return 100.0 * float(np.mean(classes == data.test_labels))


class Pruned(NamedTuple):
    """A model trained on digits, and its pruned form without healing."""

    model: CNN
    dense: Variables
    small: CNN
    small_variables: Variables


def pruned(directory: Path, data: Digits, seed: int, steps: int, fraction: float) -> Pruned:
    """Train a MobileNetV2 on digits, and remove hidden channels of its blocks.

    Args:
      directory: directory of the table.
      data: the digits.
      seed: seed of the initial variables and of the order of images.
      steps: training steps.
      fraction: fraction of hidden channels to remove, in 0..1.

    Returns:
      Both models.
    """
    model = classifier("mobilenet_v2_digits", data)
    dense = learning.trained(directory, f"dense_{seed}", model, data.train, Training(steps), seed)
    small, small_variables, _ = prune.channels(fraction)(model, dense)
    return Pruned(model, dense, small, small_variables)
