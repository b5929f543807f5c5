"""Recordings: WAV files that are ones and files that are not, rates, log-mel frames."""

import dataclasses
import time
import wave

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_edge import configs, preprocess
from glm_edge.errors import DataError

NANO = configs.preset("nano").speech
RNG = np.random.default_rng(0)


def write_wav(path, samples, rate=8000, channels=1, width=2):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return path


def tone(hertz, rate, seconds=0.5):
    return np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


def test_samples_and_rate_are_read_exactly(tmp_path):
    pcm = np.array([0, 1, -1, 32767, -32768], "<i2")
    samples, rate = preprocess.load_wav(write_wav(tmp_path / "a.wav", pcm, 11025))
    assert rate == 11025
    assert samples.dtype == np.float32
    np.testing.assert_array_equal(samples, pcm / 32768)


def test_channels_are_averaged(tmp_path):
    pcm = np.array([[100, 200], [-300, 100]], "<i2")
    samples, _ = preprocess.load_wav(write_wav(tmp_path / "a.wav", pcm, channels=2))
    np.testing.assert_array_equal(samples, np.array([150, -100]) / 32768)


def refused(path, pattern):
    with pytest.raises(DataError, match=pattern) as excinfo:
        preprocess.load_wav(path)
    assert "\n" not in str(excinfo.value)
    assert str(path) in str(excinfo.value)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"\x89PNG\r\n\x1a\n" * 9, b"tap the star " * 9])
