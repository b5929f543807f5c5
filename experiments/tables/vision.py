"""Digits as a vision task: data, and small classifiers that are trained on them."""

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
from experiments.tables.learning import Classifier, Training, Variables
from glm_edge.compress import prune
from glm_edge.errors import require
from glm_edge.models.cnn import CNN, preset

flags.disclaim_key_flags()


class Digits(NamedTuple):
    """Images [E, H, W, 1] in 0..1 and labels [E], to train on and to test on."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def size(self) -> tuple[int, int, int]:
        """`(H, W, 1)`."""
        return self.train_images.shape[1:]


def define_flags() -> None:
    """Defines the flag that names a folder of MNIST."""
    flags.DEFINE_string(
        "digits_dir", None, "Folder of MNIST files; default: scikit-learn's digits, no download."
    )


def load(digits_dir: str | None) -> Digits:
    """Reads digits.

    Args:
      digits_dir: folder of MNIST files, see `nano.phone_screens.digits.mnist_folder`; None
        takes scikit-learn's 8x8 digits, whose last quarter is by writers of its own.

    Returns:
      The digits.

    Raises:
      DataError: the folder is not what it should be.
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
    """Returns a preset of `glm_edge.models.cnn` for these images."""
    return CNN(dataclasses.replace(preset(name), image_size=data.size))


def _apply(
    model: CNN, variables: Variables, images: Array, key: Array | None
) -> tuple[Array, Variables]:
    if key is None:
        return model.apply(variables, images)[0], {}
    (logits, _), updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
    return logits, {"batch_stats": updated["batch_stats"]}


def fresh(model: CNN, seed: int) -> Variables:
    """Returns initial variables."""
    images = jnp.zeros((1, *model.config.image_size))
    return jax.jit(model.init)(jax.random.key(seed), images)


def train(
    model: CNN,
    variables: Variables,
    data: Digits,
    training: Training,
    seed: int,
    targets: np.ndarray | None = None,
) -> Variables:
    """Trains on the training images; see `learning.train`."""
    examples = data.train_images, data.train_labels
    return learning.train(Classifier(model, _apply), variables, *examples, training, seed, targets)


def logits_of(model: CNN, variables: Variables, images: np.ndarray) -> np.ndarray:
    """Scores of all images, float32 [E, N]."""
    return learning.logits_of(Classifier(model, _apply), variables, images)


def accuracy(model: CNN, variables: Variables, data: Digits) -> float:
    """Returns the top-1 accuracy on test images in percent."""
    return percent_right(logits_of(model, variables, data.test_images).argmax(-1), data)


def percent_right(classes: np.ndarray, data: Digits) -> float:
    """Returns the percentage of correctly classified test images."""
    return 100.0 * float(np.mean(classes == data.test_labels))


def trained(
    directory: Path,
    name: str,
    model: CNN,
    data: Digits,
    training: Training,
    seed: int,
    start: Variables | None = None,
    targets: np.ndarray | None = None,
) -> Variables:
    """Trains a classifier unless an earlier run did; see `train`.

    Args:
      directory: of the table.
      name: of the run.
      model: the classifier.
      data: digits.
      training: options.
      seed: of the initial variables, where there is no `start`, and of the order of images.
      start: variables to go on from.
      targets: of a teacher.

    Returns:
      The trained variables.
    """
    examples = [data.name, len(data.train_images)]

    def make() -> Variables:
        begin = fresh(model, seed) if start is None else start
        return train(model, begin, data, training, seed, targets)

    settings = learning.settings(model, examples, training, seed, start, targets)
    return learning.cached_training(directory, name, settings, make)


class Pruned(NamedTuple):
    """A trained model of digits, what it says of the training images, and what pruning leaves."""

    model: CNN
    dense: Variables
    targets: np.ndarray
    small: CNN
    small_variables: Variables


def pruned(directory: Path, data: Digits, seed: int, steps: int, fraction: float) -> Pruned:
    """Trains a MobileNetV2 of digits, and removes hidden channels of its blocks.

    Args:
      directory: of the table.
      data: digits.
      seed: of initial variables and of the order of images.
      steps: of training.
      fraction: of the hidden channels removed, in 0..1.

    Returns:
      Both models; nothing is healed.
    """
    model = classifier("mobilenet_v2_digits", data)
    dense = trained(directory, f"dense_{seed}", model, data, Training(steps), seed)
    targets = logits_of(model, dense, data.train_images)
    small, small_variables, _ = prune.channels(fraction)(model, dense)
    return Pruned(model, dense, targets, small, small_variables)
