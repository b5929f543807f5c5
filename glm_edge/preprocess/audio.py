"""Speech: reading recordings, changing their rate, and log-mel frames of a model's length."""

import functools
import math
import os
import wave
from pathlib import Path

import jax
import numpy as np

from glm_edge.configs import SpeechConfig
from glm_edge.errors import DataError
from glm_edge.kernels.log_mel import log_mel
from glm_edge.preprocess.processing import AudioProcessing

FILTER_ZEROS = 32
KAISER_BETA = 8.6
PASSBAND = 0.95


def load_wav(path: str | os.PathLike) -> tuple[np.ndarray, int]:
    """Reads a recording; several channels are averaged.

    Args:
      path: of a WAV file with 16-bit PCM samples.

    Returns:
      `(samples, rate)`: float32 [L] in -1..1, and samples a second.

    Raises:
      DataError: the file is missing, truncated, empty, or not such a recording.
    """
    file = Path(path)
    try:
        with wave.open(str(file), "rb") as recording:
            width, channels = recording.getsampwidth(), recording.getnchannels()
            rate, count = recording.getframerate(), recording.getnframes()
            raw = recording.readframes(count)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (wave.Error, EOFError, RuntimeError) as error:
        reason = str(error) or "it ends too early"
        raise DataError(f"{file}: not a WAV file of 16-bit PCM: {reason}") from error
    if width != 2:
        raise DataError(f"{file}: has {8 * width} bits a sample; 16-bit PCM is needed")
    if rate < 1 or channels < 1:
        raise DataError(f"{file}: claims {rate} samples a second in {channels} channels")
    if len(raw) != count * channels * width:
        found = len(raw) // (channels * width)
        raise DataError(f"{file}: is truncated: {found} of {count} samples are there")
    if not count:
        raise DataError(f"{file}: holds no samples")
    samples = np.frombuffer(raw, "<i2").reshape(count, channels).astype(np.float32) / 32768.0
    return samples.mean(axis=1), rate


def resample(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Changes the sampling rate with a Kaiser-windowed sinc filter, one phase at a time.

    Args:
      samples: [L] at `rate`.
      rate: samples a second of `samples`.
      target: samples a second wanted.

    Returns:
      float32 [ceil(L * target / rate)].

    Raises:
      DataError: samples are not one finite row, or a rate is not a positive integer.

    References:
      Smith, Digital audio resampling, https://ccrma.stanford.edu/~jos/resample/.
    """
    samples = _checked(samples, 1)
    for name, value in (("rate", rate), ("target", target)):
        if int(value) != value or value < 1:
            raise DataError(f"{name} must be a positive number of samples a second, not {value}")
    rate, target = int(rate), int(target)
    if rate == target:
        return samples
    divisor = math.gcd(rate, target)
    up, down = target // divisor, rate // divisor
    cutoff = min(1.0, target / rate) * PASSBAND
    reach = math.ceil(FILTER_ZEROS / cutoff)
    count = -(-len(samples) * up // down)
    padded = np.pad(samples, (reach, reach + 1))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
    resampled = np.empty(count, np.float32)
    for phase in range(min(up, count)):
        # Output `phase + k * up` lies at input `(phase * down) / up + k * down`.
        whole, part = divmod(phase * down, up)
        outputs = resampled[phase::up]
        taps = _sinc(np.arange(-reach, reach + 1) - part / up, cutoff, reach)
        outputs[:] = windows[whole::down][: len(outputs)] @ taps
    return resampled


def prepare_audio(samples: np.ndarray, config: SpeechConfig) -> np.ndarray:
    """Makes the log-mel frames that a model reads: silence is added or the end cut off.

    Args:
      samples: [L] or [B, L] at `config.sample_rate`, in -1..1.
      config: of the speech encoder.

    Returns:
      float32 [num_frames, mel_bins] or [B, num_frames, mel_bins].

    Raises:
      DataError: samples are of another shape, empty, or not finite.
    """
    samples = np.asarray(samples)
    rows = _checked(samples, samples.ndim if samples.ndim in (1, 2) else 1)
    rows = rows.reshape(-1, rows.shape[-1])
    length = config.num_frames * config.hop_length
    rows = np.pad(rows[:, :length], ((0, 0), (0, max(0, length - rows.shape[1]))))
    mel = np.asarray(
        _compiled_log_mel()(
            rows, config.mel_bins, config.fft_size, config.hop_length, config.sample_rate
        )
    )
    return mel[0] if samples.ndim == 1 else mel


def prepare_recording(
    samples: np.ndarray, processing: AudioProcessing
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a recording into chunks and makes the log-mel frames of each, silence after the last.

    Args:
      samples: [L] at `processing.sample_rate`, in -1..1; what exceeds `max_s` is left out.
      processing: the parameters.

    Returns:
      `(mel, audio_frames)`: float32 [N, frames of a chunk, mel_bins], and int32 [N], the frames
      of each chunk that are not silence added here.

    Raises:
      DataError: samples are not one finite row, or too short for a single feature.
    """
    row = _checked(samples, 1)
    length, hop = processing.chunk_samples, processing.hop_length
    row = row[: processing.max_chunks * length]
    count = -(-len(row) // length)
    lengths = np.full(count, length)
    lengths[-1] = len(row) - (count - 1) * length
    audio_frames = np.minimum(-(-lengths // hop), length // hop).astype(np.int32)
    if not processing.num_tokens(audio_frames):
        raise DataError(
            f"a recording of {len(row)} samples is too short: a feature covers "
            f"{2 * processing.merge_size * hop} samples"
        )
    chunks = np.pad(row, (0, count * length - len(row))).reshape(count, 1, length)
    # One chunk at a time: the compiled function stays the same for every recording.
    mel = [
        _compiled_log_mel()(
            chunk, processing.mel_bins, processing.fft_size, hop, processing.sample_rate
        )
        for chunk in chunks
    ]
    return np.concatenate(mel), audio_frames


@functools.cache
def _compiled_log_mel():
    return jax.jit(log_mel, static_argnums=(1, 2, 3, 4))


def _sinc(offset: np.ndarray, cutoff: float, reach: int) -> np.ndarray:
    """Taps at `offset` samples from the centre, of unit gain at zero frequency."""
    window = np.i0(KAISER_BETA * np.sqrt(np.maximum(0.0, 1.0 - (offset / (reach + 1)) ** 2)))
    taps = np.sinc(cutoff * offset) * window
    return (taps / taps.sum()).astype(np.float32)


def _checked(samples: np.ndarray, axes: int) -> np.ndarray:
    samples = np.asarray(samples)
    if samples.ndim != axes or 0 in samples.shape:
        raise DataError(f"samples must be one row, not empty, found {list(samples.shape)}")
    if not np.issubdtype(samples.dtype, np.floating):
        raise DataError(f"samples must be floats in -1..1, found {samples.dtype}")
    if not np.isfinite(samples).all():
        raise DataError("samples hold NaN or infinity")
    return samples.astype(np.float32)
