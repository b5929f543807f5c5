"""Images, videos and recordings of a conversation, in reading order."""

import base64
import binascii
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from glm_edge.errors import DataError
from glm_edge.preprocess.audio import load_wav, resample
from glm_edge.preprocess.chat import MEDIA_TYPES, Message
from glm_edge.preprocess.image import ImageSource, load_image
from glm_edge.preprocess.vision import Video

KINDS = ("image", "video", "audio")
# Types of a file argument: path or bytes.
Media = ImageSource | np.ndarray | Sequence[Any]
"""One image or recording, or several."""

FILE_TYPES = (str, os.PathLike, bytes, bytearray, memoryview)


def gather(
    conversations: Sequence[Sequence[Message]], supplied: Mapping[str, Iterable[Any] | None]
) -> list[list[tuple[str, Any]]]:
    """List the images, videos and recordings of each conversation.

    Args:
      conversations: lists of messages. A part of a message contains its own image, video or
        recording, or consumes the next supplied one.
      supplied: items for parts without a value, by `image`, `video` and `audio`, in reading order
        over all conversations.

    Returns:
      Pairs `(kind, value)` in reading order, one list per conversation.

    Raises:
      DataError: the count of supplied items does not match the parts without a value.
    """
    queues = {kind: listed(kind, supplied.get(kind)) for kind in KINDS}
    offered = {kind: len(queue) for kind, queue in queues.items()}
    gathered = []
    for conversation in conversations:
        media = []
        for kind, value in _parts(conversation):
            if value is None:
                if not queues[kind]:
                    raise DataError(
                        f"messages have more parts of type {kind!r} than the {offered[kind]} given"
                    )
                value = queues[kind].pop(0)
            media.append((kind, value))
        gathered.append(media)
    for kind, queue in queues.items():
        if queue:
            raise DataError(
                f"{len(queue)} of {offered[kind]} given as {kind} are unused; messages must "
                f"contain one part of type {kind!r} for each"
            )
    return gathered


def listed(kind: str, values: Any) -> list[Any]:
    """Convert the supplied items of one kind to a list.

    Args:
      kind: one of `KINDS`.
      values: a list, or a single path, array, Pillow image, `Video` or pair with a rate. An array
        of images [N, height, width, C] becomes N items. None means no items.

    Returns:
      The items; a single item becomes a list of one.

    Raises:
      DataError: `values` has another type.
    """
    if values is None:
        return []
    single = isinstance(values, (*FILE_TYPES, Video)) or hasattr(values, "convert")
    rated = isinstance(values, tuple) and len(values) == 2 and isinstance(values[1], numbers.Real)
    several = kind == "image" and getattr(values, "ndim", 0) == 4
    if single or rated or (hasattr(values, "ndim") and not several):
        return [values]
    if isinstance(values, Mapping) or not isinstance(values, Iterable):
        raise DataError(f"{kind}: pass a list of paths or arrays, not a {type(values).__name__}")
    return list(values)


def open_image(value: Any) -> np.ndarray:
    """Read pixels [H, W, C] from an array, a Pillow image, a path, bytes or a data URL."""
    value = _encoded(value, "image")
    if hasattr(value, "convert") or isinstance(value, FILE_TYPES):
        return load_image(value)
    return value


def open_recording(value: Any, sample_rate: int) -> np.ndarray:
    """Read samples [L] from an array, `(samples, rate)`, or a WAV file (path, bytes, data URL)."""
    value = _encoded(value, "audio")
    if isinstance(value, FILE_TYPES):
        value = load_wav(value)
    if isinstance(value, tuple):
        if len(value) != 2:
            raise DataError(f"audio: a tuple must be (samples, rate), not {len(value)} values")
        samples, rate = value
        return resample(samples, rate, sample_rate)
    return value


def open_video(value: Any) -> Video:
    """Return a `Video`, or convert `(frames, fps)` to one."""
    if isinstance(value, tuple) and len(value) == 2:
        return Video(value[0], fps=value[1])
    if not isinstance(value, Video):
        raise DataError(
            f"video: must be a Video or (frames, fps), found {type(value).__name__}; video files "
            "are not decoded"
        )
    return value


def _parts(conversation: Sequence[Message]) -> Iterable[tuple[str, Any]]:
    for message in conversation:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str) or not isinstance(content, Sequence):
            continue
        for part in content:
            kind = MEDIA_TYPES.get(part.get("type", "")) if isinstance(part, Mapping) else None
            if kind is not None:
                yield kind, _value_of(part, kind)


def _value_of(part: Mapping[str, Any], kind: str) -> Any:
    for name in (kind, part["type"], "url", "path"):
        value = part.get(name)
        if isinstance(value, Mapping):
            value = value.get("url")
        if value is not None:
            return value
    return None


def _encoded(value: Any, kind: str) -> Any:
    """Decode a data URL and refuse other URLs; other values pass unchanged."""
    if not isinstance(value, str):
        return value
    if value.startswith("data:"):
        return _decoded(value, kind)
    if "://" in value:
        raise DataError(f"{value[:80]}: URLs are not fetched; pass a file's path or its contents")
    return value


def _decoded(url: str, kind: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.endswith(";base64"):
        example = {"image": "image/png", "audio": "audio/wav"}[kind]
        raise DataError(f"{kind}: a data URL must be base64, as in data:{example};base64,…")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{kind}: the data URL is not base64: {error}") from error
