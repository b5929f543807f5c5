"""Reader of WAV files from phones, ffmpeg and studio software.

A WAV file is a RIFF container of chunks. A chunk has a name of four letters, a little-endian size
in bytes, and contents padded to an even size. `fmt ` describes the samples; `data` contains them.

This module does not use scipy.io.wavfile, for four reasons. scipy reads a size of 0, which an
interrupted recorder leaves, as no samples. It returns truncated files without an error. Damaged
headers raise ZeroDivisionError or pass (a rate of 0). It reads a file of any size into memory at
once, whereas this module averages channels block by block within limits.
"""

import io
import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glm_edge.errors import DataError
from glm_edge.files import BinaryFile, fill, opened
from glm_edge.preprocess.processing import RATES

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
# Suffix of the GUID that names the sample format in an extensible header.
GUID_TAIL = bytes.fromhex("000000001000800000aa00389b71")
OTHER_FORMATS = {2: "ADPCM", 6: "A-law", 7: "mu-law", 0x11: "ADPCM", 0x55: "MP3", 0xFF: "AAC"}
# Writers that stream without a known size leave 0 or a size of at least this: ffmpeg 0xFFFFFFFF,
# Android's Oboe 0x7FFFFFFF, sox slightly less.
UNKNOWN_SIZE = 0x7FFF0000
MAX_CHUNKS = 1000
MAX_CHANNELS = 256
MAX_BYTES = 1 << 29
MAX_SAMPLES = 1 << 27
# Bytes that may follow the last chunk, such as tags of other formats.
MAX_TAIL = 4096
# Bytes decoded per block.
BLOCK = 1 << 22


class WaveFormat(NamedTuple):
    """Contents of `fmt `: a frame is one sample of `width` bytes per channel."""

    kind: int
    channels: int
    rate: int
    width: int

    @property
    def frame(self) -> int:
        """Return the bytes of a frame."""
        return self.channels * self.width


class Chunk(NamedTuple):
    """A chunk: its name, declared size and offset of its contents."""

    name: bytes
    size: int
    start: int