def test_a_file_that_is_no_recording_is_named(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    refused(tmp_path / "a.wav", "not a WAV file")


def test_missing_files_and_folders_are_named(tmp_path):
    refused(tmp_path / "absent.wav", "cannot be read: No such file")
    refused(tmp_path, "is a directory")


@given(st.data())
def test_changed_bytes_read_or_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "a.wav"
    content = bytearray(write_wav(path, np.arange(20, dtype="<i2")).read_bytes())
    for _ in range(2):
        content[data.draw(st.integers(0, 47))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        samples, rate = preprocess.load_wav(path)
    except DataError:
        return
    assert samples.ndim == 1
    assert len(samples) > 0
    assert rate > 0


@pytest.mark.parametrize(
    ("rate", "target"),
    [(44100, 8000), (44100, 16000), (48000, 16000), (8000, 16000), (11025, 8000), (16000, 8000)],
)
def test_resampling_keeps_a_tone_and_its_phase(rate, target):
    actual = preprocess.resample(tone(1000, rate), rate, target)
    expected = tone(1000, target)
    assert actual.dtype == np.float32
    assert len(actual) == len(expected)
    np.testing.assert_allclose(actual[200:-200], expected[200:-200], atol=1e-4)


def test_resampling_removes_what_the_target_cannot_hold():
    aliased = preprocess.resample(tone(5000, 44100), 44100, 8000)
    assert np.abs(aliased[100:-100]).max() < 1e-4


def test_resampling_keeps_the_passband():
    result = preprocess.resample(tone(3500, 44100), 44100, 8000)
    np.testing.assert_allclose(result[200:-200], tone(3500, 8000)[200:-200], atol=2e-2)


@given(st.integers(1, 2000), st.integers(1000, 9000), st.integers(1000, 9000))
def test_resampled_length_and_level(length, rate, target):
    result = preprocess.resample(np.full(length, 0.5, np.float32), rate, target)
    assert len(result) == -(-length * target // rate)
    assert np.isfinite(result).all()
    reach = 40 * max(1, target // rate)
    np.testing.assert_allclose(result[reach : len(result) - reach], 0.5, atol=1e-3)


def test_same_rate_changes_nothing():
    samples = RNG.normal(size=100).astype(np.float32)
    np.testing.assert_array_equal(preprocess.resample(samples, 8000, 8000), samples)


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ((np.zeros(0, np.float32), 8000, 8000), "not empty"),
        ((np.zeros((2, 2), np.float32), 8000, 8000), "one row"),
        (([[0.0], [0.0, 1.0]], 8000, 8000), "one row"),
        ((np.zeros(9, np.int16), 8000, 8000), "must be floats"),
        ((np.full(9, np.nan), 8000, 8000), "NaN"),
        ((np.full(9, 3e38), 8000, 8000), "samples reach 3e"),
        ((np.full(9, 5000.0), 8000, 8000), "divide 16-bit integers by 32768"),
        ((np.zeros(9), 999, 8000), r"rate must be an integer .* in 1000\.\.768000, not 999"),
        ((np.zeros(9), 8000, 768001), "target must be an integer"),
        ((np.zeros(9), 8000.5, 8000), "rate must be"),
        ((np.zeros(9), np.nan, 8000), "rate must be"),
        ((np.zeros(9), np.inf, 8000), "rate must be"),
        ((np.zeros(9), None, 8000), "rate must be"),
        ((np.zeros(9), "8000", 8000), "rate must be"),
        ((np.zeros(9), True, 8000), "rate must be"),
        ((np.zeros(1 << 18), 1000, 768000), "the limit is 134217728"),
    ],
)
def test_samples_that_are_none_are_refused(arguments, pattern):
    with pytest.raises(DataError, match=pattern):
        preprocess.resample(*arguments)


def direct_log_mel(samples, config):
    """Frames, transform, filters and logarithm in float64, one frame at a time."""

    def mel(hertz):
        return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * np.log(hertz / 1000) / np.log(6.4)

    def hertz(value):
        return value * 200 / 3 if value < 15 else 1000 * 6.4 ** ((value - 15) / 27)

    size, hop, rate = config.fft_size, config.hop_length, config.sample_rate
    edges = [hertz(m) for m in np.linspace(0, mel(rate / 2), config.mel_bins + 2)]
    padded = np.pad(samples.astype(np.float64), size // 2, mode="reflect")
    turns = np.exp(-2j * np.pi * np.outer(np.arange(size // 2 + 1), np.arange(size)) / size)
    window = 0.5 * (1 - np.cos(2 * np.pi * np.arange(size) / size))
    frames = np.zeros((config.num_frames, config.mel_bins))
    for t in range(config.num_frames):
        power = np.abs(turns @ (padded[t * hop : t * hop + size] * window)) ** 2
        for m, (low, middle, high) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
            f = np.arange(size // 2 + 1) * rate / size
            triangle = np.minimum((f - low) / (middle - low), (high - f) / (high - middle))
            energy = (np.maximum(triangle, 0) * 2 / (high - low)) @ power
            frames[t, m] = np.log10(max(energy, 1e-10))
    return (np.maximum(frames, frames.max() - 8) + 4) / 4


@pytest.mark.parametrize(
    "config",
    [NANO, dataclasses.replace(configs.preset("tiny").speech, num_frames=40)],
    ids=["nano", "16kHz"],
)
def test_log_mel_matches_a_float64_loop(config):
    samples = 0.1 * RNG.normal(size=config.num_frames * config.hop_length)
    result = preprocess.prepare_audio(samples, config)
    assert result.shape == (config.num_frames, config.mel_bins)
    np.testing.assert_allclose(result, direct_log_mel(samples, config), atol=1e-4)


def test_prepare_audio_pads_short_and_refuses_long_ones():
    length = NANO.num_frames * NANO.hop_length
    samples = 0.1 * RNG.normal(size=length + 1).astype(np.float32)
    short = preprocess.prepare_audio(samples[:3000], NANO)
    padded = preprocess.prepare_audio(np.pad(samples[:3000], (0, length - 3000)), NANO)
    np.testing.assert_array_equal(short, padded)
    with pytest.raises(DataError, match=rf"longer than the {length} \(1\.60 s\)"):
        preprocess.prepare_audio(samples, NANO)


def test_prepare_recording_hears_all_or_refuses():
    processing = preprocess.AudioProcessing(chunk_s=0.5, max_s=1.2)
    samples = np.zeros(2 * 8000, np.float32)
    assert len(preprocess.prepare_recording(samples, processing)[0]) == 2
    with pytest.raises(DataError, match=r"samples\[:16000\]"):
        preprocess.prepare_recording(np.zeros(16001, np.float32), processing)


def slow_resample(samples, rate, target, count):
    """The first outputs, each by itself, in float64, from the same windowed sinc."""
    cutoff = 0.95 * min(1, target / rate)
    reach = int(np.ceil(32 / cutoff))
    padded = np.pad(samples.astype(np.float64), reach + 1)
    results = []
    for n in range(min(count, -(-len(samples) * target // rate))):
        complete, part = divmod(n * rate, target)
        offset = np.arange(-reach, reach + 1) - part / target
        taps = np.sinc(cutoff * offset)
        taps *= np.i0(8.6 * np.sqrt(np.maximum(0, 1 - (offset / (reach + 1)) ** 2)))
        results.append(taps @ padded[complete + 1 : complete + 2 + 2 * reach] / taps.sum())
    return np.array(results)


@pytest.mark.parametrize(("rate", "target"), [(44099, 16000), (8000, 44100), (767_999, 1000)])
def test_resample_is_the_sum_over_its_taps(rate, target):
    samples = 0.1 * RNG.normal(size=4000).astype(np.float32)
    actual = preprocess.resample(samples, rate, target)
    expected = slow_resample(samples, rate, target, 200)
    np.testing.assert_allclose(actual[:200], expected, atol=2e-6)


def test_a_prime_rate_is_resampled_in_bounded_time():
    before = time.process_time()
    result = preprocess.resample(tone(1000, 44099, 1.0), 44099, 16000)
    assert time.process_time() - before < 10
    np.testing.assert_allclose(result[200:-200], tone(1000, 16000, 1.0)[200:-200], atol=1e-4)


def test_a_batch_is_its_rows():
    rows = 0.1 * RNG.normal(size=(3, 5000))
    batch = preprocess.prepare_audio(rows, NANO)
    assert batch.shape == (3, 160, 40)
    for row, result in zip(rows, batch, strict=True):
        np.testing.assert_allclose(result, preprocess.prepare_audio(row, NANO), atol=1e-6)


def test_silence_is_finite():
    assert np.isfinite(preprocess.prepare_audio(np.zeros(100, np.float32), NANO)).all()


@pytest.mark.parametrize(
    ("samples", "pattern"),
    [
        (np.zeros(0), "not empty"),
        (np.zeros((1, 2, 3)), r"found shape \[1, 2, 3\]"),
        (np.float32(3), r"found shape \[\]"),
        (np.full(9, np.inf), "infinity"),
        (np.zeros(9, np.int16), "must be floats"),
    ],
)
def test_arrays_that_are_no_recording_are_refused(samples, pattern):
    with pytest.raises(DataError, match=pattern):
        preprocess.prepare_audio(samples, NANO)
