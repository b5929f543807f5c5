"""Calibration batches of any shape, with the functions that run a model on them."""

import dataclasses
import inspect
import itertools
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

from glm_edge.compress import domains
from glm_edge.errors import DataError, RecipeError
from glm_edge.params.tree import Params

# Optional inputs of a model besides tokens.
INPUTS = ("images", "audio")

Apply = Callable[[nn.Module, Mapping[str, Any], Any], Any]
Augment = Callable[[Array, Any], Any]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Batches for a model that does not read `tokens`, the argument `calibration=`.

        def apply(model, variables, batch):
            return model.apply(variables, batch["images"])

        def loss(model, variables, batch):
            logits = apply(model, variables, batch)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])

        data = ge.Calibration(batches, apply=apply, loss=loss)
        model, params, report = ge.quantize.gptq("int4")(model, params, calibration=data)

    Transforms record the inputs of Flax's and this library's layers inside these functions. The
    functions are compiled, so they must not depend on values that change between calls.

    Attributes:
      batches: a list, or another collection that can be read more than once, of pytrees of arrays.
        A string under the key `domain` of a dict names its source; the functions do not see it.
      apply: function `apply(model, variables, batch)` that returns logits [..., N], alone or first
        in a tuple. Required by distillation, block-wise training and measured allocation.
      loss: function `loss(model, variables, batch)` that returns the mean loss over the rows of the
        batch, a scalar, or one loss per row [B]. Required by gradient scores, and by labels in
        distillation (`alpha` below 1).
      variables: collections besides `params` that are passed in `variables`, such as
        `{"batch_stats": ...}`; they are not updated.
      augment: function `augment(key, batch)` that returns a random variant of a batch with the same
        shapes. Distillation and quantization-aware training apply it to each batch that they read,
        once for student and teacher. The key depends on `rng` and the number of the batch.

    Raises:
      DataError: `batches` is a single batch or an iterator, or a function has a wrong signature.
    """

    batches: Iterable[Any]
    apply: Apply | None = None
    loss: Apply | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    augment: Augment | None = None

    def __post_init__(self) -> None:
        check_list(self.batches, "Calibration: batches")
        if isinstance(self.batches, Iterator):
            raise DataError(
                "Calibration: batches is an iterator that can be read only once; pass a list"
            )
        for name, arguments in _ARGUMENTS.items():
            _check_callable(name, arguments, getattr(self, name))
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
    """Check that `batches` is not a single batch; raise DataError otherwise."""
    if isinstance(batches, Mapping):
        raise DataError(f"{name} must be a list of batches, not a single batch; pass [batch]")


_ARGUMENTS = {
    "apply": ("model", "variables", "batch"),
    "loss": ("model", "variables", "batch"),
    "augment": ("key", "batch"),
}


def _check_callable(
    name: str, arguments: tuple[str, ...], function: Callable[..., Any] | None
) -> None:
    form = f"callable as {name}({', '.join(arguments)})"
    if function is None:
        return
    if not callable(function):
        raise DataError(f"Calibration: {name} must be {form}, not {type(function).__name__}")
    try:
        signature = inspect.signature(function)
    # Functions that are not written in Python have no signature.
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*(None for _ in arguments))
    except TypeError as error:
        raise DataError(f"Calibration: {name}{signature} must be {form}: {error}") from error


@dataclass(frozen=True)
class Called:
    """A model with the functions that run it, in place of a model that reads `tokens`.

    Attributes:
      model: Linen module.
      apply: see `Calibration`.
      loss: see `Calibration`.
      variables: see `Calibration`; `to_device` adds them to batches.
    """

    model: nn.Module
    apply: Apply | None
    loss: Apply | None
    variables: Mapping[str, Any] = field(compare=False, repr=False)

    def run(self, params: Params, batch: Mapping[str, Any]) -> Any:
        """Run `apply`, or `loss` without `apply`, and return its result."""
        run: Any = self.apply or self.loss
        return self._called(run, params, batch)

    def logits(self, params: Params, batch: Mapping[str, Any]) -> Array:
        """Compute logits [..., N], float32.

        Args:
          params: parameters of the model.
          batch: batch from `to_device`.

        Returns:
          float32 [..., N].

        Raises:
          RecipeError: `apply` is missing, or does not return a floating array.
        """
        if self.apply is None:
            raise RecipeError(
                "calibration has no apply=; pass Calibration(batches, apply=...), called as "
                "apply(model, variables, batch) for logits [..., N]"
            )
        return self.logits_of(self.run(params, batch))

    def logits_of(self, output: Any) -> Array:
        """Convert the result of `apply` to float32 logits; raise as `logits`."""
        output = output[0] if isinstance(output, tuple) else output
        if not _is_floating(output) or not output.ndim:
            raise RecipeError(
                f"Calibration: apply must return a floating array of logits [..., N], not "
                f"{_described(output)}"
            )
        return output.astype(jnp.float32)

    def row_losses(self, params: Params, batch: Mapping[str, Any]) -> Array:
        """Compute the loss per row; a scalar loss applies to every row.

        Args:
          params: parameters of the model.
          batch: batch from `to_device`.

        Returns:
          float32 [B].

        Raises:
          RecipeError: `loss` is missing, or returns neither a scalar nor a value per row.
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
                f"Calibration: {type(self.model).__name__} updates a collection; run it in "
                "inference mode, such as by train=False or use_running_average=True"
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
    """Wrap a model in `Called` if calibration provides functions that run it.

    Args:
      model: Linen module.
      calibration: a `Calibration`, or batches with `tokens`.

    Returns:
      The model, or a `Called`.
    """
    if not isinstance(calibration, Calibration) or isinstance(model, Called):
        return model
    if calibration.apply is None and calibration.loss is None:
        return model
    return Called(model, calibration.apply, calibration.loss, dict(calibration.variables))


