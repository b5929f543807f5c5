"""Generator of phone screens with dense labels.

H, W are the screen's height and width in pixels. A cell is one of the 12 x 6 squares of 16 pixels
that result from merging 2x2 patches of 8 pixels.
"""

import dataclasses

import numpy as np

from experiments.nano.phone_screens import digits as digit_images
from experiments.nano.phone_screens import glyphs
from experiments.nano.phone_screens.painting import COLOURS, HEIGHT, WIDTH, Canvas, Style
from glm_edge.errors import DataError

CELL = 16
ROWS, COLUMNS = HEIGHT // CELL, WIDTH // CELL

# Limits of the benchmark, which tests check for every screen.
MIN_ELEMENTS, MAX_ELEMENTS = 8, 20
MIN_OF_TYPE = 3
MAX_AREA = 0.03 * HEIGHT * WIDTH
MIN_CENTRE_DISTANCE = CELL
MIN_KEYS_FOR_SPEECH = 7

DIGITS = tuple("0123456789")
NAMES = {
    "icon": tuple(glyphs.GLYPHS),
    "key": DIGITS,
    "button": tuple(COLOURS),
    "row": tuple(glyphs.GLYPHS),
}
CLASSES = tuple((kind, name) for kind, names in NAMES.items() for name in names)
CLASS_IDS = {pair: index + 1 for index, pair in enumerate(CLASSES)}
NUM_CLASSES = len(CLASSES) + 1

KINDS = ("mixed", "keypad")
_STREAMS = {"train": 0, "calibration": 1, "eval": 2}
_MARGIN = 2


