"""Marks that distinguish untrusted text from the template's text in a rendered prompt."""

import functools
import re
import secrets
from collections.abc import Iterable
from typing import Any

from glm_edge.errors import DataError

BRACKETS = frozenset("<>|[]{}")
# The first private-use area of Unicode.
FIRST_MARK, LAST_MARK = 0xE000, 0xF8FF
PRIVATE = re.compile("[\ue000-\uf8ff]")
# Tokens inside an answer, which the next prompt repeats as tokens. They do not begin or end a turn.
ANSWER_TOKENS = (
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<|begin_of_box|>",
    "<|end_of_box|>",
)
ANSWER_FIELDS = ("content", "reasoning_content")


class Marks:
    """A one-to-one replacement of characters that occur in every special token.

    A rendered prompt is one string. Untrusted text could spell the name of a special token in it,
    even in several pieces that the template joins. Each bracket of those names is therefore
    replaced by a mark in untrusted text. Each rendering draws new marks from the private-use
    characters that occur in no input. A mark in the template's own text is read as plain text. The
    interpreter ignores the difference between marks and brackets when it compares or splits texts.
    """

    def __init__(self, names: Iterable[str] = (), taken: Iterable[str] = ()):
        """Draw marks.

        Args:
          names: names of special tokens.
          taken: private-use characters that occur in the inputs.

        Raises:
          DataError: the inputs use nearly all private-use characters.
        """
        names = tuple(names)
        hidden, self._taken = _hidden_characters(names), frozenset(taken)
        size = LAST_MARK - FIRST_MARK + 1
        start = secrets.randbelow(size)
        free: list[str] = []
        for index in range(size):
            if len(free) == len(hidden):
                break
            mark = chr(FIRST_MARK + (start + index) % size)
            if mark not in self._taken:
                free.append(mark)
        if len(free) < len(hidden):
            raise DataError("messages contain nearly all private-use characters of Unicode")
        self._pairs = tuple(zip(hidden, free, strict=True))
        self._special = frozenset(names)
        self._marks = frozenset(free)

    def hide(self, text: str) -> str:
        """Replace brackets of untrusted text by marks; the length stays equal."""
        for character, mark in self._pairs:
            if character in text:
                text = text.replace(character, mark)
        return text

    def reveal(self, text: str) -> str:
        """Replace marks of a text by their original characters."""
        if text.isascii():
            return text
        for character, mark in self._pairs:
            if mark in text:
                text = text.replace(mark, character)
        return text

    def is_mark(self, character: str) -> bool:
        """Test for a mark."""
        return character in self._marks

    def hide_all(self, value: Any) -> Any:
        """Apply `hide` to all strings and field names of a JSON value."""
        if not self._pairs:
            return value
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, dict):
            return {self.hide(name): self.hide_all(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self.hide_all(item) for item in value]
        return value

    def hide_message(self, message: dict[str, Any]) -> dict[str, Any]:
        """Apply `hide` to all strings of a message; an answer keeps `ANSWER_TOKENS`."""
        hidden = self.hide_all(message)
        if message.get("role") == "assistant":
            for name in ANSWER_FIELDS:
                if name in message:
                    hidden[name] = self._hide_answer(message[name])
        return hidden

    def _hide_answer(self, value: Any) -> Any:
        if isinstance(value, str):
            tokens = [token for token in ANSWER_TOKENS if token in self._special]
            if not tokens:
                return self.hide(value)
            pieces = re.split(f"({'|'.join(map(re.escape, tokens))})", value)
            return "".join(p if p in self._special else self.hide(p) for p in pieces)
        if isinstance(value, list):
            return [self._hide_answer(item) for item in value]
        if isinstance(value, dict):
            return {self.hide(name): self._hide_answer(item) for name, item in value.items()}
        return value


@functools.lru_cache(maxsize=32)
def _hidden_characters(names: tuple[str, ...]) -> tuple[str, ...]:
    """Select characters such that each name contains at least one of them."""
    hidden: set[str] = set()
    for name in names:
        brackets = BRACKETS & set(name)
        hidden |= brackets or {c for c in name if not c.isalnum() and c != "_"} or set(name[:1])
    return tuple(sorted(hidden))
