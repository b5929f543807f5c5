"""Rows of earlier prompts, which later prompts with the same beginning copy instead of computing.

A block holds the rows of `BLOCK` tokens. Its key is a hash of all tokens, images and recordings up
to its end, because keys and values depend on everything before them. So a block is reused only
after the same beginning, and never for a token or a picture that differs.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glm_edge.errors import DataError
from glm_edge.serve.backend import BLOCK, Media

# Fractions of the limit in bytes: above the high one, blocks are removed down to the low one.
LOW, HIGH = 0.70, 0.85


@dataclass(eq=False)
class _Block:
    rows: Any
    parent: bytes | None
    children: int = 0
    readers: int = 0


class PrefixCache:
    """A store of blocks with a limit in bytes; the least recently used leave first.

    Only one thread, the engine's, may call its methods.

    Attributes:
      hits: tokens whose rows were reused.
      misses: tokens of complete blocks that were looked up in vain.
      evictions: blocks that were removed.
    """

    def __init__(self, limit_bytes: int, block_bytes: int):
        """Make an empty store.

        Args:
          limit_bytes: most bytes of all blocks; 0 stores nothing.
          block_bytes: bytes of one block.

        Raises:
          DataError: the limit is negative.
        """
        if limit_bytes < 0:
            raise DataError(f"the limit of the prefix cache must not be negative: {limit_bytes}")
        self._low = int(LOW * limit_bytes) // block_bytes
        self._high = int(HIGH * limit_bytes) // block_bytes
        self._block_bytes = block_bytes
        # In order of use, the least recent first.
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()
        self.hits = self.misses = self.evictions = 0

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all blocks."""
        return len(self._blocks) * self._block_bytes

    def acquire(self, keys: Sequence[bytes]) -> list[Any]:
        """Return the rows of the longest stored beginning, and protect them from removal.

        Args:
          keys: of the blocks of a prompt, from `block_keys`.

        Returns:
          Rows of the first blocks; pass `keys[:len(rows)]` to `release` after the copy.
        """
        rows = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            block.readers += 1
            self._blocks.move_to_end(key)
            rows.append(block.rows)
        self.hits += len(rows) * BLOCK
        self.misses += (len(keys) - len(rows)) * BLOCK
        return rows

    def release(self, keys: Iterable[bytes]) -> None:
        """End the protection of `acquire`."""
        for key in keys:
            self._blocks[key].readers -= 1

    def missing(self, keys: Sequence[bytes]) -> int:
        """Return the index of the first block that is not stored, and mark the others as used."""
        for index, key in enumerate(keys):
            if key not in self._blocks:
                return index
            self._blocks.move_to_end(key)
        return len(keys)

    def store(self, keys: Sequence[bytes], index: int, rows: Any) -> bool:
        """Store the rows of one block, whose predecessors are stored.

        Args:
          keys: of the blocks of a prompt.
          index: of the block in `keys`.
          rows: of `Backend.copy_out`.

        Returns:
          False if the limit has no room, or a predecessor was removed in the meantime.
        """
        key, parent = keys[index], keys[index - 1] if index else None
        if key in self._blocks:
            return True
        if parent is not None and parent not in self._blocks:
            return False
        if len(self._blocks) + 1 > self._high:
            self._evict(protected=set(keys[:index]))
            if len(self._blocks) + 1 > self._high:
                return False
        self._blocks[key] = _Block(rows, parent)
        if parent is not None:
            self._blocks[parent].children += 1
        return True

    def clear(self) -> None:
        """Remove all blocks that no request reads."""
        self._evict(set(), low=0)

    def _evict(self, protected: set[bytes], low: int | None = None) -> None:
        """Remove the least recently used blocks without successors, down to the low mark.

        A block with successors stays: without it they could not be found.
        """
        low = self._low if low is None else low
        removed = True
        while removed and len(self._blocks) > low:
            removed = False
            for key in list(self._blocks):
                block = self._blocks[key]
                if block.children or block.readers or key in protected:
                    continue
                del self._blocks[key]
                self.evictions += 1
                removed = True
                if block.parent is not None:
                    self._blocks[block.parent].children -= 1
                if len(self._blocks) <= low:
                    return


def block_keys(tokens: np.ndarray, positions: np.ndarray, media: Sequence[Media]) -> list[bytes]:
    """Hash the complete blocks of a text.

    Args:
      tokens: int32 [T].
      positions: int32 [1, T] or [3, T], rotary positions.
      media: of the text; a placeholder counts by its item's content and its feature.

    Returns:
      One key per `BLOCK` tokens.
    """
    names: dict[int, bytes] = {}
    for item in media:
        for index, offset in zip(item.places.tolist(), item.offsets.tolist(), strict=True):
            names[index] = item.key + offset.to_bytes(4, "little")
    keys, parent = [], b""
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        end = start + BLOCK
        digest = hashlib.blake2b(parent, digest_size=16)
        digest.update(np.asarray(tokens[start:end], "<i4").tobytes())
        digest.update(np.asarray(positions[:, start:end], "<i4").tobytes())
        for index in range(start, end):
            if index in names:
                digest.update(bytes([index - start]) + names[index])
        parent = digest.digest()
        keys.append(parent)
    return keys
