"""Tokens of one answer as the pieces that its client receives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from glm_edge.generate.text import TextStream
from glm_edge.preprocess.sandbox.marks import ANSWER_TOKENS
from glm_edge.preprocess.tokens import special_tokens
from glm_edge.serve.http.errors import ApiError, server_error, shutting_down
from glm_edge.serve.http.logprobs import Entry, LogprobReader
from glm_edge.serve.http.spans import (
    ARGUMENTS,
    CALL,
    CONTENT,
    REASONING,
    CallReader,
    Span,
    TagReader,
)
from glm_edge.serve.requests import Finished, Token, Usage

INLINE, SEPARATE, OMIT = "inline", "separate", "omit"
THINKING = (INLINE, SEPARATE, OMIT)


@dataclass(frozen=True, kw_only=True)
class AnswerForm:
    """The form of an answer.

    Attributes:
      tokenizer: of the model.
      stop: texts that end the answer.
      thinking: "inline" leaves thoughts in the content, "separate" and "omit" take them out.
      opened: True if the prompt opened a thought.
      tags: texts that are removed.
      names: of the functions that may be called.
      parallel: allows several calls.
      next_call: token before a further call, or None.
      logprobs: adds log-probabilities.
      top_logprobs: number of alternatives per token.
    """

    tokenizer: Tokenizer
    stop: Sequence[str] = ()
    thinking: str = INLINE
    opened: bool = False
    tags: Sequence[str] = ANSWER_TOKENS
    names: Sequence[str] = ()
    parallel: bool = True
    next_call: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0


@dataclass
class Piece:
    """A part of an answer, which one event added.

    Attributes:
      content: text of the answer.
      reasoning: text of thoughts.
      calls: pairs of a function's name and a part of its arguments; the name is None in a
        continuation.
      entries: tokens with log-probabilities.
    """

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str | None, str]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls or self.entries)


class Answer:
    """One answer in progress.

    Attributes:
      tokens: number of its tokens.
      reasoning_tokens: number of tokens of its thoughts.
      usage: of the engine, None before the end.
      finish_reason: None before the end.
    """

    def __init__(self, form: AnswerForm, cancel: Callable[[], None]) -> None:
        """Start an answer.

        Args:
          form: of the answer.
          cancel: tells the engine to stop.
        """
        self._form, self._cancel = form, cancel
        self._special = {index: name for name, index in special_tokens(form.tokenizer).ids.items()}
        self._text = TextStream(form.tokenizer, form.stop)
        self._tags = TagReader(form.opened, form.tags)
        self._calls = CallReader(form.names)
        self._logprobs = LogprobReader(form.tokenizer, form.top_logprobs) if form.logprobs else None
        self._released = 0
        self._stopped = False
        self.tokens = self.reasoning_tokens = 0
        self.usage: Usage | None = None
        self.finish_reason: str | None = None

    def push(self, event: Token) -> Piece:
        """Add a token.

        Args:
          event: of the engine.

        Returns:
          What the client can see now.
        """
        if self._stopped:
            return Piece()
        self.tokens += 1
        self.reasoning_tokens += self._tags.thinking
        name = self._special.get(event.token)
        spans: list[Span] = []
        if name is None:
            if self._logprobs is not None:
                self._logprobs.push(event)
            spans = self._read(self._text.push(event.token))
        else:
            spans = self._special_token(event.token, name)
        if self._text.stopped:
            self._stop()
        return self._piece(spans)

    def finish(self, event: Finished) -> Piece:
        """End the answer.

        Args:
          event: of the engine.

        Returns:
          What remained.

        Raises:
          ApiError: the answer ended before its end, by an error or because the service stops.
        """
        self.usage = event.usage
        error = self._error(event)
        if error is not None:
            raise error
        spans = self._read(self._text.finish())
        for span in self._tags.finish():
            spans += self._calls.push(span)
        spans += self._calls.finish()
        if self._logprobs is not None:
            self._logprobs.interrupt()
        # A stop string may have come with the last token, or only in the rest of the text.
        stopped = self._stopped or self._text.stopped
        self.finish_reason = "stop" if stopped else event.reason
        if self._calls.calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        piece = self._piece(spans)
        if self._logprobs is not None:
            piece.entries += self._logprobs.finish()
        return piece

    def _error(self, event: Finished) -> ApiError | None:
        if event.reason == "error":
            return server_error(event.error or "the engine failed on this request")
        if event.reason == "cancelled" and not self._stopped:
            return shutting_down()
        return None

    def _special_token(self, token: int, name: str) -> list[Span]:
        """Apply a tag, a stop string or a further call that is one token; skip other tokens."""
        spans = self._read(self._text.finish())
        if self._logprobs is not None:
            self._logprobs.interrupt()
        if name in self._form.stop:
            self._stop()
        elif name in self._form.tags:
            for span in self._tags.finish():
                spans += self._calls.push(span)
            self._tags.tag(name)
        elif token == self._form.next_call and self._form.names:
            for span in self._tags.finish():
                spans += self._calls.push(span)
            spans += self._calls.next_turn()
            if self._calls.calls and not self._form.parallel:
                self._stop()
        return spans

    def _stop(self) -> None:
        self._stopped = True
        self._cancel()

    def _read(self, text: str) -> list[Span]:
        self._released += len(text)
        return [out for span in self._tags.push(text) for out in self._calls.push(span)]

    def _piece(self, spans: list[Span]) -> Piece:
        if self._form.thinking == INLINE:
            spans = [
                Span(CONTENT, span.text, span.start) if span.kind == REASONING else span
                for span in spans
            ]
        piece = Piece()
        for span in spans:
            if span.kind == CONTENT:
                piece.content += span.text
            elif span.kind == REASONING and self._form.thinking == SEPARATE:
                piece.reasoning += span.text
            elif span.kind == CALL:
                piece.calls.append((span.text, ""))
            elif span.kind == ARGUMENTS:
                piece.calls.append((None, span.text))
        if self._logprobs is not None:
            done = self._released - self._tags.pending - self._calls.pending
            piece.entries += self._logprobs.take(spans, done)
        return piece
