"""Conversion between text and token ids, the only module that calls a tokenizer."""

import functools
import re
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer

from glm_edge.errors import DataError
from glm_edge.preprocess.tokenizer_files import guarded

USER, ASSISTANT = "<|user|>", "<|assistant|>"
IMAGE = ("<|begin_of_image|>", "<|image|>", "<|end_of_image|>")
AUDIO = ("<|begin_of_audio|>", "<|audio|>", "<|end_of_audio|>")

# Per tokenizer: a copy that encodes names of special tokens as text, and the copied version.
_PLAIN: weakref.WeakKeyDictionary[Any, tuple[Any, Any]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


class SpecialTokens:
    """Special tokens of a tokenizer, with search in a text.

    Attributes:
      names: names in order.
      ids: id by name.
    """

    def __init__(self, tokens: Iterable[tuple[str, int]]) -> None:
        """Prepare the search.

        Args:
          tokens: pairs of name and id.
        """
        self.ids = dict(sorted(tokens))
        self.names = tuple(self.ids)
        self._lengths = sorted({len(name) for name in self.names}, reverse=True)
        first = "".join(sorted({name[0] for name in self.names}))
        self._starts = re.compile(f"[{re.escape(first)}]") if first else None

    def find(self, text: str) -> list[tuple[int, int]]:
        """Return the spans of names of special tokens, the longest name at each position."""
        spans: list[tuple[int, int]] = []
        if self._starts is None:
            return spans
        end = 0
        for match in self._starts.finditer(text):
            start = match.start()
            if start < end:
                continue
            for length in self._lengths:
                if text[start : start + length] in self.ids:
                    end = start + length
                    spans.append((start, end))
                    break
        return spans


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """Return the special tokens of a `tokenizers.Tokenizer`."""
    added = tokenizer.get_added_tokens_decoder().items()
    return _special(tuple((token.content, i) for i, token in added if token.special))


_special = functools.lru_cache(maxsize=16)(SpecialTokens)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode text; names of special tokens become those tokens.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
      text: text to encode. No token is added before or after it.

    Returns:
      Token ids.

    Raises:
      DataError: the tokenizer truncates or pads texts, or fails on this text.
    """
    with guarded("text cannot be encoded", DataError):
        if tokenizer.truncation is not None or tokenizer.padding is not None:
            raise DataError(
                "the tokenizer truncates or pads texts; call its no_truncation() and no_padding() "
                "first"
            )
        return tokenizer.encode(text, add_special_tokens=False).ids


def decode(tokenizer: Tokenizer, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
    """Decode tokens to text.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
      tokens: token ids [T].
      skip_special_tokens: omits special tokens.

    Returns:
      The text.

    Raises:
      DataError: an id is negative or too large, or the tokenizer fails.
    """
    with guarded("tokens cannot be decoded", DataError):
        return tokenizer.decode(
            [int(token) for token in tokens], skip_special_tokens=skip_special_tokens
        )


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode text; names of special tokens are encoded as ordinary text.

    The function does not modify the tokenizer, so that threads can share it.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
      text: text to encode.

    Returns:
      Token ids, none of them special.

    Raises:
      DataError: the tokenizer fails on the text.
    """
    ids = encode(tokenizer, text)
    special = set(special_tokens(tokenizer).ids.values())
    return ids if special.isdisjoint(ids) else encode(plain_tokenizer(tokenizer), text)


def marked_ids(tokenizer: Tokenizer, text: str, plain: str) -> list[int]:
    """Encode a prompt; only text of the template can become special tokens.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
      text: text with marks from `glm_edge.preprocess.chat.render_marked`.
      plain: the same text without marks, of equal length.

    Returns:
      Token ids.

    Raises:
      DataError: the tokenizer fails on the text.
    """
    special = special_tokens(tokenizer)
    spans = special.find(text)
    written = [special.ids[text[start:end]] for start, end in spans]
    ids, known = encode(tokenizer, plain), set(special.ids.values())
    if [index for index in ids if index in known] == written:
        return ids
    # Untrusted text spells a token too, so the text between the template's tokens is encoded as
    # ordinary text.
    reader = plain_tokenizer(tokenizer)
    ids, at = [], 0
    for (start, end), index in zip(spans, written, strict=True):
        if plain[at:start]:
            ids += encode(reader, plain[at:start])
        ids.append(index)
        at = end
    return ids + (encode(reader, plain[at:]) if plain[at:] else [])


def plain_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy of a tokenizer that encodes names of special tokens as ordinary text.

    The copy is cached per tokenizer, and renewed after tokens are added. Setting the flag on the
    shared tokenizer would change the results of other threads.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.

    Returns:
      The copy, which callers must not modify.
    """
    version = (tokenizer.get_vocab_size(), special_tokens(tokenizer).names)
    with _LOCK:
        made, made_of = _PLAIN.get(tokenizer, (None, None))
        if made_of != version:
            with guarded("the tokenizer cannot be copied", DataError):
                made = type(tokenizer).from_str(tokenizer.to_str())
                made.no_padding()
                made.no_truncation()
            made.encode_special_tokens = True
            _PLAIN[tokenizer] = (made, version)
        return made


def prompt_ids(
    tokenizer: Tokenizer, instruction: str = "", image_tokens: int = 0, audio_tokens: int = 0
) -> list[int]:
    """Format one question: user, image, recording, text, assistant.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
      instruction: text, empty for a spoken instruction. Names of special tokens in it are encoded
        as ordinary text.
      image_tokens: count of image placeholders, `VisionConfig.num_tokens`, or 0.
      audio_tokens: count of speech placeholders, `SpeechConfig.num_tokens`, or 0.

    Returns:
      Token ids that end with the assistant's token.

    Raises:
      DataError: the tokenizer lacks a required special token, a count is negative, or there is
        neither an instruction nor a recording.
    """
    if not instruction and not audio_tokens:
        raise DataError("a prompt needs an instruction, as text or as a recording")
    ids = [_token_id(tokenizer, USER)]
    for count, (begin, placeholder, end) in ((image_tokens, IMAGE), (audio_tokens, AUDIO)):
        if count < 0:
            raise DataError(f"count of {placeholder} tokens must not be negative, found {count}")
        if count:
            ids.append(_token_id(tokenizer, begin))
            ids.extend([_token_id(tokenizer, placeholder)] * count)
            ids.append(_token_id(tokenizer, end))
    return [*ids, *text_ids(tokenizer, instruction), _token_id(tokenizer, ASSISTANT)]


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    index = tokenizer.token_to_id(token)
    if index is None:
        raise DataError(f"the tokenizer has no special token {token!r}, which this prompt needs")
    return index
