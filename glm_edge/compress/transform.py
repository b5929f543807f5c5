"""Transforms: values that say how to compress a model, and the registry of their classes.

A transform is a frozen dataclass, `prune.structured(heads=0.25, neurons=0.3)`: its fields are its
options, checked once, when it is made. Calling it maps a model and its parameters to a model, its
parameters and a report. Transforms compose with `chain`.
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

from glm_edge.compress.calibration import check_without
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
    """Context of a transform besides the model: data, randomness, and the original.

    Attributes:
      calibration: batches that can be read more than once, or None.
      rng: jax key, or None.
      original: model and parameters that the outermost transform was given.
      progress: called as `progress(stage, done, total)`, True for a line on standard error, or
        None.
      without: inputs (`images`, `audio`) that calibration is known to lack.
      reference: the original after transforms that changed its numbers but not its function, such
        as a rotation; layers of a compressed model are compared with this one's while they have its
        shapes. None is the original.
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
        """Returns the calibration of a transform that needs some.

        Raises:
          DataError: there is none.
        """
        if self.calibration is None:
            raise DataError("calibration= is missing")
        return self.calibration

    def advance(self, stage: str, done: int, total: int) -> None:
        """Tells the progress callback, where there is one."""
        if callable(self.progress):
            self.progress(stage, done, total)


# Metadata of a field that holds arrays, or None, which JSON leaves out.
ARRAYS = {"arrays": True}
# Largest number of steps, rounds and the like.
MOST = 10**8
_LARGEST = 2**62
_OF_NNX = (
    "of nnx, pass None as the model and nnx.to_pure_dict(nnx.split(module)[1]) as params; "
    "transforms that need data take Linen modules"
)
# Vectors even where heads or a stack of layers give them further axes.
_VECTORS = ("bias", "scale")
# Options that a transform prints even at their defaults, as it does its first one.
_DEFINING = ("method", "steps")
# Of the JSON that `to_json` writes.
VERSION = 2


class Teacher(tuple):
    """A model and its parameters that teach a student; equal only to itself, as arrays are."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Teacher) and list(map(id, self)) == list(map(id, other))

    def __hash__(self) -> int:
        return hash(tuple(map(id, self)))

    def __repr__(self) -> str:
        return "…"


@dataclass(frozen=True, kw_only=True, repr=False)
class Transform:
    """A way to compress, as a value: it prints, compares, round-trips through JSON and is called.

    A subclass is made a frozen dataclass, and known by name, by `register`. Its fields are its
    options; it checks them in `__post_init__` and carries them out in `apply`.

        @ge.compress.register("mine.scaled")
        class Scaled(ge.Transform):
            factor: float = dataclasses.field(default=2.0, kw_only=False)

            def apply(self, model, params, context):
                scaled = jax.tree.map(lambda leaf: leaf * self.factor, params)
                return model, scaled, ge.Report.of([], params, scaled)

    Attributes:
      name: of the registered transform, such as `quantize.rtn`.
      called: the name under which a call makes it; as `name`, but for names that follow from
        options.
      exact: True where the function of the model stays as it was.
      needs_model: True where parameters alone do not do.
    """

    name: ClassVar[str] = ""
    called: ClassVar[str] = ""
    exact: ClassVar[bool] = False
    needs_model: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raises RecipeError for a value of another type than its field says."""
        kind: Any = type(self)
        types_of_fields = _annotations(kind)
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, item.name, value)
            check_type(self.name, item.name, value, types_of_fields[item.name])

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        """Compresses a model: as a call, within a chain.

        Args:
          model: Linen module, or None.
          params: its parameters.
          context: data, randomness and where the chain started.

        Returns:
          `(model, params, report)`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no apply")

    @property
    def steps_in_order(self) -> tuple["Transform", ...]:
        """The transforms of a chain; elsewhere the transform alone."""
        return (self,)

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the fields that hold arrays, which JSON cannot."""
        names = (item.name for item in dataclasses.fields(self))
        return tuple(name for name in names if isinstance(getattr(self, name), Teacher))

    def _set(self, **values: Any) -> None:
        """Replaces fields by their normal form, within `__post_init__`."""
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
        """Compresses a model; neither argument is changed.

        Args:
          model: Linen module; None for parameters alone, which transforms take that need no data.
          params: its parameters, arrays or boxes.
          calibration: batches (see `glm_edge.compress.batches`), a list or another collection that
            can be read more than once, or a `glm_edge.Calibration`, which says how a model reads
            batches of any other shape; None where the transform needs none.
          rng: jax key; None where nothing is drawn, or for the order in which data comes.
          progress: True for a line on standard error, or a function that is called as
            `progress(stage, done, total)`.
          without: inputs that the model takes and calibration is known to lack, of `images` and
            `audio`; any other lack is an error.

        Returns:
          `(model, params, report)`; the model is another one only if shapes changed.

        Raises:
          RecipeError: options do not fit the model, or an argument is no model or no parameters.
          DataError: calibration is missing or cannot be read more than once, or `without` names no
            input.
        """
        if isinstance(calibration, Mapping):
            raise DataError(
                "calibration is a list of batches, and this is a single one; pass [batch]"
            )
        if isinstance(calibration, Iterator):
            raise DataError(
                "calibration is an iterator that can be read only once; pass a list of batches, "
                "such as list(itertools.islice(batches, 16))"
            )
        _check_arguments(self.name, model, params)
        if model is None:
            _check_without_model(self, calibration)
        if calibration is not None and isinstance(params.get("params"), Mapping):
            others = ", ".join(sorted(set(params) - {"params"})) or "none other"
            raise RecipeError(
                f"{self.name}: params holds whole collections (params and {others}); pass "
                "variables['params'], and the others by Calibration(batches, variables=...)"
            )
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
    """Types of the fields of a class."""
    return typing.get_type_hints(kind)