def with_batches(calibration: Any, batches: list[Any]) -> Any:
    """Replace the batches and keep the functions."""
    if not isinstance(calibration, Calibration):
        return batches
    return dataclasses.replace(calibration, batches=batches)


def has_length(calibration: Any) -> bool:
    """Test for calibration whose count of batches is known in advance."""
    if isinstance(calibration, Calibration):
        return has_length(calibration.batches)
    return hasattr(calibration, "__len__")


def evenly_spaced(calibration: Any, count: int) -> list[Any]:
    """Take at most `count` batches: evenly from a list, the first where there is no length."""
    if not has_length(calibration):
        return list(itertools.islice(calibration or (), count))
    indices = np.linspace(0, len(calibration) - 1, min(count, len(calibration)))
    return [calibration[index] for index in indices.round().astype(int).tolist()]


def is_empty(calibration: Any) -> bool:
    """Test for None or an empty collection of known length."""
    return calibration is None or (has_length(calibration) and not len(calibration))


def to_device(model: Called, batch: Any, where: str) -> dict[str, Any]:
    """Check a batch for `Called` and move it to the device.

    Args:
      model: model with its functions.
      batch: pytree of arrays.
      where: name of the batch for messages.

    Returns:
      `{"batch": ..., "variables": ...}`.

    Raises:
      DataError: a leaf is not a numeric array, or there are no leaves.
    """

    arrays = check_arrays(batch, where)
    return {"batch": arrays, "variables": jax.tree.map(jnp.asarray, dict(model.variables))}


def check_arrays(batch: Any, where: str) -> Any:
    """Move the arrays of a batch to the device; raise DataError for other leaves, or none."""

    def moved(path: Any, leaf: Any) -> Array:
        array = leaf if isinstance(leaf, jax.Array) else _array(leaf)
        if array is None:
            raise DataError(
                f"{where}: batch{jax.tree_util.keystr(path)} is not an array of numbers but "
                f"{type(leaf).__name__}"
            )
        return jnp.asarray(array)

    if isinstance(batch, Mapping):
        # Only a string is a domain; an array of that name belongs to the functions.
        named = domains.domain_of(batch) is not None
        batch = domains.without_domain(batch, where) if named else dict(batch)
    arrays = jax.tree_util.tree_map_with_path(moved, batch)
    if not jax.tree.leaves(arrays):
        raise DataError(f"{where}: the batch contains no array")
    return arrays


def _array(leaf: Any) -> np.ndarray | None:
    try:
        array = np.asarray(leaf)
    except ValueError:
        return None
    return array if array.dtype.kind in "biufV" else None


def rows_of(batch: Any) -> int:
    """Return the rows of a pytree whose arrays share their first axis; otherwise 1."""
    return _shared_axis(batch) or 1


def single_rows(batch: dict[str, Any]) -> dict[str, Any] | None:
    """Split a batch for `Called` into batches of one row, stacked [B, 1, ...].

    Args:
      batch: batch from `to_device`.

    Returns:
      Stacked batches, or None if the arrays do not share a first axis (a single sample).
    """
    if not _shared_axis(batch["batch"]):
        return None
    return jax.tree.map(lambda array: array[:, None], batch["batch"])


def _shared_axis(batch: Any) -> int | None:
    leaves = jax.tree.leaves(batch)
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    return sizes.pop() if len(sizes) == 1 else None


def check_without(without: Sequence[str]) -> None:
    """Check names of inputs that calibration intentionally lacks.

    Args:
      without: names of inputs.

    Raises:
      DataError: a name is not in `INPUTS`.
    """
    for name in without:
        if name not in INPUTS:
            raise DataError(
                f"without=[{name!r:.60}] is not an input that calibration may lack; known: "
                f"{', '.join(INPUTS)}"
            )
