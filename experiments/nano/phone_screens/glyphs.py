"""Alpha masks of the parts of a screen: glyphs, rounded rectangles, illegible text.

Masks are float32 `[h, w, 1]` in 0..1 and read-only; each is drawn once and cached. A glyph is a
predicate over the plane, x to the right and y down, with the drawing inside -1..1.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np

Points = Sequence[tuple[float, float]]
Predicate = Callable[[np.ndarray, np.ndarray], np.ndarray]

SUPERSAMPLING = 6
ANGLES = (-12.0, -8.0, -4.0, 0.0, 4.0, 8.0, 12.0)


def _disk(x, y, cx, cy, r):
    return (x - cx) ** 2 + (y - cy) ** 2 <= r * r


def _ring(x, y, cx, cy, outer, inner):
    return _disk(x, y, cx, cy, outer) & ~_disk(x, y, cx, cy, inner)


def _box(x, y, x0, y0, x1, y1):
    return (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)


def _polygon(x, y, points: Points):
    inside = np.zeros(np.broadcast(x, y).shape, bool)
    for (xa, ya), (xb, yb) in zip(points, [*points[1:], points[0]], strict=True):
        if ya != yb:
            crosses = (ya > y) != (yb > y)
            inside ^= crosses & (x < (xb - xa) * (y - ya) / (yb - ya) + xa)
    return inside


def _stroke(x, y, points: Points, radius):
    drawn = np.zeros(np.broadcast(x, y).shape, bool)
    for (xa, ya), (xb, yb) in itertools.pairwise(points):
        dx, dy = xb - xa, yb - ya
        t = np.clip(((x - xa) * dx + (y - ya) * dy) / (dx * dx + dy * dy), 0.0, 1.0)
        drawn |= _disk(x, y, xa + t * dx, ya + t * dy, radius)
    return drawn


def _star(x, y):
    turns = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.05, 0.45)
    corners = zip(radii * np.sin(turns), 0.06 - radii * np.cos(turns), strict=True)
    return _polygon(x, y, [(float(a), float(b)) for a, b in corners])


def _heart(x, y):
    u, v = 1.18 * x, 0.12 - 1.18 * y
    return (u * u + v * v - 1) ** 3 - u * u * v**3 <= 0


def _camera(x, y):
    body = _box(x, y, -0.95, -0.45, 0.95, 0.75) | _box(x, y, -0.4, -0.8, 0.4, -0.4)
    return (body & ~_disk(x, y, 0, 0.14, 0.48)) | _disk(x, y, 0, 0.14, 0.24)


def _mail(x, y):
    body = _box(x, y, -0.98, -0.68, 0.98, 0.68)
    return body & ~_stroke(x, y, [(-1.0, -0.62), (0, 0.14), (1.0, -0.62)], 0.1)


def _home(x, y):
    roof = _polygon(x, y, [(0, -0.98), (1.05, 0.02), (-1.05, 0.02)])
    return (roof | _box(x, y, -0.68, 0, 0.68, 0.9)) & ~_box(x, y, -0.2, 0.3, 0.2, 0.92)


def _search(x, y):
    return _ring(x, y, -0.22, -0.22, 0.72, 0.46) | _stroke(x, y, [(0.3, 0.3), (0.8, 0.8)], 0.18)


def _lock(x, y):
    shackle = _ring(x, y, 0, -0.4, 0.56, 0.32) & (y < -0.4)
    legs = _box(x, y, -0.56, -0.4, -0.32, 0) | _box(x, y, 0.32, -0.4, 0.56, 0)
    return shackle | legs | (_box(x, y, -0.78, -0.1, 0.78, 0.95) & ~_disk(x, y, 0, 0.38, 0.17))


def _cloud(x, y):
    puffs = _disk(x, y, -0.55, 0.2, 0.43) | _disk(x, y, 0.02, -0.14, 0.55)
    return puffs | _disk(x, y, 0.58, 0.22, 0.4) | _box(x, y, -0.55, 0.1, 0.58, 0.62)


def _flag(x, y):
    pole = _box(x, y, -0.8, -0.95, -0.58, 0.98)
    cloth = [(-0.6, -0.9), (0.9, -0.9), (0.5, -0.4), (0.9, 0.12), (-0.6, 0.12)]
    return pole | _polygon(x, y, cloth)


def _user(x, y):
    shoulders = ((x / 0.88) ** 2 + ((y - 0.98) / 0.82) ** 2 <= 1) & (y < 0.95)
    return _disk(x, y, 0, -0.45, 0.46) | shoulders


def _play(x, y):
    return _polygon(x, y, [(-0.7, -0.95), (0.98, 0), (-0.7, 0.95)])


def _clock(x, y):
    hands = _stroke(x, y, [(0, -0.5), (0, 0.06), (0.36, 0.06)], 0.11)
    return _ring(x, y, 0, 0, 0.97, 0.74) | hands


def _music(x, y):
    heads = _disk(x, y, -0.54, 0.62, 0.32) | _disk(x, y, 0.5, 0.5, 0.32)
    stems = _box(x, y, -0.4, -0.8, -0.22, 0.62) | _box(x, y, 0.64, -0.8, 0.82, 0.5)
    return heads | stems | _box(x, y, -0.4, -0.9, 0.82, -0.5)


def _plus(x, y):
    return _box(x, y, -0.26, -0.92, 0.26, 0.92) | _box(x, y, -0.92, -0.26, 0.92, 0.26)


def _bell(x, y):
    dome = _disk(x, y, 0, -0.25, 0.56) | _box(x, y, -0.56, -0.25, 0.56, 0.3)
    rim = _polygon(x, y, [(-0.56, 0.1), (0.56, 0.1), (0.92, 0.56), (-0.92, 0.56)])
    return dome | rim | _disk(x, y, 0, 0.74, 0.22) | _disk(x, y, 0, -0.84, 0.15)


def _pin(x, y):
    tail = _polygon(x, y, [(-0.58, -0.05), (0.58, -0.05), (0, 1.0)])
    return (_disk(x, y, 0, -0.32, 0.64) | tail) & ~_disk(x, y, 0, -0.32, 0.27)


GLYPHS: dict[str, Predicate] = {
    "star": _star,
    "heart": _heart,
    "camera": _camera,
    "mail": _mail,
    "home": _home,
    "search": _search,
    "lock": _lock,
    "cloud": _cloud,
    "flag": _flag,
    "user": _user,
    "play": _play,
    "clock": _clock,
    "music": _music,
    "plus": _plus,
    "bell": _bell,
    "pin": _pin,
}


def _coverage(predicate: Predicate, height: int, width: int) -> np.ndarray:
    """Compute the area coverage `[height, width, 1]` of a predicate over pixel coordinates."""
    n = SUPERSAMPLING
    y = ((np.arange(height * n) + 0.5) / n)[:, None]
    x = ((np.arange(width * n) + 0.5) / n)[None, :]
    inside = np.broadcast_to(predicate(x, y), (height * n, width * n))
    mask = inside.reshape(height, n, width, n).mean((1, 3), dtype=np.float32)[..., None]
    mask.setflags(write=False)
    return mask


@functools.cache
def glyph(name: str, size: int, angle: float = 0.0) -> np.ndarray:
    """Draw a glyph.

    Args:
      name: one of `GLYPHS`.
      size: height and width in pixels.
      angle: clockwise rotation in degrees.

    Returns:
      Alpha mask, float32 `[size, size, 1]`.
    """
    cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))

    def turned(x, y):
        u, v = 2 * x / size - 1, 2 * y / size - 1
        return GLYPHS[name](cosine * u + sine * v, cosine * v - sine * u)

    return _coverage(turned, size, size)


@functools.cache
def rounded_rectangle(height: int, width: int, radius: int) -> np.ndarray:
    """Draw a filled rectangle with rounded corners.

    Args:
      height: height in pixels.
      width: width in pixels.
      radius: radius of the corners in pixels.

    Returns:
      Alpha mask, float32 `[height, width, 1]`.
    """

    def inside(x, y):
        dx = np.maximum(np.abs(x - width / 2) - (width / 2 - radius), 0)
        dy = np.maximum(np.abs(y - height / 2) - (height / 2 - radius), 0)
        return dx * dx + dy * dy <= max(radius, 1e-6) ** 2

    return _coverage(inside, height, width)


@functools.cache
def _text_strip(height: int) -> np.ndarray:
    """Draw a line of pseudo-words, float32 `[height, 256, 1]`, the same in every process."""
    rng = np.random.default_rng(height)
    strip = rng.uniform(0.45, 1.0, (height, 256, 1)).astype(np.float32)
    x = 0
    while x < 256:
        x += int(rng.integers(5, 14))
        strip[:, x : x + 2] = 0.0
        x += 2
    strip.setflags(write=False)
    return strip


def text_line(height: int, width: int, start: int) -> np.ndarray:
    """Cut a piece from a line of illegible words.

    Args:
      height: height in pixels.
      width: width in pixels, at most 96.
      start: start of the piece in pixels, 0..159.

    Returns:
      Alpha mask, float32 `[height, width, 1]`.
    """
    return _text_strip(height)[:, start : start + width]
