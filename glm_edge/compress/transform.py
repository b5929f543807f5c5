"""Transforms, which compress a model, and the registry of their classes.

A transform is a frozen dataclass, such as `prune.structured(heads=0.25, neurons=0.3)`. Its fields
are its options, which are checked once, at construction. A call maps a model and its parameters to
a model, parameters and a report. Transforms compose with `chain`.
"""

import dataclasses
import functools
import json
import math
import numbers
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, dataclass_transform

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.compress.calibration import check_list, check_without
from glm_edge.compress.progress import Progress, progress_of
from glm_edge.compress.report import Report
from glm_edge.errors import DataError, RecipeError
from glm_edge.params import Format, is_box
from glm_edge.params.patterns import compiled, shared_steps
from glm_edge.params.tree import MATRIX_NAMES, Params, path_items

Batch = dict[str, Any]
Result = tuple[nn.Module, Params, Report]


@dataclass(frozen=True)
class Context:
    """Context of a transform besides the model: data, randomness, and the original model.

    Attributes:
      calibration: batches that can be read more than once, or None.
      rng: jax key, or None.
      original: model and parameters at the input of the outermost transform.
      progress: function `progress(stage, done, total)`, True for a line on standard error, or None.
      without: inputs (`images`, `audio`) that calibration intentionally lacks.
      reference: the original model after exact transforms, such as a rotation, which change values
        but not the function. Layers of a compressed model are compared with it as long as shapes
        are equal. None means the original.
    """

    calibration: Sequence[Batch] | None
    rng: Array | None
    original: tuple[nn.Module, Params]
    progress: Progress | bool | None = None
    without: tuple[str, ...] = ()
    reference: tuple[nn.Module, Params] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "progress", progress_of(self.progress))
        check_without(self.without)
        if self.reference is None:
            object.__setattr__(self, "reference", self.original)

    @property
    def batches(self) -> Sequence[Batch]:
        """Return the calibration of a transform that needs some.

        Raises:
          DataError: there is none.
        """
        if self.calibration is None:
            raise DataError("calibration= is missing")
        return self.calibration

    def advance(self, stage: str, done: int, total: int) -> None:
        """Call the progress callback, if any."""
        if callable(self.progress):
            self.progress(stage, done, total)


# Metadata of a field with arrays or None, which JSON omits.
ARRAYS = {"arrays": True}
# Maximum of counts such as steps and rounds.
MOST = 10**8
_LARGEST = 2**62
_OF_NNX = (
    "for nnx, pass None as the model and nnx.to_pure_dict(nnx.split(module)[1]) as params; "
    "transforms that need data require Linen modules"
)
# Names of vectors, also if heads or stacked layers add axes.
_VECTORS = ("bias", "scale")
# Options that a transform always prints, in addition to its first option.
_DEFINING = ("method", "steps")
# Version of the JSON from `to_json`.
VERSION = 2


