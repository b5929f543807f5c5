"""Vocabulary pruning: removal of tokens that are never read or written."""

import re
from collections.abc import Sequence
from dataclasses import InitVar, field
from typing import Any, ClassVar

import flax.linen as nn
import numpy as np

from glm_edge.compress.prune.shrink.arrays import check_kept, shrunk_report
from glm_edge.compress.prune.shrink.tokenizer import NAME, check_tokens, named_fields
from glm_edge.compress.prune.shrink.vocabulary import shrink_vocabulary
from glm_edge.compress.transform import Context, Result, Transform, register
from glm_edge.errors import RecipeError
from glm_edge.params.tree import Params

MAX_TOKENS = 1 << 24
_RANGES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


@register(NAME)
class VocabularyPruning(Transform):
    """Vocabulary pruning: removes tokens' rows of the embedding and of the head.

    The remaining tokens are renumbered in their order, also in the model's configuration. Later
    steps read the new ids: map their batches with `map_tokens`, or put this step last.
    `shrink_tokenizer` makes the tokenizer of the smaller model.

    Without `tokenizer`, only tokens that the model's configuration names are protected (ends of
    text, padding, placeholders). Other special tokens such as `<|user|>`, bytes, and the parts of
    merges are then removed like any token, and text that needs them cannot be encoded.

    Attributes:
      keep: ascending ids that remain, from `frequent_tokens`, or as text, `0-10,12,40-99`.
      tokenizer: a `tokenizers.Tokenizer`, checked at once against these tokens; it is not stored,
        so that a recipe remains data.

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
        smaller, shrunk = shrink_vocabulary(model, params, from_ranges(str(self.keep)))
        names = ", ".join(named_fields(model.config)) or "it names none"
        note = (
            f"tokens that the configuration names stayed ({names}); other special tokens, bytes "
            "and parts of tokens are checked where vocabulary is given tokenizer="
        )
        return smaller, shrunk, shrunk_report(NAME, (model, params), (smaller, shrunk), (note,))


vocabulary = VocabularyPruning


def to_ranges(ascending: Sequence[int] | np.ndarray) -> str:
    """Format ascending ids as text, `0-10,12`."""
    ids = np.asarray(ascending)
    starts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 2) != 1)
    ends = np.append(starts[1:], len(ids)) - 1
    pairs = zip(ids[starts].tolist(), ids[ends].tolist(), strict=True)
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)


def from_ranges(text: str) -> np.ndarray:
    """Parse the text of `to_ranges`.

    Raises:
      RecipeError: the text is not of this form.
    """
    if not _RANGES.fullmatch(text):
        raise RecipeError(f"{NAME}: keep must be ids such as '0-10,12,40-99', not {text!r:.60}")
    ids: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) >= MAX_TOKENS:
            raise RecipeError(f"{NAME}: keep has {part:.40}, which is not an id of a token")
        ids.extend(range(int(first), int(last or first) + 1))
    return np.array(ids, np.int64)
