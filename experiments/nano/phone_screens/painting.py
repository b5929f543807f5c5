"""Painting of the parts of a phone screen.

Colours are float32 `[3]` in 0..1, boxes (x0, y0, x1, y1) in integer pixels with exclusive x1 and
y1.
"""

import colorsys

import numpy as np

from experiments.nano.phone_screens import glyphs

HEIGHT, WIDTH = 192, 96
Box = tuple[int, int, int, int]
# Hue in degrees with its jitter, then the ranges of saturation and of value.
COLOURS = {
    "red": (0, 6, (0.85, 1.0), (0.75, 0.95)),
    "orange": (28, 4, (0.9, 1.0), (0.92, 1.0)),
    "yellow": (54, 4, (0.75, 1.0), (0.92, 1.0)),
    "green": (122, 14, (0.65, 0.95), (0.5, 0.75)),
    "cyan": (183, 6, (0.6, 0.9), (0.85, 1.0)),
    "blue": (224, 8, (0.7, 0.95), (0.65, 0.95)),
    "purple": (274, 7, (0.6, 0.85), (0.5, 0.75)),
    "pink": (330, 8, (0.35, 0.55), (0.92, 1.0)),
}


def _luminance(colour: np.ndarray) -> float:
    return float(0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2])


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), np.float32)


def _any_colour(rng: np.random.Generator) -> np.ndarray:
    hue, saturation, value = rng.random(3).tolist()
    return _hsv(hue, saturation, 0.1 + 0.9 * value)


def _contrasting(rng: np.random.Generator, ground: np.ndarray, least: float = 0.4) -> np.ndarray:
    """Draw a colour with enough luminance contrast to its background."""
    light = _luminance(ground)
    for _ in range(3):
        colour = _any_colour(rng)
        if abs(_luminance(colour) - light) >= least:
            return colour
    return np.full(3, rng.uniform(0.9, 1.0) if light < 0.5 else rng.uniform(0.0, 0.1), np.float32)


def _stamp(image: np.ndarray, mask: np.ndarray, x: int, y: int, colour: np.ndarray) -> None:
    region = image[y : y + mask.shape[0], x : x + mask.shape[1]]
    region += mask * (colour - region)


class Style:
    """Style that the elements of one screen share."""

    def __init__(self, rng: np.random.Generator, ground: np.ndarray):
        shade = rng.uniform(0.08, 0.3) * (1 if _luminance(ground) < 0.5 else -1)
        self.card = np.clip(ground + np.float32(shade), 0, 1)
        self.key = self.card if rng.random() < 0.6 else _any_colour(rng)
        self.key_ink = _contrasting(rng, self.key, 0.5)
        self.key_round = bool(rng.random() < 0.3)
        self.tile = str(rng.choice(["own", "same", "none"], p=[0.6, 0.2, 0.2]))
        self.tile_colour = _any_colour(rng)
        self.button_radius = int(rng.integers(2, 7))