@dataclasses.dataclass(frozen=True)
class Element:
    """An element of the screen that can be tapped.

    Args:
      type: "icon", "key", "button" or "row".
      name: class of the element, one of `NAMES[type]`.
      box: (x0, y0, x1, y1) in pixels; x1 and y1 are exclusive.
    """

    type: str
    name: str
    box: tuple[float, float, float, float]

    @property
    def class_id(self) -> int:
        """Class id in dense labels, 1..NUM_CLASSES-1."""
        return CLASS_IDS[self.type, self.name]

    @property
    def centre(self) -> tuple[float, float]:
        """Centre (x, y) of the box in pixels."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    def contains(self, x: float, y: float) -> bool:
        """Return True if a point in pixels is inside the box."""
        x0, y0, x1, y1 = self.box
        return x0 <= x < x1 and y0 <= y < y1


@dataclasses.dataclass(frozen=True)
class Screen:
    """A generated screen.

    Args:
      image: float32 RGB `[H, W, 3]` in 0..1.
      elements: elements that can be tapped.
    """

    image: np.ndarray
    elements: tuple[Element, ...]


def random_stream(split: str, seed: int) -> np.random.Generator:
    """Open a random stream that is disjoint from those of other splits for all seeds.

    Args:
      split: "train", "calibration" or "eval".
      seed: non-negative integer.

    Returns:
      A numpy generator.

    Raises:
      DataError: the split is unknown.
    """
    if split not in _STREAMS:
        raise DataError(f"unknown split {split!r} of screens; use one of {', '.join(_STREAMS)}")
    return np.random.default_rng([_STREAMS[split], seed])


def dense_labels(screen: Screen) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label each cell with its element and the element's centre.

    The element of a cell is the one with its centre in the cell, or else the one whose box contains
    the cell's centre.

    Args:
      screen: the screen; its `ROWS * COLUMNS` = 72 cells are numbered in row-major order.

    Returns:
      Class ids, int32 `[72]`, 0 for background; offsets from the cell's centre to the element's
      centre in cells, float32 `[72, 2]` as (x, y); True for cells that contain the element's
      centre, bool `[72]`.
    """
    classes = np.zeros((ROWS, COLUMNS), np.int32)
    offsets = np.zeros((ROWS, COLUMNS, 2), np.float32)
    centred = np.zeros((ROWS, COLUMNS), bool)
    half = CELL / 2

    def show(element, row, column):
        x, y = element.centre
        classes[row, column] = element.class_id
        offsets[row, column] = x / CELL - column - 0.5, y / CELL - row - 0.5

    for element in screen.elements:
        x0, y0, x1, y1 = element.box
        for row in range(int(np.ceil((y0 - half) / CELL)), int(np.ceil((y1 - half) / CELL))):
            for column in range(int(np.ceil((x0 - half) / CELL)), int(np.ceil((x1 - half) / CELL))):
                show(element, row, column)
    for element in screen.elements:
        column, row = (int(v // CELL) for v in element.centre)
        show(element, row, column)
        centred[row, column] = True
    return classes.reshape(-1), offsets.reshape(-1, 2), centred.reshape(-1)


class ScreenGenerator:
    """A generator of screens; the same random stream produces the same bytes.

    Args:
      digits: handwritten digits for the keys.
      seed: seed of the default stream of `draw`.
    """

    def __init__(self, digits: digit_images.DigitImages, seed: int = 0):
        self.digits = digits
        self._rng = np.random.default_rng(seed)
        self._resampling = {s: digit_images.resampling_matrix(24, s) for s in range(18, 23)}

    def draw(self, rng: np.random.Generator | None = None, kind: str = "mixed") -> Screen:
        """Draw one screen.

        Args:
          rng: random generator; default: the stream of this object.
          kind: "mixed", or "keypad" with at least `MIN_KEYS_FOR_SPEECH` different digit keys.

        Returns:
          The screen.

        Raises:
          DataError: the kind is unknown.
        """
        if kind not in KINDS:
            raise DataError(f"unknown kind {kind!r} of screen; use one of {', '.join(KINDS)}")
        rng = self._rng if rng is None else rng
        dark = rng.random() < 0.5
        canvas = Canvas(rng, dark)
        top = canvas.bars()
        while (placed := _arrange(rng, _choose(rng, kind), top)) is None:
            pass
        elements, gaps = placed
        for start, end in gaps:
            canvas.heading(start, end)
        style = Style(rng, canvas.ground)
        for element in elements:
            name, box = element.name, tuple(int(v) for v in element.box)
            if element.type == "icon":
                canvas.icon(name, box, style)
            elif element.type == "key":
                canvas.key(self._digit(rng, int(name)), box, style)
            elif element.type == "button":
                canvas.button(name, box, style)
            else:
                canvas.row(name, box, style)
        return Screen(canvas.finish(), tuple(elements))

    def _digit(self, rng: np.random.Generator, digit: int) -> np.ndarray:
        stack = self.digits.images[digit]
        size = int(rng.integers(18, 23))
        return digit_images.ink(stack[rng.integers(len(stack))], self._resampling[size])


def _choose(rng: np.random.Generator, kind: str) -> list[tuple[str, str, int, int]]:
    """Choose types, names and sizes (type, name, width, height), grouped by type."""
    if kind == "keypad":
        counts = {"key": int(rng.integers(8, 11))}
        others = [t for t in ("icon", "button", "row") if rng.random() < 0.45]
        if counts["key"] == 10 and len(others) > 2:
            others.pop()
        counts |= {t: int(rng.integers(3, 5)) for t in others}
    else:
        order = list(rng.permutation(list(NAMES)))[: int(rng.integers(2, 5))]
        most = {"icon": 10, "key": 8, "button": 6, "row": 6}
        counts = {}
        for i, t in enumerate(order):
            room = MAX_ELEMENTS - sum(counts.values()) - MIN_OF_TYPE * (len(order) - 1 - i)
            counts[t] = int(rng.integers(3, min(most[t], room) + 1))
        if sum(counts.values()) < MIN_ELEMENTS:
            counts[order[0]] += MIN_ELEMENTS - sum(counts.values())
    glyph_names = [str(n) for n in rng.permutation(NAMES["icon"])]
    chosen = []
    for t in (str(t) for t in rng.permutation(list(counts))):
        if t in ("icon", "row"):
            names, glyph_names = glyph_names[: counts[t]], glyph_names[counts[t] :]
        else:
            names = [str(n) for n in rng.permutation(NAMES[t])[: counts[t]]]
        chosen += [(t, name, *_size(rng, t)) for name in names]
    if rng.random() < 0.3:
        chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    return chosen


def _size(rng: np.random.Generator, kind: str) -> tuple[int, int]:
    if kind == "icon":
        side = int(rng.integers(17, 24))
        return side, side
    if kind == "key":
        return int(rng.integers(21, 24)), int(rng.integers(22, 24))
    height = int(rng.integers(13, 18)) if kind == "button" else int(rng.integers(13, 16))
    widest = int(MAX_AREA // height)
    narrowest = 22 if kind == "button" else 33
    return int(rng.integers(narrowest, min(widest, 42) + 1)), height


def _spread(rng: np.random.Generator, slack: int, parts: int) -> np.ndarray:
    """Split a number of pixels randomly into `parts` gaps."""
    cuts = np.sort(rng.integers(0, slack + 1, parts - 1))
    return np.diff(cuts, prepend=0, append=slack)


def _arrange(rng, chosen, top):
    """Place elements line by line with random gaps; return None if the screen is too small.

    Each occupies at least a cell's width and height, so that two centres are a cell apart in x or
    y.
    """
    lines, line, used = [], [], 0
    limit = WIDTH - 2 * _MARGIN
    for item in chosen:
        width = max(item[2], CELL) + 1
        if line and (used + width > limit - 4 or rng.random() < 0.06):
            lines.append(line)
            line, used = [], 0
        line.append(item)
        used += width
    lines.append(line)
    heights = [max(max(h, CELL) for _, _, _, h in line) + 1 for line in lines]
    slack = HEIGHT - 6 - top - sum(heights)
    if slack < 2 * len(lines):
        return None
    # Part of the free height separates the lines, part shifts each element within its line.
    wander = int(rng.integers(0, min(8, slack // len(lines)) + 1))
    between = _spread(rng, slack - wander * len(lines), len(lines) + 1)
    elements, gaps, y = [], [], top
    for line, height, gap in zip(lines, heights, between, strict=False):
        gaps.append((y, y + int(gap)))
        y += int(gap)
        free = limit - sum(max(w, CELL) + 1 for _, _, w, _ in line)
        x = _MARGIN
        for (kind, name, w, h), space in zip(line, _spread(rng, free, len(line) + 1), strict=False):
            cell_width, cell_height = max(w, CELL) + 1, max(h, CELL) + 1
            x += int(space)
            at_y = y + int(rng.integers(0, height + wander - cell_height + 1))
            px, py = x + (cell_width - 1 - w) // 2, at_y + (cell_height - 1 - h) // 2
            elements.append(
                Element(kind, name, (float(px), float(py), float(px + w), float(py + h)))
            )
            x += cell_width
        y += height + wander
    return elements, gaps
