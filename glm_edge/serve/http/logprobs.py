"""Log-probabilities of an answer's tokens, whose texts joined are the answer.

A token may end inside a character, inside a tag that is removed, or inside a stop string. Each
token therefore knows its span of the generated text, and shows what the answer has of it.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from glm_edge.generate.text import TextStream
from glm_edge.preprocess.tokens import decode
from glm_edge.serve.http.spans import CONTENT, Span
from glm_edge.serve.requests import Token

# JSON has no infinity.
LEAST = -9999.0


@dataclass
class Entry:
    """A token with its log-probability.

    Attributes:
      text: the part of it that the answer shows.
      logprob: of the token.
      top: texts and log-probabilities of the most probable tokens.
    """

    text: str
    logprob: float
    top: list[tuple[str, float]] = field(default_factory=list)

    def chat(self) -> dict[str, Any]:
        """Return the entry in the form of `/v1/chat/completions`."""
        top = [_described(text, logprob) for text, logprob in self.top]
        return {**_described(self.text, self.logprob), "top_logprobs": top}


def _described(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


@dataclass
class _Waiting:
    event: Token
    start: int
    end: int
    text: str = ""


class LogprobReader:
    """A reader that gives each token its part of the answer."""

    def __init__(self, tokenizer: Tokenizer, top: int) -> None:
        """Start an answer.

        Args:
          tokenizer: of the model.
          top: number of alternatives per token.
        """
        self._tokenizer, self._top = tokenizer, top
        self._stream = TextStream(tokenizer, (), skip_special_tokens=True)
        self._end = 0
        self._waiting: deque[_Waiting] = deque()

    def push(self, event: Token) -> None:
        """Add a token that is not special."""
        start = self._end
        self._end += len(self._stream.push(event.token))
        self._waiting.append(_Waiting(event, start, self._end))

    def interrupt(self) -> None:
        """End the text before a special token, as `TextStream.finish`."""
        text = self._stream.finish()
        self._end += len(text)
        if text and self._waiting:
            self._waiting[-1].end = self._end

    def take(self, spans: Sequence[Span], done: int) -> list[Entry]:
        """Return the tokens whose part of the answer is certain.

        Args:
          spans: released since the last call.
          done: position in the generated text before which everything is released.

        Returns:
          Entries; tokens of which the answer shows nothing are left out.
        """
        for span in spans:
            if span.kind != CONTENT:
                continue
            for item in self._waiting:
                first = max(item.start, span.start)
                last = min(item.end, span.start + len(span.text))
                if first < last:
                    item.text += span.text[first - span.start : last - span.start]
        entries = []
        while self._waiting and self._waiting[0].end <= done:
            item = self._waiting.popleft()
            # The first bytes of a character have no text of their own.
            if item.text or item.start == item.end:
                entries.append(self._entry(item))
        return entries

    def finish(self) -> list[Entry]:
        """Return the token that a stop string cut, if the answer shows a part of it."""
        waiting, self._waiting = self._waiting, deque()
        return [self._entry(item) for item in waiting if item.text]

    def _entry(self, item: _Waiting) -> Entry:
        event = item.event
        pairs = (event.top or ())[: self._top]
        top = [(decode(self._tokenizer, [token]), _finite(value)) for token, value in pairs]
        logprob = 0.0 if event.logprob is None else event.logprob
        return Entry(item.text, _finite(logprob), top)


def _finite(value: float) -> float:
    return max(LEAST, min(0.0, value))
