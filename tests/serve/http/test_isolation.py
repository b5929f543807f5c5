"""Conversations with a marker each, on the shipped model: no answer shows another's marker.

The marker is a word to type, or the place of an element on a screen that has it nowhere else.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import glm_edge as ge
from experiments.nano.phone_screens import digits, generator, instructions
from glm_edge.preprocess.tokens import decode
from glm_edge.serve import Engine, JaxBackend, Priority, Request
from tests.serve.http.fakes import NANO

PRIORITIES = (Priority.DEFAULT, Priority.BACKGROUND, Priority.INTERACTIVE)


@pytest.fixture(scope="module")
def engine():
    # A prefix cache of few blocks, so that blocks are removed while others are read.
    backend = JaxBackend(*ge.load(NANO), num_slots=3, capacity=160, lengths=(16, 64))
    engine = Engine(backend, cache_bytes=9 * backend.block_bytes())
    engine.start()
    yield engine
    engine.close()


def conversations():
    """Pairs of a screen's image and an instruction, two of each instruction to type."""
    drawer = generator.ScreenGenerator(digits.sklearn_digits("eval"))
    rng = np.random.default_rng(0)
    drawn = []
    for index in range(6):
        screen = drawer.draw(rng, "keypad" if index % 2 else "mixed")
        asked = instructions.questions(rng, screen, 4, {"tap": 1.0})
        texts = [question.instruction_text for question in asked]
        words = instructions.TYPED_WORDS[2 * index : 2 * index + 2]
        drawn += [(screen.image, text) for text in (*texts, *(f"type {word}" for word in words))]
    return drawn


def test_every_answer_has_its_own_marker(engine, processor):
    def submit(image, text, **options):
        parts = [{"type": "image"}, {"type": "text", "text": text}]
        inputs = processor([{"role": "user", "content": parts}], images=[image])
        stops = processor.stop_token_ids
        return engine.submit(
            Request(inputs=inputs, max_new_tokens=10, stop_tokens=stops, **options)
        )

    def answer(handle):
        return decode(processor.tokenizer, handle.result()[0], skip_special_tokens=False)

    asked = conversations()
    alone = []
    for conversation in asked:
        engine.prefix_cache.clear()
        alone.append(answer(submit(*conversation)))
    assert len(set(alone)) > 30

    def ask(number):
        index = number % len(asked)
        priority = PRIORITIES[number % 7 % 3]
        handle = submit(*asked[index], priority=priority, prompt_lookup=number % 3 == 0)
        if number % 5 == 4:
            next(iter(handle))
            handle.cancel()
            return alone[index]
        return answer(handle)

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, range(2 * len(asked))))
    assert answers == 2 * alone
    assert engine.counters.preemptions > 0
    assert engine.counters.cached_tokens > 0
    assert engine.prefix_cache.evictions > 0
