"""Questions name what is on the screen, are not ambiguous, and their answers are right."""

import collections
import re

import numpy as np
import pytest

from experiments.nano.phone_screens import actions, digits, generator, instructions
from glm_edge.errors import DataError


@pytest.fixture(scope="module")
def screens():
    images = digits.DigitImages((np.full((1, 28, 28), 200, np.uint8),) * 10)
    drawer, rng = generator.ScreenGenerator(images), generator.random_stream("calibration", 1)
    return {kind: [drawer.draw(rng, kind) for _ in range(100)] for kind in generator.KINDS}


def ask(screen, count, mix=instructions.TEXT_MIX, seed=0):
    return instructions.questions(np.random.default_rng(seed), screen, count, mix)


def test_answers_hit_their_targets(screens):
    for screen in screens["mixed"]:
        for question in ask(screen, 8, {"tap": 1.0}):
            x, y = actions.to_pixels(question.answer_action.element, 96, 192)
            assert question.target.contains(x + 0.5, y + 0.5)
            assert question.spoken is None


def test_an_instruction_fits_one_element_only(screens):
    rng = np.random.default_rng(0)
    wordings = collections.defaultdict(set)
    for kind, name in generator.CLASSES:
        element = generator.Element(kind, name, (0, 0, 1, 1))
        for part in instructions.WORDINGS[:2]:
            for _ in range(200):
                wordings[instructions.describe(rng, element, part)].add((kind, name))
    assert len(wordings) > 5000
    for classes in wordings.values():
        # A glyph is used once a screen, so that the same words may mean its icon or its row.
        assert len({name for _, name in classes}) == 1
        assert {kind for kind, _ in classes} <= {"icon", "row"} or len(classes) == 1
    other = {
        instructions.untargeted(rng, kind, part).instruction_text
        for kind in ("type", "swipe", "back", "finish")
        for part in instructions.WORDINGS[:2]
        for _ in range(400)
    }
    assert len(other) > 1000
    assert not other & set(wordings)


def test_targets_repeat_only_after_all_have_come(screens):
    screen = screens["mixed"][0]
    count = len(screen.elements)
    names = [(q.target.type, q.target.name) for q in ask(screen, 2 * count, {"tap": 1.0})]
    assert len(set(names[:count])) == len(set(names[count:])) == count


def test_spoken_questions_ask_for_a_key_among_many(screens):
    for screen in screens["keypad"]:
        for question in ask(screen, 4, instructions.SPEECH_MIX):
            assert question.instruction_text == ""
            assert question.target.type == "key"
            assert question.target.name == str(question.spoken)
            keys = [e for e in screen.elements if e.type == "key"]
            assert len(keys) >= generator.MIN_KEYS_FOR_SPEECH


def test_speech_needs_enough_keys(screens):
    few = next(
        s
        for s in screens["mixed"]
        if sum(e.type == "key" for e in s.elements) < generator.MIN_KEYS_FOR_SPEECH
    )
    with pytest.raises(DataError, match="speech needs 7"):
        ask(few, 3, instructions.SPEECH_MIX)
    assert all(q.spoken is None for q in ask(few, 20, {"speech": 0.9, "tap": 0.1}))


def test_the_mix_is_kept(screens):
    kinds = collections.Counter(
        q.answer_action.kind
        for i, screen in enumerate(screens["mixed"])
        for q in ask(screen, 20, seed=i)
    )
    assert kinds["Tap"] / kinds.total() == pytest.approx(0.8, abs=0.03)
    assert set(kinds) == {"Tap", "Type", "Swipe", "Back", "finish"}


def test_the_typed_word_is_in_the_instruction(screens):
    for question in ask(screens["mixed"][0], 50, {"type": 1.0}):
        words = re.findall(r"[a-z]+", question.instruction_text.lower())
        assert question.answer_action.text in words


def test_scrolling_down_drags_up(screens):
    questions = ask(screens["mixed"][0], 200, {"swipe": 1.0})
    down = [q.answer_action for q in questions if "downwards" in q.instruction_text]
    aside = [q.answer_action for q in questions if "next" in q.instruction_text.split()]
    assert {(a.start, a.end) for a in down} == {((505, 705), (505, 295))}
    assert {(a.start, a.end) for a in aside} >= {((705, 505), (295, 505))}


def test_same_seed_same_questions(screens):
    screen = screens["keypad"][0]
    assert ask(screen, 10, seed=4) == ask(screen, 10, seed=4) != ask(screen, 10, seed=5)


def test_unknown_kinds_are_refused(screens):
    with pytest.raises(DataError, match="unknown kind of question 'sing'"):
        ask(screens["mixed"][0], 1, {"sing": 1.0})
    with pytest.raises(DataError, match="no question"):
        ask(screens["mixed"][0], 1, {})
