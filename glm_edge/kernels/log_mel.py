"""Log-mel spectrogram of speech, the input of Whisper and GLM-ASR."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array


def _hertz_to_mel(hertz: np.ndarray) -> np.ndarray:
    # Slaney's scale: linear below 1 kHz (mel 15), logarithmic above.
    linear = hertz * 3.0 / 200.0
    logarithmic = 15.0 + 27.0 * np.log(np.maximum(hertz, 1e-9) / 1000.0) / np.log(6.4)
    return np.where(hertz < 1000.0, linear, logarithmic)


def _mel_to_hertz(mel: np.ndarray) -> np.ndarray:
    linear = mel * 200.0 / 3.0
    logarithmic = 1000.0 * np.exp(np.log(6.4) / 27.0 * (mel - 15.0))
    return np.where(mel < 15.0, linear, logarithmic)


@functools.cache
def mel_filters(mel_bins: int, fft_size: int, sample_rate: int) -> np.ndarray:
    """Build triangular filters of unit area on the Slaney mel scale.

    Args:
      mel_bins: number of filters.
      fft_size: length of the Fourier transform in samples.
      sample_rate: samples per second.

    Returns:
      float32 [mel_bins, fft_size / 2 + 1].
    """
    # Filter m rises from edge m to edge m + 1 and falls to edge m + 2.
    top = _hertz_to_mel(np.array(sample_rate / 2.0))
    edges = _mel_to_hertz(np.linspace(0.0, top, mel_bins + 2))
    hertz = np.linspace(0.0, sample_rate / 2.0, fft_size // 2 + 1)
    rising = (hertz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - hertz) / (edges[2:] - edges[1:-1])[:, None]
    area = 2.0 / (edges[2:] - edges[:-2])
    filters = np.maximum(0.0, np.minimum(rising, falling)) * area[:, None]
    return filters.astype(np.float32)


def log_mel(
    samples: Array, mel_bins: int, fft_size: int = 400, hop_length: int = 160, rate: int = 16000
) -> Array:
    """Compute the log-mel spectrogram, limited to 8 decades and scaled to about -1..1.

    Args:
      samples: [B, L] mono samples in -1..1, with `L` a multiple of `hop_length`.
      mel_bins: number of mel filters.
      fft_size: window length in samples.
      hop_length: samples between the starts of successive frames.
      rate: samples per second.

    Returns:
      float32 [B, L / hop_length, mel_bins].

    References:
      Whisper, https://arxiv.org/abs/2212.04356, section 2.2.
    """
    # Frames are centred on multiples of the hop, so both ends are reflected.
    samples = jnp.pad(samples, ((0, 0), (fft_size // 2, fft_size // 2)), mode="reflect")
    num_frames = (samples.shape[1] - fft_size) // hop_length
    index = np.arange(num_frames)[:, None] * hop_length + np.arange(fft_size)
    # Periodic Hann window.
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(fft_size) / fft_size)
    frames = samples[:, index] * window.astype(np.float32)
    # |STFT|^2, then one matrix product per frame.
    power = jnp.abs(jnp.fft.rfft(frames, axis=-1)) ** 2
    filters = mel_filters(mel_bins, fft_size, rate)
    mel = jnp.matmul(power, filters.T, precision="highest")
    # log10, with values clipped to 80 dB below the loudest value of each recording.
    mel = jnp.log10(jnp.maximum(mel, 1e-10))
    floor = mel.max(axis=(1, 2), keepdims=True) - 8.0
    return (jnp.maximum(mel, floor) + 4.0) / 4.0
