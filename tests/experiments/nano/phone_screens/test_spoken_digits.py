"""Recordings are read or refused, speakers never lie on two sides, synthesis repeats itself."""

import os
import shutil
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.nano.phone_screens import speech
from glm_edge.errors import DataError, MissingExtraError


def layout(speakers=("ann", "bob_jr"), rate=8000, dtype=np.int16):
    rng = np.random.default_rng(0)
    names = [f"{d}_{s}_{i}.wav" for s in speakers for d in range(10) for i in range(2)]
    lengths = rng.integers(1000, 3000, len(names))
    samples = rng.integers(-20000, 20000, lengths.sum()).astype(np.int16)
    return {
        "samples": samples if dtype == np.int16 else (samples / 32768).astype(dtype),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "sr": np.int32(rate),
        "name": np.array(names),
    }


def save(folder, file="digits.npz", **changes):
    data = {**layout(), **changes}
    np.savez(folder / file, **{k: v for k, v in data.items() if v is not None})


def test_a_folder_of_recordings(tmp_path):
    save(tmp_path, "a.npz")
    save(tmp_path, "b.npz", **layout(("eve",), dtype=np.float32))
    result = speech.fsdd_folder(tmp_path)
    assert len(result) == 60
    assert {u.speaker for u in result} == {"ann", "bob_jr", "eve"}
    data = layout()
    start, end = data["offsets"][3:5]
    assert result[3].digit == 1
    assert result[3].samples.dtype == np.float32
    np.testing.assert_array_equal(result[3].samples, data["samples"][start:end] / 32768.0)


def test_other_rates_become_8_khz(tmp_path):
    save(tmp_path, **layout(rate=16000))
    result, lengths = speech.fsdd_folder(tmp_path), np.diff(layout()["offsets"])
    assert abs(len(result[0].samples) - lengths[0] / 2) <= 1


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100])
def test_resampling_keeps_a_tone(rate):
    tone = np.sin(2 * np.pi * 500 * np.arange(rate) / rate).astype(np.float32)
    actual = speech.resample(tone, rate)
    expected = np.sin(2 * np.pi * 500 * np.arange(8000) / 8000)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": None}, "lacks samples"),
        ({"samples": np.array(["x"])}, "samples are <U1"),
        ({"samples": np.zeros((2, 8), np.int16)}, "samples are int16"),
        ({"samples": np.full(90000, np.nan, np.float32)}, "not finite"),
        ({"samples": np.zeros(100, np.int16)}, "offsets must be"),
        ({"offsets": np.arange(3)}, "offsets must be"),
        ({"offsets": np.zeros(41, int)}, "offsets must be"),
        ({"offsets": np.linspace(0, 1, 41)}, "offsets must be"),
        ({"sr": np.int32(0)}, "sr is 0"),
        ({"sr": np.array("fast")}, "sr is fast"),
        ({"name": np.array(["ten_ann_0"] * 40)}, "digit_speaker_index"),
        ({"name": np.array([{}] * 40)}, "not an npz of spoken digits"),
    ],
)
def test_bad_recordings_are_refused_in_one_line(tmp_path, changes, message):
    save(tmp_path, **changes)
    with pytest.raises(DataError, match=message) as caught:
        speech.fsdd_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_npz_are_refused(tmp_path):
    with pytest.raises(DataError, match="is not a folder with"):
        speech.fsdd_folder(tmp_path)
    save(tmp_path)
    file = tmp_path / "digits.npz"
    complete = file.read_bytes()
    for content in (b"", b"RIFF....WAVEfmt ", complete[: len(complete) // 2]):
        file.write_bytes(content)
        with pytest.raises(DataError, match="not an npz of spoken digits"):
            speech.fsdd_folder(tmp_path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(file)
    with pytest.raises(DataError, match="not an npz of spoken digits"):
        speech.fsdd_folder(tmp_path)


def test_speakers_are_split_never_clips(tmp_path):
    save(tmp_path)
    everything = speech.fsdd_folder(tmp_path)
    retained, stored = speech.split_speakers(everything, ["bob_jr"])
    assert {u.speaker for u in retained} == {"ann"}
    assert {u.speaker for u in stored} == {"bob_jr"}
    assert len(retained) + len(stored) == len(everything)
    with pytest.raises(DataError, match="no speaker 'eve'; known: ann, bob_jr"):
        speech.split_speakers(everything, ["eve"])
    with pytest.raises(DataError, match="leaves one set empty"):
        speech.split_speakers(everything, ["ann", "bob_jr"])


def test_no_larynx_is_in_two_splits():
    larynxes = [{v.partition("+")[2] for v in voices} for voices in speech.VOICES.values()]
    assert sum(len(split) for split in larynxes) == len(set.union(*larynxes))
    assert all(len(split) >= 2 for split in larynxes)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20000))
def test_augmentation_stays_in_bounds(seed, count):
    samples = np.sin(np.arange(count) / 3).astype(np.float32)
    changed = speech.augment(np.random.default_rng(seed), samples)
    assert changed.dtype == np.float32
    assert 0 < len(changed) <= 1.6 * 8000
    assert np.isfinite(changed).all()
    assert np.abs(changed).max() <= 1
    again = speech.augment(np.random.default_rng(seed), samples)
    np.testing.assert_array_equal(changed, again)


def test_augmentation_leaves_its_input_alone():
    samples = np.sin(np.arange(4000) / 3).astype(np.float32)
    before = samples.copy()
    lengths = {len(speech.augment(np.random.default_rng(i), samples)) for i in range(20)}
    np.testing.assert_array_equal(samples, before)
    assert len(lengths) > 15


def test_flite_is_named_where_it_is_absent(monkeypatch):
    monkeypatch.setenv("PATH", "")
    speech._synthesize_with_flite.cache_clear()
    with pytest.raises(DataError, match="install Debian's package flite"):
        speech.synthesize_with_flite(0)


@pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")
def test_flite_says_every_digit_and_repeats_itself():
    voices = ("kal16", "slt")
    first = speech.synthesize_with_flite(3, voices, repeats=1)
    assert {(u.speaker, u.digit) for u in first} == {
        (f"flite {voice}", digit) for voice in voices for digit in range(10)
    }
    assert len(first) == 40
    for utterance in first:
        assert utterance.samples.dtype == np.float32
        assert 0.1 < len(utterance.samples) / 8000 < 1.6
        assert 0.05 < np.abs(utterance.samples).max() <= 1
    speech._synthesize_with_flite.cache_clear()
    again = speech.synthesize_with_flite(3, voices, repeats=1)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.samples, b.samples)
    with pytest.raises(DataError, match="flite has no voice 'nobody'; it has kal"):
        speech.synthesize_with_flite(0, ("nobody",))


