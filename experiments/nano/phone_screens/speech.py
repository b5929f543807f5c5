"""Spoken digits: recordings from a folder, synthesis, splitting by speaker, augmentation.

Samples are mono float32 in -1..1 at 8 kHz; `N` is the number of samples.
"""

import ctypes
import dataclasses
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from glm_edge.errors import DataError, require
from glm_edge.preprocess import riff

SAMPLE_RATE = 8000
LONGEST_SECONDS = 1.6
DIGIT_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
)  # fmt: skip
# Accent and voice variant; each variant is in one split only. (f2, f3 and f5 are not reproducible,
# even in a new process.)
VOICES = {
    "train": (
        "en-us", "en-us+m1", "en-us+f1", "en+m3", "en+linda", "en-us+m7", "en-us+f4",
        "en-gb-scotland+m5", "en-029+grandma", "en-gb-x-rp+Andy", "en-us-nyc+Mario", "en-us+anika",
    ),
    "calibration": ("en-us+m2", "en+belinda"),
    "eval": ("en-us+Andrea", "en+m4", "en-us+steph", "en-us-nyc+john"),
}  # fmt: skip
# Voices of flite, another synthesizer: trained ones only, so that every split has its own larynxes.
FLITE_VOICES = ("kal16", "awb", "rms", "slt")
_PARAMETER_RATE, _PARAMETER_PITCH = 1, 3
_AUDIO_SYNCHRONOUS, _CHARACTERS_UTF8, _POSITION_CHARACTER = 2, 1, 1


@dataclasses.dataclass(frozen=True)
class Utterance:
    """A spoken digit.

    Args:
      samples: samples, float32 `[N]` at 8 kHz.
      digit: digit, 0..9.
      speaker: name of the speaker.
    """

    samples: np.ndarray
    digit: int
    speaker: str


