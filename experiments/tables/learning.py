"""Training of classifiers, and its cache.

A classifier is a model and a function that applies it. A finished training is stored as a file
under --out_dir, named by its settings, so that an interrupted script resumes.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax import Array
from safetensors.numpy import load_file, save_file

from experiments.common.training import gradient_step
from glm_edge import params as boxes
from glm_edge.errors import DataError
from glm_edge.params.tree import nested
from glm_edge.writers import write_whole

Variables = dict[str, Any]
Apply = Callable[[Any, Variables, Array, Array | None], tuple[Array, Variables]]
CHECKED = 50
_SCORED = 512


class Classifier(NamedTuple):
    """A model and the function that applies it; both are hashable.

    Attributes:
      model: Linen module with a field `config`.
      apply: function of the model, variables, inputs [B, ...], and a key in training, else None. It
        returns logits [B, N], and the collections except `params` that training changed.
    """

    model: Any
    apply: Apply


class Training(NamedTuple):
    """Options of a classifier's training.

    Attributes:
      steps: number of optimizer steps.
      learning_rate: peak learning rate, with warm-up over a tenth of the steps and cosine decay.
      batch: examples per step.
      alpha: weight of the teacher's predictions, in 0..1; labels have the weight `1 - alpha`.
      temperature: temperature of both predictions.
    """

    steps: int
    learning_rate: float = 4e-3
    batch: int = 64
    alpha: float = 0.0
    temperature: float = 4.0


def train(
    classifier: Classifier,
    variables: Variables,
    inputs: np.ndarray,
    labels: np.ndarray,
    training: Training,
    seed: int,
    targets: np.ndarray | None = None,
) -> Variables:
    """Train on examples.

    Args:
      classifier: classifier to train.
      variables: initial variables, which are not changed.
      inputs: examples [E, ...].
      labels: classes [E] of the examples.
      training: options of the training.
      seed: seed of the order of examples, and of the random values in `apply`.
      targets: logits [E, N] of a teacher; None if alpha is zero.

    Returns:
      The trained variables.

    Raises:
      DataError: the loss is not finite, or a required teacher is missing.
    """
    if training.alpha and targets is None:
        raise DataError("training: alpha is above zero, which requires targets of a teacher")
    count = len(inputs)
    if targets is None:
        targets = np.zeros((count, 1), np.float32)
    rising = max(1, training.steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, training.learning_rate, rising, training.steps + 1
    )
    rates = np.asarray(schedule(np.arange(1, training.steps + 1)), np.float32)
    rng = np.random.default_rng(seed)
    rounds = -(-training.steps * training.batch // count)
    order = np.concatenate([rng.permutation(count) for _ in range(rounds)])
    order = order[: training.steps * training.batch].reshape(training.steps, training.batch)
    arrays = jax.device_put((inputs, labels, targets))
    state = _optimizer(0.0).init(variables["params"])
    shared, losses = training._replace(steps=0, learning_rate=0.0), []
    for step, (rate, rows) in enumerate(zip(rates, order, strict=True), start=1):
        drawn = np.uint32([seed, step])
        variables, state, loss = _step(
            classifier, shared, variables, state, rate, drawn, rows, *arrays
        )
        losses.append(loss)
        if step % CHECKED == 0 or step == training.steps:
            finite = np.isfinite(jax.device_get(losses))
            if not finite.all():
                first = step - len(finite) + 1 + int(np.argmin(finite))
                raise DataError(
                    f"training: the loss is not finite at step {first}; use a lower learning rate"
                )
            losses = []
    return variables


def _optimizer(rate: Array | float) -> optax.GradientTransformation:
    clipping, adam = optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.98)
    return optax.chain(clipping, adam, optax.scale_by_learning_rate(rate))


# Not a scan: on CPU, XLA compiles convolutions within a loop to code that is many times slower.
@functools.partial(jax.jit, static_argnames=("classifier", "training"))
def _step(
    classifier: Classifier,
    training: Training,
    variables: Variables,
    state: optax.OptState,
    rate: Array,
    drawn: Array,
    rows: Array,
    inputs: Array,
    labels: Array,
    targets: Array,
) -> tuple[Variables, optax.OptState, Array]:
    key = jax.random.wrap_key_data(drawn)

    def loss(params: Variables) -> tuple[Array, Variables]:
        logits, changed = classifier.apply(
            classifier.model, {**variables, "params": params}, inputs[rows], key
        )
        return _loss(logits, labels[rows], targets[rows], training), changed

    params, state, value, changed = gradient_step(
        loss, _optimizer(rate), variables["params"], state
    )
    return {**variables, **changed, "params": params}, state, value


def _loss(logits: Array, labels: Array, targets: Array, training: Training) -> Array:
    """Compute a mix of cross-entropy with labels and `T^2 KL(teacher at T || student at T)`."""
    hard = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    if not training.alpha:
        return hard
    teacher = jax.nn.log_softmax(targets / training.temperature)
    student = jax.nn.log_softmax(logits / training.temperature)
    soft = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1).mean()
    return training.alpha * training.temperature**2 * soft + (1.0 - training.alpha) * hard


def logits_of(classifier: Classifier, variables: Variables, inputs: np.ndarray) -> np.ndarray:
    """Compute logits of all inputs, float32 [E, N]."""
    parts = []
    for start in range(0, len(inputs), _SCORED):
        part = inputs[start : start + _SCORED]
        padded = np.resize(part, (min(_SCORED, len(inputs)), *part.shape[1:]))
        parts.append(np.asarray(_logits(classifier, variables, padded))[: len(part)])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnames="classifier")
def _logits(classifier: Classifier, variables: Variables, inputs: Array) -> Array:
    return classifier.apply(classifier.model, variables, inputs, None)[0]


def cached_training(
    directory: Path, name: str, settings: dict[str, Any], make: Callable[[], Variables]
) -> Variables:
    """Load the variables of an earlier run, or store those that `make` returns.

    Args:
      directory: directory of the table, whose folder `runs` contains the files.
      name: readable name of the run.
      settings: everything that the result depends on, as JSON or printable values.
      make: function that trains.

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
    arrays = {p: np.asarray(leaf) for p, leaf in boxes.path_items(variables)}
    write_whole(path, lambda file: save_file(arrays, file))
    return variables


def settings(
    model: Any,
    data: Any,
    training: Training,
    seed: int,
    start: Variables | None = None,
    targets: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return everything that the result of a training depends on, for `cached_training`.

    Args:
      model: model of the classifier.
      data: JSON value that identifies the examples.
      training: options of the training.
      seed: seed of the initial variables and of the order.
      start: initial variables, or None.
      targets: logits of a teacher, or None.

    Returns:
      The settings, with fingerprints of arrays.
    """
    options = {"start": start, "targets": targets}
    return {
        "config": repr(model.config),
        "data": data,
        "training": training._asdict(),
        "seed": seed,
        **{key: None if value is None else fingerprint(value) for key, value in options.items()},
    }


def fingerprint(tree: Any) -> str:
    """Return a hash of all values of a tree."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
