"""Removing rows of the embedding and the head: tokens that are never read or written."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import InitVar, field
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from glm_edge import params as boxes
from glm_edge.compress.prune.shrink.arrays import check_kept, shrunk_report
from glm_edge.compress.prune.shrink.tokenizer import NAME, check_tokens, named_fields, named_tokens
from glm_edge.compress.transform import Context, Result, Transform, register
from glm_edge.configs import GLMConfig, TextConfig
from glm_edge.errors import DataError, RecipeError
from glm_edge.params.tree import Params

MAX_TOKENS = 1 << 24
_RANGES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


@register(NAME)
class VocabularyPruning(Transform):
    """Removes tokens: their rows of the embedding and of the head.

    The tokens that stay are numbered anew in their order, in the model's configuration too. Later
    steps read other ids, so map their batches (`map_tokens`) or let this step come last;
    `shrink_tokenizer` makes the tokenizer that belongs to the smaller model.

    Without `tokenizer` only tokens are protected that the model's configuration names (ends of
    text, padding, placeholders). The tokenizer's other special tokens, such as `<|user|>`, its
    bytes and the parts that merges are made of are then removed like any others, and what needs
    them can no longer be written.

    Attributes:
      keep: ascending ids that stay, from `frequent_tokens`, or the same as text, `0-10,12,40-99`.
      tokenizer: a `tokenizers.Tokenizer` that is asked at once whether it can do with these tokens;
        it is not kept, so that a recipe remains data.

    Raises:
      RecipeError: ids do not ascend; with `tokenizer`, a special token, a byte or a part of another
        token would go; on call, a token that the configuration names would go, or ids exceed the
        vocabulary.

    References:
      Efficient Multilingual Language Model Compression through Vocabulary Trimming,
      https://arxiv.org/abs/2305.15020.
    """

    needs_model: ClassVar[bool] = True

    keep: str | Sequence[int] = field(kw_only=False)
    tokenizer: InitVar[Any] = None

    def __post_init__(self, tokenizer: Any) -> None:
        ids = from_ranges(self.keep) if isinstance(self.keep, str) else np.asarray(self.keep)
        ids = check_kept(ids, MAX_TOKENS, f"{NAME}: tokens")
        if tokenizer is not None:
            if not hasattr(tokenizer, "get_vocab"):
                raise RecipeError(
                    f"{NAME}: tokenizer must be a tokenizer of the tokenizers library, not a "
                    f"{type(tokenizer).__name__}; JSON cannot hold one"
                )
            check_tokens(tokenizer, ids)
        self._set(keep=to_ranges(ids))
        super().__post_init__()

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        smaller, shrunk = shrink_vocabulary(model, params, from_ranges(self.keep))
        names = ", ".join(named_fields(model.config)) or "it names none"
        note = (
            f"tokens that the configuration names stayed ({names}); other special tokens, bytes "
            "and parts of tokens are checked where vocabulary is given tokenizer="
        )
        return smaller, shrunk, shrunk_report(NAME, (model, params), (smaller, shrunk), (note,))


vocabulary = VocabularyPruning


def shrink_vocabulary(
    model: nn.Module, params: Params, keep: Sequence[int]
) -> tuple[nn.Module, Params]:
    """Keeps some rows of the embedding and the head.

    Args:
      model: a GLM or a text encoder.
      params: its parameters; rows of quantized weights are taken with their scales.
      keep: ascending ids of the tokens that stay.

    Returns:
      `(model, params)`, whose logits are those of the model at the tokens that stay.

    Raises:
      RecipeError: the model has no vocabulary, an id does not exist, or a token would go that the
        configuration names.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, GLMConfig | TextConfig):
        raise RecipeError(f"{NAME}: {type(model).__name__} has no vocabulary")
    holder = config.decoder if isinstance(config, GLMConfig) else config
    keep = check_kept(keep, holder.vocab_size, f"{NAME}: tokens")
    number = {old: new for new, old in enumerate(keep.tolist())}
    for index, name in named_tokens(config).items():
        if index not in number:
            raise RecipeError(
                f"{NAME}: token {index} must stay, since it is {name} of the model; keep= lacks it"
            )
    params = dict(params)
    for name in ("embed", "head"):
        if name in params:
            path = f"{name}/weight"
            params[name] = {**params[name], "weight": _rows(params[name]["weight"], keep, path)}
    smaller = dataclasses.replace(holder, vocab_size=len(keep))
    if isinstance(config, GLMConfig):
        fields = {field: getattr(config, field) for field in named_fields(config)}
        renumbered = {
            field: tuple(number[i] for i in value) if isinstance(value, tuple) else number[value]
            for field, value in fields.items()
        }
        smaller = dataclasses.replace(config, decoder=smaller, **renumbered)
    return model.clone(config=smaller), params


def map_tokens(tokens: ArrayLike, keep: Sequence[int]) -> np.ndarray:
    """Numbers token ids as the smaller model does.

    Args:
      tokens: integers of any shape, of the larger vocabulary.
      keep: ascending ids that stayed.

    Returns:
      int32 of the same shape.

    Raises:
      DataError: a token did not stay.
    """
    tokens, keep = np.asarray(tokens), np.asarray(keep)
    places = np.searchsorted(keep, tokens).clip(max=len(keep) - 1)
    lost = keep[places] != tokens
    if lost.any():
        raise DataError(
            f"{NAME}: token {tokens[lost].flat[0]} did not stay, nor did {int(lost.sum())} of "
            f"{tokens.size} in all; encode the text with the smaller tokenizer"
        )
    return places.astype(np.int32)


def to_ranges(ids: Sequence[int]) -> str:
    """Ascending ids as text, `0-10,12`."""
    ids = np.asarray(ids)
    starts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 2) != 1)
    ends = np.append(starts[1:], len(ids)) - 1
    pairs = zip(ids[starts].tolist(), ids[ends].tolist(), strict=True)
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)


def from_ranges(text: str) -> np.ndarray:
    """Inverse of `to_ranges`.

    Raises:
      RecipeError: it is no such text.
    """
    if not _RANGES.fullmatch(text):
        raise RecipeError(f"{NAME}: keep must be ids such as '0-10,12,40-99', not {text!r:.60}")
    ids: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) >= MAX_TOKENS:
            raise RecipeError(f"{NAME}: keep holds {part:.40}, which is no id of a token")
        ids.extend(range(int(first), int(last or first) + 1))
    return np.array(ids, np.int64)


def _rows(leaf: Any, index: np.ndarray, path: str) -> Any:
    """Rows of an array or box, whose scales may be one a row or one for all."""
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
