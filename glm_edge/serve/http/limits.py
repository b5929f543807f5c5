"""Limits of the service on requests, and the budget of memory that requests share."""

import threading
from dataclasses import dataclass

from glm_edge.errors import ConfigError
from glm_edge.serve.http.errors import ApiError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on what one request may contain and how long its client may take.

    Attributes:
      body_bytes: of a request's body.
      body_s: seconds in which the body must arrive.
      write_s: seconds in which a client must read a piece of the answer.
      memory_bytes: of the bodies and prepared inputs of all open requests.
      json_values: values in a JSON body.
      messages: messages of a conversation.
      parts: parts of all messages.
      characters: of all texts of a request.
      image_bytes: of one encoded image.
      image_pixels: of one image.
      images: images of a conversation.
      audio_bytes: of one WAV file.
      audio_s: seconds of one recording.
      recordings: recordings of a conversation.
      choices: answers per request, prompts times `n`.
      keepalive_s: seconds without an event after which a stream sends a comment.

    Raises:
      ConfigError: a limit is not positive.
    """

    body_bytes: int = 32 << 20
    body_s: float = 30.0
    write_s: float = 60.0
    memory_bytes: int = 2 << 30
    json_values: int = 100_000
    messages: int = 1000
    parts: int = 2000
    characters: int = 1 << 20
    image_bytes: int = 20 << 20
    image_pixels: int = 24_000_000
    images: int = 16
    audio_bytes: int = 25 << 20
    audio_s: float = 700.0
    recordings: int = 8
    choices: int = 32
    keepalive_s: float = 15.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"limits: {name} must be positive, got {value}")


class Budget:
    """Bytes that open requests share."""

    def __init__(self, limit: int) -> None:
        """Start with nothing in use.

        Args:
          limit: most bytes in use.
        """
        self._limit, self._used = limit, 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes in use."""
        return self._used

    def change(self, difference: int) -> None:
        """Change the bytes in use.

        Raises:
          ApiError: they would exceed the limit; then nothing changes.
        """
        with self._lock:
            if difference > 0 and self._used + difference > self._limit:
                raise ApiError(
                    "open requests use all memory that is set aside for them; try again later",
                    status=429,
                    kind="rate_limit_error",
                    code="memory_full",
                    headers={"retry-after": "1"},
                )
            self._used += difference


class Reservation:
    """One request's part of a budget."""

    def __init__(self, budget: Budget) -> None:
        """Start with no bytes."""
        self._budget, self._size = budget, 0

    def resize(self, size: int) -> None:
        """Reserve another number of bytes.

        Raises:
          ApiError: the budget does not allow it; the reservation is unchanged.
        """
        self._budget.change(size - self._size)
        self._size = size

    def release(self) -> None:
        """Return all bytes to the budget."""
        self._budget.change(-self._size)
        self._size = 0
