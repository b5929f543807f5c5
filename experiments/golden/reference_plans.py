"""Small reference models, and the draw of their hyperparameters."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

EOS = [2, 7]
PAD = 2
# Number of placeholder ids at the end of the vocabulary.
SPECIAL_IDS = 6

Rows = list[list[Any]]


@dataclass
class Plan:
    """A reference model and its inputs.

    Attributes:
      architecture: class of transformers.
      config: arguments of its configuration.
      style: version of the config.json format of transformers, 4 or 5.
      dtype: type of the stored weights.
      shards: number of files with weights.
      stored_head: whether a tied model also stores its head.
      extra_layer: whether the file contains an extra last layer, like GLM-OCR's.
      renames: pairs `(pattern, replacement)` for the stored names of another dialect.
      subcases: inputs by name: rows of tokens and media, or shapes of inputs.
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
    """A source of random hyperparameters; for tiny models, it always returns the first option."""

    def __init__(self, rng: np.random.Generator, tiny: bool):
        self.rng = rng
        self.tiny = tiny

    def of(self, first: Any, *others: Any) -> Any:
        """Draw one of the options."""
        options = (first, *others)
        return first if self.tiny else options[int(self.rng.integers(len(options)))]

    def count(self, low: int, high: int) -> int:
        """Draw an integer, both ends included."""
        return low if self.tiny else int(self.rng.integers(low, high + 1))

    def files(self, tiny_dtype: str = "bfloat16") -> dict[str, Any]:
        """Draw the layout of the weights in files."""
        others = ("float32", "float16", "bfloat16")
        return {"dtype": self.of(tiny_dtype, *others), "shards": self.of(1, 1, 2, 5)}
