"""Requests of dialogues ask for the step after the earlier answers; the template makes the same."""

import re

import numpy as np
import pytest

import glm_edge as ge
from experiments.common import tap_items
from experiments.nano.phone_screens import actions, dialogues, digits, generator, instructions
from experiments.nano.phone_screens.speech import DIGIT_WORDS
from glm_edge.preprocess import Processor

NANO = ge.shipped("nano")


@pytest.fixture(scope="module")
def turns():
    images = digits.DigitImages((np.full((1, 28, 28), 200, np.uint8),) * 10)
    drawer, rng = generator.ScreenGenerator(images), np.random.default_rng(0)
    drawn = []
    for index in range(300):
        screen = drawer.draw(rng, "keypad" if index % 2 else "mixed")
        drawn.append((screen, dialogues.draw_turn(rng, screen, "exam" if index % 3 else "train")))
    return drawn


@pytest.fixture(scope="module")
def nano():
    return Processor.from_checkpoint(NANO)


def test_targets_are_on_the_present_screen(turns):
    tapped = [(s, t.question) for s, t in turns if t.question.target is not None]
    assert len(tapped) > 100
    for screen, question in tapped:
        assert question.target in screen.elements
        x, y = actions.to_pixels(question.answer_action.element, 96, 192)
        assert question.target.contains(x + 0.5, y + 0.5)


def test_every_step_and_the_end_occur(turns):
    histories = [len(turn.history) for _, turn in turns]
    assert set(histories) == {0, 1, 2, 3, 4}
    ends = [t for _, t in turns if t.question.answer_action == dialogues.FINISHED]
    assert 0.1 < len(ends) / len(turns) < 0.5
    assert {t.question.answer_action.kind for _, t in turns} == {
        "Tap", "Type", "Swipe", "Back", "finish",
    }  # fmt: skip


def test_dialled_digits_are_tapped_in_order():
    images = digits.DigitImages((np.full((1, 28, 28), 200, np.uint8),) * 10)
    drawer, rng = generator.ScreenGenerator(images), np.random.default_rng(1)
    for _ in range(40):
        screen = drawer.draw(rng, "keypad")
        keys = [e for e in screen.elements if e.type == "key"]
        turn = dialogues._dial(rng, keys, "train")
        words = turn.task.translate(dict.fromkeys(map(ord, ",:;"), " ")).split()
        number = [w if w.isdigit() else str(DIGIT_WORDS.index(w)) for w in words
                  if w.isdigit() or w in DIGIT_WORDS]  # fmt: skip
        boxes = {key.name: key for key in keys}
        step = len(turn.history)
        taps = [actions.tap_at(*boxes[digit].centre, 96, 192) for digit in number]
        assert [answer.action for answer in turn.history] == taps[:step]
        if step == len(number):
            assert turn.question.answer_action == dialogues.FINISHED
        else:
            assert turn.question.target.name == number[step]


def test_thoughts_are_the_words_of_the_steps_in_order(turns):
    thoughtful = [t for _, t in turns if any(answer.thought for answer in (*t.history, t.answer))]
    assert len(thoughtful) > 150
    for turn in thoughtful:
        ends = turn.answer.action.kind == "finish"
        assert (turn.thought == "") == ends
        thoughts = [answer.thought for answer in turn.history] + [turn.thought] * (not ends)
        assert all(thoughts)
        # Each occurs after the one before.
        assert re.search(".*".join(map(re.escape, thoughts)), turn.task)
    assert {t.history[-1].thought for _, t in turns if t.question.instruction_text} == {""}


def test_a_task_of_one_step_needs_no_thought(turns):
    ended = [
        t for _, t in turns if len(t.history) == 1 and t.question.answer_action.kind == "finish"
    ]
    assert ended
    assert all(t.history[0].thought == "" for t in ended)


def test_an_answer_is_its_thought_and_action_on_two_lines(turns):
    for _, turn in turns:
        *thought, action = turn.answer.text(turn.task).split("\n")
        assert [line.removeprefix(" ") for line in thought] == (
            [turn.thought] if turn.thought else []
        )
        assert actions.parse_action(turn.answer.text(turn.task)) == turn.question.answer_action
        assert actions.parse_action(action) == turn.question.answer_action


def test_tasks_of_the_exam_use_its_templates():
    assert not set(dialogues.DIAL["train"]) & set(dialogues.DIAL["exam"])
    assert not set(dialogues.JOINS["train"]) & set(dialogues.JOINS["exam"])


def request(turn, image):
    """Return the messages of Open-AutoGLM's client for a turn."""
    described = '\n\n{"current_app": "Phone"}'
    text = [turn.task + described] + ["** Screen Info **" + described] * len(turn.history)
    messages = [{"role": "system", "content": "The current date: 2026.\nYou are an agent."}]
    for content, answer in zip(text, turn.history, strict=False):
        action = actions.format_action(answer.action)
        answer = f"<think>{answer.thought}</think><answer>{action}</answer>"
        messages.append({"role": "user", "content": [{"type": "text", "text": content}]})
        messages.append({"role": "assistant", "content": answer})
    parts = [{"type": "image"}, {"type": "text", "text": text[-1]}]
    return [*messages, {"role": "user", "content": parts}]


def test_the_template_makes_the_trained_prompt_of_a_request(turns, nano):
    checked = set()
    for screen, turn in turns:
        if turn.question.instruction_text or len(turn.history) in checked:
            continue
        checked.add(len(turn.history))
        inputs = nano(request(turn, screen.image), images=[screen.image])
        item = tap_items.Item(screen.image, turn.question, turn=turn)
        expected = tap_items.prompt(item, ge.preset("nano"), nano.tokenizer)
        assert inputs.tokens.tolist() == [expected["tokens"].tolist()]
        assert (
            nano.tokenizer.encode(dialogues.prompt_text(turn)).ids
            == (expected["tokens"].tolist()[75:-1])
        )
    assert checked == {0, 1, 2, 3, 4}


def test_a_new_instruction_is_the_last_turn_of_the_user(turns, nano):
    screen, turn = next((s, t) for s, t in turns if t.question.instruction_text)
    messages = [
        {"role": "user", "content": turn.task},
        {"role": "assistant", "content": actions.format_action(turn.history[0].action)},
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": turn.question.instruction_text},
            ],
        },
    ]
    inputs = nano(messages, images=[screen.image])
    item = tap_items.Item(screen.image, turn.question, turn=turn)
    expected = tap_items.prompt(item, ge.preset("nano"), nano.tokenizer)["tokens"]
    assert inputs.tokens.tolist() == [expected.tolist()]


def test_dialogues_of_the_exam_repeat():
    first, again = (tap_items.draw_dialogues(6, 2) for _ in range(2))
    assert [i.turn for i in first] == [i.turn for i in again]
    assert all(isinstance(i.question, instructions.Question) for i in first)
