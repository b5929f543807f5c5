"""The engine's order of work and its rows, on a backend whose answers depend on every row."""

import itertools
import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_edge.errors import DataError
from glm_edge.generate.sampling import Sampling, sample
from glm_edge.preprocess import Inputs
from glm_edge.serve import (
    ClosedError,
    ContextLengthError,
    Engine,
    Finished,
    Priority,
    QueueFullError,
    Request,
)
from glm_edge.serve.backend import BLOCK, ready_prompt
from tests.serve.fake_backend import VOCABULARY, FakeBackend, scores_after
from tests.tiny_models import IMAGE, init_glm, tiny_config

STOP = 0
DRAWN = Sampling(temperature=1.3, top_k=20, top_p=0.95, min_p=0.01)
PENALIZED = Sampling(
    0.9, repetition_penalty=1.4, frequency_penalty=0.5, presence_penalty=0.3, logit_bias={7: 2.0}
)
SAMPLINGS = (Sampling(), DRAWN, PENALIZED)
_sample = jax.jit(sample)


def prompt_of(length, seed=0, shared=0):
    """Tokens of text that begin with `shared` tokens common to all prompts."""
    beginning = np.random.default_rng(99).integers(11, VOCABULARY, shared)
    return np.concatenate(
        [beginning, np.random.default_rng(seed).integers(11, VOCABULARY, length)]
    ).astype(np.int32)


def answer_alone(tokens, sampling, seed, count, matcher=None):
    """Tokens of a request that runs alone, without an engine."""
    text, key = list(tokens), jax.random.fold_in(jax.random.key(seed), 0)
    in_prompt = np.bincount(tokens, minlength=VOCABULARY)[None] > 0
    counts, answer = np.zeros((1, VOCABULARY), np.int32), []
    for index in range(count):
        scores = scores_after(text)[None]
        if matcher is not None:
            allowed = np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")
            scores = np.where(allowed[:VOCABULARY], scores, -np.inf)
        keys = jax.random.fold_in(key, index)[None]
        token = int(_sample(scores, sampling, keys, in_prompt, counts)[0])
        if token == STOP:
            break
        text.append(token)
        answer.append(token)
        counts[0, token] += 1
        if matcher is not None:
            matcher.accept(token)
    return answer


