"""State of running requests on the host: their texts, and what each needs next."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from glm_edge.serve.backend import BLOCK, ReadyPrompt
from glm_edge.serve.prefix_cache import block_keys
from glm_edge.serve.requests import (
    Event,
    Finished,
    Handle,
    Matcher,
    Request,
    Token,
    Usage,
)

# Longest and shortest run of tokens by which a draft is looked up.
LONGEST_RUN, SHORTEST_RUN = 4, 2


class Task:
    """A request from its submission to its end.

    The text is the prompt and the generated tokens. Rows of the cache exist for the first `rows` of
    its tokens. The others are pending: a prompt's tokens, tokens that a constraint forced, or the
    newest token alone.

    Attributes:
      handle: of the request.
      prompt: the checked prompt.
      order: number of the submission.
      keys: keys of the prompt's complete blocks.
      text: int32 [capacity], valid up to `length`.
      length: tokens of the text.
      rows: tokens whose rows are in the cache.
      limit: length at which the answer ends.
      usage: counts for the client.
      saved: rows that an interruption copied out, else None.
      features: features of images and recordings by key; None until they are encoded, and none
        after the prompt has rows.
      stop_tokens: tokens that end the answer.
    """

    def __init__(self, handle: Handle, prompt: ReadyPrompt, order: int, capacity: int):
        """Start with the prompt, none of whose rows exist.

        Args:
          handle: of the request.
          prompt: the checked prompt.
          order: number of the submission.
          capacity: most tokens of the text.
        """
        self.handle, self.order = handle, order
        self.text = np.zeros(capacity, np.int32)
        self.usage = Usage()
        self.saved: list[Any] | None = None
        self.features: dict[bytes, np.ndarray] | None = None
        self.stop_tokens = frozenset(self.request.stop_tokens)
        self.matcher = None if self.request.matcher is None else self.request.matcher.copy()
        self.begin_with(prompt)

    def begin_with(self, prompt: ReadyPrompt) -> None:
        """Set the prompt, before anything runs."""
        self.prompt, count = prompt, len(prompt.tokens)
        self.keys = block_keys(prompt.tokens, prompt.positions, prompt.media)
        self.limit = min(len(self.text), count + self.request.max_new_tokens)
        self.text[:count] = prompt.tokens
        self.length, self.rows = count, 0
        self.usage.prompt_tokens = count
        self.usage.image_tokens = prompt.media_tokens("image")
        self.usage.audio_tokens = prompt.media_tokens("audio")

    def written_keys(self) -> list[bytes]:
        """Return the keys of the complete blocks of all tokens that have rows."""
        positions = self.positions(0, self.rows)
        return block_keys(self.text[: self.rows], positions, self.prompt.media)

    @property
    def request(self) -> Request:
        """The submitted request."""
        return self.handle.request

    @property
    def reusable_keys(self) -> list[bytes]:
        """Keys of the blocks that may come from the prefix cache.

        At least one token must run, for the scores of the next.
        """
        return self.keys[: (self.prompt_length - 1) // BLOCK]

    @property
    def urgency(self) -> tuple[int, int]:
        """Key of the order in which tasks run."""
        return int(self.request.priority), self.order

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt.tokens)

    @property
    def generated(self) -> int:
        """Generated tokens."""
        return self.length - self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens without rows."""
        return self.length - self.rows

    @property
    def decoding(self) -> bool:
        """True if only the newest generated token is pending."""
        return self.pending == 1 and self.generated > 0

    def position(self, index: int) -> int:
        """Return the rotary position of a generated token."""
        return self.prompt.following + index - self.prompt_length

    def positions(self, start: int, end: int) -> np.ndarray:
        """Return the rotary positions [1 or 3, end - start] of tokens of the text."""
        count = self.prompt_length
        known = self.prompt.positions[:, start : min(end, count)]
        later = np.arange(max(start, count), max(end, count), dtype=np.int32)
        later = later + np.int32(self.prompt.following - count)
        return np.concatenate([known, np.broadcast_to(later, (len(known), len(later)))], axis=1)

    def append(self, token: int) -> None:
        """Add a token to the text, and advance the constraint."""
        self.text[self.length] = token
        self.length += 1
        if self.matcher is not None:
            self.matcher.accept(token)

    def deliver(self, event: Event) -> None:
        """Give an event to the client; its errors are its own."""
        try:
            self.handle.deliver(event)
        except Exception:
            self.handle.cancel()

    def deliver_token(self, token: int, **facts: Any) -> None:
        """Give a token to the client, and count it."""
        self.usage.completion_tokens += 1
        self.deliver(Token(token, **facts))

    def finish(self, reason: str, error: str | None = None) -> None:
        """Give the end to the client."""
        self.deliver(Finished(reason, self.usage, error))

    def allowed(
        self, everything: np.ndarray, length: int | None = None, matcher: Matcher | None = None
    ) -> np.ndarray:
        """Return the bits of the tokens that may be drawn next.

        Args:
          everything: uint32 [W] with all bits set.
          length: tokens of a longer text; None takes the present text and constraint.
          matcher: state of the constraint after the longer text.
        """
        if length is None:
            length, matcher = self.length, self.matcher
        bits = everything
        if matcher is not None:
            bits = np.asarray(matcher.allowed()).view(np.uint32)
        if length - self.prompt_length < self.request.min_new_tokens and self.stop_tokens:
            bits = self._without_stops(bits)
        return bits

    def must_stop(self) -> bool:
        """Return True if the constraint allows nothing but stop tokens."""
        if self.matcher is None or self.generated < self.request.min_new_tokens:
            return False
        allowed = np.asarray(self.matcher.allowed()).view(np.uint32)
        return bool(allowed.any() and not self._without_stops(allowed).any())

    def _without_stops(self, bits: np.ndarray) -> np.ndarray:
        """Return bits of tokens without those of stop tokens."""
        bits = bits.copy()
        for token in self.stop_tokens:
            bits[token // 32] &= ~np.uint32(1 << (token % 32))
        return bits

    def draft(self, most: int) -> list[int]:
        """Propose the next tokens, from the request's draft or from the text.

        Args:
          most: largest number of tokens.

        Returns:
          Proposed tokens, often none.
        """
        most = min(most, self.limit - self.length - 1)
        request = self.request
        if most < 1 or (request.draft is None and not request.prompt_lookup):
            return []
        text = self.text[: self.length]
        proposed: Sequence[int] | np.ndarray = ()
        if request.draft is not None:
            source, answer = np.asarray(request.draft), text[self.prompt_length :]
            if np.array_equal(source[: len(answer)], answer):
                proposed = source[len(answer) : len(answer) + most]
            else:
                proposed = _continuation(source, answer, most)
        if not len(proposed) and request.prompt_lookup:
            proposed = _continuation(text[:-1], text, most)
        return [int(token) for token in proposed if token not in self.stop_tokens]


def _continuation(source: np.ndarray, text: np.ndarray, most: int) -> np.ndarray:
    """Return what follows in `source` after the last place where the end of `text` occurs."""
    for run in range(min(LONGEST_RUN, len(text)), SHORTEST_RUN - 1, -1):
        if len(source) <= run:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(source, run)[:-1]
        places = np.flatnonzero((windows == text[-run:]).all(axis=1))
        if len(places):
            start = int(places[-1]) + run
            return source[start : start + most]
    return source[:0]
