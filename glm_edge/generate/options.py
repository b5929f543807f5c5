"""Options of the cache and of skipped computation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from glm_edge.errors import DataError
from glm_edge.generate.early_exit import EarlyExit
from glm_edge.generate.token_pruning import VisionTokens
from glm_edge.kernels import cache as cache_kernels

_CACHE_DTYPES = ("float32", "bfloat16", "float16", *cache_kernels.LARGEST)


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """Options of the cache and of skipped computation, for `generate` and `stream`.

    Attributes:
      cache_dtype: type of cached keys and values: a floating one, or `int8` or `int4` with one
        scale per token and head.
      early_exit: from `glm_edge.generate.early_exit`; None runs all layers for each token.
      vision_tokens: from `glm_edge.generate.drop_vision_tokens`; None keeps all.
      beyond_context: allows more positions than `max_position_embeddings`, on which the model was
        not trained.

    Raises:
      DataError: a cache cannot have this type, or an option has another type than here.
    """

    cache_dtype: Any = "float32"
    early_exit: EarlyExit | None = None
    vision_tokens: VisionTokens | None = None
    beyond_context: bool = False

    def __post_init__(self) -> None:
        for option, kind in (("early_exit", EarlyExit), ("vision_tokens", VisionTokens)):
            value = getattr(self, option)
            if value is not None and not isinstance(value, kind):
                raise DataError(f"{option} must be {kind.__name__} or None, got {value!r:.60}")
        try:
            name = jnp.dtype(self.cache_dtype).name
        except TypeError:
            name = None
        if name not in _CACHE_DTYPES:
            known = ", ".join(_CACHE_DTYPES)
            raise DataError(f"cache_dtype: one of {known}, not {self.cache_dtype!r}")
        object.__setattr__(self, "cache_dtype", name)
