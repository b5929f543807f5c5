"""Weights larger than memory: which blocks stay, and how long a token takes.

A model reads its layers in the same order for every token. The least recently used block is then
always the one that is needed next, so that LRU never hits. The bound for any policy is Belady's:
`(capacity - 1) / (layers - 1)` of the accesses hit.

References:
  Belady, A study of replacement algorithms for a virtual-storage computer, 1966.
  Kim et al., Mathematics 13(22) 3689, 2025 (loops of neural networks in a phone's memory).
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glm_edge.errors import DataError

POLICIES = ("lru", "mru", "two_lists", "pin", "belady", "oldest_first", "newest_first")
LOW_SHARE, HIGH_SHARE = 0.70, 0.85
ACTIVE_SHARE = 0.5
NEVER = math.inf


class BlockCache:
    """Blocks in memory, with reference counts; a referenced block is never evicted.

    Attributes:
      capacity: bytes of memory.
      hits: accesses to a block in memory.
      loaded: bytes read from storage, those of prefetching included.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        capacity: int,
        policy: str,
        accesses: Sequence[int] = (),
        low: float = LOW_SHARE,
        high: float = HIGH_SHARE,
    ):
        """Create an empty cache.

        Args:
          sizes: bytes of each block.
          capacity: bytes of memory.
          policy: one of `POLICIES`. `belady` knows the future; `pin` keeps the blocks that came
            first and streams the others through the last slot; `oldest_first` and `newest_first`
            prefetch the next block below `low` of the capacity and evict above `high` of it.
          accesses: future accesses, for `belady`.
          low: share of the capacity below which the next block is prefetched.
          high: share above which blocks are evicted.

        Raises:
          DataError: the policy is unknown, a size is not positive, or a block exceeds the capacity.
        """
        if policy not in POLICIES:
            raise DataError(f"loading: policy {policy!r:.60} is not one of {', '.join(POLICIES)}")
        if not sizes or min(sizes) < 1:
            raise DataError("loading: every block needs at least one byte")
        if max(sizes) > capacity:
            raise DataError(
                f"loading: a block of {max(sizes):,} bytes exceeds the memory of {capacity:,} bytes"
            )
        self.capacity, self.hits, self.loaded = capacity, 0, 0
        self._sizes, self._policy = tuple(sizes), policy
        self._low, self._high = low * capacity, high * capacity
        # In the order of the last use.
        self._blocks: OrderedDict[int, int] = OrderedDict()
        self._active: set[int] = set()
        self._used = 0
        self._next_use = _next_uses(accesses) if policy == "belady" else []
        self._due: dict[int, float] = {}
        self._time = 0

    def __contains__(self, block: int) -> bool:
        return block in self._blocks

    @property
    def used(self) -> int:
        """Bytes of the blocks in memory."""
        return self._used

    def acquire(self, block: int) -> bool:
        """Bring a block into memory and reference it.

        Args:
          block: index of the block.

        Returns:
          True if it was in memory.

        Raises:
          DataError: referenced blocks leave no space for it.
        """
        hit = block in self._blocks
        if self._policy == "belady":
            self._due[block] = self._next_use[self._time]
        self._time += 1
        if hit:
            self.hits += 1
            self._touch(block)
        else:
            self._load(block)
        self._blocks[block] += 1
        if self._policy in ("oldest_first", "newest_first"):
            self._apply_thresholds(block)
        return hit

    def release(self, block: int) -> None:
        """Drop a reference of a block.

        Raises:
          DataError: the block is not referenced.
        """
        if not self._blocks.get(block):
            raise DataError(f"loading: block {block} is released but not referenced")
        self._blocks[block] -= 1

    def _touch(self, block: int) -> None:
        if self._policy == "pin":
            # The order stays that of loading.
            return
        self._blocks.move_to_end(block)
        if self._policy == "two_lists" and block not in self._active:
            # A second use moves a block to the active list, whose oldest one becomes inactive.
            self._active.add(block)
            active_bytes = sum(self._sizes[b] for b in self._active)
            if active_bytes > ACTIVE_SHARE * self.capacity:
                oldest = next(b for b in self._blocks if b in self._active)
                self._active.discard(oldest)
                self._blocks.move_to_end(oldest)

    def _load(self, block: int) -> None:
        while self._used + self._sizes[block] > self.capacity:
            self._evict()
        self._blocks[block] = 0
        self._used += self._sizes[block]
        self.loaded += self._sizes[block]

    def _evict(self) -> None:
        free = [block for block, references in self._blocks.items() if not references]
        if not free:
            raise DataError("loading: referenced blocks fill the memory; release one first")
        victim = self._victim(free)
        del self._blocks[victim]
        self._active.discard(victim)
        self._used -= self._sizes[victim]

    def _victim(self, free: list[int]) -> int:
        """Choose among unreferenced blocks, in the order of their last use."""
        if self._policy == "belady":
            return max(free, key=lambda block: self._due[block])
        if self._policy in ("mru", "newest_first", "pin"):
            # In a loop the block that was just used is needed last.
            return free[-1]
        inactive = [block for block in free if block not in self._active]
        return (inactive or free)[0]

    def _apply_thresholds(self, block: int) -> None:
        following = (block + 1) % len(self._sizes)
        if self._used < self._low and following not in self._blocks:
            self._load(following)
        while self._used > self._high:
            if all(self._blocks.values()):
                return
            self._evict()


