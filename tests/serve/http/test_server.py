"""A real socket: the official client, clients that leave or dawdle, and the end of the service."""

import json
import socket
import threading
import time

import pytest

pytest.importorskip("uvicorn")
import httpx

from glm_edge.serve import Engine
from glm_edge.serve.http import Limits, Server, Service
from tests.serve.http.fakes import ScriptedBackend, events

MESSAGES = [{"role": "user", "content": "hello"}]


class Running:
    """A server in a thread of its own."""

    def __init__(self, processor, limits=None, **options):
        self.backend = ScriptedBackend(processor.tokenizer)
        self.engine = Engine(self.backend)
        self.engine.start()
        self.service = Service(self.engine, processor, ["nano"], limits=limits)
        self.server = Server(self.service, port=0, **options)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        assert self.server.started.wait(30)
        self.url = f"http://127.0.0.1:{self.server.port}/v1"

    def stop(self):
        self.backend.gate.set()
        self.server.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def running(processor):
    service = Running(processor, Limits(body_s=0.5), header_s=0.5)
    yield service
    service.stop()


@pytest.fixture(autouse=True)
def opened(request):
    yield
    if "running" in request.fixturenames:
        backend = request.getfixturevalue("running").backend
        backend.delay = 0
        backend.gate.set()


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def openai(running):
    library = pytest.importorskip("openai")
    return library.OpenAI(base_url=running.url, api_key="EMPTY", max_retries=0)


def test_the_official_client(openai, running):
    running.backend.say("all is well")
    answer = openai.chat.completions.create(model="nano", messages=MESSAGES, temperature=0)
    assert answer.choices[0].message.content == "all is well"
    assert answer.usage.total_tokens > 0
    stream = openai.chat.completions.create(
        model="nano",
        messages=MESSAGES,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    values = list(stream)
    assert "".join(v.choices[0].delta.content or "" for v in values if v.choices) == "all is well"
    assert values[0].choices[0].delta.content is None
    assert values[-1].usage.completion_tokens == len(running.backend.script)
    assert [model.id for model in openai.models.list()] == ["nano"]


def test_errors_of_the_official_client(openai):
    import openai as library

    with pytest.raises(library.NotFoundError) as missing:
        openai.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(library.BadRequestError) as refused:
        openai.chat.completions.create(model="nano", messages=MESSAGES, temperature=9)
    assert refused.value.param == "temperature"


def test_requests_of_open_autoglm(openai, running):
    thought = "The play key is in the middle."
    action = 'do(action="Tap", element=[435,715])'
    running.backend.say(f"<think>{thought}</think><answer>{action}</answer>")
    check = openai.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": "Hi"}], max_tokens=5, temperature=0
    )
    assert check.choices
    pixel = (
        "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhf"
        "DwAChwGA60e6kgAAAABJRU5ErkJggg=="
    )
    screen = {"type": "image_url", "image_url": {"url": pixel}}
    first = [screen, {"type": "text", "text": 'tap play\n\n{"current_app": "Phone"}'}]
    later = [screen, {"type": "text", "text": '** Screen Info **\n\n{"current_app": "Phone"}'}]
    turns = [
        [{"role": "user", "content": first}],
        [
            {"role": "user", "content": first[1:]},
            {"role": "assistant", "content": f"<think>{thought}</think><answer>{action}</answer>"},
            {"role": "user", "content": later},
        ],
    ]
    for turn in turns:
        stream = openai.chat.completions.create(
            model="nano",
            messages=[{"role": "system", "content": "You are a phone."}, *turn],
            max_tokens=3000,
            temperature=0.0,
            top_p=0.85,
            frequency_penalty=0.2,
            stream=True,
            extra_body={},
        )
        pieces = [value.choices[0].delta.content for value in stream if value.choices]
        content = "".join(piece for piece in pieces if piece is not None)
        assert content.partition("do(action=")[0] == thought
        assert content.endswith(action)


def test_langchain_as_the_article_calls_it(running):
    chat_models = pytest.importorskip("langchain_openai")
    running.backend.say("<think>why</think><answer>well</answer>")
    model = chat_models.ChatOpenAI(
        model="nano",
        temperature=0.5,
        base_url=running.url,
        api_key="EMPTY",
        streaming=True,
        extra_body={"enable_thinking": True, "return_reasoning": True},
    )
    assert model.invoke("hello").content == "well"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(running, stream):
    running.backend.script, running.backend.delay = [40] * 1500, 0.005
    body = {"messages": MESSAGES, "temperature": 0, "stream": stream}
    with httpx.Client(timeout=30) as client:
        request = client.build_request("POST", f"{running.url}/chat/completions", json=body)
        if stream:
            response = client.send(request, stream=True)
            next(response.iter_lines())
            response.close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{running.url}/chat/completions", json=body, timeout=0.5)
    until(lambda: running.engine.running == 0)
    steps = running.backend.steps
    time.sleep(0.2)
    assert running.backend.steps == steps < 1400


