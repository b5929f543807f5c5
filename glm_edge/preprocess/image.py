"""Images: reading files, bicubic resizing, and batches of a model's size."""

import contextlib
import functools
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glm_edge.configs import MAX_IMAGE_PIXELS, MAX_IMAGE_SIDE, VisionConfig
from glm_edge.errors import DataError, require
from glm_edge.files import opened

CUBIC = -0.5
CUBIC_SUPPORT = 2.0
# Orientation, a field of a photo's EXIF: 1 is upright.
ORIENTATION = 0x0112
# What Pillow may decode; for others, such as EPS, it would run a program that the file contains.
FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "DIB", "TIFF", "ICO", "PPM"),
    *("TGA", "PCX", "JPEG2000", "QOI"),
)
# Values that are floats at one time, and entries of one matrix of weights.
BLOCK = 1 << 22


def load_image(source: Any) -> np.ndarray:
    """Reads an image (PNG, JPEG, …) and turns it upright.

    Args:
      source: path of a file, its bytes, or a Pillow image.

    Returns:
      uint8 [height, width, 3] RGB.

    Raises:
      DataError: the file is missing, truncated, not an image of 8 bits a channel, or larger than
        50 megapixels.
      MissingExtraError: Pillow is not installed.
    """
    require("PIL.Image", extra="data")
    if hasattr(source, "convert"):
        return _upright_rgb(source, "image")
    if isinstance(source, bytes | bytearray | memoryview):
        with _decoder(io.BytesIO(source), "image") as image:
            return _upright_rgb(image, "image")
    with opened(source, DataError) as file, _decoder(file, str(Path(source))) as image:
        return _upright_rgb(image, str(Path(source)))


@contextlib.contextmanager
def _decoder(file: Any, where: str) -> Iterator[Any]:
    pillow = require("PIL.Image", extra="data")
    with _refused(where):
        pillow.init()
        image = pillow.open(file, formats=[name for name in FORMATS if name in pillow.OPEN])
    with image:
        yield image


@contextlib.contextmanager
def _refused(where: str) -> Iterator[None]:
    """Turns whatever a decoder raises over a damaged file into one line."""
    unknown = require("PIL.Image", extra="data").UnidentifiedImageError
    try:
        yield
    except DataError:
        raise
    except unknown as error:
        raise DataError(f"{where}: not an image that Pillow knows (PNG, JPEG, …)") from error
    # Decoders raise OSError, SyntaxError, struct.error, KeyError, and others yet.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{where}: cannot be read as an image: {reason}") from error


def _upright_rgb(image: Any, where: str) -> np.ndarray:
    with _refused(where):
        _check_size(*image.size, where)
        image.load()
        # Some formats give their true size, or another mode, only once they are decoded.
        _check_size(*image.size, where)
        if image.mode == "F" or image.mode.startswith("I"):
            raise DataError(
                f"{where}: has pixels of mode {image.mode!r}; 8 bits a channel are needed"
            )
        if image.getexif().get(ORIENTATION, 1) != 1:
            image = require("PIL.ImageOps", extra="data").exif_transpose(image)
        return np.asarray(image.convert("RGB"))


def _check_size(width: int, height: int, where: str) -> None:
    if width * height > MAX_IMAGE_PIXELS or max(width, height) > MAX_IMAGE_SIDE:
        raise DataError(
            f"{where}: has {width} x {height} pixels; at most {MAX_IMAGE_PIXELS} are read, and "
            f"{MAX_IMAGE_SIDE} a side"
        )