def _check_arguments(name: str, model: Any, params: Any) -> None:
    """Raises RecipeError where an argument is no model, or no parameters of one."""
    form = f"{name}: call it as transform(model, params)"
    if isinstance(params, nn.Module):
        raise RecipeError(f"{form}; params is a {type(params).__name__}, a model")
    if _is_of_nnx(model) or _is_of_nnx(params):
        raise RecipeError(f"{name}: {_OF_NNX}")
    if isinstance(model, type):
        raise RecipeError(
            f"{form}; model is the class {model.__name__}, not a module made of it, "
            f"{model.__name__}(...)"
        )
    if model is not None and not isinstance(model, nn.Module):
        raise RecipeError(f"{form}; model is a {type(model).__name__}, not a Linen module")
    if not isinstance(params, Mapping):
        inside = " (pass its .params)" if hasattr(params, "params") else ""
        raise RecipeError(
            f"{form}; params is the nested dict of model.init(...)['params'], not "
            f"{type(params).__name__}{inside}"
        )
    for path, leaf in path_items(params):
        if not is_box(leaf) and not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise RecipeError(f"{form}; params/{path} is {type(leaf).__name__}, not an array")


def _is_of_nnx(value: Any) -> bool:
    """True for a module of nnx, a user's own or its class, and for what nnx makes of one."""
    # Who has such a value has imported nnx, which costs those who have none.
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return False
    kind = value if isinstance(value, type) else type(value)
    return issubclass(kind, nnx.Module) or kind.__module__.startswith("flax.nnx")


def _check_without_model(transform: Transform, calibration: Any) -> None:
    """Raises RecipeError where a transform cannot do with parameters alone."""
    names = sorted({step.name for step in transform.steps_in_order if step.needs_model})
    if names:
        raise RecipeError(f"{names[0]}: needs the model, a Linen module, and it is None; {_OF_NNX}")
    if calibration is not None:
        raise RecipeError(
            f"{transform.name}: calibration needs the model, a Linen module, and it is None; "
            f"{_OF_NNX}"
        )


def _unnamed(transform: Transform, model: Any, params: Params) -> tuple[str, ...]:
    """Says which arrays no `where` can reach, since a matrix is told by its name."""
    steps = transform.steps_in_order
    acting = [step for step in steps if step.name.startswith(("quantize.", "prune."))]
    # Tables of this library's models are meant to stay.
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
        f"{len(unnamed)} arrays of two axes or more are left as they are: {shown}; only parameters "
        f"named {', '.join(MATRIX_NAMES)} are considered",
    )


