"""Sizes that vision encoders read, and resampling of images with Pillow."""

import math

import numpy as np

from glm_edge.errors import DataError

MAX_ASPECT_RATIO = 200
FILTERS = ("bilinear", "bicubic")


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
    """Resamples an 8-bit image with Pillow, in the order of passes of Pillow 13.

    The width is changed first, unless the height loses more than twice the pixels that the width
    loses. Pillow before 13 always changes the width first; with one call per pass, all releases
    give the same grey levels.

    Args:
      image: uint8 [height, width, channels].
      size: (height, width) to reach.
      resample: `bicubic` or `bilinear`; both average where they shrink.

    Returns:
      uint8 [*size, channels].

    References:
      Keys, Cubic convolution interpolation for digital image processing (1981).
    """
    height, width = image.shape[:2]
    rows, columns = size
    rows_first = height - rows > max(0, 2 * (width - columns))
    between = (rows, width) if rows_first else (height, columns)
    return resize_planes(resize_planes(image, between, resample), size, resample)


def resize_planes(image: np.ndarray, size: tuple[int, int], resample: str) -> np.ndarray:
    """Resamples each channel by itself with Pillow; an unchanged side is left out.

    Args:
      image: uint8 or float32 [height, width, channels].
      size: (height, width) to reach.
      resample: `bicubic` or `bilinear`.

    Returns:
      Array of the image's dtype, [*size, channels].
    """
    from PIL import Image

    if image.shape[:2] == tuple(size):
        return image
    method = Image.Resampling[resample.upper()]
    resized = np.empty((*size, image.shape[2]), image.dtype)
    # Channel by channel: Pillow has no mode of arbitrary channels, and multiplies RGBA by alpha.
    for channel in range(image.shape[2]):
        plane = Image.fromarray(np.ascontiguousarray(image[..., channel]))
        resized[..., channel] = np.asarray(plane.resize((size[1], size[0]), method))
    return resized
