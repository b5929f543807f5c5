"""Reads hostile images, recordings, numbers and answers in one process, and says how it went.

    python tests/attacks/media_worker.py SEED

Prints a line of JSON for each input: its name, `ok`, `refused` or the error that leaked, and the
seconds of processor time; the last line is the peak of memory in MB.
"""

import base64
import dataclasses
import io
import json
import random
import resource
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.nano.phone_screens.actions import parse_action
from glm_edge.errors import GlmEdgeError
from glm_edge.preprocess import media, prepare_image, prepare_recording, processor_config
from glm_edge.preprocess.audio import load_wav, resample
from glm_edge.preprocess.processing import GLM4V, GLM_ASR, GLM_EDGE_V

ADDRESS_SPACE = 12 << 30
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"]
FORMATS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO"]
NUMBERS = [0, -1, 1, 2, 3, 7, 1e-300, 1e-9, 0.1, 0.5, 255, 1e30, 1e300, 1e308, 10**9, 10**18]
NUMBERS += [10**400, 2.5, 401, 44_099, True, None, "4", [], {}, float("inf"), float("nan")]


def png(width, height, rows, bits):
    def chunk(name, content):
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    packer = zlib.compressobj(9)
    line = b"\0" * (1 + (width * bits + 7) // 8)
    packed = b"".join(packer.compress(line) for _ in range(rows)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def mutated(content, rng):
    content = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(content))
        match rng.randrange(4):
            case 0:
                content[at] = rng.randrange(256)
            case 1:
                content[at : at + 4] = rng.randbytes(4)
            case 2:
                del content[at : at + rng.randint(1, 30)]
            case 3:
                content[at:at] = rng.randbytes(rng.randint(1, 30))
    return bytes(content)


def images(rng):
    for _ in range(3):
        width, height = rng.randint(7_072, 9_000), rng.randint(7_072, 9_000)
        yield "png large", png(width, height, height, 1)
        yield "png lies", png(rng.randint(1, 2**31 - 1), rng.randint(1, 2**31 - 1), 1, 1)
    yield "png at the limit", png(7_000, 7_000, 7_000, 1)
    yield "png strip", png(rng.randint(60_000, 65_536), 2, 2, 8)
    for index in range(60):
        mode, kind = rng.choice(MODES), rng.choice(FORMATS)
        image = Image.new(mode, (rng.randint(1, 90), rng.randint(1, 90)), rng.randrange(2))
        exif = Image.Exif()
        exif[0x0112] = rng.randrange(12)
        buffer = io.BytesIO()
        try:
            image.save(buffer, kind, exif=exif)
        except (OSError, KeyError, ValueError):
            continue
        yield f"{kind} {mode} {index}", buffer.getvalue()
        yield f"{kind} {mode} {index} mutated", mutated(buffer.getvalue(), rng)


def read_image(content):
    url = f"data:image/x;base64,{base64.b64encode(content).decode()}"
    result = media.open_image(url)
    for processing in (GLM4V, GLM_EDGE_V):
        assert np.isfinite(prepare_image(result, processing)).all()


def recordings(rng):
    for index in range(150):
        kind = rng.choice([1] * 9 + [3] * 3 + [0xFFFE, 2, 7, rng.randrange(65_536)])
        bits = rng.choice([8, 12, 16, 16, 16, 24, 32, 32, 64, rng.randrange(65_536)])
        channels = rng.choice([1] * 6 + [2] * 4 + [6, 0, rng.randrange(65_536)])
        rate = rng.choice(
            [8_000, 44_099, 48_000, 96_001] * 3 + [999, 768_001, rng.randrange(2**32)]
        )
        frame = channels * -(-bits // 8) if rng.random() < 0.9 else rng.randrange(65_536)
        described = struct.pack("<HHIIHH", kind, channels, rate, 0, frame & 0xFFFF, bits)
        described += rng.randbytes(rng.choice([0, 0, 2, 24]))
        data = rng.randbytes(rng.randint(0, 5_000))
        size = rng.choice([len(data), len(data), 0, 2**32 - 1, 2**31 - 1, rng.randrange(2**32)])
        body = b"fmt " + struct.pack("<I", len(described)) + described
        body += b"data" + struct.pack("<I", size) + data
        content = b"RIFF" + struct.pack("<I", rng.choice([0, len(body) + 4])) + b"WAVE" + body
        yield f"wav {index}", content if rng.random() < 0.6 else mutated(content, rng)


def read_recording(content):
    samples, rate = load_wav(content)
    assert np.isfinite(samples).all()
    assert np.isfinite(resample(samples, rate, 16_000)).all()


def rates(rng):
    for _ in range(12):
        high = rng.choice([9_000, 50_000, 768_000])
        rate, target = rng.randint(1_000, high), rng.randint(1_000, high)
        yield f"resample {rate} to {target}", (rate, target, min(rate, 100_000))
    for _ in range(20):
        pair = [rng.choice([*NUMBERS, 8_000]), rng.choice([*NUMBERS, 16_000])]
        yield f"resample {str(pair)[:60]}", (*pair, rng.randint(1, 2_000))


def change_rate(rate, target, count):
    made = resample(np.sin(np.arange(count) / 9), rate, target)
    assert np.isfinite(made).all()


def files(rng):
    nasty = [*NUMBERS, *(rng.uniform(-2, 2) * 10 ** rng.randint(-20, 20) for _ in range(9))]

    def some(*names):
        return {name: rng.choice(nasty) for name in names if rng.random() < 0.3}

    for index in range(150):
        size = some("shortest_edge", "longest_edge", "height", "width")
        lists = {
            name: [rng.choice(nasty) for _ in range(rng.choice([3, 3, 3, 2]))]
            for name in ("image_mean", "image_std")
            if rng.random() < 0.5
        }
        fields = {"size": size} if rng.random() < 0.5 else {}
        base = rng.choice([GLM4V, GLM_EDGE_V])
        yield f"image fields {index}", ("image", base, {**fields, **lists})
        names = ("sampling_rate", "n_fft", "hop_length", "chunk_length", "feature_size")
        yield f"audio fields {index}", ("audio", GLM_ASR, some(*names))


def read_fields(kind, base, fields):
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(fields)
        (Path(folder) / "preprocessor_config.json").write_text(text)
        if kind == "image":
            processing = processor_config.read_image_processing(Path(folder), base)
            image = np.arange(30 * 40 * 3, dtype=np.uint8).reshape(30, 40, 3)
            assert np.isfinite(prepare_image(image, processing)).all()
        else:
            processing = processor_config.read_audio_processing(Path(folder), base)
            # Programs of many shapes would measure the compiler.
            if processing == dataclasses.replace(base):
                prepare_recording(np.zeros(16_000, np.float32), processing)


def answers(rng):
    pieces = ["do(action=", '"Type"', "'Tap'", ", text=", '"', "'", "\\", "\n", ")", "(", "[1,2]"]
    pieces += [", element=", "finish(message=", "<answer>", "</think>", "x" * 50, " ", "你好"]
    complete = ['do(action="Tap", element=[4,5])', 'finish(message="a "b"")', 'do(action="Home")']
    for index in range(150):
        yield f"answer {index}", "".join(rng.choices(pieces, k=rng.choice([9, 60, 900])))
        yield f"quoted {index}", "".join(rng.choices(complete + pieces, k=rng.randint(1, 6)))


def read_answer(text):
    parse_action(text)


ATTACKS = {
    images: read_image,
    recordings: read_recording,
    rates: change_rate,
    files: read_fields,
    answers: read_answer,
}


def main(seed: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    for draw, read in ATTACKS.items():
        for name, original in draw(random.Random(f"{seed} {draw.__name__}")):
            start = time.process_time()
            try:
                read(*original) if isinstance(original, tuple) else read(original)
                outcome = "ok"
            except GlmEdgeError as error:
                outcome = "refused" if "\n" not in str(error) else f"several lines: {error}"
            # Whatever else leaks is what this looks for.
            except BaseException as error:
                outcome = f"{type(error).__name__}: {error}"
            seconds = round(time.process_time() - start, 2)
            print(json.dumps([name, outcome[:300], seconds]), flush=True)
    print(json.dumps(["peak MB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, 0]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
