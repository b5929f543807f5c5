"""Options of a student's loss and of the batches that it is taken on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glm_edge.compress import batches
from glm_edge.compress.batches import in_order
from glm_edge.compress.options import Options
from glm_edge.compress.transform import Context, Teacher, check_whole
from glm_edge.errors import RecipeError


@dataclass(frozen=True, kw_only=True, repr=False)
class IntermediateLosses(Options):
    """Weights of losses between intermediate outputs of student and teacher.

    Attributes:
      hidden: weight of the squared distance between layer outputs, relative to the teacher's
        squared norm. Where widths differ, a linear projection trains along and is then dropped.
      attention: weight of the divergence between attention weights, in nats. Where numbers of heads
        differ, the means over heads are compared.
      layers: teacher layer per student layer, from 0; None spaces them evenly.

    Raises:
      RecipeError: a weight is negative, both are zero, or `layers` are not layer indices.
    """

    hidden: float = 0.0
    attention: float = 0.0
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "layers", whole_numbers(name, "layers", self.layers))
        super().__post_init__()
        if self.hidden < 0.0 or self.attention < 0.0:
            raise RecipeError(f"{name}: hidden and attention must not be negative")
        if not self.hidden and not self.attention:
            raise RecipeError(f"{name}: needs hidden= or attention= above zero")


@dataclass(frozen=True, kw_only=True, repr=False)
class OnPolicy(Options):
    """Options of on-policy batches, which the student continues by sampling.

    The student samples a continuation of each prompt. There it learns from the teacher's
    predictions alone (`alpha` is 1).

    Attributes:
      share: fraction of on-policy batches, above 0 and at most 1.
      prompt: tokens per row that stay; None keeps all before the first that `loss_mask` teaches.
        Placeholders of images and audio always stay.
      temperature: of sampling; 0 takes the top-1 token.

    Raises:
      RecipeError: an option is out of range.
    """

    share: float = 1.0
    prompt: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if not 0.0 < self.share <= 1.0:
            raise RecipeError(f"{name}: share must be above 0 and at most 1, not {self.share!r}")
        if self.prompt is not None:
            check_whole(name, prompt=self.prompt)
        if self.temperature < 0.0:
            raise RecipeError(f"{name}: temperature must not be negative")


@dataclass(frozen=True)
class DistillOptions:
    """Loss of a student, for `train`; see `glm_edge.compress.distill` for the options."""

    temperature: float = 2.0
    alpha: float = 0.9
    beta: float = 0.0
    intermediates: IntermediateLosses | None = None
    vocabulary: tuple[int, ...] | None = None
    mixture: tuple[tuple[str, float], ...] | None = None
    on_policy: OnPolicy | None = None

    @property
    def needs_teacher(self) -> bool:
        """True if the loss has a term of the teacher."""
        return self.alpha > 0.0 or self.intermediates is not None or self.on_policy is not None

    def check(self, name: str) -> None:
        """Raise RecipeError where an option of the transform `name` has no meaning."""
        if self.temperature <= 0.0:
            raise RecipeError(f"{name}: temperature must be positive")
        for option in ("alpha", "beta"):
            if not 0.0 <= getattr(self, option) <= 1.0:
                raise RecipeError(f"{name}: {option} must be in 0..1")
        for kind, share in self.mixture or ():
            if kind not in batches.KINDS or not 0.0 < share < np.inf:
                raise RecipeError(
                    f"{name}: mixture= takes positive shares of {', '.join(batches.KINDS)}, not "
                    f"{share!r} of {kind!r}"
                )

    def data(self, context: Context, skip: int) -> Iterator[batches.Batch]:
        """Return an endless iterator over batches, without the first `skip`."""
        if self.mixture is None:
            return in_order(context.batches, context.rng, skip)
        return batches.in_proportion(context.batches, dict(self.mixture), context.rng, skip)


def as_teacher(transform: str, teacher: Any) -> Teacher | None:
    """Read the option `teacher` of a transform.

    Raises:
      RecipeError: `teacher` is not a pair of a model and its parameters.
    """
    if teacher is None or isinstance(teacher, Teacher):
        return teacher
    if not (isinstance(teacher, tuple) and len(teacher) == 2):
        raise RecipeError(f"{transform}: teacher must be (model, params)")
    return Teacher(teacher)


def whole_numbers(transform: str, option: str, values: Any) -> tuple[int, ...] | None:
    """Read an option that holds indices, or None.

    Raises:
      RecipeError: `values` are not whole numbers, or one is negative.
    """
    if values is None:
        return None
    array = np.asarray(values)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu" or array.min() < 0:
        raise RecipeError(f"{transform}: {option} must be whole numbers, none negative")
    return tuple(array.tolist())


def shares(transform: str, mixture: Any) -> tuple[tuple[str, float], ...] | None:
    """Read the option `mixture`: shares by kind, or None.

    Raises:
      RecipeError: `mixture` does not hold shares by kind, or is empty.
    """
    if mixture is None:
        return None
    try:
        pairs = [(str(kind), float(share)) for kind, share in dict(mixture).items()]
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"{transform}: mixture must hold shares by kind, such as {{'text': 1.0}}, not "
            f"{mixture!r:.60}"
        ) from error
    if not pairs:
        raise RecipeError(f"{transform}: mixture names no kind")
    return tuple(sorted(pairs))
