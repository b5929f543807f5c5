"""Spans of an answer's text: thoughts and answer, and calls of tools.

Text arrives in pieces of any size. Each reader releases what later text cannot change.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from glm_edge.preprocess.sandbox.marks import ANSWER_TOKENS

CONTENT, REASONING, CALL, ARGUMENTS = "content", "reasoning", "call", "arguments"
OPENS, CLOSES = ("<think>",), ("</think>", "<answer>")


@dataclass(frozen=True)
class Span:
    """A part of an answer.

    Attributes:
      kind: "content", "reasoning", "call" (the text is a function's name) or "arguments".
      text: the text.
      start: its position in the generated text.
    """

    kind: str
    text: str
    start: int


class TagReader:
    """A reader that removes tags such as `<think>`, and separates thoughts from the answer.

    Attributes:
      thinking: True inside a thought.
    """

    def __init__(self, thinking: bool = False, tags: Collection[str] = ANSWER_TOKENS) -> None:
        """Start a text.

        Args:
          thinking: the prompt opened a thought.
          tags: texts to remove.
        """
        self.thinking = thinking
        self._tags = tuple(tags)
        self._pattern = re.compile("|".join(map(re.escape, self._tags))) if tags else None
        self._pending = ""
        self._at = 0

    @property
    def pending(self) -> int:
        """Number of characters that are not released."""
        return len(self._pending)

    def push(self, text: str) -> list[Span]:
        """Add text.

        Args:
          text: the next piece.

        Returns:
          Spans that can be shown, none empty.
        """
        text = self._pending + text
        spans: list[Span] = []
        if self._pattern is not None:
            while match := self._pattern.search(text):
                spans += self._release(text[: match.start()])
                self.tag(match[0])
                self._at += len(match[0])
                text = text[match.end() :]
        count = max((_overlap(text, tag) for tag in self._tags), default=0)
        spans += self._release(text[: len(text) - count])
        self._pending = text[len(text) - count :]
        return spans

    def finish(self) -> list[Span]:
        """Return the pending text, as nothing follows."""
        pending, self._pending = self._pending, ""
        return self._release(pending)

    def tag(self, name: str) -> None:
        """Apply a tag, which may be one special token."""
        if name in OPENS:
            self.thinking = True
        elif name in CLOSES:
            self.thinking = False

    def _release(self, text: str) -> list[Span]:
        if not text:
            return []
        start, self._at = self._at, self._at + len(text)
        return [Span(REASONING if self.thinking else CONTENT, text, start)]


class CallReader:
    """A reader that finds calls of tools in the content.

    Attributes:
      calls: number of calls so far.
    """

    def __init__(self, names: Collection[str]) -> None:
        """Start an answer.

        Args:
          names: of the functions that may be called.
        """
        self._names = tuple(names)
        self._state = "undecided" if names else CONTENT
        self._pending: list[Span] = []
        self.calls = 0

    @property
    def pending(self) -> int:
        """Number of characters that are not released."""
        return sum(len(span.text) for span in self._pending)

    def push(self, span: Span) -> list[Span]:
        """Add a span.

        Args:
          span: of a `TagReader`.

        Returns:
          Spans whose kind is certain.
        """
        if span.kind != CONTENT or self._state == CONTENT:
            return [span]
        if self._state == ARGUMENTS:
            return [replace(span, kind=ARGUMENTS)]
        self._pending.append(span)
        text = "".join(item.text for item in self._pending)
        line, ended, after = text.partition("\n")
        name = line.rstrip(" ")
        after = after.lstrip()
        if name in self._names and (not ended or not after):
            return []
        if name in self._names and after.startswith("{"):
            start, end = self._pending[0].start, span.start + len(span.text)
            self._pending = []
            self._state = ARGUMENTS
            self.calls += 1
            return [Span(CALL, name, start), Span(ARGUMENTS, after, end - len(after))]
        if not ended and any(known.startswith(line) for known in self._names):
            return []
        return self._as_content()

    def next_turn(self) -> list[Span]:
        """Begin a further turn of the answer, after the token of the assistant's role."""
        spans = self.finish()
        self._state = "undecided" if self._names else CONTENT
        return spans

    def finish(self) -> list[Span]:
        """Return the pending text, as nothing follows."""
        return self._as_content() if self._pending else []

    def _as_content(self) -> list[Span]:
        spans, self._pending = self._pending, []
        self._state = CONTENT
        return spans


def _overlap(text: str, tag: str) -> int:
    """Measure the longest proper prefix of a tag that the text ends with."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)
