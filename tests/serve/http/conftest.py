"""One engine without a model and one with the shipped model, for all tests of a process."""

import pytest

import glm_edge as ge
from glm_edge.preprocess.processor import Processor
from glm_edge.serve import Engine, JaxBackend
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
def nano_engine():
    engine = Engine(JaxBackend(*ge.load(NANO), num_slots=4, capacity=512, lengths=(16, 64)))
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