class Teacher(tuple):
    """A teacher model and its parameters, compared by identity."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Teacher) and list(map(id, self)) == list(map(id, other))

    def __hash__(self) -> int:
        return hash(tuple(map(id, self)))

    def __repr__(self) -> str:
        return "…"


@dataclass(frozen=True, kw_only=True, repr=False)
class Transform:
    """A callable compression method with printing, equality, hashing and JSON round trip.

    `register` makes a subclass a frozen dataclass, and adds it to the registry. Fields are options;
    `__post_init__` checks them, and `apply` compresses.

        @ge.compress.register("mine.scaled")
        class Scaled(ge.Transform):
            factor: float = dataclasses.field(default=2.0, kw_only=False)

            def apply(self, model, params, context):
                scaled = jax.tree.map(lambda leaf: leaf * self.factor, params)
                return model, scaled, ge.Report.of([], params, scaled)

    Attributes:
      name: name of the registered transform, such as `quantize.rtn`.
      called: name of the factory; equal to `name`, unless the name depends on options.
      exact: True if the model's function is unchanged.
      needs_model: True if the transform needs the model, not only parameters.
      takes_variables: True if `params` may be a model's variables, with collections such as
        `batch_stats` beside the parameters.
    """

    name: ClassVar[str] = ""
    called: ClassVar[str] = ""
    exact: ClassVar[bool] = False
    needs_model: ClassVar[bool] = False
    takes_variables: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the types of all fields; raise RecipeError for a wrong one."""
        kind: Any = type(self)
        types_of_fields = _annotations(kind)
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, item.name, value)
            check_type(self.name, item.name, value, types_of_fields[item.name])

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        """Compress a model within a call or a chain.

        Args:
          model: Linen module, or None.
          params: parameters of the model.
          context: data, randomness and original model.

        Returns:
          `(model, params, report)`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no apply")

    @property
    def steps_in_order(self) -> tuple["Transform", ...]:
        """Transforms of a chain, or the transform itself."""
        return (self,)

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of fields with arrays, which JSON cannot store."""
        names = (item.name for item in dataclasses.fields(self))
        return tuple(name for name in names if isinstance(getattr(self, name), Teacher))

    def _set(self, **values: Any) -> None:
        """Replace fields by normalized values, within `__post_init__`."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __call__(
        self,
        model: nn.Module,
        params: Params,
        calibration: Sequence[Batch] | None = None,
        rng: Array | None = None,
        progress: Progress | bool | None = None,
        without: Sequence[str] = (),
    ) -> Result:
        """Compress a model without modifying its arguments.

        Args:
          model: Linen module. None means parameters alone, for transforms that need no data.
          params: parameters of the model, arrays or boxes.
          calibration: batches (see `glm_edge.compress.batches`), a list or another collection that
            can be read more than once; or a `glm_edge.Calibration`, with functions that run a
            model on batches of any other shape. None for a transform without calibration.
          rng: jax key. None means no random values, and data in its original order.
          progress: True for a line on standard error, or a function
            `progress(stage, done, total)`.
          without: inputs of the model, of `images` and `audio`, that calibration intentionally
            lacks. Other missing inputs are an error.

        Returns:
          `(model, params, report)`; the model differs only if shapes changed.

        Raises:
          RecipeError: options do not match the model, or an argument is not a model or parameters.
          DataError: calibration is missing or cannot be read more than once, or `without` names an
            unknown input.
        """
        check_list(calibration, "calibration")
        if isinstance(calibration, Iterator):
            raise DataError(
                "calibration is an iterator that can be read only once; pass a list of batches, "
                "such as list(itertools.islice(batches, 16))"
            )
        _check_arguments(self.name, model, params)
        if model is None:
            _check_without_model(self, calibration)
        if calibration is not None:
            for step in self.steps_in_order:
                if not step.takes_variables:
                    check_params_alone(step.name, params)
        context = Context(calibration, rng, (model, params), progress, tuple(without))
        with shared_steps():
            model, changed, report = self.apply(model, params, context)
        notes = (*report.notes, *_unnamed(self, model, params))
        return model, changed, dataclasses.replace(report, notes=notes)

    def __repr__(self) -> str:
        shown = []
        for index, item in enumerate(dataclasses.fields(self)):
            value = getattr(self, item.name)
            defining = value is not None and (index == 0 or item.name in _DEFINING)
            if defining or value != item.default:
                text = repr(str(value) if isinstance(value, Format) else value)
                shown.append(text if index == 0 and not item.kw_only else f"{item.name}={text}")
        return f"{self.called}({', '.join(shown)})"


@functools.cache
def _annotations(kind: type) -> dict[str, Any]:
    """Return the annotations of a class by field."""
    return typing.get_type_hints(kind)


def _check_arguments(name: str, model: Any, params: Any) -> None:
    """Check the types of model and parameters; raise RecipeError for a wrong one."""
    form = f"{name}: call it as transform(model, params)"
    if isinstance(params, nn.Module):
        raise RecipeError(f"{form}; params is a {type(params).__name__}, a model")
    if _is_of_nnx(model) or _is_of_nnx(params):
        raise RecipeError(f"{name}: {_OF_NNX}")
    if isinstance(model, type):
        raise RecipeError(
            f"{form}; model is the class {model.__name__}, not an instance of it, "
            f"{model.__name__}(...)"
        )
    if model is not None and not isinstance(model, nn.Module):
        raise RecipeError(f"{form}; model is a {type(model).__name__}, not a Linen module")
    if not isinstance(params, Mapping):
        inside = " (pass its .params)" if hasattr(params, "params") else ""
        raise RecipeError(
            f"{form}; params must be the nested dict of model.init(...)['params'], not "
            f"{type(params).__name__}{inside}"
        )
    for path, leaf in path_items(params):
        if not is_box(leaf) and not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise RecipeError(f"{form}; params/{path} is {type(leaf).__name__}, not an array")


def check_params_alone(name: str, params: Params) -> None:
    """Check that `params` has no further collections; raise RecipeError otherwise."""
    if isinstance(params.get("params"), Mapping):
        others = ", ".join(sorted(set(params) - {"params"})) or "none other"
        raise RecipeError(
            f"{name}: params contains collections (params and {others}); pass "
            "variables['params'], and the others by Calibration(batches, variables=...)"
        )


def _is_of_nnx(value: Any) -> bool:
    """Test for a module or a class of nnx, or a state of nnx."""
    # Only a program that imported nnx can have such a value; importing it here would cost time.
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return False
    kind = value if isinstance(value, type) else type(value)
    return issubclass(kind, nnx.Module) or kind.__module__.startswith("flax.nnx")


def _check_without_model(transform: Transform, calibration: Any) -> None:
    """Check that a transform works without a model; raise RecipeError otherwise."""
    names = sorted({step.name for step in transform.steps_in_order if step.needs_model})
    if names:
        raise RecipeError(f"{names[0]}: needs the model, a Linen module, and it is None; {_OF_NNX}")
    if calibration is not None:
        raise RecipeError(
            f"{transform.name}: calibration needs the model, a Linen module, and it is None; "
            f"{_OF_NNX}"
        )


def _unnamed(transform: Transform, model: Any, params: Params) -> tuple[str, ...]:
    """Return a note on arrays that no `where` can select, because of their names."""
    steps = transform.steps_in_order
    acting = [step for step in steps if step.name.startswith(("quantize.", "prune."))]
    # Tables of this library's models are not compressed.
    if not acting or type(model).__module__.startswith("glm_edge.models."):
        return ()
    unnamed = [
        path
        for path, leaf in path_items(params)
        if not is_box(leaf)
        and leaf.ndim >= 2
        and jnp.issubdtype(leaf.dtype, jnp.floating)
        and path.rsplit("/", 1)[-1] not in (*MATRIX_NAMES, *_VECTORS)
    ]
    if not unnamed:
        return ()
    shown = ", ".join(unnamed[:3]) + (", …" if len(unnamed) > 3 else "")
    return (
        f"{len(unnamed)} arrays of two or more axes are unchanged: {shown}; only parameters named "
        f"{', '.join(MATRIX_NAMES)} are compressed",
    )


Kind = TypeVar("Kind", bound=Transform)
_REGISTRY: dict[str, type[Transform]] = {}


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def register(name: str, *others: str) -> Callable[[type[Kind]], type[Kind]]:
    """Register a transform: a frozen dataclass of keyword-only fields, with a name.

    Args:
      name: name in calls, chains and recipes, such as `quantize.rtn`.
      *others: further names in recipes, for a class whose `name` is a property.

    Returns:
      Decorator of a subclass of `Transform`.
    """

    def decorate(kind: type[Kind]) -> type[Kind]:
        if "name" not in vars(kind):
            kind.name = name
        kind.called = name
        kind = dataclass(frozen=True, kw_only=True, repr=False)(kind)
        for known in (name, *others):
            _REGISTRY[known] = kind
        return kind

    return decorate


def check_pattern(transform: str, option: str, pattern: Any) -> None:
    """Check that an option is None or a regular expression; raise RecipeError otherwise."""
    if pattern is None:
        return
    try:
        compiled(pattern)
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"{transform}: {option}={pattern!r:.100} is not a regular expression that can be "
            f"searched in bounded time: {error}"
        ) from error


def check_whole(transform: str, **options: Any) -> None:
    """Check that every option is an integer in 1..`MOST`; raise RecipeError otherwise."""
    for option, number in options.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= MOST:
            raise RecipeError(
                f"{transform}: {option} must be a whole number of at least 1 and at most {MOST}, "
                f"not {number!r:.60}"
            )


def check_type(transform: str, option: str, value: Any, annotation: Any) -> None:
    """Check the type of an option, and refuse NaN and infinity.

    Options annotated with other types than `bool`, `int`, `float`, `str` and None are not checked.

    Args:
      transform: name of the transform for messages.
      option: name of the option.
      value: value of the option.
      annotation: annotation of the field.

    Raises:
      RecipeError: the value has another type, or is not finite.
    """
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = typing.get_args(annotation) if union else (annotation,)
    if not set(kinds) <= {bool, int, float, str, type(None)}:
        return
    if any(_is_a(value, kind) for kind in kinds):
        return
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if number and not (math.isfinite(value) and abs(value) <= _LARGEST) and {int, float} & {*kinds}:
        raise RecipeError(f"{transform}: {option} must be finite and not huge, not {value!r:.60}")
    wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
    raise RecipeError(f"{transform}: {option} must be {wanted}, not {value!r:.60}")


def _is_a(value: Any, kind: Any) -> bool:
    if kind is type(None) or isinstance(value, bool):
        return isinstance(value, kind)
    integral, real = isinstance(value, numbers.Integral), isinstance(value, numbers.Real)
    if kind is int:
        return integral and abs(value) <= _LARGEST
    if kind is float:
        return real and abs(value) <= _LARGEST
    return isinstance(value, kind) and "\0" not in value


def is_number(value: Any) -> bool:
    """Test for an int or a float, excluding bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_fraction(transform: str, **fractions: Any) -> None:
    """Check that every option is a fraction in [0, 1); raise RecipeError otherwise."""
    for option, fraction in fractions.items():
        if not is_number(fraction) or not 0.0 <= fraction < 1.0:
            raise RecipeError(
                f"{transform}: {option} must be at least 0 and below 1, so that the keep ratio is "
                f"above 0 and at most 1, not {fraction!r}"
            )


