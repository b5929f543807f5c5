"""Sizes that vision encoders want, and resampling of 8-bit images with Pillow's integers."""

import functools
import math

import numpy as np

from glm_edge.errors import DataError

MAX_ASPECT_RATIO = 200
COEFFICIENT_BITS = 22
# Values that are summed at one time.
BLOCK = 1 << 22
FILTERS = {"bilinear": 1.0, "bicubic": 2.0}


def smart_resize(
    num_frames: int,
    height: int,
    width: int,
    factor: int = 28,
    min_pixels: int = 112 * 112,
    max_pixels: int = 28 * 28 * 15000,
    temporal_factor: int = 2,
) -> tuple[int, int]:
    """Finds the size to which GLM-4.1V resizes: nearly the same shape, and within its budget.

    Args:
      num_frames: of the video; a still image counts as `temporal_factor` frames.
      height: of a frame in pixels.
      width: of a frame in pixels.
      factor: both sides become multiples of this many pixels (patch size times merge size).
      min_pixels: fewest pixels, over all frames.
      max_pixels: most pixels, over all frames.
      temporal_factor: frames are counted in multiples of this.

    Returns:
      `(height, width)`.

    Raises:
      DataError: there are too few frames, a side is empty, or one side is more than 200 times
        the other.

    References:
      GLM-4.1V-Thinking, https://arxiv.org/abs/2507.01006, section 2.1.
    """
    if num_frames < temporal_factor:
        raise DataError(f"a video needs at least {temporal_factor} frames, found {num_frames}")
    if min(height, width) < 1:
        raise DataError(f"an image of {height}x{width} pixels is empty")
    if min(height, width) < factor:
        scale = factor / min(height, width)
        height, width = int(height * scale), int(width * scale)
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise DataError(
            f"one side of the image is {ratio:.0f} times the other; "
            f"at most {MAX_ASPECT_RATIO} times is possible"
        )
    frames = round(num_frames / temporal_factor) * temporal_factor
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    pixels = num_frames * height * width
    if frames * rows * columns > max_pixels:
        shrink = math.sqrt(pixels / max_pixels)
        rows, columns = (
            max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
        )
    elif frames * rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / pixels)
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def fit_size(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Finds the largest size of the same shape that fits into a canvas.

    Args:
      height: of the image in pixels.
      width: of the image in pixels.
      size: (height, width) of the canvas.

    Returns:
      `(height, width)`; one of them is the canvas's.
    """
    rows, columns = size
    if columns / width < rows / height:
        return min(math.floor(height * (columns / width)) or 1, rows), columns
    return rows, min(math.floor(width * (rows / height)) or 1, columns)


def resize_uint8(image: np.ndarray, size: tuple[int, int], resample: str = "bicubic") -> np.ndarray:
    """Resamples an 8-bit image as Pillow 13 does, to the last bit.

    Two passes, each with 22-bit integer weights and rounded to whole grey levels. The width is
    changed first, unless the height loses more than twice the pixels that the width loses; Pillow
    before 13 always changes the width first.

    Args:
      image: uint8 [height, width, channels].
      size: (height, width) to reach.
      resample: `bicubic` or `bilinear`; both average where they shrink.

    Returns:
      uint8 [*size, channels].

    References:
      Keys, Cubic convolution interpolation for digital image processing (1981).
    """
    lost_rows, lost_columns = image.shape[0] - size[0], image.shape[1] - size[1]
    rows_first = lost_rows > max(0, 2 * lost_columns)
    for rows in (rows_first, not rows_first):
        if rows:
            image = _resample_rows(image, size[0], resample)
        else:
            image = _resample_rows(image.swapaxes(0, 1), size[1], resample).swapaxes(0, 1)
    return np.ascontiguousarray(image)


def _resample_rows(image: np.ndarray, target: int, resample: str) -> np.ndarray:
    if target == image.shape[0]:
        return image
    first, weights = _integer_weights(image.shape[0], target, resample)
    half, last = 1 << (COEFFICIENT_BITS - 1), image.shape[0] - 1
    resized = np.empty((target, *image.shape[1:]), np.uint8)
    # A few columns at a time: the sums are four times as large as the image.
    step = max(1, BLOCK // (target * image.shape[2]))
    for start in range(0, image.shape[1], step):
        columns = image[:, start : start + step]
        total = np.full((target, *columns.shape[1:]), half, np.int32)
        for tap in range(weights.shape[1]):
            rows = columns[np.minimum(first + tap, last)]
            total += rows.astype(np.int32) * weights[:, tap, None, None]
        levels = np.clip(total >> COEFFICIENT_BITS, 0, 255)
        resized[:, start : start + step] = levels.astype(np.uint8)
    return resized


@functools.lru_cache(maxsize=32)
def _integer_weights(source: int, target: int, resample: str) -> tuple[np.ndarray, np.ndarray]:
    """Computes the first source row of each target row, and weights int32 [target, taps]."""
    scale = source / target
    spread = max(scale, 1.0)
    reach = FILTERS[resample] * spread
    centre = (np.arange(target) + 0.5) * scale
    first = np.maximum(np.trunc(centre - reach + 0.5), 0).astype(np.int64)
    end = np.minimum(np.trunc(centre + reach + 0.5), source).astype(np.int64)
    taps = np.arange((end - first).max())
    offset = (taps + first[:, None] - centre[:, None] + 0.5) * (1.0 / spread)
    weights = _kernel(np.abs(offset), resample) * (taps < (end - first)[:, None])
    # One addition at a time: the order of a sum decides its last bit, and so the rounding below.
    weights = weights / np.cumsum(weights, axis=1)[:, -1:]
    scaled = weights * (1 << COEFFICIENT_BITS)
    return first, np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int32)


def _kernel(x: np.ndarray, resample: str) -> np.ndarray:
    if resample == "bilinear":
        return np.maximum(0.0, 1.0 - x)
    a = -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
