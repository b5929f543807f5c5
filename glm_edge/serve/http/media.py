"""Images and recordings in a request, checked before they are decoded.

A service must not open files or addresses that a client names, so only the content itself is taken:
base64 in a data URL, or in `input_audio`.
"""

import base64
import binascii
import io
import re
from typing import Any

from glm_edge.errors import GlmEdgeError
from glm_edge.preprocess.audio import load_wav
from glm_edge.serve.http.errors import ApiError
from glm_edge.serve.http.limits import Limits

FORMATS = ("PNG", "JPEG", "WEBP")
_IMAGE_URL = re.compile(r"data:image/(?:png|jpeg|jpg|webp)(?:;[\w=.+-]{1,40})*;base64,", re.I)
_URL_SHOWN = 40


def read_image(url: str, where: str, limits: Limits) -> Any:
    """Decode a data URL, and check the format and size in the image's header.

    Args:
      url: of a PNG, JPEG or WebP image.
      where: path of the part, for messages.
      limits: of the service.

    Returns:
      A Pillow image whose pixels are not decoded yet.

    Raises:
      ApiError: it is another URL, no base64, no such image, or too large.
    """
    match = _IMAGE_URL.match(url[:200])
    if match is None:
        raise ApiError(
            f"{where}: must be a data URL of a PNG, JPEG or WebP image in base64; files and "
            f"addresses are not opened, got {url[:_URL_SHOWN]!r}",
            where,
        )
    content = _decoded(url[match.end() :], where, limits.image_bytes)
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    # Decoders raise SyntaxError, struct.error and others, and Pillow refuses very large sizes.
    except Exception as error:
        raise ApiError(f"{where}: is not a PNG, JPEG or WebP image", where) from error
    width, height = image.size
    if width * height > limits.image_pixels:
        raise ApiError(
            f"{where}: has {width} x {height} pixels; the limit is {limits.image_pixels}", where
        )
    return image


def read_recording(data: str, where: str, limits: Limits) -> tuple[Any, int]:
    """Decode a WAV file in base64.

    Args:
      data: base64, or a data URL with it.
      where: path of the part, for messages.
      limits: of the service.

    Returns:
      `(samples, rate)`.

    Raises:
      ApiError: it is no base64 or no WAV file, or too large.
    """
    if data.startswith("data:"):
        header, comma, data = data.partition(",")
        if not comma or not header.endswith(";base64"):
            raise ApiError(f"{where}: a data URL must be in base64", where)
    return check_recording(_decoded(data, where, limits.audio_bytes), where, limits)


def check_recording(content: bytes, where: str, limits: Limits) -> tuple[Any, int]:
    """Read a WAV file within limits; see `read_recording`."""
    if len(content) > limits.audio_bytes:
        raise ApiError(f"{where}: has {len(content)} bytes, over {limits.audio_bytes}", where)
    try:
        samples, rate = load_wav(content)
    except GlmEdgeError as error:
        raise ApiError(f"{where}: {error}", where) from error
    if len(samples) > limits.audio_s * rate:
        raise ApiError(
            f"{where}: lasts {len(samples) / rate:.0f} s; the limit is {limits.audio_s:g} s", where
        )
    return samples, rate


def _decoded(data: str, where: str, limit: int) -> bytes:
    if len(data) // 4 * 3 > limit + 3:
        raise ApiError(f"{where}: is larger than {limit} bytes", where)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(f"{where}: is not base64", where) from error
