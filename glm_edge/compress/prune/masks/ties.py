"""The order in which torch takes equal scores.

`torch.topk` on a CPU leaves ties to the C++ standard library: `std::partial_sort` where few are
asked for, `std::nth_element` elsewhere. Which of equals it takes follows from the steps of those
algorithms, so they are repeated here as libstdc++ takes them, whole sweeps at a time.
"""

import numpy as np

# torch sorts a part where at most one in so many is asked for.
_FEW = 64


def smallest(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the smallest scores, of equals those that `torch.topk(largest=False)` takes.

    Args:
      scores: [n], finite. Of their negatives, the result is that of `largest=True`.
      count: how many.

    Returns:
      int [count], in no order.
    """
    values, places = np.array(scores, copy=True), np.arange(len(scores))
    if 0 < count < len(scores):
        if count * _FEW <= len(scores):
            _heap_select(values, places, 0, count, len(scores))
        else:
            _nth_element(values, places, count - 1)
    return places[:count]


def _nth_element(values: np.ndarray, places: np.ndarray, nth: int) -> None:
    first, last = 0, len(values)
    depth = 2 * (len(values).bit_length() - 1)
    while last - first > 3:
        if depth == 0:
            _heap_select(values, places, first, nth + 1, last)
            _swap(values, places, first, nth)
            return
        depth -= 1
        cut = _partition(values, places, first, last)
        first, last = (cut, last) if cut <= nth else (first, cut)
    order = first + np.argsort(values[first:last], kind="stable")
    values[first:last], places[first:last] = values[order], places[order]


def _partition(values: np.ndarray, places: np.ndarray, first: int, last: int) -> int:
    """Hoare's partition about the median of three; returns where the right part begins."""
    a, b, c = first + 1, first + (last - first) // 2, last - 1
    if values[a] < values[b]:
        median = b if values[b] < values[c] else c if values[a] < values[c] else a
    else:
        median = a if values[a] < values[c] else c if values[b] < values[c] else b
    _swap(values, places, first, median)
    rest = values[first + 1 : last]
    # Each pointer stops at what may not stay on its side; the stops are swapped pair by pair.
    left = np.flatnonzero(rest >= values[first]) + first + 1
    right = np.flatnonzero(rest <= values[first])[::-1] + first + 1
    pairs = min(len(left), len(right))
    crossed = np.flatnonzero(left[:pairs] >= right[:pairs])
    pairs = int(crossed[0]) if len(crossed) else pairs
    _swap(values, places, left[:pairs], right[:pairs])
    stops = [*left[pairs : pairs + 1], *right[max(pairs - 1, 0) : pairs]]
    return int(min(stops))


def _swap(values: np.ndarray, places: np.ndarray, one: object, other: object) -> None:
    for array in (values, places):
        array[one], array[other] = np.copy(array[other]), np.copy(array[one])


def _heap_select(
    values: np.ndarray, places: np.ndarray, first: int, middle: int, last: int
) -> None:
    heap = list(zip(values[first:middle].tolist(), places[first:middle].tolist(), strict=True))
    for parent in reversed(range(len(heap) // 2)):
        _sift(heap, parent, heap[parent])
    # The greatest in the heap only falls, so what is not below it now never is.
    later = middle + np.flatnonzero(values[middle:last] < heap[0][0])
    for place in later.tolist():
        if values[place] < heap[0][0]:
            value = (values[place].item(), places[place].item())
            values[place], places[place] = heap[0]
            _sift(heap, 0, value)
    values[first:middle], places[first:middle] = zip(*heap, strict=True)


def _sift(heap: list[tuple[float, int]], top: int, value: tuple[float, int]) -> None:
    """Puts a value where the hole at `top` sinks to, and lets it rise from there."""
    hole, child = top, top
    while child < (len(heap) - 1) // 2:
        child = 2 * child + 2
        if heap[child][0] < heap[child - 1][0]:
            child -= 1
        heap[hole], hole = heap[child], child
    if len(heap) % 2 == 0 and child == (len(heap) - 2) // 2:
        child = 2 * child + 1
        heap[hole], hole = heap[child], child
    while hole > top and heap[(hole - 1) // 2][0] < value[0]:
        heap[hole], hole = heap[(hole - 1) // 2], (hole - 1) // 2
    heap[hole] = value