def prepare_images(images: np.ndarray | Sequence[np.ndarray], config: VisionConfig) -> np.ndarray:
    """Makes a batch of the size that a model reads; width and height scale independently.

    Args:
      images: one [height, width, channels] or several, of any sizes: floats in 0..1 or uint8.
      config: of the vision encoder.

    Returns:
      float32 [B, image_size rows, image_size columns, channels] in 0..1.

    Raises:
      DataError: an image is of another shape or type, holds NaN, or leaves 0..1.
    """
    single = isinstance(images, np.ndarray) and images.ndim == 3
    batch = [images] if single else list(images)
    if not batch:
        raise DataError("images: the batch is empty")
    return np.stack(
        [
            resize(check_pixels(image, f"images[{index}]", config.channels), config.image_size)
            for index, image in enumerate(batch)
        ]
    )


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resamples images, bicubic and averaging where it shrinks, as Pillow does.

    Args:
      image: [height, width, channels]: floats in 0..1 or uint8.
      size: (height, width) to reach.

    Returns:
      float32 [*size, channels], clipped to 0..1.

    References:
      Keys, Cubic convolution interpolation for digital image processing (1981).
    """
    if image.shape[:2] == tuple(size):
        return _as_floats(image)
    columns = max(1, BLOCK // (image.shape[0] * image.shape[2]))
    # A few columns at a time, so that a large photo is never float as a whole.
    parts = [
        _resize_rows(_as_floats(image[:, start : start + columns]), size[0])
        for start in range(0, image.shape[1], columns)
    ]
    resized = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    resized = _resize_rows(resized.swapaxes(0, 1), size[1]).swapaxes(0, 1)
    return np.ascontiguousarray(np.clip(resized, 0.0, 1.0))


def _as_floats(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint8:
        return image.astype(np.float32) / np.float32(255)
    return image.astype(np.float32)


def _resize_rows(image: np.ndarray, target: int) -> np.ndarray:
    source, scale = image.shape[0], image.shape[0] / target
    step = max(1, BLOCK // source)
    if step >= target:
        return np.einsum("yh,hwc->ywc", _weights(source, target), image, optimize=True)
    # Blocks of rows read only what lies below their kernels.
    reach, parts = CUBIC_SUPPORT * max(scale, 1.0) + 1, []
    for start in range(0, target, step):
        rows = np.arange(start, min(start + step, target))
        first = max(0, int((rows[0] + 0.5) * scale - reach))
        last = min(source, int((rows[-1] + 0.5) * scale + reach) + 1)
        weights = _kernel_weights(rows, np.arange(first, last), scale)
        parts.append(np.einsum("yh,hwc->ywc", weights, image[first:last], optimize=True))
    return np.concatenate(parts)


@functools.lru_cache(maxsize=32)
def _weights(source: int, target: int) -> np.ndarray:
    """Computes the [target, source] matrix, whose rows sum to one."""
    return _kernel_weights(np.arange(target), np.arange(source), source / target)


def _kernel_weights(rows: np.ndarray, columns: np.ndarray, scale: float) -> np.ndarray:
    spread = max(scale, 1.0)
    centre = (rows[:, None] + 0.5) * scale
    x = np.abs((columns + 0.5 - centre) / spread)
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC
    weights = np.where(x < 1, near, np.where(x < CUBIC_SUPPORT, far, 0.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def check_pixels(image: np.ndarray, where: str, channels: int, axes: int = 3) -> np.ndarray:
    """Refuses what is no image, or no frames of a video.

    Args:
      image: [height, width, channels], or [frames, …]: floats in 0..1 or uint8.
      where: what it is, for messages.
      channels: that it must have.
      axes: 3 for an image, 4 for frames.

    Returns:
      The array as it is.

    Raises:
      DataError: it is of another shape or type, holds NaN, leaves 0..1, or is larger than 50
        megapixels.
    """
    try:
        image = np.asarray(image)
    except ValueError as error:
        raise DataError(f"{where}: must be an array of pixels: {error}") from error
    if image.ndim != axes or image.shape[-1] != channels or 0 in image.shape:
        frames = "frames, " if axes == 4 else ""
        raise DataError(
            f"{where}: must be [{frames}height, width, {channels}], found {list(image.shape)}"
        )
    _check_size(image.shape[-2], image.shape[-3], where)
    if image.dtype == np.uint8:
        return image
    if not np.issubdtype(image.dtype, np.floating):
        raise DataError(f"{where}: must be floats in 0..1 or uint8, found {image.dtype}")
    if not np.isfinite(image).all():
        raise DataError(f"{where}: holds NaN or infinity")
    if image.min() < 0.0 or image.max() > 1.0:
        raise DataError(
            f"{where}: values lie in {image.min():g}..{image.max():g}; floats must lie in 0..1"
        )
    return image
