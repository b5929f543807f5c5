"""Log-mel spectrogram against a float64 discrete Fourier sum."""

import jax
import numpy as np
import pytest

from glm_edge.kernels import log_mel

spectrogram = jax.jit(log_mel.log_mel, static_argnums=(1, 2, 3, 4))


def spectrogram_loop(samples, mel_bins, fft_size, hop, rate):
    padded = np.pad(samples, fft_size // 2, mode="reflect")
    frames = (len(padded) - fft_size) // hop
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(fft_size) / fft_size)
    phase = np.exp(
        -2j * np.pi * np.outer(np.arange(fft_size // 2 + 1), np.arange(fft_size)) / fft_size
    )
    filters = np.float64(log_mel.mel_filters(mel_bins, fft_size, rate))
    out = np.zeros((frames, mel_bins))
    for t in range(frames):
        power = np.abs(phase @ (padded[t * hop : t * hop + fft_size] * window)) ** 2
        out[t] = np.log10(np.maximum(filters @ power, 1e-10))
    return (np.maximum(out, out.max() - 8.0) + 4.0) / 4.0


@pytest.mark.parametrize(("fft_size", "hop", "rate"), [(200, 80, 8000), (400, 160, 16000)])
def test_log_mel_matches_a_loop(fft_size, hop, rate):
    rng = np.random.default_rng(0)
    time = np.arange(10 * hop) / rate
    samples = 0.5 * np.sin(2 * np.pi * 440 * time) + 0.01 * rng.normal(size=time.shape)
    actual = np.asarray(spectrogram(np.float32(samples[None]), 20, fft_size, hop, rate))
    assert actual.shape == (1, 10, 20)
    expected = spectrogram_loop(samples, 20, fft_size, hop, rate)
    np.testing.assert_allclose(actual[0], expected, atol=1e-3)


def test_silence_is_finite():
    assert np.isfinite(spectrogram(np.zeros((1, 1600), np.float32), 40, 200, 80, 8000)).all()


def test_filters_are_triangles_of_unit_area_in_order():
    filters = log_mel.mel_filters(40, 400, 16000)
    assert filters.shape == (40, 201)
    assert (filters >= 0).all()
    assert (np.diff(filters.argmax(axis=1)) >= 0).all()
    wide = filters[-5:] * (16000 / 400)
    np.testing.assert_allclose(wide.sum(axis=1), 1.0, rtol=0.05)
