"""Calibration batches of any shape, with the functions by which a model reads them."""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import ModifyScopeVariableError, ScopeCollectionNotFound
from jax import Array

from glm_edge.errors import DataError, RecipeError
from glm_edge.params.tree import Params

# Inputs that a model may take besides tokens.
INPUTS = ("images", "audio")

Apply = Callable[[nn.Module, Mapping[str, Any], Any], Any]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Batches for a model that does not read `tokens`, to pass as `calibration=`.

        def apply(model, variables, batch):
            return model.apply(variables, batch["images"])

        def loss(model, variables, batch):
            logits = apply(model, variables, batch)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])

        data = ge.Calibration(batches, apply=apply, loss=loss)
        model, params, report = ge.quantize.gptq("int4")(model, params, calibration=data)

    Layers of Flax and of this library that run inside either function have their inputs recorded.
    Functions are compiled: they must not depend on values that change between calls.

    Attributes:
      batches: a list, or another collection that can be read more than once, of pytrees of arrays.
      apply: called as `apply(model, variables, batch)`; returns logits [..., N], alone or first in
        a tuple. Distillation, block-wise training and measured allocation need it.
      loss: called likewise; returns a scalar, the mean over the rows of the batch, or one loss per
        row [B]. Scores from gradients need it, and labels in distillation (`alpha` below 1).
      variables: collections besides `params` that `variables` holds in each call, such as
        `{"batch_stats": ...}`; they stay as they are.
    """

    batches: Iterable[Any]
    apply: Apply | None = None
    loss: Apply | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_list(self.batches, "Calibration: batches")
        if isinstance(self.batches, Iterator):
            raise DataError(
                "Calibration: batches is an iterator that can be read only once; pass a list"
            )
        for name in ("apply", "loss"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise DataError(
                    f"Calibration: {name} must be callable as {name}(model, variables, batch), not "
                    f"{type(getattr(self, name)).__name__}"
                )
            _check_arguments(name, getattr(self, name))
        if not isinstance(self.variables, Mapping) or "params" in self.variables:
            raise DataError(
                "Calibration: variables must be a mapping of collections besides 'params', such as "
                "{'batch_stats': ...}"
            )

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    @property
    def _listed(self) -> Any:
        # Batches without a length can still be iterated over.
        return self.batches

    def __getitem__(self, index: int) -> Any:
        return self._listed[index]

    def __len__(self) -> int:
        return len(self._listed)


def check_list(batches: Any, name: str) -> None:
    """Raises DataError for a single batch in the place of a list of them."""
    if isinstance(batches, Mapping):
        raise DataError(f"{name} is a list of batches, and this is a single one; pass [batch]")


def _check_arguments(name: str, function: Callable[..., Any] | None) -> None:
    if function is None:
        return
    try:
        signature = inspect.signature(function)
    # Of what is not written in Python.
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise DataError(
            f"Calibration: {name}{signature} must be callable as {name}(model, variables, batch): "
            f"{error}"
        ) from error


@dataclass(frozen=True)
class Called:
    """A model with the functions that run it, in the place of a model that reads `tokens`.

    Attributes:
      model: Linen module.
      apply: see `Calibration`.
      loss: see `Calibration`.
      variables: see `Calibration`; they travel in the batches.
    """

    model: nn.Module
    apply: Apply | None
    loss: Apply | None
    variables: Mapping[str, Any] = field(compare=False, repr=False)

    def run(self, params: Params, batch: Mapping[str, Any]) -> Any:
        """Runs the model in any way, for what its layers read; returns whatever that gives."""
        run: Any = self.apply or self.loss
        return self._called(run, params, batch)

    def logits(self, params: Params, batch: Mapping[str, Any]) -> Array:
        """Logits [..., N], float32.

        Raises:
          RecipeError: there is no `apply`, or it gives no floating array.
        """
        if self.apply is None:
            raise RecipeError(
                "calibration has no apply=; pass Calibration(batches, apply=...), called as "
                "apply(model, variables, batch) for logits [..., N]"
            )
        return self.logits_of(self.run(params, batch))

    def logits_of(self, output: Any) -> Array:
        """Reads the result of `apply` as float32 logits; raises as `logits`."""
        output = output[0] if isinstance(output, tuple) else output
        if not _is_floating(output) or not output.ndim:
            raise RecipeError(
                f"Calibration: apply must return a floating array of logits [..., N], not "
                f"{_described(output)}"
            )
        return output.astype(jnp.float32)

    def row_losses(self, params: Params, batch: Mapping[str, Any]) -> Array:
        """Loss of each row, [B]; a mean over rows stands for each of them.

        Raises:
          RecipeError: there is no `loss`, or it gives neither a scalar nor a value per row.
        """
        if self.loss is None:
            raise RecipeError(
                "calibration has no loss=; pass Calibration(batches, loss=...), called as "
                "loss(model, variables, batch) for a scalar or one loss per row"
            )
        losses = self._called(self.loss, params, batch)
        rows = rows_of(batch["batch"])
        if not _is_floating(losses) or losses.shape not in ((), (rows,)):
            raise RecipeError(
                f"Calibration: loss must return a scalar or one loss per row [{rows}], not "
                f"{_described(losses)}"
            )
        return jnp.broadcast_to(losses.astype(jnp.float32), (rows,))

    def _called(self, function: Apply, params: Params, batch: Mapping[str, Any]) -> Any:
        try:
            return function(self.model, _variables(params, batch), batch["batch"])
        except ScopeCollectionNotFound as error:
            name = re.search(r'from collection "(\w+)"', str(error))
            missing = name[1] if name else "batch_stats"
            if missing in ("params", *self.variables):
                raise
            raise DataError(
                f"{type(self.model).__name__} reads the collection {missing!r}, which calibration "
                f"lacks; pass Calibration(variables={{{missing!r}: ...}})"
            ) from error
        except ModifyScopeVariableError as error:
            raise DataError(
                f"Calibration: {type(self.model).__name__} writes a collection, which is to stay; "
                "run it as at inference, such as by train=False or use_running_average=True"
            ) from error


def _variables(params: Params, batch: Mapping[str, Any]) -> dict[str, Any]:
    return {**batch["variables"], "params": params}


def _is_floating(value: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)


def _described(value: Any) -> str:
    if hasattr(value, "dtype"):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__


def called(model: Any, calibration: Any) -> Any:
    """The model, or `Called` where calibration brings functions that run it.

    Args:
      model: Linen module.
      calibration: a `Calibration`, or batches that hold `tokens`.
    """
    if not isinstance(calibration, Calibration) or isinstance(model, Called):
        return model
    if calibration.apply is None and calibration.loss is None:
        return model
    return Called(model, calibration.apply, calibration.loss, dict(calibration.variables))


def with_batches(calibration: Any, batches: list[Any]) -> Any:
    """Other batches, read by the same functions."""
    if not isinstance(calibration, Calibration):
        return batches
    return Calibration(batches, calibration.apply, calibration.loss, calibration.variables)


def has_length(calibration: Any) -> bool:
    """True where the number of batches is known before they are read."""
    if isinstance(calibration, Calibration):
        return has_length(calibration.batches)
    return hasattr(calibration, "__len__")


def is_empty(calibration: Any) -> bool:
    """True for None, and for a collection of known length that holds no batch."""
    return calibration is None or (has_length(calibration) and not len(calibration))


def to_device(model: Called, batch: Any, where: str) -> dict[str, Any]:
    """Checks a batch for `Called` and moves it to the device.

    Args:
      model: with its functions.
      batch: a pytree of arrays.
      where: for messages.

    Returns:
      `{"batch": ..., "variables": ...}`.

    Raises:
      DataError: a leaf is no array of numbers, or there is none.
    """

    def moved(path: Any, leaf: Any) -> Array:
        array = leaf if isinstance(leaf, jax.Array) else _array(leaf)
        if array is None:
            raise DataError(
                f"{where}: batch{jax.tree_util.keystr(path)} is not an array of numbers but "
                f"{type(leaf).__name__}"
            )
        return jnp.asarray(array)

    if isinstance(batch, Mapping):
        batch = dict(batch)
    arrays = jax.tree_util.tree_map_with_path(moved, batch)
    if not jax.tree.leaves(arrays):
        raise DataError(f"{where}: the batch holds no array")
    return {"batch": arrays, "variables": jax.tree.map(jnp.asarray, dict(model.variables))}


def _array(leaf: Any) -> np.ndarray | None:
    try:
        array = np.asarray(leaf)
    except ValueError:
        return None
    return array if array.dtype.kind in "biufV" else None


def rows_of(batch: Any) -> int:
    """Rows of a pytree whose arrays share their first axis; 1 where they share none."""
    return _shared_axis(batch) or 1


def single_rows(batch: dict[str, Any]) -> dict[str, Any] | None:
    """The rows of a batch for `Called` as batches of one row, stacked [B, 1, ...].

    Returns:
      None where the arrays share no first axis, and the batch is one sample.
    """
    if not _shared_axis(batch["batch"]):
        return None
    return jax.tree.map(lambda array: array[:, None], batch["batch"])


def _shared_axis(batch: Any) -> int | None:
    leaves = jax.tree.leaves(batch)
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    return sizes.pop() if len(sizes) == 1 else None


def check_without(without: Sequence[str]) -> None:
    """Refuses names of inputs that no model takes.

    Args:
      without: inputs that calibration is known to lack.

    Raises:
      DataError: one is not of `INPUTS`.
    """
    for name in without:
        if name not in INPUTS:
            raise DataError(
                f"without=[{name!r:.60}] is no input that calibration may lack; known: "
                f"{', '.join(INPUTS)}"
            )
