"""Speech: reading recordings, changing their rate, and log-mel frames of a model's length."""

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from scipy import signal, special

from glm_edge.configs import SpeechConfig
from glm_edge.errors import DataError
from glm_edge.kernels.log_mel import log_mel
from glm_edge.preprocess.processing import RATES, AudioProcessing
from glm_edge.preprocess.riff import read_wav

FILTER_ZEROS = 32
KAISER_BETA = 8.6
PASSBAND = 0.95
# Most taps of a filter that scipy receives.
MAX_TAPS = 1 << 22
# Full scale is 1. Mixing goes somewhat beyond it; samples that were never divided go far beyond it.
LOUDEST = 16.0
MAX_SAMPLES = 1 << 27
# Taps that are computed, and samples that are gathered, at one time.
BLOCK = 1 << 20


def load_wav(
    source: str | os.PathLike | bytes | bytearray | memoryview,
) -> tuple[np.ndarray, int]:
    """Reads a recording; several channels are averaged.

    Sizes that a phone or ffmpeg left unknown (0, 0xFFFFFFFF) reach to the end of the file.

    Args:
      source: path of a WAV file with PCM samples of 8, 16, 24 or 32 bits or floats of 32 or 64
        bits, or its bytes.

    Returns:
      `(samples, rate)`: float32 [L] in -1..1, and samples per second.

    Raises:
      DataError: the file is missing, truncated, empty, or not such a recording.
    """
    return read_wav(source)


