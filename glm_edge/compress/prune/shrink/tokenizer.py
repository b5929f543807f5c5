"""A tokenizer with fewer tokens, which reads what is left as it did before.

Works on the JSON of the tokenizers library, of the models BPE, WordPiece, WordLevel and Unigram.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from glm_edge.configs import GLMConfig, TextConfig
from glm_edge.errors import RecipeError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAME = "prune.vocabulary"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_KINDS = ("BPE", "WordPiece", "WordLevel", "Unigram")
_FIELDS = (
    "eos_token_ids",
    "pad_token_id",
    "image_token_id",
    "audio_token_id",
    "video_token_id",
    "image_boundary_ids",
    "video_boundary_ids",
)


class Vocabulary:
    """Fields of a tokenizer's JSON about its tokens.

    Attributes:
      fields: of the JSON.
      base: token to id, without added tokens that the model lacks.
      added: added tokens, with their fields.
      required: id to the reason why it cannot go.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Read a tokenizer.

        Args:
          tokenizer: a `tokenizers.Tokenizer`.

        Raises:
          RecipeError: its model is of a kind that cannot be cut.
        """
        self.fields = json.loads(tokenizer.to_str())
        model = self.fields["model"]
        self.kind = model.get("type", "BPE")
        affixes = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
        if self.kind not in _KINDS or (self.kind == "BPE" and any(affixes)):
            raise RecipeError(
                f"{NAME}: a {self.kind} tokenizer with {affixes} affixes cannot be cut; known: "
                f"{', '.join(_KINDS)}, BPE without affixes"
            )
        if self.kind == "Unigram":
            self.base = {token: index for index, (token, _) in enumerate(model["vocab"])}
        else:
            self.base = dict(model["vocab"])
        self.added = list(self.fields.get("added_tokens") or [])
        self.merges = [
            tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
            for merge in model.get("merges", [])
        ]
        self.tokens = {index: token for token, index in self.base.items()}
        self.tokens |= {token["id"]: token["content"] for token in self.added}
        self.required = self._required()

    def _required(self) -> dict[int, str]:
        model = self.fields["model"]
        required: dict[int, str] = {}
        if model.get("byte_fallback"):
            needed = [token for token in self.base if _BYTE_TOKEN.fullmatch(token)]
            reason = "a byte that any text may hold"
            required |= dict.fromkeys((self.base[token] for token in needed), reason)
        elif self.kind == "BPE":
            alphabet = _byte_alphabet() if _has_step(self.fields, "ByteLevel") else None
            needed = [t for t in self.base if len(t) == 1 and (alphabet is None or t in alphabet)]
            reason = "a character" if alphabet is None else "a byte that any text may hold"
            required |= dict.fromkeys((self.base[token] for token in needed), reason)
        unknown = model.get("unk_token")
        if unknown in self.base:
            required[self.base[unknown]] = "the token of unknown text"
        if isinstance(model.get("unk_id"), int):
            required[model["unk_id"]] = "the token of unknown text"
        required |= dict.fromkeys(
            _processor_ids(self.fields.get("post_processor")), "added to texts"
        )
        required |= {token["id"]: "a special token" for token in self.added if token.get("special")}
        return required

    @functools.cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        ranks: dict[tuple[str, str], int] = {}
        for rank, merge in enumerate(self.merges):
            ranks.setdefault((merge[0], merge[1]), rank)
        return ranks

    def parts(self, index: int) -> set[int]:
        """Return the token and the tokens that merge into it, without which it never occurs."""
        ids, text = {index}, self.tokens[index]
        if self.kind != "BPE" or self.base.get(text) != index:
            return ids
        symbols = list(text)
        while len(symbols) > 1:
            pairs = list(itertools.pairwise(symbols))
            ranked = [
                (self._ranks[pair], at) for at, pair in enumerate(pairs) if pair in self._ranks
            ]
            if not ranked:
                # No merges lead to it: it is read only as a whole word, if at all.
                return {index}
            at = min(ranked)[1]
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            ids.add(self.base[symbols[at]])
        return ids | {self.base[symbol] for symbol in text if symbol in self.base}


def check_tokens(tokenizer: Any, keep: Sequence[int] | np.ndarray) -> Vocabulary:
    """Check that a tokenizer can do with some of its tokens.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
      keep: ids that stay.

    Returns:
      Its vocabulary.

    Raises:
      RecipeError: a token that must stay is missing; the message says which and why.
    """
    vocabulary, ids = Vocabulary(tokenizer), set(map(int, keep))
    missing = [index for index in vocabulary.required if index not in ids]
    if missing:
        token, reason = vocabulary.tokens.get(missing[0]), vocabulary.required[missing[0]]
        raise RecipeError(
            f"{NAME}: token {missing[0]} ({token!r}) must stay, since it is {reason}"
            f"{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}; keep= lacks it"
        )
    for index in sorted(ids):
        lost = vocabulary.parts(index) - ids if index in vocabulary.tokens else set()
        if lost:
            part = min(lost)
            raise RecipeError(
                f"{NAME}: token {part} ({vocabulary.tokens[part]!r}) must stay, since merges make "
                f"token {index} ({vocabulary.tokens[index]!r}) of it; see frequent_tokens"
            )
    return vocabulary


def frequent_tokens(
    tokenizer: "Tokenizer",
    data: Iterable[Any],
    size: int | None = None,
    config: GLMConfig | TextConfig | None = None,
    min_count: int = 1,
) -> np.ndarray:
    """Choose tokens to keep: those that data hold most often, and all that must stay.

    Special tokens, the token of unknown text, bytes (or, without bytes, single characters) and
    tokens that the configuration names always stay, and so does what merges make on the way to a
    token that stays. Text whose tokens all stay is read as before; other text is read too, in more
    tokens.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
      data: texts, or arrays of token ids, which count alike.
      size: tokens to keep at most; None keeps every token that is frequent enough.
      config: of the model, whose placeholders and stop tokens stay.
      min_count: how often a token must occur.

    Returns:
      int64 ids, ascending, for `vocabulary` and `shrink_tokenizer`.

    Raises:
      RecipeError: `size` is below what must stay, or the tokenizer is of a kind that cannot be cut.
    """
    vocabulary = Vocabulary(tokenizer)
    counts = np.zeros(max(vocabulary.tokens) + 1, np.int64)
    for item in data:
        ids = (
            tokenizer.encode(item, add_special_tokens=False).ids if isinstance(item, str) else item
        )
        ids = np.asarray(ids, np.int64).reshape(-1)
        counts += np.bincount(ids[(ids >= 0) & (ids < len(counts))], minlength=len(counts))
    required_ids = set(vocabulary.required) | set(named_tokens(config))
    for index in sorted(required_ids & set(vocabulary.tokens)):
        required_ids |= vocabulary.parts(index)
    if size is not None and len(required_ids) > size:
        raise RecipeError(f"{NAME}: size={size}, but {len(required_ids)} tokens must stay")
    for index in np.argsort(-counts, kind="stable").tolist():
        if counts[index] < max(min_count, 1):
            break
        needed = vocabulary.parts(index) - required_ids if index in vocabulary.tokens else set()
        if size is None or len(required_ids) + len(needed) <= size:
            required_ids |= needed
    return np.array(sorted(required_ids), np.int64)


def shrink_tokenizer(tokenizer: "Tokenizer", keep: Sequence[int]) -> "Tokenizer":
    """Drop tokens from a tokenizer and number the others anew, in the order of `keep`.

    Save it with the model: `save(model, params, path, extras={"tokenizer.json":
    tokenizer.to_str().encode()})`. Files that name ids, such as generation_config.json, belong to
    the larger vocabulary and must not be copied.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
      keep: ascending ids that stay, as the model's.

    Returns:
      Another `tokenizers.Tokenizer`.

    Raises:
      RecipeError: a token that must stay is missing, or the ids cannot be numbered anew.
    """
    vocabulary = check_tokens(tokenizer, keep)
    number = {int(old): new for new, old in enumerate(keep)}
    fields, model = vocabulary.fields, vocabulary.fields["model"]
    base = {t: number[i] for t, i in vocabulary.base.items() if i in number}
    if vocabulary.kind == "Unigram":
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in number]
        if isinstance(model.get("unk_id"), int):
            model["unk_id"] = number[model["unk_id"]]
    else:
        model["vocab"] = base
    if vocabulary.kind == "BPE":
        model["merges"] = [list(m) for m in vocabulary.merges if {*m, m[0] + m[1]} <= base.keys()]
    fields["added_tokens"] = [
        {**token, "id": number[token["id"]]} for token in vocabulary.added if token["id"] in number
    ]
    _renumber(fields.get("post_processor"), number)
    made = type(tokenizer).from_str(json.dumps(fields))
    for old, new in number.items():
        token = vocabulary.tokens.get(old)
        if token is not None and made.token_to_id(token) != new:
            raise RecipeError(
                f"{NAME}: token {old} ({token!r}) cannot become {new}: the tokenizer numbers added "
                f"tokens after all others; keep only ids that it has"
            )
    return made


def named_fields(config: Any) -> dict[str, tuple[int, ...]]:
    """Return the fields of a configuration that name tokens, with their ids."""
    fields = {}
    for field in _FIELDS:
        value = getattr(config, field, None)
        ids = value if isinstance(value, tuple) else () if value is None else (value,)
        if ids:
            fields[field] = ids
    return fields


def named_tokens(config: Any) -> dict[int, str]:
    """Return the ids that a configuration names, and a field that does."""
    return {index: field for field, ids in named_fields(config).items() for index in ids}


@functools.cache
def _byte_alphabet() -> frozenset[str]:
    from tokenizers import pre_tokenizers

    return frozenset(pre_tokenizers.ByteLevel.alphabet())


def _has_step(fields: dict[str, Any], kind: str) -> bool:
    """Return True if a step of that type, nested or not, runs before or after the model."""
    return any(
        f'"type": "{kind}"' in json.dumps(fields.get(name)) for name in ("pre_tokenizer", "decoder")
    )


def _processor_ids(node: Any) -> set[int]:
    """Return the ids in a post-processor."""
    if isinstance(node, dict):
        ids = set(node["ids"]) if isinstance(node.get("ids"), list) else set()
        return ids.union(*map(_processor_ids, node.values()))
    if isinstance(node, list):
        if _is_named_id(node):
            return {node[1]}
        return set().union(*map(_processor_ids, node))
    return set()


def _renumber(node: Any, number: dict[int, int]) -> None:
    """Give the ids in a post-processor their new numbers, in place."""
    if isinstance(node, dict):
        if isinstance(node.get("ids"), list):
            node["ids"] = [number[index] for index in node["ids"]]
        for value in node.values():
            _renumber(value, number)
    elif isinstance(node, list):
        if _is_named_id(node):
            node[1] = number[node[1]]
        else:
            for value in node:
                _renumber(value, number)


def _is_named_id(node: list[Any]) -> bool:
    """Return True for `["[CLS]", 101]`, as older post-processors name their tokens."""
    return len(node) == 2 and isinstance(node[0], str) and type(node[1]) is int
