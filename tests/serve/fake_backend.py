"""A backend without a model: the next token depends on every row that the engine wrote.

So a row of another request, a stale row or a row at the wrong place changes the answer.
"""

import threading
import zlib

import numpy as np

from glm_edge.serve.backend import BLOCK
from tests.tiny_models import tiny_config

VOCABULARY = 48


def scores_after(rows):
    """Scores that are a hash of all rows of a text."""
    seed = zlib.crc32(np.asarray(rows, np.int64).tobytes())
    return np.random.default_rng(seed).normal(size=VOCABULARY).astype(np.float32) * 3


class FakeBackend:
    """A backend whose rows are the tokens themselves, or a sum of the features in their place."""

    def __init__(self, num_slots=3, capacity=160, chunk=16, scored=8, encodes_apart=True):
        """Make slots full of values that no text has."""
        self.config = tiny_config({"max_position_embeddings": capacity}, {}, {})
        self.num_slots, self.capacity = num_slots, capacity
        self.chunk, self.scored = chunk, scored
        self.rows = np.full((num_slots, capacity + chunk + BLOCK), -1, np.int64)
        self.row_counts = sorted({1, scored, num_slots})
        self.exits, self.calls = None, []
        # Cleared, it stops the encoder.
        self.encodes_apart, self.gate = encodes_apart, threading.Event()
        self.gate.set()

    def encode(self, media):
        assert self.gate.wait(60)
        self.calls.append(("encode", media.key))
        width = self.config.decoder.hidden_size
        value = 1000 + zlib.crc32(media.key) % 1000
        return np.full((media.count, width), value, np.float32)

    def extend(self, slot, start, tokens, positions, features, placed, all_scores):
        assert 0 < len(tokens) <= (self.scored if all_scores else self.chunk)
        self.calls.append(("extend", slot, start, len(tokens)))
        written = tokens if features is None else np.where(placed, features[:, 0], tokens)
        assert (positions == np.arange(start, start + len(tokens))).all()
        end = start + len(tokens)
        self.rows[slot, start:end] = written
        # Padding of a chunk overwrites later rows.
        self.rows[slot, end : start + self.chunk] = -2
        ends = range(start + 1, end + 1) if all_scores else [end]
        return np.stack([scores_after(self.rows[slot, :at]) for at in ends])

    def step(self, tokens, lengths, positions, count):
        self.calls.append(("step", count))
        # As a compiled program does, it writes to other slots, too.
        for slot, (token, length) in enumerate(zip(tokens, lengths, strict=True)):
            self.rows[slot, length] = token
        texts = (self.rows[slot, : length + 1] for slot, length in enumerate(lengths))
        return np.stack([scores_after(text) for text in texts])

    def copy_out(self, slot, start):
        assert start % BLOCK == 0
        return self.rows[slot, start : start + BLOCK].copy()

    def copy_in(self, slot, start, rows):
        assert start % BLOCK == 0
        self.rows[slot, start : start + BLOCK] = rows

    def block_bytes(self):
        return 8 * BLOCK

    def warm_up(self):
        pass
