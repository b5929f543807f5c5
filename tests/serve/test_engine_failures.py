"""Failures of one request's constraint, or of a client's health check, end nothing else."""

import numpy as np
import pytest

from glm_edge.errors import DataError
from glm_edge.preprocess import Inputs
from glm_edge.serve import Engine, Request
from tests.serve.fake_backend import FakeBackend


class Exhausted:
    """A constraint that exceeds a limit of its grammar after some tokens."""

    def __init__(self, fails, tokens=0):
        self.fails, self.tokens = fails, tokens

    def check(self, name):
        if name == self.fails and self.tokens >= 3:
            raise DataError("the grammar exceeds a limit")

    def allowed(self):
        self.check("allowed")
        return np.full(2, 0xFFFFFFFE, np.uint32)

    def forced(self):
        self.check("forced")
        return []

    def accept(self, token):
        self.check("accept")
        self.tokens += 1

    def copy(self):
        return Exhausted(self.fails, self.tokens)


@pytest.fixture
def engine():
    engine = Engine(FakeBackend())
    engine.start()
    yield engine
    engine.close()


def request(seed, **options):
    tokens = np.random.default_rng(seed).integers(11, 48, (1, 9))
    return Request(inputs=Inputs(tokens), max_new_tokens=20, **options)


@pytest.mark.parametrize("fails", ["allowed", "forced", "accept"])
def test_a_constraint_over_its_limit_ends_its_own_request(engine, fails):
    other = engine.submit(request(1))
    tokens, end = engine.submit(request(2, matcher=Exhausted(fails))).result()
    assert len(tokens) == 3
    assert (end.reason, end.error) == ("error", "the grammar exceeds a limit")
    assert other.result()[1].reason == "length"
    engine.ping().result(10)


def test_a_cancelled_health_check(engine):
    for _ in range(20):
        engine.ping().cancel()
    engine.ping().result(10)
    assert engine.submit(request(3)).result()[1].reason == "length"
