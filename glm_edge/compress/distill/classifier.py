"""Classifiers in training: their forward pass, their batches, and their collections.

A batch of a classifier is a dict of arrays with `B` rows:

- the inputs of its method `classify`, such as `images`, or `tokens` and `valid`;
- `labels`: int [B], optional, the class of each row, -1 for a row without a label;
- `weights`: [B], optional, the weight of each row in the loss, 1 by default.

Letters of shapes: `B` rows, `N` classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.errors import ScopeCollectionNotFound
from jax import Array

from glm_edge.compress.batches import Batch
from glm_edge.compress.calibration import called, check_arrays
from glm_edge.errors import DataError, RecipeError
from glm_edge.params.tree import Params

UNLABELLED = -1


@dataclass(frozen=True)
class Classifier:
    """A classifier in place of a model that predicts the next token.

    Attributes:
      model: Linen module with `num_classes` above 0 and a method `classify(batch, train)`, which
        returns logits [B, N]. With `train`, it may draw from the stream `dropout` and change
        collections such as `batch_stats`.
    """

    model: nn.Module

    @property
    def config(self) -> Any:
        """Configuration of the model, or None."""
        return getattr(self.model, "config", None)

    def logits(self, params: Params, collections: Params, batch: Batch) -> Array:
        """Compute logits in inference mode.

        Args:
          params: parameters of the model.
          collections: its other collections; empty without any.
          batch: batch from `to_device`.

        Returns:
          float32 [B, N].

        Raises:
          DataError: the batch lacks an input.
          RecipeError: a collection is missing, or the logits have another shape.
        """
        return self._run(params, collections, batch, train=False)[0]

    def training_logits(
        self, params: Params, collections: Params, batch: Batch, key: Array | None
    ) -> tuple[Array, Params]:
        """Compute logits in training mode.

        Args:
          params: parameters of the model.
          collections: its other collections; empty without any.
          batch: batch from `to_device`.
          key: jax key of the stream `dropout`.

        Returns:
          `(logits, collections)`: float32 [B, N], and the collections after this batch.

        Raises:
          As `logits`.
        """
        logits, changed = self._run(params, collections, batch, train=True, key=key)
        return logits, {**collections, **changed}

    def _run(
        self,
        params: Params,
        collections: Params,
        batch: Batch,
        train: bool,
        key: Array | None = None,
    ) -> tuple[Array, Params]:
        kind = type(self.model).__name__
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "weights")}
        variables = {**collections, "params": params}
        try:
            logits, changed = self.model.apply(
                variables,
                inputs,
                train,
                method="classify",
                rngs={} if key is None else {"dropout": key},
                mutable=list(collections) if train else [],
            )
        except KeyError as error:
            if error.args and error.args[0] in inputs:
                raise
            raise DataError(
                f"distill: {kind} reads {error} of a batch, which has {', '.join(inputs) or 'none'}"
            ) from error
        except ScopeCollectionNotFound as error:
            raise RecipeError(
                f"distill: {kind} reads a collection besides its parameters; pass the model's "
                f'variables, such as {{"params": …, "batch_stats": …}} ({error})'
            ) from error
        rows = len(batch["labels"])
        if logits.shape != (rows, self.model.num_classes):
            raise RecipeError(
                f"distill: {kind} returns logits {list(logits.shape)} for {rows} rows and "
                f"{self.model.num_classes} classes"
            )
        return logits.astype(jnp.float32), dict(changed)

    def to_device(self, batch: Any, where: str) -> Batch:
        """Check a batch and move it to the device.

        Args:
          batch: see the module's docstring.
          where: name of the batch for messages.

        Returns:
          The batch with int32 `labels` and float32 `weights`.

        Raises:
          DataError: an array, a label or a weight has a wrong type, shape or value.
        """
        if not isinstance(batch, Mapping):
            raise DataError(f"{where}: a batch of a classifier is a dict of arrays")
        inputs = {
            name: value
            for name, value in batch.items()
            if name not in ("labels", "weights") and value is not None
        }
        arrays = check_arrays(inputs, where)
        rows = next(iter(arrays.values())).shape[:1]
        labels = _row_values(batch, "labels", rows, UNLABELLED, where)
        weights = _row_values(batch, "weights", rows, 1.0, where)
        classes = self.model.num_classes
        if labels.dtype.kind not in "iu" or ((labels < UNLABELLED) | (labels >= classes)).any():
            raise DataError(
                f"{where}: labels must be integers below {classes}, or {UNLABELLED} for a row "
                "without a label"
            )
        if not np.isfinite(weights).all() or (weights < 0).any():
            raise DataError(f"{where}: weights must be finite and not negative")
        return {
            **arrays,
            "labels": jnp.asarray(labels, jnp.int32),
            "weights": jnp.asarray(weights, jnp.float32),
        }


def is_classifier(model: Any) -> bool:
    """Test for a module with `num_classes` above 0 and a method `classify`."""
    return callable(getattr(model, "classify", None)) and bool(getattr(model, "num_classes", 0))


def reader_of(model: nn.Module, calibration: Any) -> Any:
    """Wrap a model by what reads its batches.

    Args:
      model: Linen module.
      calibration: batches; a `Calibration` with functions runs the model by these.

    Returns:
      A `Called`, a `Classifier`, or the model.
    """
    reader = called(model, calibration)
    return Classifier(model) if reader is model and is_classifier(model) else reader


def has_labels(batch: Any) -> bool:
    """Test for a batch with a label on at least one row."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return labels is not None and bool((np.asarray(labels) != UNLABELLED).any())


def variables_of(params: Params) -> tuple[Params, Params]:
    """Split into `(params, other collections)`; without a collection `params`, all are parameters.

    The inverse is `with_collections`.
    """
    if not isinstance(params.get("params"), Mapping):
        return params, {}
    return params["params"], {name: tree for name, tree in params.items() if name != "params"}


def _row_values(
    batch: Mapping[str, Any], name: str, rows: tuple[int, ...], default: float, where: str
) -> np.ndarray:
    if batch.get(name) is None:
        return np.full(rows, default)
    values = np.asarray(batch[name])
    if values.shape != rows:
        raise DataError(
            f"{where}: {name} must have one value per row, {list(rows)}, found {list(values.shape)}"
        )
    return values