class Canvas:
    """A screen that is being painted."""

    def __init__(self, rng: np.random.Generator, dark: bool):
        self.rng = rng
        tint = rng.uniform(-0.06, 0.06, 3)
        grey = rng.uniform(0.05, 0.22) if dark else rng.uniform(0.82, 0.97)
        self.ground = np.clip(grey + tint, 0, 1).astype(np.float32)
        self.ink = _contrasting(rng, self.ground, 0.6)
        ramp = np.linspace(-1, 1, HEIGHT, dtype=np.float32)[:, None, None]
        self.image = np.empty((HEIGHT, WIDTH, 3), np.float32)
        self.image[:] = self.ground + ramp * np.float32(rng.uniform(-0.06, 0.06))

    def bars(self) -> int:
        """Draw the status bar, sometimes a title bar, and the pill; return the content's top."""
        rng, image = self.rng, self.image
        top = int(rng.integers(7, 10))
        image[:top] *= np.float32(rng.uniform(0.75, 1.0))
        _stamp(image, glyphs.text_line(3, 14, int(rng.integers(160))), 4, top // 2 - 1, self.ink)
        for x in range(70, 70 + 6 * int(rng.integers(1, 4)), 6):
            _stamp(image, glyphs.rounded_rectangle(4, 4, 1), x, top // 2 - 2, self.ink)
        _stamp(image, glyphs.rounded_rectangle(3, 30, 1), 33, HEIGHT - 5, self.ink)
        if rng.random() < 0.4:
            height = int(rng.integers(11, 16))
            colour = _any_colour(rng)
            image[top : top + height] = colour
            line = glyphs.text_line(4, int(rng.integers(20, 56)), int(rng.integers(160)))
            _stamp(
                image,
                line,
                int(rng.integers(4, 30)),
                top + height // 2 - 2,
                _contrasting(rng, colour),
            )
            top += height
        return top + 1

    def heading(self, start: int, end: int) -> None:
        """Draw illegible text into a gap between lines of elements."""
        rng = self.rng
        if end - start < 5 or rng.random() < 0.3:
            return
        height = 2 if end - start < 7 or rng.random() < 0.5 else 3
        line = glyphs.text_line(height, int(rng.integers(16, 60)), int(rng.integers(160)))
        y = int(rng.integers(start + 1, end - height))
        colour = self.ground + np.float32(rng.uniform(0.4, 0.9)) * (self.ink - self.ground)
        _stamp(self.image, line, int(rng.integers(4, 32)), y, colour)

    def icon(self, name: str, box: Box, style: Style) -> None:
        """Draw a glyph, on a tile or on the background."""
        rng = self.rng
        x0, y0, x1, _ = box
        side = x1 - x0
        ground = self.ground
        if style.tile != "none":
            ground = _any_colour(rng) if style.tile == "own" else style.tile_colour
            mask = glyphs.rounded_rectangle(side, side, int(rng.integers(1, side // 2 + 1)))
            _stamp(self.image, mask, x0, y0, ground)
            size = side - int(rng.integers(5, 8))
        else:
            size = side - int(rng.integers(2, 5))
        self._glyph(name, max(size, 12), x0, y0, side, _contrasting(rng, ground))

    def _glyph(self, name, size, x, y, room, colour):
        """Stamp a glyph near the middle of a square."""
        rng = self.rng
        mask = glyphs.glyph(name, size, glyphs.ANGLES[rng.integers(len(glyphs.ANGLES))])
        free = room - size
        dx, dy = np.clip(free // 2 + rng.integers(-1, 2, 2), 0, free).tolist()
        _stamp(self.image, mask, x + dx, y + dy, colour)

    def key(self, digit: np.ndarray, box: Box, style: Style) -> None:
        """Draw a handwritten digit on a key."""
        rng = self.rng
        x0, y0, x1, y1 = box
        width, height = x1 - x0, y1 - y0
        mask = glyphs.rounded_rectangle(height, width, 10 if style.key_round else 3)
        shade = np.float32(rng.uniform(-0.05, 0.05))
        _stamp(self.image, mask, x0, y0, np.clip(style.key + shade, 0, 1))
        size = min(len(digit), width, height)
        dx = int(rng.integers(0, width - size + 1))
        dy = int(rng.integers(0, height - size + 1))
        _stamp(self.image, digit[:size, :size], x0 + dx, y0 + dy, style.key_ink)

    def button(self, name: str, box: Box, style: Style) -> None:
        """Draw a coloured button with illegible text."""
        rng = self.rng
        x0, y0, x1, y1 = box
        width, height = x1 - x0, y1 - y0
        hue, jitter, saturation, value = COLOURS[name]
        colour = _hsv(
            (hue + rng.uniform(-jitter, jitter)) / 360,
            rng.uniform(*saturation),
            rng.uniform(*value),
        )
        _stamp(
            self.image, glyphs.rounded_rectangle(height, width, style.button_radius), x0, y0, colour
        )
        length = int(rng.integers(8, width - 7))
        grey = rng.uniform(0.8, 1.0) if _luminance(colour) < 0.55 else rng.uniform(0.05, 0.35)
        line = glyphs.text_line(3, length, int(rng.integers(160)))
        _stamp(
            self.image,
            line,
            x0 + (width - length) // 2,
            y0 + height // 2 - 1,
            np.full(3, grey, np.float32),
        )

    def row(self, name: str, box: Box, style: Style) -> None:
        """Draw a list row: a leading glyph and one or two lines of text."""
        rng = self.rng
        x0, y0, x1, y1 = box
        width, height = x1 - x0, y1 - y0
        _stamp(self.image, glyphs.rounded_rectangle(height, width, 2), x0, y0, style.card)
        size = min(13, height - 1)
        self._glyph(name, size, x0 + 1, y0, height, _contrasting(rng, style.card, 0.45))
        edge_x = size + 4
        ink = style.card + np.float32(rng.uniform(0.5, 0.9)) * (self.ink - style.card)
        lines = 1 + int(rng.random() < 0.5)
        for i in range(lines):
            length = int(rng.integers(7, width - edge_x - 1))
            at = y0 + (height // 2 - 1 if lines == 1 else 3 + i * (height - 8))
            _stamp(
                self.image,
                glyphs.text_line(2, length, int(rng.integers(160))),
                x0 + edge_x,
                at,
                ink,
            )

    def finish(self) -> np.ndarray:
        """Add screenshot noise and return the image."""
        rng = self.rng
        noise = rng.standard_normal((HEIGHT, WIDTH, 1), np.float32)
        self.image += noise * np.float32(rng.uniform(0, 0.03))
        return np.clip(self.image, 0.0, 1.0, out=self.image)
