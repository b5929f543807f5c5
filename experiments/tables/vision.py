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
from experiments.tables.learning import Classifier, Training, Variables
from glm_edge.compress import prune
from glm_edge.errors import require
from glm_edge.models.cnn import CNN, preset

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


def _apply(
    model: CNN, variables: Variables, images: Array, key: Array | None
) -> tuple[Array, Variables]:
    if key is None:
        return model.apply(variables, images)[0], {}
    (logits, _), updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
    return logits, {"batch_stats": updated["batch_stats"]}


def fresh(model: CNN, seed: int) -> Variables:
    """Return initial variables."""
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
    """Train on the training images; see `learning.train`."""
    examples = data.train_images, data.train_labels
    return learning.train(Classifier(model, _apply), variables, *examples, training, seed, targets)


def logits_of(model: CNN, variables: Variables, images: np.ndarray) -> np.ndarray:
    """Compute logits of all images, float32 [E, N]."""
    return learning.logits_of(Classifier(model, _apply), variables, images)


def accuracy(model: CNN, variables: Variables, data: Digits) -> float:
    """Return the top-1 accuracy on test images in percent."""
    return percent_right(logits_of(model, variables, data.test_images).argmax(-1), data)


def percent_right(classes: np.ndarray, data: Digits) -> float:
    """Return the percentage of correctly classified test images."""
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
    """Train a classifier, or load that of an earlier run; see `train`.

    Args:
      directory: directory of the table.
      name: name of the run.
      model: model of the classifier.
      data: the digits.
      training: options of the training.
      seed: seed of the initial variables without `start`, and of the order of images.
      start: initial variables.
      targets: logits of a teacher.

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
    """A model trained on digits, its logits on the training images, and its pruned form."""

    model: CNN
    dense: Variables
    targets: np.ndarray
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
      Both models, without healing.
    """
    model = classifier("mobilenet_v2_digits", data)
    dense = trained(directory, f"dense_{seed}", model, data, Training(steps), seed)
    targets = logits_of(model, dense, data.train_images)
    small, small_variables, _ = prune.channels(fraction)(model, dense)
    return Pruned(model, dense, targets, small, small_variables)
