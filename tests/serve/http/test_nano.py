"""The shipped model behind the service."""

import base64
import io
import json
import wave

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from glm_edge.generate.sampling import Sampling
from glm_edge.preprocess.tokens import decode
from glm_edge.serve import Request
from glm_edge.serve.http import Service, create_app

QUESTION = "say hello"
# Short answers.
SPOKEN = "go back"


@pytest.fixture(scope="module")
def ask(nano_client):
    def post(content=QUESTION, **fields):
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 12, **fields}
        response = nano_client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    return post


@pytest.fixture(scope="module")
def expected(nano_engine, processor):
    """Asks the engine without HTTP."""

    def submit(content, **options):
        inputs = processor([{"role": "user", "content": content}])
        stops = processor.stop_token_ids
        request = Request(inputs=inputs, max_new_tokens=12, stop_tokens=stops, **options)
        tokens, _ = nano_engine.submit(request).result()
        return decode(processor.tokenizer, tokens, skip_special_tokens=True)

    return submit


def test_seeds_of_several_answers_follow_each_other(ask, expected):
    body = ask(n=2, seed=7, temperature=1.0)
    texts = [choice["message"]["content"] for choice in body["choices"]]
    sampling = Sampling(temperature=1.0)
    for text, seed in zip(texts, (7, 8), strict=True):
        assert text == expected(QUESTION, sampling=sampling, seed=seed)


def test_a_screen_in_a_data_url(ask, expected):
    pixels = np.random.default_rng(0).integers(0, 255, (192, 96, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "tap the play"},
    ]
    body = ask(parts, temperature=0)
    same = [{"type": "image", "image": pixels}, {"type": "text", "text": "tap the play"}]
    assert body["choices"][0]["message"]["content"] == expected(same)
    details = body["usage"]["prompt_tokens_details"]
    assert details["image_tokens"] > 0
    pruned = ask(parts, temperature=0, vision_tokens={"keep": 0.5})["usage"]
    half = pruned["prompt_tokens_details"]
    assert half["dropped_image_tokens"] > 0
    assert half["image_tokens"] + half["dropped_image_tokens"] == details["image_tokens"]
    assert half["text_tokens"] == details["text_tokens"]
    assert details["text_tokens"] + details["image_tokens"] == body["usage"]["prompt_tokens"]


def test_constraints_of_all_kinds(ask):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    described = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answers = ask(response_format=described, n=3, seed=1, temperature=2.0, max_tokens=60)
    for choice in answers["choices"]:
        assert isinstance(json.loads(choice["message"]["content"])["ok"], bool)
    action = ask(structured_outputs={"phone_actions": True}, temperature=0, max_tokens=60)
    assert action["choices"][0]["message"]["content"].startswith(("do(action=", "finish(message="))


def test_logprobs_are_those_of_the_model(ask):
    choice = ask(logprobs=True, top_logprobs=2, temperature=0)["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == choice["message"]["content"]
    for token in tokens:
        assert token["logprob"] == token["top_logprobs"][0]["logprob"]
        assert token["logprob"] <= 0


def test_transcription_needs_a_model_that_transcribes(nano_client):
    response = nano_client.post(
        "/v1/audio/transcriptions", data={"model": "nano"}, files={"file": ("a.wav", b"RIFF")}
    )
    assert response.status_code == 400
    assert "does not transcribe" in response.json()["error"]["message"]


def test_a_transcription_is_the_answer_to_the_recording(nano_engine, processor):
    service = Service(nano_engine, processor, ["ear"], transcribes=True)
    client = TestClient(create_app(service))
    rng, answers = np.random.default_rng(0), []
    for pitch in (200, 700):
        times = np.arange(6000) / 8000
        samples = (0.3 * np.sin(2 * np.pi * pitch * times) + 0.01 * rng.normal(size=6000)) * 32767
        samples = samples.astype("<i2")
        file = io.BytesIO()
        with wave.open(file, "wb") as writer:
            writer.setparams((1, 2, 8000, 0, "NONE", ""))
            writer.writeframes(samples.tobytes())
        body = {"model": "ear", "temperature": "0", "prompt": SPOKEN}
        response = client.post(
            "/v1/audio/transcriptions", data=body, files={"file": ("a.wav", file.getvalue())}
        ).json()
        sound = {"type": "audio", "audio": (samples.astype(np.float32) / 32768, 8000)}
        inputs = processor([{"role": "user", "content": [sound, {"type": "text", "text": SPOKEN}]}])
        stops = processor.stop_token_ids
        tokens, end = nano_engine.submit(
            Request(inputs=inputs, max_new_tokens=512, stop_tokens=stops)
        ).result()
        assert end.usage.audio_tokens > 0
        expected = decode(processor.tokenizer, tokens, skip_special_tokens=True).strip()
        assert response == {"text": expected, "usage": {"type": "duration", "seconds": 0.75}}
        answers.append(expected)
    assert answers[0]