def resample(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Changes the sampling rate with a Kaiser-windowed sinc filter.

    Args:
      samples: [L] at `rate`.
      rate: samples per second of `samples`, 1,000 to 768,000.
      target: samples per second of the result.

    Returns:
      float32 [ceil(L * target / rate)].

    Raises:
      DataError: samples are not one finite row in -1..1, a rate is not an integer of that range,
        or the result would have more than 2**27 samples.

    References:
      Smith, Digital audio resampling, https://ccrma.stanford.edu/~jos/resample/.
    """
    samples = _checked(samples, 1)
    rate, target = _rate(rate, "rate"), _rate(target, "target")
    if rate == target:
        return samples
    divisor = math.gcd(rate, target)
    up, down = target // divisor, rate // divisor
    count = -(-len(samples) * up // down)
    if count > MAX_SAMPLES:
        raise DataError(
            f"{len(samples)} samples at rate {rate} would become {count} at {target}; at most "
            f"{MAX_SAMPLES} are made, resample a part at a time"
        )
    cutoff = min(1.0, target / rate) * PASSBAND
    reach = math.ceil(FILTER_ZEROS / cutoff)
    if count >= up and up * (2 * reach + 1) <= MAX_TAPS:
        # Phase p of the bank is every `up`-th tap of one filter; zeros in front centre it.
        bank = _filter_bank(np.arange(up) / up, cutoff, reach)
        taps = np.pad(bank[:, ::-1].T.ravel(), (up - 1, 0)) / np.float32(up)
        return signal.resample_poly(samples, up, down, window=taps)
    return _resample_by_phases(samples, count, (up, down), cutoff, reach)


def _resample_by_phases(
    samples: np.ndarray, count: int, ratio: tuple[int, int], cutoff: float, reach: int
) -> np.ndarray:
    """Computes only the phases that occur, since scipy needs the taps of all.

    Rates without a common divisor have as many phases as `target`: from 767,999 to 1,000 Hz, scipy
    would need 52 million taps, however short the recording.
    """
    up, down = ratio
    phases = np.arange(min(up, count)) * down % up
    bank = _filter_bank(phases / up, cutoff, reach)
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(samples, (reach, reach + 1)), bank.shape[1]
    )
    resampled = np.empty(count, np.float32)
    step = max(1, BLOCK // bank.shape[1])
    for start in range(0, count, step):
        # Output n is at input n * down / up; outputs `up` apart have the same taps.
        outputs = np.arange(start, min(start + step, count))
        gathered = windows[outputs * down // up]
        resampled[outputs] = np.einsum("nt,nt->n", gathered, bank[outputs % up])
    return resampled


def _filter_bank(phases: np.ndarray, cutoff: float, reach: int) -> np.ndarray:
    """Returns taps at fractions of a sample, float32 [phases, 2 * reach + 1], of unit gain."""
    around = np.arange(-reach, reach + 1)
    bank = np.empty((phases.size, around.size), np.float32)
    step = max(1, BLOCK // around.size)
    for start in range(0, phases.size, step):
        offset = around - phases[start : start + step, None]
        window = special.i0(KAISER_BETA * np.sqrt(1.0 - (offset / (reach + 1)) ** 2))
        taps = np.sinc(cutoff * offset) * window
        bank[start : start + step] = taps / taps.sum(axis=1, keepdims=True)
    return bank


def prepare_audio(samples: np.ndarray, config: SpeechConfig) -> np.ndarray:
    """Makes the log-mel frames that a model reads; silence is added at the end.

    Args:
      samples: [L] or [B, L] at `config.sample_rate`, in -1..1.
      config: of the speech encoder.

    Returns:
      float32 [num_frames, mel_bins] or [B, num_frames, mel_bins].

    Raises:
      DataError: samples are of another shape, empty, not finite, or more than the model hears.
    """
    samples = np.asarray(samples)
    rows = _checked(samples, samples.ndim if samples.ndim in (1, 2) else 1)
    rows = rows.reshape(-1, rows.shape[-1])
    length = config.num_frames * config.hop_length
    _check_length(rows.shape[1], length, config.sample_rate)
    rows = np.pad(rows, ((0, 0), (0, length - rows.shape[1])))
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
      samples: [L] at `processing.sample_rate`, in -1..1.
      processing: the parameters.

    Returns:
      `(mel, audio_frames)`: float32 [N, frames of a chunk, mel_bins], and int32 [N], the frames
      of each chunk that are not silence added here.

    Raises:
      DataError: samples are not one finite row, too short for a single feature, or more than the
        chunks that the model hears.
    """
    row = _checked(samples, 1)
    length, hop = processing.chunk_samples, processing.hop_length
    _check_length(len(row), processing.max_chunks * length, processing.sample_rate)
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
def _compiled_log_mel() -> Callable[..., jax.Array]:
    return jax.jit(log_mel, static_argnums=(1, 2, 3, 4))


def _check_length(count: int, limit: int, rate: int) -> None:
    if count > limit:
        raise DataError(
            f"a recording of {count} samples ({count / rate:.2f} s) is longer than the {limit} "
            f"({limit / rate:.2f} s) that this model hears; cut it, as in samples[:{limit}]"
        )


def _rate(value: Any, name: str) -> int:
    low, high = RATES
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(
        value, bool
    )
    if not number or not low <= value <= high or value != int(value):
        raise DataError(
            f"{name} must be a whole number of samples per second in {low}..{high}, "
            f"not {value!r:.60}"
        )
    return int(value)


def _checked(samples: np.ndarray, axes: int) -> np.ndarray:
    try:
        samples = np.asarray(samples)
    except ValueError as error:
        raise DataError(f"samples must be one row of numbers: {error}") from error
    if samples.ndim != axes or 0 in samples.shape:
        raise DataError(f"samples must be one row, not empty, found {list(samples.shape)}")
    if not np.issubdtype(samples.dtype, np.floating):
        raise DataError(f"samples must be floats in -1..1, found {samples.dtype}")
    loudest = np.max(np.abs(samples))
    if not np.isfinite(loudest):
        raise DataError("samples hold NaN or infinity")
    if loudest > LOUDEST:
        raise DataError(
            f"samples reach {loudest:g}; floats in -1..1 are needed: divide 16-bit integers by "
            "32768"
        )
    return samples.astype(np.float32)
