"""Removal of rows of the embedding and the head."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from glm_edge import params as boxes
from glm_edge.compress.prune.shrink.arrays import check_kept
from glm_edge.compress.prune.shrink.tokenizer import NAME, named_fields, named_tokens
from glm_edge.configs import GLMConfig, TextConfig
from glm_edge.errors import DataError, RecipeError
from glm_edge.params.tree import Params


def shrink_vocabulary(
    model: nn.Module, params: Params, keep: Sequence[int] | np.ndarray
) -> tuple[nn.Module, Params]:
    """Keep some rows of the embedding and the head.

    Args:
      model: a GLM or a text encoder.
      params: its parameters; rows of quantized weights keep their scales.
      keep: ascending ids of the tokens that remain.

    Returns:
      `(model, params)`, whose logits are those of the model at the remaining tokens.

    Raises:
      RecipeError: the model has no vocabulary, an id does not exist, or a token would go that the
        configuration names.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, GLMConfig | TextConfig):
        raise RecipeError(f"{NAME}: {type(model).__name__} has no vocabulary")
    holder = config.decoder if isinstance(config, GLMConfig) else config
    kept_ids = check_kept(keep, holder.vocab_size, f"{NAME}: tokens")
    number = {old: new for new, old in enumerate(kept_ids.tolist())}
    for index, name in named_tokens(config).items():
        if index not in number:
            raise RecipeError(
                f"{NAME}: token {index} must stay, since it is {name} of the model; keep= lacks it"
            )
    params = dict(params)
    for name in ("embed", "head"):
        if name in params:
            path = f"{name}/weight"
            params[name] = {**params[name], "weight": _rows(params[name]["weight"], kept_ids, path)}
    smaller: Any = dataclasses.replace(holder, vocab_size=len(kept_ids))
    if isinstance(config, GLMConfig):
        fields = {field: getattr(config, field) for field in named_fields(config)}
        renumbered: dict[str, Any] = {
            field: tuple(number[i] for i in value) if isinstance(value, tuple) else number[value]
            for field, value in fields.items()
        }
        smaller = dataclasses.replace(config, decoder=smaller, **renumbered)
    return model.clone(config=smaller), params


def map_tokens(tokens: ArrayLike, keep: Sequence[int]) -> np.ndarray:
    """Renumber token ids for the smaller model.

    Args:
      tokens: integers of any shape, of the larger vocabulary.
      keep: ascending ids that remain.

    Returns:
      int32 of the same shape.

    Raises:
      DataError: a token was removed.
    """
    tokens, ids = np.asarray(tokens), np.asarray(keep)
    numbers = np.searchsorted(ids, tokens).clip(max=len(ids) - 1)
    lost = ids[numbers] != tokens
    if lost.any():
        raise DataError(
            f"{NAME}: token {tokens[lost].flat[0]} did not stay, nor did {int(lost.sum())} of "
            f"{tokens.size} in all; encode the text with the smaller tokenizer"
        )
    return numbers.astype(np.int32)


def _rows(leaf: Any, index: np.ndarray, path: str) -> Any:
    """Return the rows of an array or box; scales are per row or shared by all rows."""
    if isinstance(leaf, boxes.Masked):
        mask = jnp.take(leaf.mask, index, axis=0)
        return boxes.Masked(value=_rows(leaf.value, index, path), mask=mask)
    if not isinstance(leaf, boxes.Quantized | boxes.FakeQuantized):
        return jnp.take(leaf, index, axis=0)
    if leaf.kernel_shape:
        raise RecipeError(f"{NAME}: {path} is a quantized kernel of a stock module")
    stored = leaf.data if isinstance(leaf, boxes.Quantized) else leaf.value
    names = ("data" if isinstance(leaf, boxes.Quantized) else "value", "scale", "zero")
    arrays = {name: getattr(leaf, name) for name in names}
    return leaf.replace(
        **{
            name: jnp.take(array, index, axis=0)
            for name, array in arrays.items()
            if array is not None and array.shape[0] == stored.shape[0]
        }
    )
