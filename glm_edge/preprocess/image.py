"""Images: reading of files, bicubic resizing, and batches of a model's image size."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from glm_edge.configs import MAX_IMAGE_PIXELS, MAX_IMAGE_SIDE, VisionConfig
from glm_edge.errors import DataError
from glm_edge.files import opened
from glm_edge.preprocess.resizing import resample_rows

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

ImageSource = Union[str, Path, bytes, bytearray, memoryview, "PillowImage"]
# EXIF field of a photo's orientation; 1 is upright.
ORIENTATION = 0x0112
# Formats that Pillow may decode. For others, such as EPS, it would run a program in the file.
FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "DIB", "TIFF", "ICO", "PPM"),
    *("TGA", "PCX", "JPEG2000", "QOI"),
)


def load_image(source: ImageSource) -> np.ndarray:
    """Read an image (PNG, JPEG, …) and apply its EXIF orientation.

    Args:
      source: path of a file, its bytes, or a Pillow image.

    Returns:
      uint8 [height, width, 3] RGB.

    Raises:
      DataError: the file is missing, truncated, not an image of 8 bits per channel, or larger than
        50 megapixels.
    """
    if hasattr(source, "convert"):
        return _upright_rgb(source, "image")
    if isinstance(source, bytes | bytearray | memoryview):
        with _decoder(io.BytesIO(source), "image") as image:
            return _upright_rgb(image, "image")
    with opened(source, DataError) as file, _decoder(file, str(Path(source))) as image:
        return _upright_rgb(image, str(Path(source)))


@contextlib.contextmanager
def _decoder(file: Any, where: str) -> Iterator[Any]:
    from PIL import Image

    with _refused(where):
        Image.init()
        image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    with image:
        yield image


@contextlib.contextmanager
def _refused(where: str) -> Iterator[None]:
    """Convert any exception of a decoder to a one-line DataError."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{where}: not an image that Pillow reads (PNG, JPEG, …)") from error
    # Decoders raise OSError, SyntaxError, struct.error, KeyError, and other exceptions.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{where}: cannot be read as an image: {reason}") from error


def _upright_rgb(image: Any, where: str) -> np.ndarray:
    from PIL import ImageOps

    with _refused(where):
        _check_size(image.size, where)
        image.load()
        # Some formats report their true size and mode only after decoding.
        _check_size(image.size, where)
        if image.mode == "F" or image.mode.startswith("I"):
            raise DataError(
                f"{where}: has pixels of mode {image.mode!r}; 8 bits per channel are needed"
            )
        if image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return np.asarray(image.convert("RGB"))


def _check_size(size: tuple[int, int], where: str) -> None:
    width, height = size
    if width * height > MAX_IMAGE_PIXELS or max(width, height) > MAX_IMAGE_SIDE:
        raise DataError(
            f"{where}: has {width} x {height} pixels; the limits are {MAX_IMAGE_PIXELS} pixels "
            f"and {MAX_IMAGE_SIDE} per side"
        )


def prepare_images(images: np.ndarray | Sequence[np.ndarray], config: VisionConfig) -> np.ndarray:
    """Resize images to a model's image size; width and height scale independently.

    Args:
      images: one image [height, width, channels] or a list of any sizes: floats in 0..1 or uint8.
      config: configuration of the vision encoder.

    Returns:
      float32 [B, *config.image_size, channels] in 0..1.

    Raises:
      DataError: an image has a wrong shape or type, contains NaN, or exceeds 0..1.
    """
    single = isinstance(images, np.ndarray) and images.ndim == 3
    batch: Sequence[Any] = [images] if single else list(images)
    if not batch:
        raise DataError("images: the batch is empty")
    return np.stack(
        [
            resize(check_pixels(image, f"images[{index}]", config.channels), config.image_size)
            for index, image in enumerate(batch)
        ]
    )


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resample with Pillow's antialiased bicubic filter, without rounding between the passes.

    Args:
      image: [height, width, channels], floats in 0..1 or uint8.
      size: target (height, width) in pixels.

    Returns:
      float32 [*size, channels], clipped to 0..1.

    References:
      Keys, Cubic convolution interpolation for digital image processing (1981).
    """
    if image.shape[:2] == tuple(size):
        return _as_floats(image)
    resized = resample_rows(image, size[0])
    resized = np.swapaxes(resample_rows(np.swapaxes(resized, 0, 1), size[1]), 0, 1)
    # By 255 only now, so that a large photo needs no float copy.
    largest = np.float32(255 if image.dtype == np.uint8 else 1)
    return np.clip(resized / largest, 0.0, 1.0)


def _as_floats(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint8:
        return image.astype(np.float32) / np.float32(255)
    return image.astype(np.float32)


def check_pixels(image: np.ndarray, where: str, channels: int, axes: int = 3) -> np.ndarray:
    """Check shape, type and range of an image or of the frames of a video.

    Args:
      image: [height, width, channels], or [frames, …], floats in 0..1 or uint8.
      where: name of the argument for messages.
      channels: required count of channels.
      axes: 3 for an image, 4 for frames.

    Returns:
      The same array.

    Raises:
      DataError: the array has a wrong shape or type, contains NaN, exceeds 0..1, or is larger than
        50 megapixels.
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
    _check_size((image.shape[-2], image.shape[-3]), where)
    if image.dtype == np.uint8:
        return image
    if not np.issubdtype(image.dtype, np.floating):
        raise DataError(f"{where}: must be floats in 0..1 or uint8, found {image.dtype}")
    if not np.isfinite(image).all():
        raise DataError(f"{where}: contains NaN or infinity")
    if image.min() < 0.0 or image.max() > 1.0:
        raise DataError(
            f"{where}: values are in {image.min():g}..{image.max():g}; floats must be in 0..1"
        )
    return image
