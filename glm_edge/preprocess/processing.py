"""Parameters of preprocessing, with the published values of each family."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from glm_edge.configs import MAX_FRAMES, MAX_IMAGE_PIXELS, MAX_IMAGE_SIDE
from glm_edge.errors import ConfigError
from glm_edge.preprocess.resizing import FILTERS

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIZINGS = ("smart", "stretch", "pad")
# Range of sample rates in Hz, from telephones to studio converters.
RATES = (1_000, 768_000)
# Normalized pixels beyond this limit would overflow in the first product.
LARGEST_PIXEL = 1e6
# Limit of values in the overlapping windows of one chunk.
MAX_WINDOWED = 1 << 26


@dataclass(frozen=True)
class ImageProcessing:
    """Parameters of image preprocessing for a vision encoder.

    Attributes:
      sizing: `smart` keeps nearly the aspect ratio, with sides in multiples of
        `patch_size * merge_size`; `stretch` resizes to `size`, ignoring the aspect ratio; `pad`
        fits the image into `size`, with black pixels below and on the right.
      size: target (height, width) in pixels of `stretch` and `pad`.
      min_pixels: minimum of pixels of `smart`, summed over `temporal_patch_size` frames.
      max_pixels: maximum of pixels of `smart`, summed over `temporal_patch_size` frames.
      resample: `bicubic` or `bilinear`.
      eight_bit: True rounds pixels to grey levels and resizes with Pillow. False keeps floats, and
        requires `stretch` and `bicubic`.
      mean: mean per channel that normalization subtracts, for pixels in 0..1.
      std: standard deviation per channel by which normalization divides.
      patch_size: pixels between the starts of adjacent patches.
      temporal_patch_size: frames per patch.
      merge_size: width and height in patches of a merge block.
      marker_tokens: features that the model adds to each image.
    """

    sizing: str = "smart"
    size: tuple[int, int] | None = None
    min_pixels: int = 112 * 112
    max_pixels: int = 28 * 28 * 15000
    resample: str = "bicubic"
    eight_bit: bool = True
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    marker_tokens: int = 0

    def __post_init__(self) -> None:
        if self.sizing not in SIZINGS:
            raise ConfigError(f"image: sizing {self.sizing!r} must be one of {', '.join(SIZINGS)}")
        if self.resample not in FILTERS:
            raise ConfigError(
                f"image: resample {self.resample!r} must be one of {', '.join(FILTERS)}"
            )
        if not self.eight_bit and (self.sizing != "stretch" or self.resample != "bicubic"):
            raise ConfigError(
                f"image: sizing {self.sizing!r} with {self.resample!r} needs 8-bit pixels; floats "
                "need 'stretch' and 'bicubic'"
            )
        if self.sizing != "smart" and not self.size:
            raise ConfigError(f"image: sizing {self.sizing!r} needs a size (height, width)")
        if self.size:
            for name, side in zip(("height", "width"), self.size, strict=True):
                _require_whole("image", name, side, 1, MAX_IMAGE_SIDE)
            if math.prod(self.size) > MAX_IMAGE_PIXELS:
                raise ConfigError(
                    f"image: size {self.size} has more than {MAX_IMAGE_PIXELS} pixels"
                )
        # Budgets count a still image as two frames.
        for name in ("min_pixels", "max_pixels"):
            _require_whole("image", name, getattr(self, name), 1, 2 * MAX_IMAGE_PIXELS)
        for name, low, high in (
            ("patch_size", 1, 4096),
            ("temporal_patch_size", 1, 64),
            ("merge_size", 1, 64),
            ("marker_tokens", 0, 64),
        ):
            _require_whole("image", name, getattr(self, name), low, high)
        if self.min_pixels > self.max_pixels:
            raise ConfigError(
                f"image: min_pixels {self.min_pixels} must not exceed max_pixels {self.max_pixels}"
            )
        self._check_normalisation()

    def _check_normalisation(self) -> None:
        if len(self.mean) != len(self.std) or not all(self.std):
            raise ConfigError(
                f"image: mean {self.mean!s:.90} and std {self.std!s:.90} must have equal lengths, "
                "and std must not be 0"
            )
        with np.errstate(all="ignore"):
            mean, std = (np.asarray(values, np.float32) for values in (self.mean, self.std))
            largest = np.max(np.abs((np.array([[0], [1]], np.float32) - mean) / std), initial=0.0)
        if not largest <= LARGEST_PIXEL:
            raise ConfigError(
                f"image: mean {self.mean!s:.90} and std {self.std!s:.90} make pixels of "
                f"{largest:g}; the limit is {LARGEST_PIXEL:g}"
            )

    @property
    def fixed_size(self) -> tuple[int, int]:
        """Return `size`, which all sizings but `smart` have.

        Raises:
          ConfigError: images keep their shape.
        """
        if self.size is None:
            raise ConfigError(f"image: sizing {self.sizing!r} has no size (height, width)")
        return self.size

    @property
    def factor(self) -> int:
        """Side of a merge block in pixels."""
        return self.patch_size * self.merge_size

    def num_tokens(self, image: np.ndarray) -> int:
        """Count the features of a prepared image [H, W, C] or one temporal patch of a video."""
        height, width = image.shape[-3:-1]
        return (height // self.factor) * (width // self.factor) + self.marker_tokens


@dataclass(frozen=True)
class VideoProcessing(ImageProcessing):
    """Parameters of video preprocessing: `fps` frames per second, and fewer from a long video.

    Attributes:
      fps: sampled frames per second.
      max_duration_s: duration in seconds beyond which the count of frames stays constant.
    """

    max_pixels: int = 28 * 28 * 2 * 30000
    fps: float = 2.0
    max_duration_s: float = 300.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_number("video", "fps", self.fps, 1e-3, 240)
        _require_number("video", "max_duration_s", self.max_duration_s, 1e-3, 36_000)


@dataclass(frozen=True)
class AudioProcessing:
    """Parameters of log-mel chunks.

    Attributes:
      mel_bins: count of mel filters.
      sample_rate: samples per second.
      fft_size: window length in samples.
      hop_length: samples between the starts of successive frames.
      chunk_s: duration of a chunk in seconds.
      max_s: maximum duration of a recording in seconds.
      merge_size: frames, after the encoder's stride of 2, per feature.
      silence: True includes the features of padding, False only those of frames with sound.
    """

    mel_bins: int = 128
    sample_rate: int = 16000
    fft_size: int = 400
    hop_length: int = 160
    chunk_s: float = 30
    max_s: float = 655
    merge_size: int = 4
    silence: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("mel_bins", 1, 4096),
            ("sample_rate", *RATES),
            ("fft_size", 2, 1 << 16),
            ("hop_length", 1, 1 << 16),
            ("merge_size", 1, 64),
        ):
            _require_whole("audio", name, getattr(self, name), low, high)
        for name in ("chunk_s", "max_s"):
            _require_number("audio", name, getattr(self, name), 1e-3, 86_400)
        if self.fft_size % 2:
            raise ConfigError(f"audio: fft_size {self.fft_size} must be even")
        if self.chunk_samples <= self.fft_size // 2 or not self.chunk_frames:
            raise ConfigError(
                f"audio: a chunk of {self.chunk_s} s is too short for windows of {self.fft_size} "
                f"samples every {self.hop_length}"
            )
        if self.chunk_frames > MAX_FRAMES or self.chunk_frames * self.fft_size > MAX_WINDOWED:
            raise ConfigError(
                f"audio: a chunk of {self.chunk_s} s has {self.chunk_frames} frames of "
                f"{self.fft_size} samples; the limits are {MAX_FRAMES} frames and {MAX_WINDOWED} "
                "samples in all frames"
            )

    @property
    def chunk_samples(self) -> int:
        """Samples per chunk."""
        return round(self.chunk_s * self.sample_rate)

    @property
    def chunk_frames(self) -> int:
        """Log-mel frames per chunk."""
        return self.chunk_samples // self.hop_length

    @property
    def max_chunks(self) -> int:
        """Maximum of chunks per recording."""
        return max(1, int(self.max_s // self.chunk_s))

    def num_tokens(self, audio_frames: np.ndarray) -> int:
        """Count the features of all chunks.

        Args:
          audio_frames: int [N], valid frames per chunk.

        Returns:
          Count of features.
        """
        audio_frames = np.asarray(audio_frames)
        if self.silence:
            audio_frames = np.full_like(audio_frames, self.chunk_frames)
        halved = (audio_frames - 1) // 2 + 1
        return int(np.maximum((halved - self.merge_size) // self.merge_size + 1, 0).sum())


def _require_whole(part: str, name: str, value: Any, low: int, high: int) -> None:
    integral = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not integral or not low <= value <= high:
        raise ConfigError(
            f"{part}: {name} {value!r:.60} must be a positive integer, {low} to {high}"
            if low
            else f"{part}: {name} {value!r:.60} must be an integer, {low} to {high}"
        )


def _require_number(part: str, name: str, value: Any, low: float, high: float) -> None:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise ConfigError(f"{part}: {name} {value!r:.60} must be a number, {low:g} to {high:g}")


GLM4V = ImageProcessing()
GLM4V_VIDEO = VideoProcessing()
# The published preprocessor keeps the aspect ratio and pads, like one tile of Llama 3.2.
GLM_EDGE_V = ImageProcessing(
    sizing="pad", size=(672, 672), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), marker_tokens=2
)
GLM_ASR = AudioProcessing()
