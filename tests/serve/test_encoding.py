"""Images are encoded beside the answers that run, and wait for nobody but their own request."""

import time

import numpy as np
import pytest

from glm_edge.errors import DataError
from glm_edge.preprocess import Inputs
from glm_edge.serve import Engine, Finished, Request
from tests.serve.fake_backend import FakeBackend
from tests.tiny_models import IMAGE


class Broken(FakeBackend):
    """A backend that cannot encode dark images."""

    def encode(self, media):
        if media.array.max() < 0.1:
            raise DataError("the image is dark")
        return super().encode(media)


@pytest.fixture
def start():
    engines = []

    def begin(backend):
        engines.append(Engine(backend))
        engines[-1].start()
        return engines[-1]

    yield begin
    for engine in engines:
        engine.backend.gate.set()
        engine.close()


def text(count=5, **options):
    tokens = np.random.default_rng(count).integers(11, 48, count)
    return Request(inputs=Inputs([tokens]), **{"max_new_tokens": 20, **options})


def picture(backend, value=0.5):
    vision = backend.config.vision_tower
    image = np.full((*vision.image_size, 3), value, np.float32)
    tokens = np.concatenate([[11, 12], [IMAGE] * vision.num_tokens, [13]])
    return Request(inputs=Inputs([tokens], images=[image]), max_new_tokens=5)


def until(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen in 5 s")


def test_answers_run_while_an_image_is_encoded(start):
    expected = start(FakeBackend()).submit(picture(FakeBackend())).result()[0]
    backend = FakeBackend(num_slots=1)
    backend.gate.clear()
    engine = start(backend)
    pictured = engine.submit(picture(backend))
    later = engine.submit(text())
    tokens, end = later.result()
    assert len(tokens) == 20
    assert end.reason == "length"
    assert engine.waiting == 1
    engine.ping().result(10)
    backend.gate.set()
    assert pictured.result()[0] == expected


@pytest.mark.parametrize("apart", [True, False])
def test_both_ways_to_encode_give_the_same_answers(start, apart):
    backend = FakeBackend(encodes_apart=apart)
    engine = start(backend)
    handles = [engine.submit(picture(backend, value)) for value in (0.2, 0.4, 0.2, 0.6, 0.8, 0.4)]
    answers = [handle.result()[0] for handle in handles]
    assert answers[0] == answers[2]
    assert len({tuple(answer) for answer in answers}) == 4
    assert [call[0] for call in backend.calls].count("encode") == 4


def test_an_image_that_cannot_be_encoded_ends_its_own_request(start):
    for apart in (True, False):
        backend = Broken(encodes_apart=apart)
        engine = start(backend)
        failed = engine.submit(picture(backend, 0.0))
        other = engine.submit(picture(backend))
        tokens, end = failed.result()
        assert (tokens, end.reason, end.error) == ([], "error", "the image is dark")
        assert other.result()[1].reason == "length"
        engine.ping().result(10)


def test_a_request_that_leaves_while_its_image_is_encoded(start):
    backend = FakeBackend()
    backend.gate.clear()
    engine = start(backend)
    gone, other = engine.submit(picture(backend)), engine.submit(picture(backend, 0.9))
    until(lambda: engine._waiting._blocked == 2)
    gone.cancel()
    backend.gate.set()
    assert gone.result()[1].reason == "cancelled"
    assert other.result()[1].reason == "length"


def test_an_engine_that_closes_while_it_encodes(start):
    backend = FakeBackend()
    backend.gate.clear()
    engine = start(backend)
    handle = engine.submit(picture(backend))
    until(lambda: engine._waiting._blocked == 1)
    engine.close(0.1)
    assert [type(event) for event in handle] == [Finished]


def test_few_images_are_encoded_ahead(start):
    backend = FakeBackend(num_slots=2)
    backend.gate.clear()
    engine = start(backend)
    handles = [engine.submit(picture(backend, value / 10)) for value in range(9)]
    until(lambda: engine._waiting._blocked == 9)
    assert len(engine._features._pending) == 2
    backend.gate.set()
    assert {handle.result()[1].reason for handle in handles} == {"length"}
