"""WAV files as phones, ffmpeg and studios write them.

A WAV file is a RIFF container: chunks of a name of four letters, a size in bytes (little-endian)
and contents that are padded to an even size. `fmt ` describes the samples, `data` holds them.

scipy.io.wavfile is not used, for four reasons. It reads a size of 0, which recorders leave behind
when they are killed, as no samples. It returns truncated files without an error. Damaged headers
raise ZeroDivisionError or pass (a rate of 0). It reads a file of any size into memory at once,
where this module averages channels block by block within limits.
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
# An extensible format names its kind of samples by a GUID that ends so.
GUID_TAIL = bytes.fromhex("000000001000800000aa00389b71")
OTHER_FORMATS = {2: "ADPCM", 6: "A-law", 7: "mu-law", 0x11: "ADPCM", 0x55: "MP3", 0xFF: "AAC"}
# Writers that do not know the size when they begin leave 0, or at least this: ffmpeg 0xFFFFFFFF,
# Android's Oboe 0x7FFFFFFF, sox a little less.
UNKNOWN_SIZE = 0x7FFF0000
MAX_CHUNKS = 1000
MAX_CHANNELS = 256
MAX_BYTES = 1 << 29
MAX_SAMPLES = 1 << 27
# Bytes of junk that may follow the last chunk, as tags of other formats do.
MAX_TAIL = 4096
# Bytes that are decoded at one time.
BLOCK = 1 << 22


class WaveFormat(NamedTuple):
    """Contents of `fmt `; a frame is one sample per channel, of `width` bytes each."""

    kind: int
    channels: int
    rate: int
    width: int

    @property
    def frame(self) -> int:
        """Returns the bytes of a frame."""
        return self.channels * self.width


class Chunk(NamedTuple):
    """A chunk: its name, declared size and offset of its contents."""

    name: bytes
    size: int
    start: int


def read_wav(source: str | os.PathLike | bytes | bytearray | memoryview) -> tuple[np.ndarray, int]:
    """Reads a recording; several channels are averaged.

    Args:
      source: path of the file, or its bytes.

    Returns:
      `(samples, rate)`: float32 [L], and samples per second.

    Raises:
      DataError: the file is missing, truncated, empty, or not such a recording.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return _read(io.BytesIO(source), memoryview(source).nbytes, "recording")
    with opened(source, DataError) as file:
        return _read(file, os.fstat(file.fileno()).st_size, str(Path(source)))


def _read(file: BinaryFile, total: int, where: str) -> tuple[np.ndarray, int]:
    head = file.read(12)
    if head[:4] not in (b"RIFF", b"RF64") or head[8:] != b"WAVE":
        raise DataError(f"{where}: not a WAV file: it must begin with RIFF, a size, and WAVE")
    chunks, end = _chunks(file, total, where)
    for name in (b"fmt ", b"data"):
        count = sum(chunk.name == name for chunk in chunks)
        if count != 1:
            raise DataError(
                f"{where}: not a WAV file that can be read: it has {count or 'no'} chunks "
                f"{name.decode()!r}, one is needed"
            )
    by_name = {chunk.name: chunk for chunk in chunks}
    described = _format(_contents(file, by_name[b"fmt "], 40), where)
    data = by_name[b"data"]
    if data.size == 0xFFFFFFFF and b"ds64" in by_name:
        # RF64: sizes of 64 bits, the second of which is that of `data`.
        sizes = _contents(file, by_name[b"ds64"], 16)
        data = data._replace(size=struct.unpack("<QQ", sizes.ljust(16, b"\0"))[1])
    # An empty recording whose other chunks follow is empty; else its writer never came back.
    unfinished = data.size == 0 and end not in (total, total + 1)
    there = total - data.start
    if data.size >= UNKNOWN_SIZE > there or unfinished:
        data = data._replace(size=there)
    elif data.size > there:
        raise DataError(
            f"{where}: is truncated: {there // described.frame} of "
            f"{data.size // described.frame} samples are there"
        )
    elif total - end > MAX_TAIL:
        raise DataError(
            f"{where}: {total - end} bytes follow its last chunk; they are not a chunk, and sizes "
            "do not count them as samples"
        )
    return _samples(file, data, described, where), described.rate


def _chunks(file: BinaryFile, total: int, where: str) -> tuple[list[Chunk], int]:
    """Lists all chunks, and the end of the last by its declared size."""
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
        raise DataError(f"{where}: its chunk 'fmt ' holds {len(fields)} bytes; 16 are needed")
    kind, channels, rate, _, frame, bits = struct.unpack("<HHIIHH", fields[:16])
    if kind == EXTENSIBLE:
        if len(fields) < 40 or fields[26:40] != GUID_TAIL:
            raise DataError(f"{where}: its extensible format has an unknown kind of samples")
        (kind,) = struct.unpack("<H", fields[24:26])
    low, high = RATES
    if not 1 <= channels <= MAX_CHANNELS or not low <= rate <= high:
        raise DataError(
            f"{where}: claims {rate} samples per second in {channels} channels; {low}..{high} in "
            f"1..{MAX_CHANNELS} are read"
        )
    widths = {PCM: (1, 2, 3, 4), FLOAT: (4, 8)}.get(kind)
    if widths is None:
        name = OTHER_FORMATS.get(kind, "unknown")
        raise DataError(
            f"{where}: holds samples of format {kind} ({name}); PCM (1) and floats (3) are read, "
            "convert it as with ffmpeg -c:a pcm_s16le"
        )
    # Samples of 12 bits stand in the upper bits of 2 bytes, and so on.
    width = -(-bits // 8)
    if width not in widths or frame != channels * width:
        raise DataError(
            f"{where}: has {bits} bits per sample in frames of {frame} bytes and {channels} "
            f"channels; samples of {', '.join(map(str, widths))} bytes are read"
        )
    return WaveFormat(kind, channels, rate, width)


def _samples(file: BinaryFile, data: Chunk, described: WaveFormat, where: str) -> np.ndarray:
    count = data.size // described.frame
    if not count:
        raise DataError(f"{where}: holds no samples")
    if data.size > MAX_BYTES or count > MAX_SAMPLES:
        raise DataError(
            f"{where}: holds {count} samples in {data.size} bytes; at most {MAX_SAMPLES} in "
            f"{MAX_BYTES} are read"
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
        raise DataError(f"{where}: holds samples that are NaN or infinite")
    return mono


def _decoded(raw: np.ndarray, described: WaveFormat) -> np.ndarray:
    """Samples in -1..1, float32, of the bytes of whole frames."""
    if described.kind == FLOAT:
        with np.errstate(over="ignore"):
            return raw.view(f"<f{described.width}").astype(np.float32)
    if described.width == 1:
        # Samples of a single byte are the only ones without a sign.
        return (raw.astype(np.float32) - 128) / 128
    if described.width == 3:
        wide = np.zeros((raw.size // 3, 4), np.uint8)
        wide[:, 1:] = raw.reshape(-1, 3)
        raw, described = wide.reshape(-1), described._replace(width=4)
    scale = np.float32(2.0 ** -(8 * described.width - 1))
    return raw.view(f"<i{described.width}").astype(np.float32) * scale
