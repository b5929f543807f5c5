"""Encoded images and recordings, kept for later requests with the same content."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from glm_edge.errors import DataError, GlmEdgeError
from glm_edge.serve.backend import Backend, Media, ReadyPrompt


class FeatureCache:
    """Features by content, the least recently used leave first; for one thread, the engine's.

    A backend that encodes apart does so on a thread of the cache, so that neither an encoder nor
    its compilation for an image of a new size stops the answers that run.
    """

    def __init__(
        self, backend: Backend, limit_bytes: int, on_encoded: Callable[[], None] = lambda: None
    ):
        """Make an empty cache.

        Args:
          backend: encodes images and recordings.
          limit_bytes: limit of all features; the newest item stays even if it exceeds the limit.
          on_encoded: called on the cache's thread when features that were requested are there.

        Raises:
          DataError: the limit is negative.
        """
        if limit_bytes < 0:
            raise DataError(f"the limit of kept features must not be negative: {limit_bytes}")
        self._backend, self._limit, self._on_encoded = backend, limit_bytes, on_encoded
        # An item that could not be encoded has the error in place of its features.
        self._features: OrderedDict[bytes, np.ndarray | GlmEdgeError] = OrderedDict()
        self._bytes = 0
        self._pending: dict[bytes, Future[np.ndarray | GlmEdgeError]] = {}
        self._encoder = ThreadPoolExecutor(1, "glm-edge-encoder") if backend.encodes_apart else None

    def request(self, media: Iterable[Media]) -> dict[bytes, np.ndarray] | None:
        """Return the features of some items by key; begin to encode those that are missing.

        Args:
          media: the items.

        Returns:
          Features [M, D] by key, or None until all are there; `on_encoded` then tells.

        Raises:
          GlmEdgeError: an item cannot be encoded.
        """
        self._collect()
        known: dict[bytes, np.ndarray] = {}
        complete = True
        for item in media:
            features = self._features.get(item.key)
            if features is None and self._encoder is not None:
                complete = False
                if item.key not in self._pending:
                    self._begin(self._encoder, item)
                continue
            if features is None:
                features = self._encode(item)
                self._keep(item.key, features)
            if isinstance(features, GlmEdgeError):
                del self._features[item.key]
                raise features
            self._features.move_to_end(item.key)
            known[item.key] = features
        return known if complete else None

    @property
    def settled(self) -> bool:
        """False while items are encoded and none is finished."""
        return not self._pending or any(future.done() for future in self._pending.values())

    def of_tokens(
        self, prompt: ReadyPrompt, known: Mapping[bytes, np.ndarray], start: int, end: int
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """Return the features of tokens `start..end`, and where they belong.

        Args:
          prompt: the prompt, which may end before these tokens.
          known: from `request`; an item that is missing is encoded now.
          start: index of the first token.
          end: index after the last.

        Returns:
          `(features, placed)`: float32 [T, D], or None without any; and bool [T].

        Raises:
          GlmEdgeError: an item cannot be encoded.
        """
        features, placed = None, np.zeros(end - start, bool)
        for media in prompt.media:
            inside = (start <= media.places) & (media.places < end)
            if not inside.any():
                continue
            if features is None:
                width = self._backend.config.decoder.hidden_size
                features = np.zeros((end - start, width), np.float32)
            at = media.places[inside] - start
            encoded = known.get(media.key)
            if encoded is None:
                encoded = self._backend.encode(media)
            features[at] = encoded[media.offsets[inside]]
            placed[at] = True
        return features, placed

    def close(self) -> None:
        """End the thread after the item that it encodes."""
        if self._encoder is not None:
            self._encoder.shutdown(wait=False, cancel_futures=True)

    def _begin(self, encoder: ThreadPoolExecutor, media: Media) -> None:
        future = encoder.submit(self._encode, media)
        self._pending[media.key] = future
        future.add_done_callback(lambda _: self._on_encoded())

    def _encode(self, media: Media) -> np.ndarray | GlmEdgeError:
        try:
            return self._backend.encode(media)
        except GlmEdgeError as error:
            return error

    def _collect(self) -> None:
        """Keep what the thread has encoded; an error that is no `GlmEdgeError` is raised."""
        for key in [key for key, future in self._pending.items() if future.done()]:
            self._keep(key, self._pending.pop(key).result())

    def _keep(self, key: bytes, features: np.ndarray | GlmEdgeError) -> None:
        self._features[key] = features
        self._bytes += _size(features)
        while self._bytes > self._limit and len(self._features) > 1:
            self._bytes -= _size(self._features.popitem(last=False)[1])


def _size(features: np.ndarray | GlmEdgeError) -> int:
    return features.nbytes if isinstance(features, np.ndarray) else 0
