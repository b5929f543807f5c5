"""Inputs of a model that reads text, images and recordings."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from glm_edge.errors import DataError


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class Inputs(Mapping):
    """Inputs of a model, as a `Processor` makes them; a mapping of the arrays that are not None.

    A batch of token ids alone needs no more than `Inputs([[5, 6, 7]])`. Rows of other lengths are
    padded, with `valid` False at padding.

    Attributes:
      tokens: int [B, T]; padding may be anywhere, a `Processor` pads on the left.
      valid: bool [B, T], False at padding; None means no padding.
      images: in reading order over the batch, [H, W, C] or a video's [F, H, W, C]; or one array
        [B, H, W, C], one image per row.
      audio: float32 [N, frames, mel_bins], chunks in reading order; without `audio_frames`, one
        recording per row.
      audio_frames: int32 [N], valid frames of each chunk.

    Raises:
      DataError: `tokens` are not integers [B, T], or `valid` does not fit them.
    """

    tokens: Any
    _: KW_ONLY
    valid: Any = None
    images: Any = None
    audio: Any = None
    audio_frames: Any = None

    def __post_init__(self) -> None:
        tokens = _rows(self.tokens, "prompts")
        valid = np.ones(tokens.shape, bool)
        if self.valid is not None:
            valid = _rows(self.valid, "valid") != 0
        if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
            raise DataError(
                f"prompts must be integers [rows, tokens], found {tokens.dtype} {tokens.shape}"
            )
        if valid.shape != tokens.shape:
            raise DataError(f"valid has shape {valid.shape}, the prompts {tokens.shape}")
        if not valid.any(axis=1).all():
            raise DataError(f"prompt {int(np.argmin(valid.any(axis=1)))} holds padding only")
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "valid", valid)

    @classmethod
    def of(cls, inputs: "Mapping[str, Any] | ArrayLike") -> "Inputs":
        """Read inputs from `Inputs`, a mapping of the same names, or an int array [B, T].

        Raises:
          DataError: a name is unknown or `tokens` is missing, or as the constructor.
        """
        if isinstance(inputs, cls):
            return inputs
        if not isinstance(inputs, Mapping):
            return cls(inputs)
        known = [item.name for item in dataclasses.fields(cls)]
        unknown = next((name for name in inputs if name not in known), None)
        if unknown is not None or "tokens" not in inputs:
            fault = "lack 'tokens'" if unknown is None else f"have no {unknown!r:.60}"
            raise DataError(f"inputs {fault}; known: {', '.join(known)}")
        return cls(**inputs)

    def __getitem__(self, name: str) -> Any:
        if name not in tuple(self):
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        fields = dataclasses.fields(self)
        return (item.name for item in fields if getattr(self, item.name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        """Return the arrays of all fields."""
        return tuple(getattr(self, item.name) for item in dataclasses.fields(self)), None

    @classmethod
    def tree_unflatten(cls, _: None, arrays: tuple[Any, ...]) -> "Inputs":
        """Rebuild without validation: the arrays may be tracers."""
        rebuilt = object.__new__(cls)
        for item, array in zip(dataclasses.fields(cls), arrays, strict=True):
            object.__setattr__(rebuilt, item.name, array)
        return rebuilt


def _rows(values: Any, name: str) -> np.ndarray:
    try:
        rows = np.asarray(values)
    except ValueError as error:
        raise DataError(
            f"{name} must be rows of one length; pad them and mark padding in valid"
        ) from error
    if rows.dtype.kind not in "biuf":
        raise DataError(f"{name} must be numbers [rows, tokens], found {rows.dtype} {rows.shape}")
    return rows
