"""Small reference models, and the draw of their hyperparameters."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

EOS = [2, 7]
PAD = 2
# Ids at the end of the vocabulary that stand for media.
SPECIAL_IDS = 6

Rows = list[list[Any]]


@dataclass
class Plan:
    """A reference model and what it is given.

    Attributes:
      architecture: class of transformers.
      config: arguments of its configuration.
      style: 4 or 5, the version of transformers whose config.json is written.
      dtype: of the stored weights.
      shards: files that hold them.
      stored_head: a tied model stores its head again.
      extra_layer: the file holds a layer after the last, as GLM-OCR's does.
      renames: `(pattern, replacement)` of the stored names, another dialect of the file.
      subcases: what is computed, by name: rows of tokens and media, or shapes of inputs.
    """

    architecture: str
    config: dict[str, Any]
    subcases: dict[str, Any]
    style: int = 5
    dtype: str = "float32"
    shards: int = 1
    stored_head: bool = False
    extra_layer: bool = False
    renames: list[tuple[str, str]] = field(default_factory=list)


class Draw:
    """Draws hyperparameters; where they shall be tiny, the first option is taken every time."""

    def __init__(self, rng: np.random.Generator, tiny: bool):
        self.rng = rng
        self.tiny = tiny

    def of(self, first: Any, *others: Any) -> Any:
        """Returns one of the options."""
        options = (first, *others)
        return first if self.tiny else options[int(self.rng.integers(len(options)))]

    def count(self, low: int, high: int) -> int:
        """Returns a whole number, both ends included."""
        return low if self.tiny else int(self.rng.integers(low, high + 1))

    def files(self, tiny_dtype: str = "bfloat16") -> dict[str, Any]:
        """Draws the layout of the weights in files."""
        others = ("float32", "float16", "bfloat16")
        return {"dtype": self.of(tiny_dtype, *others), "shards": self.of(1, 1, 2, 5)}
