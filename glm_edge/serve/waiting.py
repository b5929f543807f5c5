"""Requests that wait for a slot, the most urgent first, and for their images."""

import heapq
import threading
from collections.abc import Callable, Iterator, Sequence

from glm_edge.errors import GlmEdgeError
from glm_edge.serve.backend import BLOCK, Media
from glm_edge.serve.features import FeatureCache
from glm_edge.serve.prefix_cache import PrefixCache
from glm_edge.serve.slots import Task


class QueueFullError(GlmEdgeError):
    """Raised when too many requests wait."""


class WaitingTasks:
    """A queue with a limit, whose requests start when their images and recordings are encoded.

    Args:
      limit: requests that may wait.
      ahead: requests whose images may be encoded before they have a slot.
      features: encodes images and recordings.
      prefix_cache: rows that need no features.
      lock: of all that the threads share; the caller holds it for `push`, `first` and `len`.
    """

    def __init__(
        self,
        limit: int,
        ahead: int,
        features: FeatureCache,
        prefix_cache: PrefixCache,
        lock: threading.Condition,
    ):
        self._limit, self._ahead = limit, ahead
        self._features, self._prefix_cache, self._lock = features, prefix_cache, lock
        self._heap: list[tuple[tuple[int, int], Task]] = []
        # Requests that the last iteration could not start before something is encoded.
        self._blocked = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, task: Task) -> None:
        """Add a new request.

        Args:
          task: the request.

        Raises:
          QueueFullError: too many requests wait.
        """
        if len(self._heap) >= self._limit:
            raise QueueFullError(f"{len(self._heap)} requests wait; try again later")
        heapq.heappush(self._heap, (task.urgency, task))

    def put_back(self, task: Task) -> None:
        """Add a request that was interrupted, whatever the limit."""
        with self._lock:
            heapq.heappush(self._heap, (task.urgency, task))

    def remove(self, task: Task) -> None:
        """Remove a request."""
        with self._lock:
            if self._heap[0][1] is task:
                heapq.heappop(self._heap)
                return
        self.take(lambda other: other is task)

    def take(self, condition: Callable[[Task], bool]) -> list[Task]:
        """Remove and return the requests that fulfil a condition."""
        with self._lock:
            taken = [task for _, task in self._heap if condition(task)]
            if taken:
                self._heap = [item for item in self._heap if item[1] not in taken]
                heapq.heapify(self._heap)
        return taken

    @property
    def stalled(self) -> bool:
        """True if no request can start before something is encoded."""
        return self._blocked == len(self._heap) and not self._features.settled

    def startable(self) -> Iterator[Task]:
        """Iterate over the requests that can start, in order of urgency.

        A request whose images are being encoded lets others go first. One whose images cannot be
        encoded ends.
        """
        self._blocked = 0
        for task in self._by_urgency():
            try:
                ready = self._has_features(task)
            except GlmEdgeError as error:
                self.remove(task)
                task.finish("error", str(error))
                continue
            if ready:
                yield task
            else:
                self._blocked += 1

    def _by_urgency(self) -> Iterator[Task]:
        """Iterate over all; the first, often the only one that is needed, costs no sorting."""
        with self._lock:
            if not self._heap:
                return
            first = self._heap[0][1]
        yield first
        with self._lock:
            others = [item for item in self._heap if item[1] is not first]
        yield from (task for _, task in sorted(others, key=lambda item: item[0]))

    def _has_features(self, task: Task) -> bool:
        """Return True if a request can start; else let its images and recordings be encoded."""
        if task.saved is not None or task.features is not None:
            return True
        media: Sequence[Media] = task.prompt.media
        if media and self._blocked >= self._ahead:
            return False
        if task.request.vision_tokens is None:
            rows = self._prefix_cache.missing(task.reusable_keys) * BLOCK
            media = [item for item in media if item.places[-1] >= rows]
        task.features = self._features.request(media)
        return task.features is not None
