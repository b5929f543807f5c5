"""The door between the engine's thread and the event loop."""

import asyncio
import functools
import threading
from collections.abc import Callable, Sequence

from glm_edge.serve.engine import Engine
from glm_edge.serve.requests import Event, Finished, Handle, Request

EventQueue = asyncio.Queue[tuple[int, Event]]


class Submission:
    """Requests of one client on the engine, whose events arrive on an asyncio queue.

    `submit` runs on any thread and `close` on any other: a request is either cancelled or never
    submitted.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        """Prepare the queue.

        Args:
          engine: takes the requests.
          loop: reads the events.
        """
        self._engine, self._loop = engine, loop
        self._queue: EventQueue = asyncio.Queue()
        self._lock = threading.Lock()
        self._handles: list[Handle] = []
        self._open = 0
        self._closed = False

    def submit(self, requests: Sequence[Request]) -> None:
        """Submit all requests or, if one is refused, none.

        Args:
          requests: in the order of their indices.

        Raises:
          GlmEdgeError: as `Engine.submit`.
        """
        try:
            for index, request in enumerate(requests):
                with self._lock:
                    if self._closed:
                        return
                    deliver = functools.partial(self._deliver, index)
                    self._handles.append(self._engine.submit(request, deliver))
                    self._open += 1
        except BaseException:
            self.close()
            raise

    def cancel(self, index: int) -> Callable[[], None]:
        """Return a function that ends one request before its next step."""
        return lambda: self._handles[index].cancel()

    async def next(self) -> tuple[int, Event] | None:
        """Return the index and the next event of a request, or None after the last end."""
        if not self._open:
            return None
        index, event = await self._queue.get()
        self._open -= isinstance(event, Finished)
        return index, event

    def close(self) -> None:
        """Cancel the requests that run or wait."""
        with self._lock:
            self._closed = True
            for handle in self._handles:
                handle.cancel()

    def _deliver(self, index: int, event: Event) -> None:
        # On the engine's thread. A closed loop raises, and the engine then cancels the request.
        self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))
