"""One engine without a model and one with the shipped model, for all tests of a process."""

import pytest

import glm_edge as ge
from glm_edge.preprocess.processor import Processor
from glm_edge.serve import Engine, JaxBackend
from glm_edge.serve.runner_backend import RunnerBackend
from tests.serve.http.fakes import NANO, ScriptedBackend

pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from starlette.testclient import TestClient

from glm_edge.serve.http import Service, create_app


@pytest.fixture(scope="session")
def processor():
    return Processor.from_checkpoint(NANO)


@pytest.fixture(scope="session")
def scripted_engine(processor):
    engine = Engine(ScriptedBackend(processor.tokenizer))
    engine.start()
    yield engine
    engine.close()


@pytest.fixture
def backend(scripted_engine):
    yield scripted_engine.backend
    scripted_engine.backend.gate.set()


@pytest.fixture(scope="session")
def client(scripted_engine, processor):
    return TestClient(create_app(Service(scripted_engine, processor, ["nano", "alias"])))


@pytest.fixture(scope="session")
def nano_file(tmp_path_factory):
    """The shipped model as a phone's file."""
    pytest.importorskip("tensorflow")
    pytest.importorskip("ai_edge_litert")
    path = tmp_path_factory.mktemp("nano") / "nano.tflite"
    sizes = {"prefill_lengths": (16, 64), "cache_slots": 512, "prefill_logits": True}
    return ge.export.tflite(*ge.load(NANO), path, **sizes).path


@pytest.fixture(scope="session", params=["jax", pytest.param("file", marks=pytest.mark.slow)])
def nano_engine(request):
    """The shipped model in JAX, and as a file in LiteRT."""
    if request.param == "jax":
        backend = JaxBackend(*ge.load(NANO), num_slots=4, capacity=512, lengths=(16, 64))
    else:
        backend = RunnerBackend.from_file(request.getfixturevalue("nano_file"))
    engine = Engine(backend)
    engine.start()
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def nano_client(nano_engine, processor):
    return TestClient(create_app(Service(nano_engine, processor, ["nano"])))


@pytest.fixture
def ask(client):
    """Posts a conversation of one message, greedy, and returns the response."""

    def post(text="hello", path="/v1/chat/completions", **fields):
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, **fields}
        return client.post(path, json=body)

    return post
