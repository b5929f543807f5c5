"""Answers in the shapes of OpenAI's API: complete objects, and chunks of a stream."""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from glm_edge.serve.http.answers import Answer, Piece
from glm_edge.serve.http.logprobs import Entry
from glm_edge.serve.http.schema import Options


@dataclass
class Gathered:
    """The pieces of one answer together.

    Attributes:
      content: text of the answer.
      reasoning: text of thoughts.
      calls: ids, names and arguments of called functions.
      entries: tokens with log-probabilities.
    """

    content: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Append a piece."""
        self.content += piece.content
        self.reasoning += piece.reasoning
        self.entries += piece.entries
        for name, arguments in piece.calls:
            if name is not None:
                self.calls.append([_call_id(), name, arguments])
            else:
                self.calls[-1][2] += arguments


class Format(Protocol):
    """The shape of a response."""

    def begin(self, count: int) -> list[dict[str, Any]]:
        """Return the chunks before the first token of `count` answers."""
        ...

    def piece(self, index: int, piece: Piece, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """Return the chunks of a piece."""
        ...

    def finish(self, index: int, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """Return the chunks at the end of an answer."""
        ...

    def end(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """Return the chunks after the last answer."""
        ...

    def complete(
        self, answers: Sequence[Answer], gathered: Sequence[Gathered]
    ) -> dict[str, Any] | str:
        """Return the response without a stream."""
        ...


def usage_of(answers: Sequence[Answer], n: int) -> dict[str, Any]:
    """Count the tokens of a request.

    Args:
      answers: of all prompts, `n` adjacent ones per prompt; unfinished ones count so far.
      n: answers per prompt.

    Returns:
      The object `usage`.
    """
    prompts = [answer.usage for answer in answers[::n] if answer.usage is not None]
    ends = [answer.usage for answer in answers if answer.usage is not None]
    prompt = sum(usage.prompt_tokens for usage in prompts)
    image = sum(usage.image_tokens for usage in prompts)
    audio = sum(usage.audio_tokens for usage in prompts)
    completion = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(usage.cached_tokens for usage in prompts),
            "image_tokens": image,
            "audio_tokens": audio,
            "text_tokens": prompt - image - audio,
            "dropped_image_tokens": sum(usage.dropped_image_tokens for usage in prompts),
        },
        "completion_tokens_details": {
            "reasoning_tokens": sum(answer.reasoning_tokens for answer in answers),
            "accepted_prediction_tokens": sum(usage.accepted_draft_tokens for usage in ends),
            "rejected_prediction_tokens": sum(usage.rejected_draft_tokens for usage in ends),
            "forced_tokens": sum(usage.forced_tokens for usage in ends),
            "skipped_layers": sum(usage.skipped_layers for usage in ends),
        },
    }


class _Shape:
    """The common part of chat and plain completions."""

    prefix, kind, chunk_kind = "", "", ""

    def __init__(self, model: str, options: Options, prompt_tokens: int) -> None:
        """Start a response.

        Args:
          model: name of the model in the response.
          options: of the request.
          prompt_tokens: of all prompts.
        """
        self._options, self._prompt_tokens = options, prompt_tokens
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._head = {"created": int(time.time()), "model": model}

    def _chunk(self, choices: list[dict[str, Any]], usage: Any = None) -> dict[str, Any]:
        chunk = {"id": self._id, "object": self.chunk_kind, **self._head, "choices": choices}
        if self._options.include_usage:
            chunk["usage"] = usage
        return chunk

    def _running(self, answers: Sequence[Answer]) -> dict[str, Any] | None:
        """Return the usage so far if every chunk shows it."""
        if not self._options.continuous_usage:
            return None
        completion = sum(answer.tokens for answer in answers)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._prompt_tokens + completion,
        }

    def end(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """Return the chunk with the usage, if it was asked for."""
        if not self._options.include_usage:
            return []
        return [self._chunk([], usage_of(answers, self._options.n))]

    def _response(self, choices: list[dict[str, Any]], answers: Sequence[Answer]) -> dict[str, Any]:
        usage = usage_of(answers, self._options.n)
        return {
            "id": self._id,
            "object": self.kind,
            **self._head,
            "choices": choices,
            "usage": usage,
            "service_tier": self._options.tier,
            "system_fingerprint": None,
        }


class ChatFormat(_Shape):
    """The shape of `/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, options: Options, prompt_tokens: int) -> None:
        """Start a response; see the base class."""
        super().__init__(model, options, prompt_tokens)
        self._calls: dict[int, int] = {}

    def begin(self, count: int) -> list[dict[str, Any]]:
        """Return the roles. Their content is null, as an empty text would count as a token."""
        delta = {"role": "assistant", "content": None}
        return [self._delta(index, delta, None) for index in range(count)]

    def piece(self, index: int, piece: Piece, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """Return one chunk, or none for an empty piece."""
        if not piece:
            return []
        delta: dict[str, Any] = {}
        if piece.reasoning:
            delta["reasoning_content"] = piece.reasoning
        if piece.content or (piece.entries and not piece.calls):
            delta["content"] = piece.content
        if piece.calls:
            delta["tool_calls"] = [self._call(index, *call) for call in piece.calls]
        chunk = self._delta(index, delta, self._running(answers))
        if piece.entries:
            chunk["choices"][0]["logprobs"] = _chat_logprobs(piece.entries)
        return [chunk]

    def finish(self, index: int, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """Return the chunk with the reason, whose delta is empty."""
        return [self._delta(index, {}, self._running(answers), answers[index].finish_reason)]

    def complete(self, answers: Sequence[Answer], gathered: Sequence[Gathered]) -> dict[str, Any]:
        """Return the object `chat.completion`."""
        choices = []
        for index, (answer, parts) in enumerate(zip(answers, gathered, strict=True)):
            message: dict[str, Any] = {"role": "assistant", "content": parts.content}
            message["refusal"] = None
            if parts.reasoning:
                message["reasoning_content"] = parts.reasoning
            if parts.calls:
                message["content"] = parts.content or None
                message["tool_calls"] = [
                    {
                        "id": call,
                        "type": "function",
                        "function": {"name": name, "arguments": arguments},
                    }
                    for call, name, arguments in parts.calls
                ]
            logprobs = _chat_logprobs(parts.entries) if self._options.logprobs else None
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": logprobs,
                    "finish_reason": answer.finish_reason,
                }
            )
        return self._response(choices, answers)

    def _call(self, index: int, name: str | None, arguments: str) -> dict[str, Any]:
        if name is None:
            number = self._calls[index]
            return {"index": number, "function": {"arguments": arguments}}
        number = self._calls[index] = self._calls.get(index, -1) + 1
        function = {"name": name, "arguments": arguments}
        return {"index": number, "id": _call_id(), "type": "function", "function": function}

    def _delta(
        self, index: int, delta: dict[str, Any], usage: Any, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self._chunk([choice], usage)


class CompletionFormat(_Shape):
    """The shape of `/v1/completions`."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, model: str, options: Options, prompt_tokens: int, echoes: Sequence[str]
    ) -> None:
        """Start a response.

        Args:
          model: as in the base class.
          options: as in the base class.
          prompt_tokens: as in the base class.
          echoes: text before each answer.
        """
        super().__init__(model, options, prompt_tokens)
        self._echoes = echoes
        self._offsets = [len(echo) for echo in echoes]

    def begin(self, count: int) -> list[dict[str, Any]]:
        """Return the prompts that are echoed."""
        return [
            self._text(index, self._echoes[index], None)
            for index in range(count)
            if self._echoes[index]
        ]

    def piece(self, index: int, piece: Piece, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """Return one chunk, or none for an empty piece."""
        if not piece:
            return []
        chunk = self._text(index, piece.content, self._running(answers))
        if piece.entries:
            chunk["choices"][0]["logprobs"] = self._logprobs(index, piece.entries)
        return [chunk]

    def finish(self, index: int, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """Return the chunk with the reason."""
        return [self._text(index, "", self._running(answers), answers[index].finish_reason)]

    def complete(self, answers: Sequence[Answer], gathered: Sequence[Gathered]) -> dict[str, Any]:
        """Return the object `text_completion`."""
        choices = []
        for index, (answer, parts) in enumerate(zip(answers, gathered, strict=True)):
            logprobs = self._logprobs(index, parts.entries) if self._options.logprobs else None
            choices.append(
                {
                    "index": index,
                    "text": self._echoes[index] + parts.content,
                    "logprobs": logprobs,
                    "finish_reason": answer.finish_reason,
                }
            )
        return self._response(choices, answers)

    def _text(self, index: int, text: str, usage: Any, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
        return self._chunk([choice], usage)

    def _logprobs(self, index: int, entries: Sequence[Entry]) -> dict[str, Any]:
        offsets = []
        for entry in entries:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(entry.text)
        return {
            "tokens": [entry.text for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [dict(entry.top) or None for entry in entries],
            "text_offset": offsets,
        }


def event_bytes(value: Any) -> bytes:
    """Format one server-sent event."""
    return b"data: " + json_bytes(value) + b"\n\n"


def json_bytes(value: Any) -> bytes:
    """Encode a JSON value."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _chat_logprobs(entries: Sequence[Entry]) -> dict[str, Any]:
    return {"content": [entry.chat() for entry in entries], "refusal": None}


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
