"""WAV files as phones, ffmpeg and studios write them, and damaged ones."""

import struct

import numpy as np
import pytest

from glm_edge import preprocess
from glm_edge.errors import DataError

RNG = np.random.default_rng(1)
TONE = 0.5 * np.sin(np.arange(400) / 3)
TAIL = bytes.fromhex("000000001000800000aa00389b71")


def chunk(name, content, size=None):
    size = len(content) if size is None else size
    return name + struct.pack("<I", size) + content + b"\0" * (len(content) % 2)


def wav(content, bits=16, kind=1, rate=8000, channels=1, before=b"", after=b"", **sizes):
    frame = channels * -(-bits // 8)
    fmt = struct.pack("<HHIIHH", kind, channels, rate, 0, frame, bits)
    if kind == 0xFFFE:
        fmt += struct.pack("<HHI", 22, bits, 0) + struct.pack("<H", 1) + TAIL
    body = before + chunk(b"fmt ", fmt) + chunk(b"data", content, sizes.get("data")) + after
    riff = sizes.get("riff", len(body) + 4)
    return sizes.get("name", b"RIFF") + struct.pack("<I", riff) + b"WAVE" + body


def as_int(samples, bits):
    return np.round(samples * 2 ** (bits - 1)).astype(np.int64)


def packed(samples, width):
    return b"".join(
        int(v).to_bytes(width, "little", signed=True) for v in as_int(samples, 8 * width)
    )


PCM = packed(TONE, 2)


@pytest.mark.parametrize(
    ("content", "step"),
    [
        (wav(PCM), 2**-15),
        (wav(packed(TONE, 3), bits=24), 2**-23),
        (wav(packed(TONE, 4), bits=32), 2**-23),
        (wav(np.round(128 + 127 * TONE).astype(np.uint8).tobytes(), bits=8), 2**-6),
        (wav(TONE.astype("<f4").tobytes(), bits=32, kind=3), 2**-23),
        (wav(TONE.astype("<f8").tobytes(), bits=64, kind=3), 2**-23),
        (wav(PCM, kind=0xFFFE), 2**-15),
        (wav(packed(TONE, 2), bits=12), 2**-15),
        (wav(np.repeat(np.frombuffer(PCM, "<i2"), 3).tobytes(), channels=3), 2**-15),
        (wav(PCM, data=0xFFFFFFFF, riff=0xFFFFFFFF), 2**-15),
        (wav(PCM, data=0x7FFFFFFF, riff=0x7FFFFFFF), 2**-15),
        (wav(PCM, data=0, riff=0), 2**-15),
        (wav(PCM, before=chunk(b"LIST", b"INFOx")), 2**-15),
        (wav(PCM, after=chunk(b"LIST", b"INFO")), 2**-15),
        (wav(PCM + b"\1"), 2**-15),
        (
            wav(
                PCM,
                name=b"RF64",
                data=0xFFFFFFFF,
                before=chunk(b"ds64", struct.pack("<QQQI", 0, len(PCM), 400, 0)),
                after=chunk(b"LIST", b"INFO" * 20),
            ),
            2**-15,
        ),
    ],
    ids=range(16),
)
def test_load_wav_reads_what_writers_write(tmp_path, content, step):
    (tmp_path / "a.wav").write_bytes(content)
    samples, rate = preprocess.load_wav(tmp_path / "a.wav")
    assert rate == 8000
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, TONE, atol=step)
    np.testing.assert_array_equal(preprocess.load_wav(content)[0], samples)


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (wav(PCM)[:-100], "is truncated: it has 350 of 400 samples"),
        (wav(b""), "has no samples"),
        (wav(b"", after=chunk(b"LIST", b"INFO")), "has no samples"),
        (wav(PCM, rate=0), r"declares 0 samples per second"),
        (wav(PCM, rate=2**32 - 1), "declares 4294967295 samples per second"),
        (wav(PCM, channels=0), "in 0 channels"),
        (wav(PCM, bits=40), "has 40 bits per sample"),
        (wav(PCM, kind=7), r"format 7 \(mu-law\)"),
        (wav(PCM, kind=0x55), r"format 85 \(MP3\)"),
        (wav(PCM, kind=0xFFFE).replace(TAIL, b"x" * 14), "extensible format has an unknown"),
        (wav(struct.pack("<3f", 0, np.nan, 0), bits=32, kind=3), "NaN or infinite"),
        (wav(struct.pack("<2d", 0, 1e300), bits=64, kind=3), "NaN or infinite"),
        (wav(PCM, name=b"RIFX"), "which begins with RIFF"),
        (wav(PCM, after=chunk(b"data", PCM)), "has 2 chunks 'data'"),
        (wav(PCM, before=wav(PCM)[12:36]), "has 2 chunks 'fmt '"),
        (wav(PCM)[:12] + wav(PCM)[36:], "has no chunks 'fmt '"),
        (wav(PCM, before=chunk(b"JUNK", b"") * 1001), "more than 1000 chunks"),
        (wav(PCM, after=bytes(5000)), "5000 bytes follow its last chunk"),
    ],
    ids=range(18),
)
def test_load_wav_refuses_damaged_files_in_one_line(tmp_path, content, pattern):
    (tmp_path / "a.wav").write_bytes(content)
    for source in (tmp_path / "a.wav", content):
        with pytest.raises(DataError, match=pattern) as excinfo:
            preprocess.load_wav(source)
        assert "\n" not in str(excinfo.value)
