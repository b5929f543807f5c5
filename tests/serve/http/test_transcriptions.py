"""`/v1/audio/transcriptions`, of an engine that answers by a script."""

import io
import json
import wave

import pytest
from starlette.testclient import TestClient

from glm_edge.serve.http import Limits, Service, create_app
from glm_edge.serve.http.errors import ApiError
from glm_edge.serve.http.transcriptions import read_form
from tests.serve.http.fakes import events

PATH = "/v1/audio/transcriptions"


def wav(seconds=0.25):
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, 8000, 0, "NONE", ""))
        writer.writeframes(b"\0\0" * int(seconds * 8000))
    return file.getvalue()


@pytest.fixture(scope="module")
def hearing(scripted_engine, processor):
    service = Service(
        scripted_engine, processor, ["ear"], limits=Limits(audio_s=1.0), transcribes=True
    )
    return TestClient(create_app(service))


def post(client, content=None, **fields):
    files = {"file": ("a.wav", wav() if content is None else content, "audio/wav")}
    return client.post(PATH, data={"model": "ear", **fields}, files=files)


def test_a_transcription(hearing, backend):
    backend.say(" all is well ")
    body = post(hearing).json()
    assert body == {"text": "all is well", "usage": {"type": "duration", "seconds": 0.25}}
    assert post(hearing, response_format="text", temperature="0").text == "all is well"


def test_a_stream(hearing, backend):
    backend.say("all is well")
    *values, last = events(post(hearing, stream="true").text)
    values = [json.loads(value) for value in values]
    assert last == "[DONE]"
    assert "".join(value.get("delta", "") for value in values) == "all is well"
    assert (values[-1]["type"], values[-1]["text"]) == ("transcript.text.done", "all is well")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "srt"}, "response_format"),
        ({"language": "en"}, "language"),
        ({"temperature": "hot"}, "temperature"),
        ({"unknown": "1"}, "unknown"),
        ({"content": b"ID3 not a WAV"}, "file"),
        ({"content": wav(1.5)}, "file"),
    ],
)
def test_what_is_refused(hearing, fields, param):
    response = post(hearing, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_other_forms(hearing):
    assert post(hearing, model="gpt").status_code == 404
    assert hearing.post(PATH, data={"model": "ear"}).status_code == 415
    assert hearing.post(PATH, files={"other": ("a.wav", wav())}).status_code == 400
    kind = {"content-type": "multipart/form-data; boundary=x"}
    for content in (b"", b"--x", b"--x\r\n\r\n\r\n--x--", b"\0" * 100):
        assert hearing.post(PATH, content=content, headers=kind).status_code == 400
    with pytest.raises(ApiError, match="boundary"):
        read_form(b"", "multipart/form-data")
