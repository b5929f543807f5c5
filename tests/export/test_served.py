"""The engine on an exported file, in LiteRT: tokens against those of the model."""

import jax
import numpy as np
import pytest

from glm_edge.generate import Sampling, generate
from glm_edge.preprocess import Inputs
from glm_edge.serve import Engine, Priority, Request
from glm_edge.serve.runner_backend import RunnerBackend

DRAWN = Sampling(temperature=1.2, top_k=20)
COUNT = 6
STOP = 0


@pytest.fixture
def engine(dense_export):
    engine = Engine(RunnerBackend.from_file(dense_export.path))
    engine.start()
    yield engine
    engine.close()


def text(length, seed=0):
    return np.random.default_rng(seed).integers(11, 30, length)


def alone(model, params, inputs, sampling=DRAWN, seed=0):
    options = {"stop_tokens": (), "rng": jax.random.key(seed)}
    return generate(model, params, inputs, COUNT, sampling, **options).tokens[0].tolist()


def answer(engine, inputs, **options):
    options = {"max_new_tokens": COUNT, "sampling": DRAWN, "seed": 0, **options}
    tokens, end = engine.submit(Request(inputs=inputs, **options)).result()
    assert end.error is None
    return tokens, end.usage


def test_a_file_answers_as_the_model_with_images_prefixes_and_drafts(engine, model, dense_params):
    vision = model.config.vision_tower
    image = np.random.default_rng(1).random((*vision.image_size, vision.channels), np.float32)
    placeholders = [model.config.image_token_id] * vision.num_tokens
    tokens = np.concatenate([text(4), placeholders, text(34 - vision.num_tokens, 1)])
    pictured = Inputs([tokens], images=[image])
    expected = alone(model, dense_params, pictured)
    assert answer(engine, pictured)[0] == expected
    again, usage = answer(engine, pictured, draft=expected)
    assert again == expected
    assert usage.cached_tokens == 32
    assert usage.accepted_draft_tokens == COUNT - 2


def test_an_urgent_request_interrupts_another_on_the_only_slot(engine, model, dense_params):
    slow, urgent = Inputs([text(8)]), Inputs([text(5, 2)])
    handle = engine.submit(
        Request(
            inputs=slow, max_new_tokens=40, sampling=DRAWN, seed=0, priority=Priority.BACKGROUND
        )
    )
    next(iter(handle))
    tokens, _ = answer(engine, urgent, priority=Priority.INTERACTIVE)
    assert tokens == alone(model, dense_params, urgent)
    others, end = handle.result()
    assert end.usage.preemptions == 1
    assert others[: COUNT - 1] == alone(model, dense_params, slow)[1:]


def test_a_prompt_that_exceeds_the_file_is_refused(engine):
    with pytest.raises(ValueError, match="context of 64"):
        engine.submit(Request(inputs=Inputs([text(64)])))


class Triples:
    """A constraint: a free token, then two that it forces; it ends after three triples."""

    def __init__(self, jumps, tokens=()):
        """Start; without `jumps`, forced tokens are drawn one by one."""
        self.jumps, self.tokens = jumps, list(tokens)

    def following(self):
        count = len(self.tokens)
        if count == 9:
            return [STOP]
        last = self.tokens[count - count % 3] if count % 3 else 0
        return [200 + (last + count) % 90] if count % 3 else range(20, 120)

    def allowed(self):
        flags = np.zeros(320, np.uint8)
        flags[list(self.following())] = 1
        return np.packbits(flags, bitorder="little").view(np.uint32)

    def forced(self):
        if not self.jumps or not len(self.tokens) % 3:
            return []
        twin = self.copy()
        while len(twin.tokens) % 3:
            twin.accept(twin.following()[0])
        return twin.tokens[len(self.tokens) :]

    def accept(self, token):
        self.tokens.append(token)

    def copy(self):
        return Triples(self.jumps, self.tokens)


def test_forced_tokens_ride_along_in_short_prefills(engine):
    answers, steps, runner = [], [], engine.backend._runner
    run, prompt = runner.run, text(8, 3)
    for jumps in (False, True):
        ran = []
        runner.run = lambda name, ran=ran, **inputs: ran.append(name) or run(name, **inputs)
        options = {"matcher": Triples(jumps), "stop_tokens": (STOP,), "max_new_tokens": 20}
        answers.append(answer(engine, Inputs([prompt]), sampling=Sampling(), **options)[0])
        steps.append([name for name in ran if name in ("decode", "prefill_4")])
    assert answers[0] == answers[1]
    assert len(answers[0]) == 9
    # Two calls for the prompt's eight tokens; neither runs anything before the stop token.
    assert steps[0] == ["prefill_4"] * 2 + ["decode"] * 8
    assert steps[1] == ["prefill_4"] * 4
