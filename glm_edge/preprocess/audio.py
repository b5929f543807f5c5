"""Speech: reading of recordings, resampling, and log-mel frames of a model's length."""

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from glm_edge.configs import SpeechConfig
from glm_edge.errors import DataError
from glm_edge.kernels.log_mel import log_mel
from glm_edge.preprocess.processing import RATES, AudioProcessing
from glm_edge.preprocess.riff import read_wav

FILTER_ZEROS = 32
KAISER_BETA = 8.6
PASSBAND = 0.95
# Maximum of filter taps passed to scipy.
MAX_TAPS = 1 << 22
# Full scale is 1. Mixing exceeds it slightly; integers that were not divided exceed it far.
LOUDEST = 16.0
MAX_SAMPLES = 1 << 27
# Taps computed, and samples gathered, per block.
BLOCK = 1 << 20


def load_wav(
    source: str | os.PathLike | bytes | bytearray | memoryview,
) -> tuple[np.ndarray, int]:
    """Read a recording and average its channels.

    A size that a phone or ffmpeg left unknown (0, 0xFFFFFFFF) extends to the end of the file.

    Args:
      source: path of a WAV file with PCM samples of 8, 16, 24 or 32 bits or floats of 32 or 64
        bits, or its bytes.

    Returns:
      `(samples, rate)`: float32 [L] in -1..1, and samples per second.

    Raises:
      DataError: the file is missing, truncated, empty, or not a supported WAV file.
    """
    return read_wav(source)


def resample(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Resample with a Kaiser-windowed sinc filter.

    Args:
      samples: [L] at `rate`.
      rate: sample rate of `samples` in Hz, 1,000 to 768,000.
      target: sample rate of the result in Hz, 1,000 to 768,000.

    Returns:
      float32 [ceil(L * target / rate)].

    Raises:
      DataError: samples are not one finite row in -1..1, a rate is not an integer in its range, or
        the result would exceed 2**27 samples.

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
            f"{len(samples)} samples at rate {rate} would become {count} at {target}; the limit is "
            f"{MAX_SAMPLES}, resample in parts"
        )
    cutoff = min(1.0, target / rate) * PASSBAND
    reach = math.ceil(FILTER_ZEROS / cutoff)
    if count >= up and up * (2 * reach + 1) <= MAX_TAPS:
        # Phase p of the bank is every `up`-th tap of one filter, centred by leading zeros.
        bank = _filter_bank(np.arange(up) / up, cutoff, reach)
        taps = np.pad(bank[:, ::-1].T.ravel(), (up - 1, 0)) / np.float32(up)
        # Its import takes longer than all of this package's, and few recordings are resampled.
        from scipy import signal

        return signal.resample_poly(samples, up, down, window=taps)
    return _resample_by_phases(samples, count, (up, down), cutoff, reach)


def _resample_by_phases(
    samples: np.ndarray, count: int, ratio: tuple[int, int], cutoff: float, reach: int
) -> np.ndarray:
    """Resample with only the phases that occur, since scipy needs the taps of all phases.

    Rates without a common divisor have `target` phases. From 767,999 to 1,000 Hz, scipy would need
    52 million taps even for a short recording.
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
        # Output n is at input n * down / up; outputs `up` apart share their taps.
        outputs = np.arange(start, min(start + step, count))
        gathered = windows[outputs * down // up]
        resampled[outputs] = np.einsum("nt,nt->n", gathered, bank[outputs % up])
    return resampled


def _filter_bank(phases: np.ndarray, cutoff: float, reach: int) -> np.ndarray:
    """Compute taps of unit gain per fraction of a sample, float32 [phases, 2 * reach + 1]."""
    from scipy import special

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
    """Compute a model's log-mel frames, padded with silence at the end.

    Args:
      samples: [L] or [B, L] at `config.sample_rate`, in -1..1.
      config: configuration of the speech encoder.

    Returns:
      float32 [num_frames, mel_bins] or [B, num_frames, mel_bins].

    Raises:
      DataError: samples have a wrong shape, are empty, not finite, or longer than the model's
        input.
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
    """Split a recording into chunks and compute their log-mel frames; pads the last with silence.

    Args:
      samples: [L] at `processing.sample_rate`, in -1..1.
      processing: parameters of preprocessing.

    Returns:
      `(mel, audio_frames)`: float32 [N, frames per chunk, mel_bins], and int32 [N], the frames per
      chunk without padding.

    Raises:
      DataError: samples are not one finite row, are too short for one feature, or exceed the
        model's maximum of chunks.
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
    # One chunk per call, so that one compiled function serves recordings of any length.
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
            f"({limit / rate:.2f} s) that this model reads; cut it, as in samples[:{limit}]"
        )


def _rate(value: Any, name: str) -> int:
    low, high = RATES
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(
        value, bool
    )
    if not number or not low <= value <= high or value != int(value):
        raise DataError(
            f"{name} must be an integer of samples per second in {low}..{high}, not {value!r:.60}"
        )
    return int(value)


def _checked(samples: np.ndarray, axes: int) -> np.ndarray:
    try:
        samples = np.asarray(samples)
    except ValueError as error:
        raise DataError(f"samples must be one row of values: {error}") from error
    if samples.ndim != axes or 0 in samples.shape:
        raise DataError(f"samples must be one row and not empty, found shape {list(samples.shape)}")
    if not np.issubdtype(samples.dtype, np.floating):
        raise DataError(f"samples must be floats in -1..1, found {samples.dtype}")
    loudest = np.max(np.abs(samples))
    if not np.isfinite(loudest):
        raise DataError("samples contain NaN or infinity")
    if loudest > LOUDEST:
        raise DataError(
            f"samples reach {loudest:g}; floats in -1..1 are needed: divide 16-bit integers by "
            "32768"
        )
    return samples.astype(np.float32)
