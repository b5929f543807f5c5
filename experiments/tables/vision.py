"""Digits as a vision task: data, training of small classifiers, and what is kept of it.

A finished training is a file under --out_dir, named by its settings, so that a killed script goes
on where it stopped.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging
from jax import Array
from safetensors.numpy import load_file, save_file

from experiments.phone_screens import digits as mnist
from glm_edge import params as boxes
from glm_edge.errors import DataError, require
from glm_edge.models.cnn import CNN, preset
from glm_edge.params.tree import nested

Variables = dict[str, Any]
CHECKED = 50
_SCORED = 512


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
      digits_dir: folder of MNIST files, see `experiments.phone_screens.digits.mnist_folder`; None
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
    """A preset of `glm_edge.models.cnn` for these images."""
    return CNN(dataclasses.replace(preset(name), image_size=data.size))


class Training(NamedTuple):
    """How a classifier learns.

    Attributes:
      steps: of the optimizer.
      learning_rate: peak; it rises over a tenth of the steps and falls by a cosine.
      batch: images a step.
      alpha: weight of the teacher's predictions, in 0..1; the rest is the labels'.
      temperature: softens both predictions.
    """

    steps: int
    learning_rate: float = 4e-3
    batch: int = 64
    alpha: float = 0.0
    temperature: float = 4.0


def fresh(model: CNN, seed: int) -> Variables:
    """Initial variables."""
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
    """Trains on the training images.

    Args:
      model: the classifier.
      variables: to start from; they are left as they are.
      data: digits.
      training: options.
      seed: of the order of images.
      targets: logits [E, N] of a teacher for the training images; None where alpha is zero.

    Returns:
      The trained variables.

    Raises:
      DataError: the loss is not finite, or a teacher is needed and absent.
    """
    if training.alpha and targets is None:
        raise DataError("training: alpha is above zero, and there are no targets of a teacher")
    count = len(data.train_images)
    if targets is None:
        targets = np.zeros((count, model.config.num_classes), np.float32)
    rising = max(1, training.steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, training.learning_rate, rising, training.steps + 1
    )
    rates = np.asarray(schedule(np.arange(1, training.steps + 1)), np.float32)
    rng = np.random.default_rng(seed)
    rounds = -(-training.steps * training.batch // count)
    order = np.concatenate([rng.permutation(count) for _ in range(rounds)])
    order = order[: training.steps * training.batch].reshape(training.steps, training.batch)
    arrays = jax.device_put((data.train_images, data.train_labels, targets))
    state = _optimizer().init(variables["params"])
    shared, losses = training._replace(steps=0, learning_rate=0.0), []
    for step, (rate, rows) in enumerate(zip(rates, order, strict=True), start=1):
        variables, state, loss = _step(model, shared, variables, state, rate, rows, *arrays)
        losses.append(loss)
        if step % CHECKED == 0 or step == training.steps:
            finite = np.isfinite(jax.device_get(losses))
            if not finite.all():
                first = step - len(finite) + 1 + int(np.argmin(finite))
                raise DataError(f"training: the loss is not finite at step {first}; lower its rate")
            losses = []
    return variables


def _optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.98))


# Not a scan: XLA compiles convolutions within a loop for the CPU to code that is many times slower.
@functools.partial(jax.jit, static_argnames=("model", "training"))
def _step(
    model: CNN,
    training: Training,
    variables: Variables,
    state: optax.OptState,
    rate: Array,
    rows: Array,
    images: Array,
    labels: Array,
    targets: Array,
) -> tuple[Variables, optax.OptState, Array]:
    def loss(params: Variables) -> tuple[Array, Variables]:
        (logits, _), updated = model.apply(
            {**variables, "params": params}, images[rows], train=True, mutable=["batch_stats"]
        )
        return _loss(logits, labels[rows], targets[rows], training), updated["batch_stats"]

    params = variables["params"]
    (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    updates, state = _optimizer().update(gradient, state, params)
    params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    return {"params": params, "batch_stats": stats}, state, value


def _loss(logits: Array, labels: Array, targets: Array, training: Training) -> Array:
    """Cross-entropy with the labels mixed with `T^2 KL(teacher at T || student at T)`."""
    hard = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    if not training.alpha:
        return hard
    teacher = jax.nn.log_softmax(targets / training.temperature)
    student = jax.nn.log_softmax(logits / training.temperature)
    soft = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1).mean()
    return training.alpha * training.temperature**2 * soft + (1.0 - training.alpha) * hard


def logits_of(model: CNN, variables: Variables, images: np.ndarray) -> np.ndarray:
    """Scores of all images, float32 [E, N]."""
    parts = []
    for start in range(0, len(images), _SCORED):
        part = images[start : start + _SCORED]
        padded = np.resize(part, (min(_SCORED, len(images)), *part.shape[1:]))
        parts.append(np.asarray(_logits(model, variables, padded))[: len(part)])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnames="model")
def _logits(model: CNN, variables: Variables, images: Array) -> Array:
    return model.apply(variables, images)[0]


def accuracy(model: CNN, variables: Variables, data: Digits) -> float:
    """Test images whose likeliest class is right, in percent."""
    return percent_right(logits_of(model, variables, data.test_images).argmax(-1), data)


def percent_right(classes: np.ndarray, data: Digits) -> float:
    """Test images that were given their class, in percent."""
    return 100.0 * float(np.mean(classes == data.test_labels))


def kept(
    directory: Path, name: str, settings: dict[str, Any], make: Callable[[], Variables]
) -> Variables:
    """Variables that an earlier run left, or those that `make` returns, which are then left.

    Args:
      directory: of the table; files lie in its `runs`.
      name: of the run, for a reader.
      settings: all that the result depends on, JSON-ready or printable.
      make: trains.

    Returns:
      The variables.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    path = directory / "runs" / f"{name}_{digest.hexdigest()[:12]}.safetensors"
    if path.exists():
        logging.info("%s: found %s", name, path)
        return jax.tree.map(jnp.asarray, nested(load_file(path)))
    logging.info("%s: training", name)
    variables = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    save_file({p: np.asarray(leaf) for p, leaf in boxes.path_items(variables)}, beside)
    os.replace(beside, path)
    return variables


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
    given = {"start": start, "targets": targets}
    settings = {
        "config": repr(model.config),
        "data": [data.name, len(data.train_images)],
        "training": training._asdict(),
        "seed": seed,
        **{key: None if value is None else fingerprint(value) for key, value in given.items()},
    }

    def make() -> Variables:
        begin = fresh(model, seed) if start is None else start
        return train(model, begin, data, training, seed, targets)

    return kept(directory, name, settings, make)


def fingerprint(tree: Any) -> str:
    """A hash of all numbers of a tree."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
