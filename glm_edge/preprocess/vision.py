"""Images and videos for a GLM's vision encoder: resized and normalized.

Letters: `F` frames, `H`, `W` pixels, `C` channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glm_edge.errors import DataError
from glm_edge.preprocess.image import check_pixels, resize
from glm_edge.preprocess.processing import ImageProcessing, VideoProcessing
from glm_edge.preprocess.resizing import fit_size, resize_uint8, smart_resize


@dataclass(frozen=True)
class Video:
    """Frames of a video, with their rate or their timestamps.

    Attributes:
      frames: [F, H, W, C], floats in 0..1 or uint8.
      fps: frames per second of the recording; preprocessing samples frames from it.
      timestamps: [F] times in seconds of frames that are sampled already; all frames are kept.
      duration_s: duration of the recording in seconds; None means F / fps.
    """

    frames: np.ndarray
    fps: float | None = None
    timestamps: Sequence[float] | None = None
    duration_s: float | None = None


def prepare_image(image: np.ndarray, processing: ImageProcessing) -> np.ndarray:
    """Resize and normalize an image.

    Args:
      image: [height, width, C], floats in 0..1 or uint8.
      processing: parameters of preprocessing.

    Returns:
      float32 [H, W, C], normalized.

    Raises:
      DataError: the image has a wrong shape or type, contains NaN, exceeds 0..1, or has an aspect
        ratio above 200.
    """
    if not processing.eight_bit:
        return _prepare_floats(image, processing)
    pixels = _grey_levels(image, "image", 3, len(processing.mean))
    size = _target_size(processing, processing.temporal_patch_size, *pixels.shape[:2])
    return _normalise(_reshape(pixels, size, processing), processing)


def prepare_video(video: Video, processing: VideoProcessing) -> tuple[np.ndarray, np.ndarray]:
    """Sample, resize and normalize the frames of a video.

    Args:
      video: frames with their rate or timestamps.
      processing: parameters of preprocessing.

    Returns:
      `(frames, seconds)`: float32 [F, H, W, C], with F padded to a multiple of
      `temporal_patch_size` by repeating the last frame; and float64 [F / temporal_patch_size], the
      start of each temporal patch in seconds.

    Raises:
      DataError: a frame is not a valid image, or both or neither of rate and timestamps are set.
    """
    frames = _grey_levels(video.frames, "video", 4, len(processing.mean))
    if (video.fps is None) == (video.timestamps is None):
        raise DataError("video: set either its frames per second (fps) or timestamps")
    if video.fps is not None:
        indices = sample_frames(len(frames), video.fps, processing, video.duration_s)
        frames, seconds = frames[indices], indices / video.fps
    else:
        try:
            seconds = np.asarray(video.timestamps, np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"video: timestamps must be seconds: {error}") from error
        if seconds.shape != (len(frames),) or not np.isfinite(seconds).all():
            raise DataError(
                f"video: timestamps must be finite [{len(frames)}], found {list(seconds.shape)}"
            )
    group = processing.temporal_patch_size
    size = _target_size(processing, max(len(frames), group), *frames.shape[1:3])
    resized = [_normalise(_reshape(frame, size, processing), processing) for frame in frames]
    resized += resized[-1:] * (-len(resized) % group)
    return np.stack(resized), seconds[::group]


def sample_frames(
    num_frames: int, fps: float, processing: VideoProcessing, duration_s: float | None = None
) -> np.ndarray:
    """Select `processing.fps` frames per second, or fewer from a long video.

    Args:
      num_frames: frames of the recording.
      fps: frames per second of the recording.
      processing: parameters of preprocessing.
      duration_s: duration of the recording in seconds; None means `num_frames / fps`.

    Returns:
      Increasing int64 indices. The last index is repeated if their count would be odd.

    Raises:
      DataError: there is no frame, or rate or duration is not positive.

    References:
      GLM-4.1V-Thinking, https://arxiv.org/abs/2507.01006.
    """
    if num_frames < 1:
        raise DataError("video: it has no frames")
    if duration_s is None and _is_positive(fps):
        duration_s = num_frames / fps
    if duration_s is None or not _is_positive(fps) or not _is_positive(duration_s):
        raise DataError(
            f"video: fps {fps!r:.60} and duration {duration_s!r:.60} s must be positive numbers"
        )
    last = num_frames - 1
    if duration_s <= processing.max_duration_s:
        count = max(int(duration_s * processing.fps), 1)
        indices = np.ceil(np.arange(count) * fps / processing.fps)
    else:
        count = int(processing.max_duration_s * processing.fps)
        indices = np.arange(num_frames)
        if count < num_frames:
            indices = np.ceil(np.linspace(0, duration_s, count) * fps)
    indices = np.unique(np.minimum(indices, last).astype(np.int64))
    return np.append(indices, indices[len(indices) - len(indices) % 2 :])


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating)
    return number and 0 < value < math.inf


def _prepare_floats(image: np.ndarray, processing: ImageProcessing) -> np.ndarray:
    pixels = check_pixels(image, "image", len(processing.mean))
    mean, std = (np.array(x, np.float32) for x in (processing.mean, processing.std))
    return (resize(pixels, processing.fixed_size) - mean) / std


def _target_size(
    processing: ImageProcessing, frames: int, height: int, width: int
) -> tuple[int, int]:
    if processing.sizing != "smart":
        return processing.fixed_size
    return smart_resize(
        frames,
        height,
        width,
        processing.factor,
        processing.min_pixels,
        processing.max_pixels,
        processing.temporal_patch_size,
    )


def _reshape(pixels: np.ndarray, size: tuple[int, int], processing: ImageProcessing) -> np.ndarray:
    if processing.sizing != "pad":
        return resize_uint8(pixels, size, processing.resample)
    height, width = fit_size(pixels.shape[0], pixels.shape[1], size)
    canvas = np.zeros((*size, pixels.shape[2]), np.uint8)
    canvas[:height, :width] = resize_uint8(pixels, (height, width), processing.resample)
    return canvas


def _normalise(pixels: np.ndarray, processing: ImageProcessing) -> np.ndarray:
    """Normalize grey levels with a table of 256 float32 values per channel."""
    mean, std = (np.array(x, np.float32) for x in (processing.mean, processing.std))
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)
    table = (levels[:, None] - mean) / std
    normalised = np.empty(pixels.shape, np.float32)
    for channel in range(len(mean)):
        # Per row, since int64 indices of a complete image need eight times its memory.
        for row, grey in zip(normalised, pixels, strict=True):
            row[:, channel] = table[:, channel][grey[:, channel]]
    return normalised


def _grey_levels(image: np.ndarray, where: str, axes: int, channels: int) -> np.ndarray:
    image = check_pixels(image, where, channels, axes)
    return image if image.dtype == np.uint8 else np.rint(image * 255.0).astype(np.uint8)
