"""Requests to the engine, and the events that answer them."""

import enum
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np

from glm_edge.generate.sampling import Sampling
from glm_edge.generate.token_pruning import VisionTokens
from glm_edge.preprocess.inputs import Inputs


class Priority(enum.IntEnum):
    """Order of requests: a lower value runs first, and may interrupt a higher one."""

    INTERACTIVE = 0
    DEFAULT = 1
    BACKGROUND = 2


class Matcher(Protocol):
    """State of a constraint after the tokens of an answer."""

    def allowed(self) -> np.ndarray:
        """Return uint32 [ceil(V / 32)], bits of the tokens that may follow."""
        ...

    def forced(self) -> list[int]:
        """Return the tokens that must follow, often none."""
        ...

    def accept(self, token: int) -> None:
        """Advance by one token."""
        ...

    def copy(self) -> "Matcher":
        """Return an independent copy."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One prompt and the options of its answer.

    Attributes:
      inputs: of a `glm_edge.Processor`, one row.
      max_new_tokens: most tokens of the answer, as far as the context has room.
      sampling: sampling rules.
      seed: seed of the draws, below 2 ** 32; None draws one.
      stop_tokens: token ids that end the answer, which does not contain them.
      min_new_tokens: tokens before which no stop token may be drawn.
      logprobs: adds log-probabilities to the tokens.
      matcher: state of a constraint at its beginning, or None.
      draft: token ids that the answer may begin with, verified in few steps; or None.
      prompt_lookup: drafts continuations from the text, where its last tokens occur before.
      exit_threshold: threshold of early exit, in 0..1; None runs all layers for each token.
      vision_tokens: from `glm_edge.generate.drop_vision_tokens` with layer 0, the only one that a
        prompt in chunks allows; None keeps all.
      priority: see `Priority`.
    """

    inputs: Inputs
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stop_tokens: Sequence[int] = ()
    min_new_tokens: int = 0
    logprobs: bool = False
    matcher: Matcher | None = None
    draft: Sequence[int] | None = None
    prompt_lookup: bool = False
    exit_threshold: float | None = None
    vision_tokens: VisionTokens | None = None
    priority: Priority = Priority.DEFAULT


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    Attributes:
      token: its id.
      logprob: its log-probability before any sampling rule, or None.
      top: most probable tokens with their log-probabilities, or None.
      forced: True if the constraint left no other token.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] | None = None
    forced: bool = False


@dataclass
class Usage:
    """Tokens of a request, and the steps that were saved.

    Attributes:
      prompt_tokens: of the prompt, after vision token pruning.
      image_tokens: placeholders of images in the prompt.
      audio_tokens: placeholders of speech in the prompt.
      cached_tokens: tokens of the prompt whose rows were reused.
      completion_tokens: of the answer, without its stop token.
      forced_tokens: of the answer, appended without a step because the constraint forced them.
      accepted_draft_tokens: of the answer, verified from a draft.
      rejected_draft_tokens: of drafts, not used.
      dropped_image_tokens: placeholders that vision token pruning removed.
      skipped_layers: layers that early exit did not run, summed over tokens.
      preemptions: times that the request was interrupted by one of a higher priority.
    """

    prompt_tokens: int = 0
    image_tokens: int = 0
    audio_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    forced_tokens: int = 0
    accepted_draft_tokens: int = 0
    rejected_draft_tokens: int = 0
    dropped_image_tokens: int = 0
    skipped_layers: int = 0
    preemptions: int = 0


@dataclass(frozen=True)
class Finished:
    """The end of an answer.

    Attributes:
      reason: "stop", "length", "cancelled" or "error".
      usage: of the request.
      error: message for the reason "error".
    """

    reason: str
    usage: Usage
    error: str | None = None


Event = Token | Finished


class Handle:
    """A submitted request: its events, and the means to cancel it.

    Iterating yields the tokens and then the end, unless the request was submitted with `deliver`.
    """

    def __init__(self, request: Request, deliver: Callable[[Event], Any] | None = None):
        """Prepare the delivery of events.

        Args:
          request: the request.
          deliver: called with each event on the engine's thread; None keeps events for iteration.
        """
        self.request = request
        seed = secrets.randbits(32) if request.seed is None else request.seed & 0xFFFFFFFF
        self.seed = seed
        self._events: SimpleQueue[Event] = SimpleQueue()
        self.deliver = deliver or self._events.put
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ask the engine to end the request before its next step."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """True after `cancel`."""
        return self._cancelled.is_set()

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self._events.get()
            yield event
            if isinstance(event, Finished):
                return

    def result(self) -> tuple[list[int], Finished]:
        """Wait for the end, and return the tokens and the last event."""
        tokens: list[int] = []
        for event in self:
            if isinstance(event, Finished):
                return tokens, event
            tokens.append(event.token)
        raise RuntimeError("the engine delivered no end")
