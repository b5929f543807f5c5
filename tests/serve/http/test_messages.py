"""Messages and media of strangers."""

import base64
import io
import struct
import wave
import zlib

import numpy as np
import pytest
from PIL import Image

from glm_edge.serve.http.errors import ApiError
from glm_edge.serve.http.limits import Limits
from glm_edge.serve.http.messages import MessageReader

SMALL = Limits(
    image_bytes=5000,
    image_pixels=10_000,
    images=2,
    audio_bytes=20_000,
    audio_s=0.5,
    recordings=1,
    characters=100,
    parts=5,
)


def read(content, role="user", limits=SMALL, **fields):
    return MessageReader(limits).read([{"role": role, "content": content, **fields}])[0]


def image_url(kind="PNG", size=(8, 6)):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 10, 10)).save(file, kind)
    encoded = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{encoded}"


def image_part(url):
    return [{"type": "image_url", "image_url": {"url": url, "detail": "high"}}]


def wav(seconds=0.1, rate=8000):
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, rate, 0, "NONE", ""))
        writer.writeframes(np.zeros(int(seconds * rate), "<i2").tobytes())
    return base64.b64encode(file.getvalue()).decode()


def audio_part(data, kind="wav"):
    return [{"type": "input_audio", "input_audio": {"data": data, "format": kind}}]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_are_decoded_later(kind):
    (part,) = read(image_part(image_url(kind)))["content"]
    assert part["type"] == "image"
    assert part["image"].size == (8, 6)


def test_recordings_are_samples():
    (part,) = read(audio_part(wav()))["content"]
    samples, rate = part["audio"]
    assert (len(samples), rate) == (800, 8000)


def bomb(width, height):
    """A small PNG whose header promises many pixels."""

    def chunk(name, data):
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    raw = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(raw).decode()


@pytest.mark.parametrize(
    "url",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "http://localhost/x.png",
        "https://a.b/c.png",
        "./screen.png",
        "",
        "data:image/png,abc",
        "data:text/plain;base64,aGk=",
        "data:image/svg+xml;base64,PHN2Zy8+",
        "data:image/gif;base64,R0lGODlhAQABAAAAACw=",
        "data:image/png;base64,???",
        "data:image/png;base64,aGVsbG8=",
        "data:image/png;base64,",
        bomb(60_000, 60_000),
        bomb(200, 200),
        image_url(size=(200, 60)),
        "data:image/png;base64," + "A" * 9000,
    ],
)
def test_other_images_are_refused_without_opening_anything(url, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a file was opened")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ApiError) as refused:
        read(image_part(url))
    assert refused.value.param == "messages[0].content[0].image_url.url"
    assert refused.value.status == 400


@pytest.mark.parametrize(
    "part",
    [
        audio_part("/etc/passwd"),
        audio_part("AAAA"),
        audio_part(wav(0.6)),
        audio_part("A" * 40_000),
        audio_part(wav(), "mp3"),
        audio_part("data:audio/wav,AAAA"),
        [{"type": "input_audio", "input_audio": {}}],
        [{"type": "input_audio"}],
        [{"type": "image_url", "image_url": "data:..."}],
        [{"type": "video_url", "video_url": {"url": "x"}}],
        [{"type": "image", "image": "/etc/passwd"}],
        [{"type": "text"}],
        ["text"],
        [None],
        [{"type": "text", "text": "x", "path": "/etc/passwd"}],
        5,
        {"text": "x"},
        None,
    ],
)
def test_malformed_parts(part):
    with pytest.raises(ApiError):
        read(part)


def test_counts_are_limited():
    with pytest.raises(ApiError, match="more than 2 images"):
        read(image_part(image_url()) * 3)
    with pytest.raises(ApiError, match="more than 1 recordings"):
        read(audio_part(wav()) * 2)
    with pytest.raises(ApiError, match="more than 5 parts"):
        read([{"type": "text", "text": ""}] * 6)
    with pytest.raises(ApiError, match="more than 100 characters"):
        read("x" * 101)


def test_roles():
    assert read("x", role="developer") == {"role": "system", "content": "x"}
    for role in ("owner", None, 5):
        with pytest.raises(ApiError):
            read("x", role=role)


def test_turns_of_the_service_come_back():
    call = {"id": "call_1", "type": "function", "function": {"name": "tap", "arguments": "{}"}}
    message = read(None, "assistant", tool_calls=[call], refusal=None, annotations=[])
    function = {"name": "tap", "arguments": "{}"}
    assert message == {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": function}],
    }
    assert read("3", "tool", tool_call_id="call_1") == {"role": "tool", "content": "3"}
    with pytest.raises(ApiError, match="only an assistant"):
        read("x", tool_calls=[call])
    with pytest.raises(ApiError, match="does not know"):
        read("x", special=True)