def resample(samples: np.ndarray, rate: int, target: int = SAMPLE_RATE) -> np.ndarray:
    """Change the sampling rate by truncating or padding the spectrum.

    It differs from `glm_edge.preprocess.resample` on purpose. Nano was trained on recordings of
    this function, and published results of spoken questions are measured on them.

    Args:
      samples: samples, float32 `[N]` in -1..1.
      rate: input sampling rate in Hz.
      target: output sampling rate in Hz.

    Returns:
      Samples, float32 `[round(N * target / rate)]`.
    """
    if rate == target or not len(samples):
        return np.asarray(samples, np.float32)
    count = max(1, round(len(samples) * target / rate))
    spectrum = np.fft.rfft(samples)[: count // 2 + 1]
    # A truncated spectrum overshoots at loud edges.
    wave = np.clip(np.fft.irfft(spectrum, count) * (count / len(samples)), -1, 1)
    return wave.astype(np.float32)


def fsdd_folder(path: str | Path) -> list[Utterance]:
    """Open recordings in the layout of the Free Spoken Digit Dataset packed as npz.

    Args:
      path: folder of `*.npz`, each with `samples` (all recordings concatenated, int16 PCM or float
        in -1..1), `offsets` (start of each recording, and the end), `sr` (Hz) and `name`
        (`digit_speaker_index`).

    Returns:
      The recordings at 8 kHz in the order of the files.

    Raises:
      DataError: the folder has no such file, or a file has a different content.
    """
    folder = Path(path)
    files = sorted(folder.glob("*.npz")) if folder.is_dir() else []
    if not files:
        raise DataError(f"{folder} is not a folder with *.npz files of spoken digits")
    return [utterance for file in files for utterance in _read_npz(file)]


def _read_npz(file: Path) -> list[Utterance]:
    try:
        # Each indexing of an NpzFile decompresses the array again.
        with np.load(file, allow_pickle=False) as opened:
            data = {key: np.asarray(value) for key, value in opened.items()}
    except (
        OSError,
        ValueError,
        TypeError,
        EOFError,
        NotImplementedError,
        zlib.error,
        zipfile.BadZipFile,
    ) as error:
        raise DataError(f"{file} is not an npz of spoken digits ({error})") from error
    if missing := {"samples", "offsets", "sr", "name"} - set(data):
        raise DataError(
            f"{file} lacks {', '.join(sorted(missing))}; "
            "an npz of spoken digits has samples, offsets, sr and name"
        )
    samples, offsets, names, rate = (data[key] for key in ("samples", "offsets", "name", "sr"))
    is_float = samples.dtype.kind == "f"
    if samples.ndim != 1 or not (is_float or samples.dtype == np.int16) or not samples.size:
        raise DataError(
            f"{file}: samples are {samples.dtype} {list(samples.shape)}, expected int16 PCM or "
            "float [N]"
        )
    # The negation catches NaN as well.
    if is_float and not np.abs(samples).max() <= 1:
        raise DataError(f"{file}: samples are not finite or outside -1..1, the range of float PCM")
    if rate.size != 1 or rate.dtype.kind not in "iuf" or not 4000 <= rate <= 192000:
        raise DataError(f"{file}: sr is {rate}, expected one rate of 4000..192000 Hz")
    if (
        offsets.ndim != 1
        or offsets.dtype.kind not in "iu"
        or offsets.shape != (names.size + 1,)
        or offsets[0] < 0
        or offsets[-1] > len(samples)
        or (np.diff(offsets.astype(np.int64)) <= 0).any()
    ):
        raise DataError(
            f"{file}: offsets must be {names.size + 1} ascending indices into the {len(samples)} "
            "samples"
        )
    scale = np.float32(1 if is_float else 1 / 32768)
    utterances = []
    for i, name in enumerate(str(n) for n in names.reshape(-1)):
        parts = name.removesuffix(".wav").split("_")
        if len(parts) < 3 or parts[0] not in list("0123456789"):
            raise DataError(f"{file}: name {name!r}, expected digit_speaker_index")
        wave = samples[offsets[i] : offsets[i + 1]].astype(np.float32) * scale
        speaker = "_".join(parts[1:-1])
        utterances.append(Utterance(resample(wave, int(rate.item())), int(parts[0]), speaker))
    return utterances


def split_speakers(
    utterances: Sequence[Utterance], holdout: Collection[str]
) -> tuple[list[Utterance], list[Utterance]]:
    """Split recordings into two sets with disjoint speakers.

    Args:
      utterances: recordings.
      holdout: names of the held-out speakers.

    Returns:
      (recordings of the other speakers, recordings of the held-out speakers).

    Raises:
      DataError: a speaker is unknown, or one set is empty.
    """
    speakers = {u.speaker for u in utterances}
    if absent := set(holdout) - speakers:
        raise DataError(f"no speaker {min(absent)!r}; known: {', '.join(sorted(speakers))}")
    training = [u for u in utterances if u.speaker not in holdout]
    holdouts = [u for u in utterances if u.speaker in holdout]
    if not training or not holdouts:
        raise DataError(f"holding out {sorted(holdout)} of {sorted(speakers)} leaves one set empty")
    return training, holdouts


def synthesize_digits(
    seed: int, voices: Sequence[str] = VOICES["train"], repeats: int = 2
) -> list[Utterance]:
    """Synthesise digits with eSpeak NG, alone and as "press seven", at varied speed and pitch.

    eSpeak NG's output depends on everything that it synthesised before. It therefore runs in a
    separate process, so that the same arguments produce the same samples. The last results are
    cached.

    Args:
      seed: seed of speeds and pitches.
      voices: names of eSpeak voices, such as "en-us+f1"; each is a speaker.
      repeats: number of repetitions of each phrase per voice.

    Returns:
      `20 * repeats` utterances per voice, with silence trimmed at both ends.

    Raises:
      DataError: eSpeak does not have a voice.
      MissingExtraError: the extra `speech` is not installed.

    References:
      eSpeak NG, https://github.com/espeak-ng/espeak-ng
    """
    require("espeakng_loader", extra="speech")
    return list(_synthesize(seed, tuple(voices), repeats))


@functools.lru_cache(maxsize=8)
def _synthesize(seed: int, voices: tuple[str, ...], repeats: int) -> tuple[Utterance, ...]:
    rng = np.random.default_rng(seed)
    phrases = [
        (voice, digit, phrase.format(DIGIT_WORDS[digit]))
        for voice in voices
        for digit in range(10)
        for phrase in ("{}", "press {}")
        for _ in range(repeats)
    ]
    requests = [
        [voice, text, int(rng.integers(130, 211)), int(rng.integers(30, 71))]
        for voice, _, text in phrases
    ]
    child = subprocess.run(
        [sys.executable, "-m", __name__ if __name__ != "__main__" else __spec__.name],
        input=json.dumps(requests).encode(),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
        check=False,
    )
    if child.returncode:
        lines = child.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise DataError(f"eSpeak NG could not say the digits: {lines[-1].rpartition('Error: ')[2]}")
    header, _, pcm = child.stdout.partition(b"\n")
    rate, lengths = json.loads(header)
    waves = np.split(np.frombuffer(pcm, np.int16), np.cumsum(lengths)[:-1])
    return tuple(
        Utterance(_trim(resample(wave / np.float32(32768), rate)), digit, voice)
        for (voice, digit, _), wave in zip(phrases, waves, strict=True)
    )


def synthesize_with_flite(
    seed: int, voices: Sequence[str] = FLITE_VOICES, repeats: int = 4
) -> list[Utterance]:
    """Synthesise digits with flite, alone and as "press seven", at varied duration and pitch.

    The last results are cached.

    Args:
      seed: seed of durations and pitches.
      voices: names of flite's voices; each is a speaker.
      repeats: number of repetitions of each phrase per voice.

    Returns:
      `20 * repeats` utterances per voice, with silence trimmed at both ends.

    Raises:
      DataError: the program is not installed, or does not have a voice.

    References:
      Black and Lenzo, Flite: a small fast run-time synthesis engine, 2001
    """
    return list(_synthesize_with_flite(seed, tuple(voices), repeats))


@functools.lru_cache(maxsize=2)
def _synthesize_with_flite(
    seed: int, voices: tuple[str, ...], repeats: int
) -> tuple[Utterance, ...]:
    program = shutil.which("flite")
    if program is None:
        raise DataError("flite is not on PATH; install Debian's package flite")
    # flite silently uses its first voice for an unknown name.
    listed = _flite(program, "-lv").decode(errors="replace").partition(":")[2].split()
    if absent := set(voices) - set(listed):
        raise DataError(f"flite has no voice {min(absent)!r}; it has {', '.join(listed)}")
    rng = np.random.default_rng(seed)
    utterances = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "spoken.wav"
        for voice, digit, phrase, _ in itertools.product(
            voices, range(10), ("{}", "press {}"), range(repeats)
        ):
            stretch, pitch = rng.uniform(0.8, 1.3), rng.uniform(85, 210)
            changes = (f"duration_stretch={stretch:.3f}", f"int_f0_target_mean={pitch:.1f}")
            options = [part for change in changes for part in ("--setf", change)]
            text = phrase.format(DIGIT_WORDS[digit])
            _flite(program, "-voice", voice, *options, "-t", text, "-o", str(file))
            wave = _trim(resample(*riff.read_wav(file)))
            utterances.append(Utterance(wave, digit, f"flite {voice}"))
    return tuple(utterances)


def _flite(program: str, *arguments: str) -> bytes:
    done = subprocess.run([program, *arguments], capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise DataError(f"flite failed: {lines[-1]}")
    return done.stdout


def _trim(samples: np.ndarray) -> np.ndarray:
    """Trim samples below a hundredth of the peak from both ends."""
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max(initial=1e-6))
    return samples[loud[0] : loud[-1] + 1] if len(loud) else samples


def _say(requests: Sequence[Sequence]) -> tuple[int, list[np.ndarray]]:
    """Synthesise (voice, text, words per minute, pitch) one after the other in this process."""
    loader = require("espeakng_loader", extra="speech")
    library = ctypes.CDLL(loader.get_library_path())
    rate = library.espeak_Initialize(_AUDIO_SYNCHRONOUS, 0, loader.get_data_path().encode(), 0)
    if rate <= 0:
        raise DataError("eSpeak NG does not start; espeakng-loader may be damaged")
    variants = Path(loader.get_data_path()) / "voices" / "!v"
    chunks = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def receive(wave, count, _events):
        if wave and count > 0:
            chunks.append(np.ctypeslib.as_array(wave, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(receive)
    spoken = []
    for voice, text, speed, pitch in requests:
        chunks.clear()
        # eSpeak silently ignores an unknown variant, the part after the plus.
        variant = variants / voice.partition("+")[2]
        if not variant.exists() or library.espeak_SetVoiceByName(voice.encode()):
            raise DataError(f"unknown voice {voice!r}; use a name such as en-us or en-us+f1")
        library.espeak_SetParameter(_PARAMETER_RATE, speed, 0)
        library.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0)
        data = text.encode() + b"\0"
        library.espeak_Synth(
            data, len(data), 0, _POSITION_CHARACTER, 0, _CHARACTERS_UTF8, None, None
        )
        library.espeak_Synchronize()
        spoken.append(np.concatenate(chunks) if chunks else np.zeros(1, np.int16))
    return rate, spoken


def augment(rng: np.random.Generator, samples: np.ndarray) -> np.ndarray:
    """Augment a recording to vary speaker, room and microphone.

    Changes speed (and pitch with it), equalization, time shift, noise and gain, in this order.

    Args:
      rng: random generator.
      samples: samples, float32 `[N]` at 8 kHz.

    Returns:
      Samples, float32 in -1..1, at most `LONGEST_SECONDS` long.
    """
    longest = int(LONGEST_SECONDS * SAMPLE_RATE)
    speed = float(np.clip(np.exp(rng.normal(0, 0.13)), 0.75, 1.33))
    count = min(max(int(len(samples) / speed), 1), longest)
    wave = np.interp(np.arange(count) * speed, np.arange(len(samples)), samples)

    size = 1 << count.bit_length()
    frequencies = np.linspace(0, 1, size // 2 + 1)
    knots = np.linspace(0, 1, 7)
    decibels = np.interp(frequencies, knots, rng.normal(0, 4.0, 7))
    wave = np.fft.irfft(np.fft.rfft(wave, size) * 10 ** (decibels / 20), size)[:count]

    before = int(rng.integers(0, min(longest - count, 3200) + 1))
    after = int(rng.integers(0, min(longest - count - before, 3200) + 1))
    wave = np.pad(wave, (before, after))
    noise = rng.standard_normal(len(wave))
    if rng.random() < 0.5:
        # A moving average turns white noise into low-frequency noise.
        noise = np.convolve(noise, np.full(6, 6**-0.5), "same")
    loudness = np.sqrt(np.mean(np.square(wave))) + 1e-6
    wave += noise * loudness * 10 ** (-rng.uniform(8, 45) / 20)
    wave *= 10 ** (rng.uniform(-12, 8) / 20)
    return np.clip(wave, -1, 1).astype(np.float32)


def _main() -> None:
    """Synthesise requests of standard input; write a JSON line, then int16 samples."""
    rate, spoken = _say(json.load(sys.stdin))
    header = json.dumps([rate, [len(wave) for wave in spoken]]).encode()
    sys.stdout.buffer.write(header + b"\n" + b"".join(wave.tobytes() for wave in spoken))


if __name__ == "__main__":
    _main()
