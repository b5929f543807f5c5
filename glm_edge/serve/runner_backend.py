"""An exported file behind the engine: one slot, through the file's own signatures.

So the service answers with the numbers of the phone's file, on a desk.
"""

from pathlib import Path
from typing import Any

import numpy as np

from glm_edge.export.common.interface import CACHE
from glm_edge.export.verify.litert_runner import LiteRTRunner
from glm_edge.export.verify.runner import SignatureRunner
from glm_edge.serve.backend import BLOCK, Media

# Most tokens that a draft may verify at once.
SCORED = 16


class RunnerBackend:
    """The signatures of an exported model; see `glm_edge.serve.backend.Backend` for the methods.

    Args:
      runner: driver of the signatures, such as `LiteRTRunner(path)`.
    """

    def __init__(self, runner: SignatureRunner):
        self.config = runner.config
        self.num_slots, self.capacity = 1, runner.cache_slots
        self.chunk = runner.lengths[-1]
        self.scored = min(SCORED, self.chunk)
        self.row_counts, self.exits = sorted({1, self.scored}), None
        # A file's signatures share one interpreter.
        self.encodes_apart = False
        self._runner = runner
        self._cache = runner.empty_cache()

    @classmethod
    def from_file(cls, path: str | Path, num_threads: int = 2) -> "RunnerBackend":
        """Open a `.tflite` file in LiteRT.

        Args:
          path: path of a file that `glm_edge.export.tflite` wrote.
          num_threads: number of threads of the interpreter.

        Raises:
          ExportError: glm_edge did not export the file, or it is damaged.
          MissingExtraError: LiteRT is not installed.
        """
        return cls(LiteRTRunner(path, num_threads))

    def encode(self, media: Media) -> np.ndarray:
        """Encode one image or one recording of the size of the file's signature."""
        if media.kind == "image":
            return self._runner.encode_images(media.array)
        return self._runner.encode_audio(media.array)[: media.count]

    def extend(
        self,
        slot: int,
        start: int,
        tokens: np.ndarray,
        positions: np.ndarray,
        features: np.ndarray | None,
        placed: np.ndarray,
        all_scores: bool,
    ) -> np.ndarray:
        """Append tokens by the calls that take the least time; see `SignatureRunner.extend`.

        The engine passes a free token with the run that a grammar forces behind it, which then take
        one call of a signature of `forced_lengths`.
        """
        embedded = self._runner.embed(tokens)
        if features is not None:
            embedded = np.where(placed[:, None], features, embedded)
        axes = positions if self.config.decoder.mrope_section else None
        scores, self._cache = self._runner.extend(embedded, start, self._cache, all_scores, axes)
        if not all_scores:
            return scores
        # One number of rows, so that one program draws the tokens of drafts of any length.
        return np.pad(scores, ((0, self.scored - len(scores)), (0, 0)))

    def step(
        self, tokens: np.ndarray, lengths: np.ndarray, positions: np.ndarray, count: int
    ) -> np.ndarray:
        """Append one token by `decode`."""
        axes = np.broadcast_to(positions[:1], (3, 1))
        nowhere = np.zeros(1, bool)
        return self.extend(0, int(lengths[0]), tokens[:1], axes, None, nowhere, False)

    def step_until_sure(
        self, tokens: Any, lengths: Any, positions: Any, count: int, thresholds: Any
    ) -> tuple[Any, Any]:
        """Raise: a file has no exits."""
        raise NotImplementedError("an exported file has no exits")

    def copy_out(self, slot: int, start: int) -> Any:
        """Copy rows of keys and values, which differ in the axis of slots."""
        return {name: array[_block(name, start)].copy() for name, array in self._cache.items()}

    def copy_in(self, slot: int, start: int, rows: Any) -> None:
        """Write copied rows."""
        for name, values in rows.items():
            array = np.array(self._cache[name])
            array[_block(name, start)] = values
            self._cache[name] = array

    def block_bytes(self) -> int:
        """Return the bytes of `BLOCK` rows of all layers."""
        return sum(array.nbytes for array in self._cache.values()) // self.capacity * BLOCK

    def warm_up(self) -> None:
        """Run the signatures once; LiteRT then allocates its memory."""
        for length in self._runner.lengths:
            tokens, axes = np.zeros(length, np.int32), np.zeros((3, length), np.int32)
            self.extend(0, 0, tokens, axes, None, tokens > 0, False)
        self._cache = self._runner.empty_cache()


def _block(name: str, start: int) -> tuple[Any, ...]:
    """Index the rows of a block: keys are [1, K, S, H], values [1, K, H, S]."""
    rows = slice(start, start + BLOCK)
    everything = slice(None)
    if name.startswith(f"{CACHE}k"):
        return everything, everything, rows
    return everything, everything, everything, rows
