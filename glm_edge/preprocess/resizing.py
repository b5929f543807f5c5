"""Image sizes of vision encoders, and resampling with Pillow."""

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
    return resize_planes(resize_planes(image, between, resample), size, resample)


def resize_planes(image: np.ndarray, size: tuple[int, int], resample: str) -> np.ndarray:
    """Resample each channel separately with Pillow; an unchanged side needs no pass.

    Args:
      image: uint8 or float32 [height, width, channels].
      size: target (height, width) in pixels.
      resample: `bicubic` or `bilinear`.

    Returns:
      [*size, channels] in the type of the image.
    """
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
