"""Transforms: values that say how to compress a model, and the registry of what carries them out.

A transform is data, `prune.structured(heads=0.25, neurons=0.3)`; calling it maps a model and its
parameters to a model, its parameters and a report. Transforms compose with `chain`.
"""

import dataclasses
import inspect
import numbers
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.compress.calibration import check_without
from glm_edge.compress.progress import Progress, progress_of
from glm_edge.compress.report import Report
from glm_edge.errors import DataError, RecipeError
from glm_edge.params import is_box
from glm_edge.params.patterns import compiled, shared_steps
from glm_edge.params.tree import MATRIX_NAMES, Params, path_items

Batch = dict[str, Any]
Result = tuple[nn.Module, Params, Report]


@dataclass(frozen=True)
class Context:
    """What a transform may use besides the model: data, randomness, and where it started.

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

    def advance(self, stage: str, done: int, total: int) -> None:
        """Tells the progress callback, where there is one."""
        if self.progress is not None:
            self.progress(stage, done, total)


class Entry(NamedTuple):
    """The factory that builds a transform from options, and the function that carries it out."""

    factory: Callable[..., "Transform"]
    apply: Callable[..., Result]
    exact: bool = False


_REGISTRY: dict[str, Entry] = {}
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
_DEFINING = ("bits", "group_size", "method", "steps")


@dataclass(frozen=True, eq=False, repr=False)
class Transform:
    """How to compress, as a value: it prints, compares, round-trips through JSON and is called.

    Attributes:
      name: of the registered transform, such as `quantize.rtn`.
      options: JSON-ready, every option spelled out.
      objects: arguments that JSON cannot hold (a teacher's arrays).
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    objects: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self.name, self.options)
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        object.__setattr__(self, "objects", MappingProxyType(dict(self.objects)))

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
            model, changed, report = self.run(model, params, context)
        notes = (*report.notes, *_unnamed(self, model, params))
        return model, changed, dataclasses.replace(report, notes=notes)

    def run(self, model: nn.Module, params: Params, context: Context) -> Result:
        """As a call, within a chain."""
        return entry(self.name).apply(model, params, context, **self.options, **self.objects)

    def __repr__(self) -> str:
        if self.name == CHAIN:
            inner = ",\n".join(f"  {t!r}" for t in self.options["transforms"])
            return f"chain(\n{inner},\n)" if inner else "chain()"
        parameters = inspect.signature(entry(self.name).factory).parameters
        first = next(iter(parameters), None)
        shown = [f"{k}=…" for k in self.objects] + [
            f"{key}={value!r}"
            for key, value in self.options.items()
            if key not in parameters
            or parameters[key].default != value
            or (value is not None and (key == first or key in _DEFINING))
            # A type that is not bits wide comes in their place.
            if key != "bits" or self.options.get("qtype") is None
        ]
        return f"{self.name}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Transform):
            return NotImplemented
        return (
            self.name == other.name
            and dict(self.options) == dict(other.options)
            and {k: id(v) for k, v in self.objects.items()}
            == {k: id(v) for k, v in other.objects.items()}
        )

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted(self.options.items()))))


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
    # The table asks this module for the registered transforms.
    from glm_edge.compress.methods import ANY, METHODS, YES

    apart = {method.name for method in METHODS if method.data == YES or method.models != ANY}
    names = sorted({step.name for step in _steps(transform)} & apart)
    if names:
        raise RecipeError(f"{names[0]}: needs the model, a Linen module, and it is None; {_OF_NNX}")
    if calibration is not None:
        raise RecipeError(
            f"{transform.name}: calibration needs the model, a Linen module, and it is None; "
            f"{_OF_NNX}"
        )


def _steps(transform: Transform) -> tuple[Transform, ...]:
    return transform.options["transforms"] if transform.name == CHAIN else (transform,)


def _unnamed(transform: Transform, model: Any, params: Params) -> tuple[str, ...]:
    """Says which arrays no `where` can reach, since a matrix is told by its name."""
    acting = [step for step in _steps(transform) if step.name.startswith(("quantize.", "prune."))]
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


def register(
    name: str,
    factory: Callable[..., Transform],
    apply: Callable[..., Result],
    exact: bool = False,
) -> None:
    """Makes a transform known by name, to calls and to recipes.

    Args:
      name: such as `quantize.rtn`.
      factory: checks options and returns the `Transform`.
      apply: called as `apply(model, params, context, **options, **objects)`.
      exact: leaves the function of the model as it was.
    """
    _REGISTRY[name] = Entry(factory, apply, exact)


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


def check_types(name: str, options: Mapping[str, Any]) -> None:
    """Raises RecipeError for a value of another type than its option says, NaN and infinity.

    Options of other types than `bool`, `int`, `float`, `str` and None are left to their transform.

    Args:
      name: of the registered transform.
      options: by name.
    """
    parameters = inspect.signature(entry(name).factory).parameters
    for option, value in options.items():
        annotation = parameters[option].annotation if option in parameters else Any
        union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
        kinds = typing.get_args(annotation) if union else (annotation,)
        if not set(kinds) <= {bool, int, float, str, type(None)}:
            continue
        if not any(_is_a(value, kind) for kind in kinds):
            wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            raise RecipeError(
                f"{name}: {option} must be {wanted}, finite and of ordinary size, not {value!r:.60}"
            )


def _is_a(value: Any, kind: type) -> bool:
    if kind is type(None) or isinstance(value, bool):
        return isinstance(value, kind)
    if kind is int:
        return isinstance(value, numbers.Integral) and abs(value) <= _LARGEST
    if kind is float:
        return isinstance(value, numbers.Real) and abs(value) <= _LARGEST
    return isinstance(value, kind) and "\0" not in value


def check_fraction(transform: str, **fractions: Any) -> None:
    """Raises RecipeError unless every option is a fraction that removes less than everything."""
    for option, fraction in fractions.items():
        number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
        if not number or not 0.0 <= fraction < 1.0:
            raise RecipeError(
                f"{transform}: {option} must be in 0..1 and below 1, so that the keep ratio is "
                f"above 0 and at most 1, not {fraction!r}"
            )


def entry(name: str) -> Entry:
    """Looks up a registered transform.

    Raises:
      RecipeError: no transform has this name.
    """
    if name not in _REGISTRY:
        raise RecipeError(f"unknown transform {name!r}; known: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


CHAIN = "chain"


def chain(*transforms: Transform) -> Transform:
    """Applies transforms from left to right, itself a transform.

    Chains within a chain are flattened, so that grouping changes nothing. Step `i` gets the key
    folded with `i`, and the model that the chain started from is every step's default teacher.

        recipe = ge.chain(ge.prune.magnitude(sparsity=0.5), ge.quantize.rtn(bits=8))
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
        inner = transform.options["transforms"] if transform.name == CHAIN else (transform,)
        flat.extend(inner)
    return Transform(CHAIN, {"transforms": tuple(flat)})


def _apply_chain(
    model: nn.Module, params: Params, context: Context, transforms: tuple[Transform, ...]
) -> Result:
    report = Report.start(params)
    for index, transform in enumerate(transforms):
        rng = None if context.rng is None else jax.random.fold_in(context.rng, index)
        step = dataclasses.replace(context, rng=rng)
        before = params
        model, params, done = transform.run(model, params, step)
        if entry(transform.name).exact and context.reference[1] is before:
            context = dataclasses.replace(context, reference=(model, params))
        report = report + done
    return model, params, report


register(CHAIN, chain, _apply_chain)