Kind = TypeVar("Kind", bound=Transform)
_REGISTRY: dict[str, type[Transform]] = {}


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def register(name: str, *others: str) -> Callable[[type[Kind]], type[Kind]]:
    """Makes a class a transform: a frozen dataclass of keyword-only fields, known by name.

    Args:
      name: such as `quantize.rtn`, in calls, chains and recipes.
      *others: further names under which recipes find the class, whose `name` then is a property.

    Returns:
      The decorator of a subclass of `Transform`.
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
    """Raises RecipeError unless an option is None or a regular expression."""
    if pattern is None:
        return
    try:
        compiled(pattern)
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"{transform}: {option}={pattern!r:.100} is not a regular expression that is searched "
            f"in bounded time: {error}"
        ) from error


def check_whole(transform: str, **options: Any) -> None:
    """Raises RecipeError unless every option is a whole number of 1 to `MOST`."""
    for option, number in options.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= MOST:
            raise RecipeError(
                f"{transform}: {option} must be a whole number of at least 1 and at most {MOST}, "
                f"not {number!r:.60}"
            )


def check_type(transform: str, option: str, value: Any, annotation: Any) -> None:
    """Raises RecipeError for a value of another type than annotated, NaN and infinity.

    Options of other types than `bool`, `int`, `float`, `str` and None are left to their transform.

    Args:
      transform: name, for messages.
      option: its name.
      value: of the option.
      annotation: of its field.
    """
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = typing.get_args(annotation) if union else (annotation,)
    if not set(kinds) <= {bool, int, float, str, type(None)}:
        return
    if any(_is_a(value, kind) for kind in kinds):
        return
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if number and not (math.isfinite(value) and abs(value) <= _LARGEST) and {int, float} & {*kinds}:
        raise RecipeError(
            f"{transform}: {option} must be finite and of ordinary size, not {value!r:.60}"
        )
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
    """True for an int or a float that is no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_fraction(transform: str, **fractions: Any) -> None:
    """Raises RecipeError unless every option is a fraction that removes less than everything."""
    for option, fraction in fractions.items():
        if not is_number(fraction) or not 0.0 <= fraction < 1.0:
            raise RecipeError(
                f"{transform}: {option} must be in 0..1 and below 1, so that the keep ratio is "
                f"above 0 and at most 1, not {fraction!r}"
            )


def registered(name: str) -> type[Transform]:
    """Looks up the class of a transform.

    Raises:
      RecipeError: no transform has this name.
    """
    if name not in _REGISTRY:
        raise RecipeError(f"unknown transform {name!r}; known: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


CHAIN = "chain"


@register(CHAIN)
class Chain(Transform):
    """Transforms that are applied from left to right; made by `chain`.

    Attributes:
      transforms: none of them a chain.
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
    """Applies transforms from left to right, itself a transform.

    Chains within a chain are flattened, so that grouping changes nothing. Step `i` gets the key
    folded with `i`, and the model that the chain started from is every step's default teacher.

        recipe = ge.chain(ge.prune.magnitude(sparsity=0.5), ge.quantize.rtn("int8"))
        model, params, report = recipe(model, params)

    Args:
      *transforms: what to apply.

    Returns:
      The chain.

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
    """Writes a transform as JSON, every option spelled out.

    Args:
      transform: or a chain of them.

    Returns:
      JSON that `recipe_from_json` reads back to an equal transform.

    Raises:
      RecipeError: the transform holds arrays (a teacher), which JSON cannot.
    """
    return json.dumps({"version": VERSION, **_to_object(transform)}, indent=2) + "\n"


def _to_object(transform: Transform) -> dict[str, Any]:
    if transform.teachers:
        raise RecipeError(
            f"{transform.name}: {', '.join(transform.teachers)}= holds arrays, which JSON cannot; "
            "leave it out and the model that the chain starts from is used"
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