def read_wav(source: str | os.PathLike | bytes | bytearray | memoryview) -> tuple[np.ndarray, int]:
    """Read a recording and average its channels.

    Args:
      source: path of the file, or its bytes.

    Returns:
      `(samples, rate)`: float32 [L] in -1..1, and samples per second.

    Raises:
      DataError: the file is missing, truncated, empty, or not a supported WAV file.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return _read(io.BytesIO(source), memoryview(source).nbytes, "recording")
    with opened(source, DataError) as file:
        return _read(file, os.fstat(file.fileno()).st_size, str(Path(source)))


def _read(file: BinaryFile, total: int, where: str) -> tuple[np.ndarray, int]:
    head = file.read(12)
    if head[:4] not in (b"RIFF", b"RF64") or head[8:] != b"WAVE":
        raise DataError(f"{where}: not a WAV file, which begins with RIFF, a size, and WAVE")
    chunks, end = _chunks(file, total, where)
    for name in (b"fmt ", b"data"):
        count = sum(chunk.name == name for chunk in chunks)
        if count != 1:
            raise DataError(
                f"{where}: not a readable WAV file: it has {count or 'no'} chunks "
                f"{name.decode()!r}, but needs exactly one"
            )
    by_name = {chunk.name: chunk for chunk in chunks}
    described = _format(_contents(file, by_name[b"fmt "], 40), where)
    data = by_name[b"data"]
    if data.size == 0xFFFFFFFF and b"ds64" in by_name:
        # RF64 stores 64-bit sizes; the second is the size of `data`.
        sizes = _contents(file, by_name[b"ds64"], 16)
        data = data._replace(size=struct.unpack("<QQ", sizes.ljust(16, b"\0"))[1])
    # A size of 0 without following chunks means that the writer was interrupted.
    unfinished = data.size == 0 and end not in (total, total + 1)
    available = total - data.start
    if data.size >= UNKNOWN_SIZE > available or unfinished:
        data = data._replace(size=available)
    elif data.size > available:
        raise DataError(
            f"{where}: is truncated: it has {available // described.frame} of "
            f"{data.size // described.frame} samples"
        )
    elif total - end > MAX_TAIL:
        raise DataError(
            f"{where}: {total - end} bytes follow its last chunk, which are neither a chunk nor "
            "samples of the declared size"
        )
    return _samples(file, data, described, where), described.rate


def _chunks(file: BinaryFile, total: int, where: str) -> tuple[list[Chunk], int]:
    """List all chunks, and the end of the last chunk by its declared size."""
    chunks: list[Chunk] = []
    at = 12
    while at + 8 <= total:
        file.seek(at)
        head = file.read(8)
        if not head[:4].isascii() or not head[:4].decode().isprintable():
            break
        if len(chunks) == MAX_CHUNKS:
            raise DataError(f"{where}: has more than {MAX_CHUNKS} chunks")
        chunks.append(Chunk(head[:4], struct.unpack("<I", head[4:])[0], at + 8))
        at = chunks[-1].start + chunks[-1].size + chunks[-1].size % 2
    return chunks, at


def _contents(file: BinaryFile, chunk: Chunk, limit: int) -> bytes:
    file.seek(chunk.start)
    return file.read(min(chunk.size, limit))


def _format(fields: bytes, where: str) -> WaveFormat:
    if len(fields) < 16:
        raise DataError(f"{where}: its chunk 'fmt ' has {len(fields)} bytes; 16 are needed")
    kind, channels, rate, _, frame, bits = struct.unpack("<HHIIHH", fields[:16])
    if kind == EXTENSIBLE:
        if len(fields) < 40 or fields[26:40] != GUID_TAIL:
            raise DataError(f"{where}: its extensible format has an unknown sample format")
        (kind,) = struct.unpack("<H", fields[24:26])
    low, high = RATES
    if not 1 <= channels <= MAX_CHANNELS or not low <= rate <= high:
        raise DataError(
            f"{where}: declares {rate} samples per second in {channels} channels; supported are "
            f"{low}..{high} in 1..{MAX_CHANNELS}"
        )
    widths = {PCM: (1, 2, 3, 4), FLOAT: (4, 8)}.get(kind)
    if widths is None:
        name = OTHER_FORMATS.get(kind, "unknown")
        raise DataError(
            f"{where}: has samples of format {kind} ({name}); supported are PCM (1) and floats "
            "(3), convert it with ffmpeg -c:a pcm_s16le"
        )
    # Samples of 12 bits, for instance, are stored in the upper bits of 2 bytes.
    width = -(-bits // 8)
    if width not in widths or frame != channels * width:
        raise DataError(
            f"{where}: has {bits} bits per sample in frames of {frame} bytes and {channels} "
            f"channels; supported are samples of {', '.join(map(str, widths))} bytes"
        )
    return WaveFormat(kind, channels, rate, width)


def _samples(file: BinaryFile, data: Chunk, described: WaveFormat, where: str) -> np.ndarray:
    count = data.size // described.frame
    if not count:
        raise DataError(f"{where}: has no samples")
    if data.size > MAX_BYTES or count > MAX_SAMPLES:
        raise DataError(
            f"{where}: has {count} samples in {data.size} bytes; the limits are {MAX_SAMPLES} "
            f"samples and {MAX_BYTES} bytes"
        )
    file.seek(data.start)
    mono = np.empty(count, np.float32)
    step = min(count, BLOCK // described.frame)
    raw = np.empty(step * described.frame, np.uint8)
    for start in range(0, count, step):
        part = raw[: min(step, count - start) * described.frame]
        fill(file, part, where, DataError)
        decoded = _decoded(part, described).reshape(-1, described.channels)
        mono[start : start + step] = decoded.mean(axis=1)
    if not np.isfinite(mono).all():
        raise DataError(f"{where}: has samples that are NaN or infinite")
    return mono


def _decoded(raw: np.ndarray, described: WaveFormat) -> np.ndarray:
    """Decode the bytes of complete frames to float32 samples in -1..1."""
    if described.kind == FLOAT:
        with np.errstate(over="ignore"):
            return raw.view(f"<f{described.width}").astype(np.float32)
    if described.width == 1:
        # Only samples of one byte are unsigned.
        return (raw.astype(np.float32) - 128) / 128
    if described.width == 3:
        wide = np.zeros((raw.size // 3, 4), np.uint8)
        wide[:, 1:] = raw.reshape(-1, 3)
        raw, described = wide.reshape(-1), described._replace(width=4)
    scale = np.float32(2.0 ** -(8 * described.width - 1))
    return raw.view(f"<i{described.width}").astype(np.float32) * scale