class Countdown:
    """A constraint: after a free token below 30 come that many tokens 40, 41, 42, again."""

    def __init__(self, pending=()):
        """Continue with pending tokens."""
        self.pending = list(pending)

    def allowed(self):
        bits = np.zeros(2, np.uint32)
        for token in self.pending[:1] or range(11, 30):
            bits[token // 32] |= np.uint32(1 << (token % 32))
        return bits

    def forced(self):
        return list(self.pending)

    def accept(self, token):
        if self.pending:
            assert token == self.pending.pop(0)
        else:
            assert 11 <= token < 30
            self.pending = [40, 41, 42][: token % 4]

    def copy(self):
        return Countdown(self.pending)


@pytest.fixture
def serve():
    """Starts engines, and closes them after the test."""
    engines = []

    def start(backend=None, **options):
        engines.append(Engine(backend or FakeBackend(), **options))
        engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def request_of(tokens, **options):
    options = {"max_new_tokens": 20, "stop_tokens": (STOP,), **options}
    return Request(inputs=Inputs([tokens]), **options)


requests = st.fixed_dictionaries(
    {
        "length": st.integers(1, 70),
        "shared": st.sampled_from([0, 5, 40, 70]),
        "seed": st.integers(0, 3),
        "sampling": st.sampled_from(SAMPLINGS),
        "count": st.integers(1, 20),
        "kind": st.sampled_from(["plain", "constraint", "lookup", "draft", "wrong draft"]),
        "priority": st.sampled_from(list(Priority)),
        "cancel_after": st.sampled_from([None, None, 0, 3]),
        "logprobs": st.booleans(),
    }
)


@settings(max_examples=25, deadline=None)
@given(st.lists(requests, min_size=1, max_size=9), st.sampled_from([0, 6 * 8 * BLOCK, 1 << 20]))
def test_every_request_gets_the_answer_that_it_would_get_alone(wanted, cache_bytes):
    engine = Engine(FakeBackend(), cache_bytes=cache_bytes)
    handles, expected = [], []
    for fields in wanted:
        tokens = prompt_of(fields["length"], fields["seed"], fields["shared"])
        matcher = Countdown() if fields["kind"] == "constraint" else None
        common = tokens, fields["sampling"], fields["seed"], fields["count"]
        expected.append(answer_alone(*common, matcher and matcher.copy()))
        draft = {"draft": expected[-1], "wrong draft": [13] * 6 + expected[-1][:4]}
        request = request_of(
            tokens,
            sampling=fields["sampling"],
            seed=fields["seed"],
            max_new_tokens=fields["count"],
            matcher=matcher,
            prompt_lookup=fields["kind"] == "lookup",
            draft=draft.get(fields["kind"]),
            priority=fields["priority"],
            logprobs=fields["logprobs"],
        )
        handles.append(submit_with_cancel(engine, request, fields["cancel_after"]))
    engine.start()
    results = [wait() for wait in handles]
    engine.close()
    for fields, alone, (tokens, end) in zip(wanted, expected, results, strict=True):
        assert end.error is None
        if fields["cancel_after"] is None:
            assert end.reason == ("length" if len(alone) == fields["count"] else "stop")
            assert tokens == alone
        else:
            assert tokens == alone[: len(tokens)]
        assert end.usage.completion_tokens == len(tokens)
    assert engine.running == engine.waiting == 0


def submit_with_cancel(engine, request, cancel_after):
    """Submits a request that is cancelled after some tokens; returns the wait for its result."""
    if cancel_after is None:
        return engine.submit(request).result
    tokens, ends, done = [], [], threading.Event()

    def deliver(event):
        if isinstance(event, Finished):
            ends.append(event)
            done.set()
            return
        tokens.append(event.token)
        if len(tokens) == cancel_after:
            handle.cancel()

    handle = engine.submit(request, deliver)
    if not cancel_after:
        handle.cancel()

    def wait():
        assert done.wait(60)
        return tokens, ends[0]

    return wait


def test_a_long_prompt_delays_running_answers_by_one_chunk_per_token(serve):
    backend = FakeBackend()
    engine = serve(backend)
    short = engine.submit(request_of(prompt_of(5), max_new_tokens=60, stop_tokens=()))
    events = iter(short)
    next(events)
    backend.calls.clear()
    long = engine.submit(request_of(prompt_of(120, 1), max_new_tokens=1, stop_tokens=()))
    long.result()
    calls = [call[0] for call in backend.calls]
    chunks = [index for index, call in enumerate(calls) if call == "extend"]
    assert len(chunks) == 8
    assert all("step" in calls[one:two] for one, two in itertools.pairwise(chunks))


def test_rows_of_a_common_beginning_are_reused_and_counted(serve):
    backend = FakeBackend()
    engine = serve(backend)
    engine.submit(request_of(prompt_of(3, 1, shared=70))).result()
    backend.calls.clear()
    tokens, end = engine.submit(request_of(prompt_of(9, 2, shared=70), seed=0)).result()
    assert end.usage.cached_tokens == 64
    assert sum(call[3] for call in backend.calls if call[0] == "extend") == 15
    assert tokens == answer_alone(prompt_of(9, 2, shared=70), Sampling(), 0, 20)


def test_a_conversation_reuses_the_rows_of_its_own_answers(serve):
    engine = serve()
    tokens, _ = engine.submit(request_of(prompt_of(50), max_new_tokens=30, stop_tokens=())).result()
    turn = np.concatenate([prompt_of(50), tokens, prompt_of(4, 3)])
    _, end = engine.submit(request_of(turn)).result()
    assert end.usage.cached_tokens == 64


def test_an_image_is_encoded_once_and_another_image_is_no_prefix(serve):
    backend = FakeBackend(capacity=200)
    engine = serve(backend)
    vision = backend.config.vision_tower
    images = [np.full((*vision.image_size, 3), value, np.float32) for value in (0.1, 0.9)]
    count = vision.num_tokens
    tokens = np.concatenate([prompt_of(40), [IMAGE] * count, prompt_of(9, 1)])

    def ask(image):
        inputs = Inputs([tokens], images=[image])
        answer, end = engine.submit(Request(inputs=inputs, max_new_tokens=3)).result()
        return answer, end.usage

    first, usage = ask(images[0])
    assert usage.image_tokens == count
    assert usage.cached_tokens == 0
    again, usage = ask(images[0])
    assert again == first
    assert usage.cached_tokens > 0
    other, usage = ask(images[1])
    assert other != first
    assert usage.cached_tokens == 32
    assert [call[0] for call in backend.calls].count("encode") == 2


def test_forced_tokens_and_accepted_drafts_save_steps(serve):
    backend = FakeBackend()
    engine = serve(backend)
    plain = prompt_of(8, 4)
    alone = answer_alone(plain, Sampling(), 0, 20)
    for options, field in (
        ({"draft": alone}, "accepted_draft_tokens"),
        ({"matcher": Countdown()}, "forced_tokens"),
    ):
        backend.calls.clear()
        tokens, end = engine.submit(request_of(plain, **options)).result()
        saved = getattr(end.usage, field)
        calls = [call for call in backend.calls if call[0] != "encode"]
        assert saved > 3
        assert len(calls) <= len(tokens) + 1 - saved // 2
    assert end.usage.rejected_draft_tokens == 0


class OneToken:
    """A constraint of one free token, and then the end."""

    def __init__(self, ended=False):
        """Start before or behind the token."""
        self.ended = ended

    def allowed(self):
        bits = np.zeros(2, np.uint32)
        for token in (STOP,) if self.ended else range(11, 30):
            bits[token // 32] |= np.uint32(1 << (token % 32))
        return bits

    def forced(self):
        return []

    def accept(self, token):
        self.ended = True

    def copy(self):
        return OneToken(self.ended)


def test_nothing_runs_where_only_a_stop_token_can_follow(serve):
    backend = FakeBackend()
    engine = serve(backend)
    for matcher, count in ((OneToken(), 1), (OneToken(True), 0)):
        backend.calls.clear()
        tokens, end = engine.submit(request_of(prompt_of(8, 4), matcher=matcher)).result()
        assert (len(tokens), end.reason, end.error) == (count, "stop", None)
        assert len(backend.calls) == count


def test_an_interactive_request_interrupts_a_background_one_which_goes_on_later(serve):
    backend = FakeBackend(num_slots=1)
    engine = serve(backend)
    slow = engine.submit(
        request_of(prompt_of(60), max_new_tokens=80, stop_tokens=(), priority=Priority.BACKGROUND)
    )
    events = iter(slow)
    next(events)
    urgent = engine.submit(request_of(prompt_of(3, 1), priority=Priority.INTERACTIVE))
    assert urgent.result()[0] == answer_alone(prompt_of(3, 1), Sampling(), 0, 20)
    *_, end = events
    assert end.usage.preemptions == 1
    assert end.usage.completion_tokens == 80


def test_a_full_queue_and_impossible_requests_are_refused():
    engine = Engine(FakeBackend(), queue_size=2)
    for _ in range(2):
        engine.submit(request_of(prompt_of(3)))
    with pytest.raises(QueueFullError, match="2 requests wait"):
        engine.submit(request_of(prompt_of(3)))
    with pytest.raises(ContextLengthError, match="the prompt has 160 tokens"):
        engine.submit(request_of(prompt_of(160)))
    with pytest.raises(DataError, match="placeholders of image"):
        engine.submit(request_of(np.int32([11, IMAGE])))
    engine.close()
    with pytest.raises(ClosedError, match="shutting down"):
        engine.submit(request_of(prompt_of(3)))


def test_closing_finishes_what_it_can_and_ends_the_others(serve):
    engine = serve(FakeBackend(num_slots=1))
    quick = engine.submit(request_of(prompt_of(3), max_new_tokens=2, stop_tokens=()))
    engine.close(timeout=30)
    assert quick.result()[1].reason == "length"
    idle = Engine(FakeBackend())
    waiting = idle.submit(request_of(prompt_of(3)))
    idle.close()
    assert waiting.result()[1].reason == "cancelled"


def test_a_failing_backend_ends_requests_with_its_message_and_the_health_check(serve):
    class Broken(FakeBackend):
        def step(self, *arguments):
            raise RuntimeError("out of memory")

    engine = serve(Broken())
    engine.ping().result(10)
    _, end = engine.submit(request_of(prompt_of(3))).result()
    assert end.reason == "error"
    assert "out of memory" in end.error
    engine.close()
    with pytest.raises(ClosedError, match="out of memory"):
        engine.ping()


def test_damaged_scores_end_the_request_alone(serve):
    class Damaged(FakeBackend):
        def step(self, tokens, *others):
            scores = super().step(tokens, *others)
            scores[tokens == 15] = np.nan
            return scores

    def force(token):
        return Sampling(logit_bias={token: 100.0})

    engine = serve(Damaged())
    bad = engine.submit(request_of(prompt_of(3), sampling=force(15)))
    good = engine.submit(request_of(prompt_of(3), sampling=force(16), max_new_tokens=5))
    assert "NaN" in bad.result()[1].error
    assert good.result()[0] == [16] * 5


def test_a_minimum_of_tokens_and_log_probabilities(serve):
    engine = serve()
    sampling = Sampling(logit_bias={STOP: 100.0})
    handle = engine.submit(
        request_of(prompt_of(6), sampling=sampling, min_new_tokens=3, logprobs=True)
    )
    *tokens, end = handle
    assert len(tokens) == 3
    assert end.reason == "stop"
    scores = jax.nn.log_softmax(scores_after(prompt_of(6)))
    assert tokens[0].logprob == pytest.approx(float(scores[tokens[0].token]), abs=1e-5)
    assert tokens[0].top[0] == (int(scores.argmax()), pytest.approx(float(scores.max()), abs=1e-5))


def test_positions_of_images_equal_the_models():
    backend = FakeBackend(capacity=200)
    decoder = {"mrope_section": (1, 1, 2), "max_position_embeddings": 200}
    model, _ = init_glm(tiny_config(decoder, {}, {}))
    image = np.zeros((*model.config.vision_tower.image_size, 3), np.float32)
    count = model.config.vision_tower.num_tokens
    tokens = np.concatenate([prompt_of(4), [IMAGE] * count, prompt_of(3), [IMAGE] * count, [12]])
    inputs = Inputs([tokens.astype(np.int32)], images=[image, image])
    prompt = ready_prompt(model.config, inputs, backend.capacity)
    positions, following = model.start_positions(inputs.tokens, None, [image, image])
    assert prompt.positions.tolist() == np.asarray(positions)[:, 0].tolist()
    assert prompt.following == int(following[0])
