"""Image sizes of vision encoders, and resampling with Pillow."""

import math

import numpy as np

from glm_edge.errors import DataError

MAX_ASPECT_RATIO = 200
FILTERS = ("bilinear", "bicubic")
# Target rows per product: few, so that the matrix of one product has few zeros.
ROW_BLOCK = 16


def smart_resize(
    num_frames: int,
    height: int,
    width: int,
    factor: int = 28,
    min_pixels: int = 112 * 112,
    max_pixels: int = 28 * 28 * 15000,
    temporal_factor: int = 2,
) -> tuple[int, int]:
    """Compute the size to which GLM-4.1V resizes, with nearly the same aspect ratio.

    Args:
      num_frames: frames of the video; a still image counts as `temporal_factor` frames.
      height: height of a frame in pixels.
      width: width of a frame in pixels.
      factor: divisor of both result sides in pixels (patch size times merge size).
      min_pixels: minimum of pixels over all frames.
      max_pixels: maximum of pixels over all frames.
      temporal_factor: divisor of the frame count.

    Returns:
      `(height, width)` in pixels.

    Raises:
      DataError: there are too few frames, a side is empty, or one side is more than 200 times
        the other.

    References:
      GLM-4.1V-Thinking, https://arxiv.org/abs/2507.01006, section 2.1.

    Example:
      >>> smart_resize(2, 480, 640)
      (476, 644)
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
            f"the limit is {MAX_ASPECT_RATIO} times"
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
    """Compute the largest size of the same aspect ratio that fits into a canvas.

    Args:
      height: height of the image in pixels.
      width: width of the image in pixels.
      size: (height, width) of the canvas.

    Returns:
      `(height, width)`, of which at least one equals the canvas's.
    """
    rows, columns = size
    if columns / width < rows / height:
        return min(math.floor(height * (columns / width)) or 1, rows), columns
    return rows, min(math.floor(width * (rows / height)) or 1, columns)


def resize_uint8(image: np.ndarray, size: tuple[int, int], resample: str = "bicubic") -> np.ndarray:
    """Resample an 8-bit image with Pillow, in the order of passes of Pillow 13.

    The width is resampled first, unless the height loses more than twice as many pixels as the
    width. Pillow before 13 always resamples the width first. One call per pass makes the result
    identical for all Pillow releases.

    Args:
      image: uint8 [height, width, channels].
      size: target (height, width) in pixels.
      resample: `bicubic` or `bilinear`, both antialiased.

    Returns:
      uint8 [*size, channels].

    References:
      Keys, Cubic convolution interpolation for digital image processing (1981).
    """
    height, width = image.shape[:2]
    rows, columns = size
    rows_first = height - rows > max(0, 2 * (width - columns))
    between = (rows, width) if rows_first else (height, columns)
    return _resize_planes(_resize_planes(image, between, resample), size, resample)


def _resize_planes(image: np.ndarray, size: tuple[int, int], resample: str) -> np.ndarray:
    """Resample each channel separately with Pillow; an unchanged side needs no pass."""
    from PIL import Image

    if image.shape[:2] == tuple(size):
        return image
    method = Image.Resampling[resample.upper()]
    resized = np.empty((*size, image.shape[2]), image.dtype)
    # Per channel, since Pillow has no mode for arbitrary channels and premultiplies RGBA by alpha.
    for channel in range(image.shape[2]):
        plane = Image.fromarray(np.ascontiguousarray(image[..., channel]))
        resized[..., channel] = np.asarray(plane.resize((size[1], size[0]), method))
    return resized


def resample_rows(image: np.ndarray, rows: int) -> np.ndarray:
    """Resample the height with Pillow's bicubic filter, antialiased, in floats.

    Pillow's own pass on floats needs a float copy of the image and runs channel by channel. Here,
    blocks of rows are products of matrices.

    Args:
      image: [height, width, channels].
      rows: target height in pixels.

    Returns:
      float32 [rows, width, channels].
    """
    height = len(image)
    if height == rows:
        return image.astype(np.float32)
    flat = image.reshape(height, -1)
    starts, weights = _bicubic(height, rows)
    resampled = np.empty((rows, flat.shape[1]), np.float32)
    for first in range(0, rows, ROW_BLOCK):
        block = slice(first, min(first + ROW_BLOCK, rows))
        low, high = starts[block][0], min(height, starts[block][-1] + weights.shape[1])
        matrix = np.zeros((block.stop - first, high - low), np.float32)
        for row, (start, taps) in enumerate(zip(starts[block], weights[block], strict=True)):
            at = start - low
            matrix[row, at : at + len(taps)] = taps[: high - start]
        resampled[block] = matrix @ flat[low:high].astype(np.float32)
    return resampled.reshape(rows, *image.shape[1:])


def _bicubic(height: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first source row of each target row [rows], and weights [rows, taps]."""
    scale = height / rows
    # A smaller image averages over more source rows (antialiasing).
    stretch = max(scale, 1.0)
    centers = (np.arange(rows) + 0.5) * scale
    starts = np.maximum((centers - 2 * stretch + 0.5).astype(int), 0)
    ends = np.minimum((centers + 2 * stretch + 0.5).astype(int), height)
    taps = starts[:, None] + np.arange((ends - starts).max())
    distance = np.abs((taps - centers[:, None] + 0.5) / stretch)
    # Keys' kernel with a = -0.5.
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    weights[taps >= ends[:, None]] = 0.0
    return starts, weights / weights.sum(axis=1, keepdims=True)