def test_a_waiting_client_that_leaves_ends_no_other_request(running):
    running.backend.script = [40] * 30
    running.backend.gate.clear()
    url, answers = f"{running.url}/chat/completions", []
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 20}

    def ask():
        answers.append(httpx.post(url, json={**body, "n": 4}, timeout=60).json())

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: running.engine.running == 4)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=body, timeout=0.3)
    running.backend.gate.set()
    thread.join(60)
    reasons = [choice["finish_reason"] for choice in answers[0]["choices"]]
    assert reasons == ["length"] * 4
    until(lambda: running.engine.running + running.engine.waiting == 0)


def exchange(running, *parts):
    """Send raw bytes with pauses; return the bytes until the server closes."""
    with socket.create_connection(("127.0.0.1", running.server.port), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(0.05)
        received = b""
        while block := connection.recv(65536):
            received += block
        return received


def test_slow_headers_and_bodies_are_cut_off(running):
    assert exchange(running, b"POST /v1/completions HTTP/1.1\r\nHost:") == b""
    assert exchange(running) == b""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    received = exchange(running, head + b"Content-Length: 100\r\n\r\n", b"{", b'"')
    assert b" 408 " in received.splitlines()[0]


def test_long_headers_are_refused(running):
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000
    assert b" 400 " in exchange(running, head).splitlines()[0]


def test_the_end_finishes_open_requests(processor):
    running = Running(processor, drain_s=30)
    running.backend.script = [40] * 50
    running.backend.gate.clear()
    answers = []

    def ask():
        body = {"messages": MESSAGES, "temperature": 0}
        answers.append(httpx.post(f"{running.url}/chat/completions", json=body, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: running.engine.running == 1)
    running.server.stop()
    until(lambda: httpx.get(f"{running.url[:-3]}/health").status_code == 503)
    late = httpx.post(f"{running.url}/completions", json={"prompt": "x"})
    assert (late.status_code, late.json()["error"]["code"]) == (503, "closed")
    running.backend.gate.set()
    thread.join(60)
    assert answers[0].json()["choices"][0]["finish_reason"] == "stop"
    running.thread.join(30)
    assert not running.thread.is_alive()


def test_the_end_ends_open_streams_with_an_event(processor):
    running = Running(processor, drain_s=0.2)
    running.backend.script, running.backend.delay = [40] * 1900, 0.005
    body = {"messages": MESSAGES, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{running.url}/chat/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        running.server.stop()
        text = "\n".join(lines)
    assert json.loads(events(text.strip())[-1])["error"]["code"] == "closed"
    running.thread.join(30)
    assert not running.thread.is_alive()


def test_the_official_client_raises_when_a_stream_ends_early(processor):
    library = pytest.importorskip("openai")
    running = Running(processor, drain_s=0.2)
    running.backend.script, running.backend.delay = [40] * 1900, 0.005
    client = library.OpenAI(base_url=running.url, api_key="EMPTY", max_retries=0)
    stream = client.chat.completions.create(
        model="nano", messages=MESSAGES, temperature=0, stream=True
    )
    next(stream)
    running.server.stop()
    with pytest.raises(library.APIError, match="shutting down"):
        list(stream)
    running.thread.join(30)


def test_other_names_of_the_host_are_refused(running):
    def get(host):
        return httpx.get(f"{running.url}/models", headers={"host": host})

    refused = get("evil.example:80")
    assert refused.status_code == 421
    assert "evil.example" in refused.json()["error"]["message"]
    assert [get(host).status_code for host in ("localhost", "127.0.0.1:1", "[::1]:8000")] == [
        200
    ] * 3


def test_an_allowed_name_and_a_limit_of_connections(processor):
    service = Running(processor, allowed_hosts=["phone.example"], connections=2)
    try:
        headers = {"host": "Phone.Example"}
        assert httpx.get(f"{service.url}/models", headers=headers).status_code == 200
        address = ("127.0.0.1", service.server.port)
        until(lambda: not service.server._server.server_state.connections)
        opened = [socket.create_connection(address) for _ in range(2)]
        until(lambda: len(service.server._server.server_state.connections) == 2)
        with socket.create_connection(address) as third:
            third.settimeout(10)
            assert third.recv(1) == b""
        for connection in opened:
            connection.close()
        until(lambda: not service.server._server.server_state.connections)
        assert httpx.get(f"{service.url}/models", headers=headers).status_code == 200
    finally:
        service.stop()
