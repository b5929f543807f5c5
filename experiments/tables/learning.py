"""Training of classifiers by `glm_edge.distill`, and its cache.

A finished training is stored as a file under --out_dir, named by its settings, so that an
interrupted script resumes.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import Array
from safetensors.numpy import load_file, save_file

from glm_edge import params as boxes
from glm_edge.compress import Calibration, TrainOptions, distill
from glm_edge.errors import DataError
from glm_edge.params.tree import nested
from glm_edge.writers import write_whole

Variables = dict[str, Any]
Examples = Mapping[str, np.ndarray]
Teacher = tuple[Any, Variables]
Augment = Callable[[Array, Any], Any]
_SCORED = 512


class Training(NamedTuple):
    """Options of a classifier's training.

    Attributes:
      steps: number of optimizer steps.
      learning_rate: peak learning rate, see `glm_edge.TrainOptions`.
      batch: examples per step.
      alpha: weight of the teacher's predictions, in 0..1; labels have the weight `1 - alpha`.
      temperature: temperature of both predictions.
    """

    steps: int
    learning_rate: float = 4e-3
    batch: int = 64
    alpha: float = 0.0
    temperature: float = 2.0


class Draws(Sequence):
    """Batches of examples, one per step, that contain each example once before any is repeated.

    Args:
      examples: arrays [E, ...] by name.
      training: number and size of the batches.
      seed: seed of the order.
    """

    def __init__(self, examples: Examples, training: Training, seed: int):
        self._examples = examples
        count = len(examples["labels"])
        drawn = training.steps * training.batch
        rng = np.random.default_rng(seed)
        order = np.concatenate([rng.permutation(count) for _ in range(-(-drawn // count))])
        self._rows = order[:drawn].reshape(training.steps, training.batch)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: array[self._rows[index]] for name, array in self._examples.items()}


def train(
    model: Any,
    variables: Variables,
    examples: Examples,
    training: Training,
    seed: int,
    teacher: Teacher | None = None,
    augment: Augment | None = None,
) -> Variables:
    """Train on examples.

    Args:
      model: classifier to train.
      variables: initial variables, which are not changed.
      examples: inputs [E, ...] and `labels` [E] by name, -1 for an example without a label.
      training: options of the training.
      seed: seed of the order of examples, and of augmentation.
      teacher: `(model, variables)`; None if alpha is zero. It reads the same augmented examples.
      augment: function of a key and a batch; None changes nothing.

    Returns:
      The trained variables.

    Raises:
      DataError: a required teacher is missing.
      TrainingError: the loss is not finite.
    """
    if training.alpha and teacher is None:
        raise DataError("training: alpha is above zero, which requires a teacher")
    transform = distill(
        teacher if training.alpha else None,
        alpha=training.alpha,
        temperature=training.temperature,
        train=TrainOptions(steps=training.steps, learning_rate=training.learning_rate),
    )
    calibration = Calibration(Draws(examples, training, seed), augment=augment)
    return transform(model, variables, calibration, jax.random.key(seed))[1]


def labelled(examples: Examples) -> Examples:
    """Return the examples that have a label."""
    chosen = examples["labels"] >= 0
    return {name: array[chosen] for name, array in examples.items()}


def few_labels(examples: Examples, count: int, seed: int) -> Examples:
    """Keep the labels of some examples, equally many of each class.

    Args:
      examples: labelled examples.
      count: number of labels that stay, a multiple of the number of classes.
      seed: seed of the choice.

    Returns:
      All examples, with the label -1 for the others.

    Raises:
      DataError: a class has fewer examples, or the count is not a multiple.
    """
    labels = examples["labels"]
    classes = np.unique(labels)
    each, remainder = divmod(count, len(classes))
    sizes = [int(np.sum(labels == label)) for label in classes]
    if remainder or not each or each > min(sizes):
        raise DataError(
            f"{count} labels: must be a multiple of {len(classes)} classes, and at most "
            f"{min(sizes) * len(classes)}"
        )
    rng = np.random.default_rng(seed)
    stay = [rng.permutation(np.flatnonzero(labels == label))[:each] for label in classes]
    few = np.full_like(labels, -1)
    few[np.concatenate(stay)] = labels[np.concatenate(stay)]
    return {**examples, "labels": few}


def logits_of(model: Any, variables: Variables, examples: Examples) -> np.ndarray:
    """Compute logits of all examples, float32 [E, N]."""
    inputs = {name: array for name, array in examples.items() if name != "labels"}
    count = len(next(iter(inputs.values())))
    size, parts = min(_SCORED, count), []
    for start in range(0, count, size):
        part = {name: array[start : start + size] for name, array in inputs.items()}
        # All parts have one shape, so that one program is compiled.
        padded = {name: np.resize(array, (size, *array.shape[1:])) for name, array in part.items()}
        parts.append(np.asarray(_logits(model, variables, padded))[: count - start])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnames="model")
def _logits(model: Any, variables: Variables, batch: dict[str, Array]) -> Array:
    return model.apply(variables, batch, method="classify")


def accuracy(model: Any, variables: Variables, examples: Examples) -> float:
    """Compute the top-1 accuracy on labelled examples in percent."""
    classes = logits_of(model, variables, examples).argmax(-1)
    return 100.0 * float(np.mean(classes == examples["labels"]))


def trained(
    directory: Path,
    name: str,
    model: Any,
    examples: Examples,
    training: Training,
    seed: int,
    start: Variables | None = None,
    teacher: Teacher | None = None,
    augment: Augment | None = None,
) -> Variables:
    """Train a classifier, or load that of an earlier run; see `train`.

    Args:
      directory: directory of the table, whose folder `runs` contains the files.
      name: readable name of the run.
      model: model of the classifier.
      examples: see `train`.
      training: options of the training.
      seed: seed of the initial variables without `start`, and of the order of examples.
      start: initial variables.
      teacher: `(model, variables)`, unused if alpha is zero.
      augment: function of a key and a batch.

    Returns:
      The trained variables.
    """
    parts = {"examples": examples, "start": start, "teacher": teacher and teacher[1]}
    settings = {
        "config": repr(model.config),
        "training": training._asdict(),
        "seed": seed,
        "augment": augment and f"{augment.__module__}.{augment.__qualname__}",
        **{key: None if value is None else fingerprint(value) for key, value in parts.items()},
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    path = directory / "runs" / f"{name}_{digest.hexdigest()[:12]}.safetensors"
    if path.exists():
        logging.info("%s: found %s", name, path)
        return jax.tree.map(jnp.asarray, nested(load_file(path)))
    logging.info("%s: training", name)
    begin = fresh(model, examples, seed) if start is None else start
    variables = train(model, begin, examples, training, seed, teacher, augment)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {p: np.asarray(leaf) for p, leaf in boxes.path_items(variables)}
    write_whole(path, lambda file: save_file(arrays, file))
    return variables


def fresh(model: Any, examples: Examples, seed: int) -> Variables:
    """Return initial variables."""
    row = {name: array[:1] for name, array in examples.items() if name != "labels"}
    return _initial(model, jax.random.key(seed), row)


@functools.partial(jax.jit, static_argnames="model")
def _initial(model: Any, key: Array, batch: dict[str, Array]) -> Variables:
    return model.init(key, batch, method="classify")


def fingerprint(tree: Any) -> str:
    """Return a hash of all values of a tree."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
