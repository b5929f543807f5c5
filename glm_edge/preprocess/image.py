"""Images: reading files, bicubic resizing, and batches of a model's size."""

import functools
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from glm_edge.configs import VisionConfig
from glm_edge.errors import DataError, require

CUBIC = -0.5
CUBIC_SUPPORT = 2.0


def load_image(path: str | os.PathLike | bytes) -> np.ndarray:
    """Reads an image file (PNG, JPEG, …), turned upright.

    Args:
      path: of the file, or its bytes.

    Returns:
      float32 [height, width, 3] RGB in 0..1.

    Raises:
      DataError: the file is missing, truncated, or not an image of 8 bits a channel.
      MissingExtraError: Pillow is not installed.
    """
    pillow = require("PIL.Image", extra="data")
    upright = require("PIL.ImageOps", extra="data").exif_transpose
    in_memory = isinstance(path, bytes)
    file = "image" if in_memory else Path(path)
    try:
        with pillow.open(io.BytesIO(path) if in_memory else file) as image:
            image.load()
            mode, pixels = image.mode, np.asarray(upright(image).convert("RGB"))
    except pillow.UnidentifiedImageError as error:
        raise DataError(f"{file}: not an image that Pillow knows (PNG, JPEG, …)") from error
    # Decoders raise these, and SyntaxError for a broken PNG chunk, when a file is damaged.
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{file}: cannot be read as an image: {reason}") from error
    if mode in ("F", "I") or mode.startswith("I;"):
        raise DataError(f"{file}: has pixels of mode {mode!r}; 8 bits a channel are needed")
    return pixels.astype(np.float32) / 255.0


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
            resize(_checked(image, f"images[{index}]", config.channels), config.image_size)
            for index, image in enumerate(batch)
        ]
    )


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bicubic resampling that averages where it shrinks, as Pillow's.

    Args:
      image: float [height, width, channels] in 0..1.
      size: (height, width) to reach.

    Returns:
      float32 [*size, channels], clipped to 0..1.

    References:
      Keys, Cubic convolution interpolation for digital image processing (1981).
    """
    if image.shape[:2] == tuple(size):
        return image.astype(np.float32)
    rows = _weights(image.shape[0], size[0])
    columns = _weights(image.shape[1], size[1])
    resized = np.einsum("yh,hwc->ywc", rows, image.astype(np.float32), optimize=True)
    resized = np.einsum("xw,ywc->yxc", columns, resized, optimize=True)
    return np.clip(resized, 0.0, 1.0)


@functools.lru_cache(maxsize=32)
def _weights(source: int, target: int) -> np.ndarray:
    """[target, source] matrix whose rows sum to one."""
    scale = source / target
    spread = max(scale, 1.0)
    centre = (np.arange(target)[:, None] + 0.5) * scale
    x = np.abs((np.arange(source) + 0.5 - centre) / spread)
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
      DataError: it is of another shape or type, holds NaN, or leaves 0..1.
    """
    image = np.asarray(image)
    if image.ndim != axes or image.shape[-1] != channels or 0 in image.shape:
        frames = "frames, " if axes == 4 else ""
        raise DataError(
            f"{where}: must be [{frames}height, width, {channels}], found {list(image.shape)}"
        )
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


def _checked(image: np.ndarray, where: str, channels: int) -> np.ndarray:
    image = check_pixels(image, where, channels)
    return image.astype(np.float32) / 255.0 if image.dtype == np.uint8 else image