def _next_uses(accesses: Sequence[int]) -> list[float]:
    """Return the time of the next access to the block of each access."""
    following: dict[int, int] = {}
    times = [NEVER] * len(accesses)
    for time in range(len(accesses) - 1, -1, -1):
        times[time] = following.get(accesses[time], NEVER)
        following[accesses[time]] = time
    return times


@dataclass(frozen=True)
class LoadTrace:
    """Result of simulated loading.

    Attributes:
      hits: accesses to a block in memory.
      accesses: count of accesses.
      loaded_bytes: bytes read from storage.
      seconds: time of all accesses.
      stall_s: time in which nothing was computed.
    """

    hits: int
    accesses: int
    loaded_bytes: int
    seconds: float
    stall_s: float

    @property
    def hit_rate(self) -> float:
        """Share of accesses that hit."""
        return self.hits / self.accesses


def simulate_loading(
    block_bytes: Sequence[int],
    accesses: Sequence[int],
    capacity_bytes: int,
    storage_bytes_s: float,
    compute_bytes_s: float,
    policy: str = "pin",
    ahead: bool = True,
) -> LoadTrace:
    """Simulate a sequence of accesses to blocks of weights.

    One queue reads from storage. With `ahead`, the queue reads the following missing blocks while
    blocks are computed, as far as memory allows; without, each miss waits.

    Args:
      block_bytes: bytes of each block.
      accesses: indices of blocks in order, such as all layers of each token.
      capacity_bytes: memory for blocks.
      storage_bytes_s: bandwidth of storage.
      compute_bytes_s: bandwidth at which a block in memory is used.
      policy: one of `POLICIES`.
      ahead: whether reading overlaps with computing.

    Returns:
      Hits, bytes and times.

    Raises:
      DataError: the policy is unknown, a block exceeds the memory, or a rate is not positive.
    """
    if not (storage_bytes_s > 0 and compute_bytes_s > 0):
        raise DataError("loading: bandwidths must be above 0")
    if not accesses:
        raise DataError("loading: there is no access")
    cache = BlockCache(block_bytes, capacity_bytes, policy, accesses)
    # End of the last read and of the last computation, in seconds.
    read_s = compute_s = busy_s = 0.0
    for block in accesses:
        before = cache.loaded
        cache.acquire(block)
        io_s = (cache.loaded - before) / storage_bytes_s
        start_s = read_s if ahead else max(read_s, compute_s)
        read_s = start_s + io_s if io_s else read_s
        work_s = block_bytes[block] / compute_bytes_s
        compute_s = max(compute_s, read_s if io_s else 0.0) + work_s
        busy_s += work_s
        cache.release(block)
    return LoadTrace(cache.hits, len(accesses), cache.loaded, compute_s, compute_s - busy_s)


def layers_in_order(layers: int, tokens: int) -> list[int]:
    """List the accesses of decoding: every layer in order, per token."""
    return np.tile(np.arange(layers), tokens).tolist()


def hit_rate_bound(layers: int, capacity: int) -> float:
    """Compute the highest hit rate of any policy for equal layers in a loop, in the long run.

    Args:
      layers: count of layers.
      capacity: count of layers that fit, at least 1.

    Returns:
      `(capacity - 1) / (layers - 1)`, or 1 if all fit.

    Raises:
      DataError: no layer fits.
    """
    if capacity < 1 or layers < 1:
        raise DataError(f"loading: {capacity} of {layers} layers fit; at least 1 is needed")
    return 1.0 if capacity >= layers else (capacity - 1) / (layers - 1)


def loaded_token_s(
    weight_bytes: float,
    memory_bytes: float,
    storage_bytes_s: float,
    compute_bytes_s: float,
    layers: int,
) -> float:
    """Compute the seconds of a token with pinned layers and prefetching, in the long run.

    Args:
      weight_bytes: bytes that a token reads.
      memory_bytes: memory for weights.
      storage_bytes_s: bandwidth of storage.
      compute_bytes_s: achieved bandwidth of memory.
      layers: count of equal blocks.

    Returns:
      The longer of reading what does not fit and of computing. One block streams while the others
      stay.
    """
    compute_s = weight_bytes / compute_bytes_s
    if memory_bytes >= weight_bytes:
        return compute_s
    resident = max(math.floor(memory_bytes / weight_bytes * layers) - 1, 0) / layers
    return max((1.0 - resident) * weight_bytes / storage_bytes_s, compute_s)