def registered(name: str) -> type[Transform]:
    """Look up the class of a transform.

    Raises:
      RecipeError: no transform has this name.
    """
    if name not in _REGISTRY:
        raise RecipeError(f"unknown transform {name!r}; known: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


CHAIN = "chain"


@register(CHAIN)
class Chain(Transform):
    """Transforms that are applied from left to right; built by `chain`.

    Attributes:
      transforms: transforms in order, without nested chains.
    """

    transforms: tuple[Transform, ...] = ()

    @property
    def steps_in_order(self) -> tuple[Transform, ...]:
        return self.transforms

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        report = Report.start(params)
        for index, transform in enumerate(self.transforms):
            rng = None if context.rng is None else jax.random.fold_in(context.rng, index)
            step = dataclasses.replace(context, rng=rng)
            before = params
            model, params, done = transform.apply(model, params, step)
            if transform.exact and (context.reference or context.original)[1] is before:
                context = dataclasses.replace(context, reference=(model, params))
            report = report + done
        return model, params, report

    def __repr__(self) -> str:
        inner = ",\n".join(f"  {transform!r}" for transform in self.transforms)
        return f"chain(\n{inner},\n)" if inner else "chain()"


def chain(*transforms: Transform) -> Chain:
    """Compose transforms, which are applied from left to right.

    Nested chains are flattened, so grouping has no effect. Step `i` receives the key folded with
    `i`. The input model of the chain is the default teacher of every step.

        recipe = ge.chain(ge.prune.magnitude(sparsity=0.5), ge.quantize.rtn("int8"))
        model, params, report = recipe(model, params)

    Args:
      *transforms: transforms in order.

    Returns:
      The chain, a transform.

    Raises:
      RecipeError: an argument is not a transform.
    """
    flat: list[Transform] = []
    for transform in transforms:
        if not isinstance(transform, Transform):
            raise RecipeError(f"chain takes transforms, found {type(transform).__name__}")
        flat.extend(transform.steps_in_order)
    return Chain(transforms=tuple(flat))


def to_json(transform: Transform) -> str:
    """Write a transform as JSON with every option.

        assert ge.recipe_from_json(ge.to_json(recipe)) == recipe

    Args:
      transform: a transform or a chain.

    Returns:
      JSON that `recipe_from_json` reads back to an equal transform.

    Raises:
      RecipeError: the transform contains arrays (a teacher), which JSON cannot store.
    """
    return json.dumps({"version": VERSION, **_to_object(transform)}, indent=2) + "\n"


def _to_object(transform: Transform) -> dict[str, Any]:
    if transform.teachers:
        raise RecipeError(
            f"{transform.name}: {', '.join(transform.teachers)}= contains arrays, which JSON "
            "cannot store; without it, the input model of the chain is used"
        )
    if isinstance(transform, Chain):
        options: dict[str, Any] = {"transforms": [_to_object(t) for t in transform.transforms]}
    else:
        options = {
            item.name: _json_value(getattr(transform, item.name))
            for item in dataclasses.fields(transform)
            if not item.metadata.get("arrays")
        }
    return {"name": transform.name, "options": options}


def _json_value(value: Any) -> Any:
    if isinstance(value, Format):
        return str(value)
    is_options = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_options else value