def test_a_program_that_fails_is_reported(monkeypatch, tmp_path):
    program = tmp_path / "flite"
    program.write_text("#!/bin/sh\necho no audio >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    speech._synthesize_with_flite.cache_clear()
    with pytest.raises(DataError, match="flite failed: no audio"):
        speech.synthesize_with_flite(0)


def test_synthesis_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(MissingExtraError, match="speech"):
        speech.synthesize_digits(0)


@pytest.fixture
def synthesis():
    pytest.importorskip("espeakng_loader")
    speech._synthesize.cache_clear()
    yield speech.synthesize_digits
    speech._synthesize.cache_clear()


def test_synthesis_says_every_digit_and_repeats_itself(synthesis):
    voices = ("en-us", "en-us+f1")
    first = synthesis(3, voices, repeats=1)
    assert len(first) == 40
    assert {(u.speaker, u.digit) for u in first} == {(v, d) for v in voices for d in range(10)}
    for utterance in first:
        assert utterance.samples.dtype == np.float32
        assert 0.1 < len(utterance.samples) / 8000 < 1.6
        assert 0.05 < np.abs(utterance.samples).max() <= 1
    synthesis(4, ("en-us",), repeats=1)
    speech._synthesize.cache_clear()
    again = synthesis(3, voices, repeats=1)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.samples, b.samples)
    start = time.perf_counter()
    synthesis(3, voices, repeats=1)
    assert time.perf_counter() - start < 0.1


def test_all_named_voices_exist(synthesis):
    voices = tuple(v for split in speech.VOICES.values() for v in split)
    assert len(synthesis(0, voices, repeats=1)) == 20 * len(voices)


@pytest.mark.parametrize("voice", ["zh", "en-us+nobody", "en-us+../x"])
def test_unknown_voices_are_refused(synthesis, voice):
    with pytest.raises(DataError, match="unknown voice"):
        synthesis(0, (voice,))
