"""Groups of options that a transform takes as one field, such as `train=`."""

import dataclasses
import functools
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from glm_edge.compress.transform import check_type, check_whole
from glm_edge.errors import RecipeError

COMPUTE = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True, repr=False)
class Options:
    """A group of options, checked once, when it is made; JSON holds it as an object.

    A group prints only the options that differ from their defaults.
    """

    def __post_init__(self) -> None:
        """Raise RecipeError for a value of another type than its field says."""
        kind: Any = type(self)
        annotations = _annotations(kind)
        for item in dataclasses.fields(self):
            check_type(
                type(self).__name__, item.name, getattr(self, item.name), annotations[item.name]
            )

    def __repr__(self) -> str:
        items = ((item, getattr(self, item.name)) for item in dataclasses.fields(self))
        shown = [f"{item.name}={value!r}" for item, value in items if value != item.default]
        return f"{type(self).__name__}({', '.join(shown)})"

    @classmethod
    def of(cls, transform: str, option: str, value: Any) -> Self:
        """Read an option of a transform: a group, or a mapping as JSON holds it.

        Args:
          transform: name, for messages.
          option: its name, for messages.
          value: of the option.

        Raises:
          RecipeError: `value` is neither, or one of its options is unknown or has no meaning.
        """
        if isinstance(value, cls):
            return value
        known = [item.name for item in dataclasses.fields(cls)]
        if not isinstance(value, Mapping):
            raise RecipeError(
                f"{transform}: {option} must be {cls.__name__}({known[0]}=…), not {value!r:.60}"
            )
        unknown = next((name for name in value if name not in known), None)
        if unknown is not None:
            raise RecipeError(
                f"{transform}: {option} has no option {unknown!r:.60}; known: {', '.join(known)}"
            )
        try:
            return cls(**value)
        except RecipeError as error:
            raise RecipeError(f"{transform}: {error}") from error


@functools.cache
def _annotations(kind: type) -> dict[str, Any]:
    """Return the types of the fields of a class."""
    return typing.get_type_hints(kind)


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainOptions(Options):
    """Length and speed of a training, for every transform that trains.

    The optimizer is AdamW after gradient clipping. Its learning rate rises linearly during warm-up
    and then decays by a cosine to a tenth of the peak.

    Attributes:
      steps: of the optimizer, one calibration batch each. Batches are read in an order drawn from
        `rng`, each once before any is repeated.
      learning_rate: peak.
      warmup: fraction of the steps.
      weight_decay: of AdamW.
      clip_norm: largest norm of the gradient.
      compute: `float32` or `bfloat16` products while training; None leaves the model unchanged.
      accumulate: batches per step. Their gradients add up to that of one batch with all their rows.
      state_dir: directory that stores the state of the training. Rerunning the same call resumes
        and gives bit-identical results. The directory also holds the curve, as `curve.csv`, and the
        parameters after the last good step when the loss is not finite.
      save_every: steps between two states.

    Raises:
      RecipeError: an option has no meaning.
    """

    steps: int = 200
    learning_rate: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    compute: str | None = None
    accumulate: int = 1
    state_dir: str | None = None
    save_every: int = 100

    def __post_init__(self) -> None:
        if isinstance(self.state_dir, os.PathLike):
            object.__setattr__(self, "state_dir", os.fspath(self.state_dir))
        super().__post_init__()
        name = type(self).__name__
        check_whole(name, steps=self.steps, accumulate=self.accumulate, save_every=self.save_every)
        if self.learning_rate <= 0.0 or self.clip_norm <= 0.0:
            raise RecipeError(f"{name}: learning_rate and clip_norm must be positive")
        if not 0.0 <= self.warmup < 1.0 or self.weight_decay < 0.0:
            raise RecipeError(f"{name}: warmup must be in 0..1 and weight_decay not negative")
        if self.compute is not None and self.compute not in COMPUTE:
            raise RecipeError(
                f"{name}: compute must be one of {', '.join(COMPUTE)}, not {self.compute!r}"
            )
