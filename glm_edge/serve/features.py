"""Encoded images and recordings, kept for later requests with the same content."""

from collections import OrderedDict

import numpy as np

from glm_edge.errors import DataError
from glm_edge.serve.backend import Backend, Media, ReadyPrompt


class FeatureCache:
    """Features by content, the least recently used leave first; for one thread, the engine's.

    Args:
      backend: encodes images and recordings.
      limit_bytes: limit of all features; the newest item stays even if it exceeds the limit.

    Raises:
      DataError: the limit is negative.
    """

    def __init__(self, backend: Backend, limit_bytes: int):
        if limit_bytes < 0:
            raise DataError(f"the limit of kept features must not be negative: {limit_bytes}")
        self._backend, self._limit = backend, limit_bytes
        self._features: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._bytes = 0

    def of(self, media: Media) -> np.ndarray:
        """Return the features [M, D] of an item."""
        features = self._features.get(media.key)
        if features is None:
            features = self._backend.encode(media)
            self._features[media.key] = features
            self._bytes += features.nbytes
            while self._bytes > self._limit and len(self._features) > 1:
                self._bytes -= self._features.popitem(last=False)[1].nbytes
        self._features.move_to_end(media.key)
        return features

    def of_tokens(
        self, prompt: ReadyPrompt, start: int, end: int
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """Return the features of tokens `start..end`, and where they belong.

        Args:
          prompt: the prompt, which may end before these tokens.
          start: index of the first token.
          end: index after the last.

        Returns:
          `(features, placed)`: float32 [T, D], or None without any; and bool [T].
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
            features[at] = self.of(media)[media.offsets[inside]]
            placed[at] = True
        return features, placed
