"""Stages take the same steps after an interruption; batches fit their blocks."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from experiments.nano import objectives, stages
from experiments.nano.batches import (
    ANSWER_LENGTH,
    DIALOGUE_BLOCK,
    THOUGHT_WEIGHT,
    ScreenBatches,
    _sources,
    by_speaker,
    speech_batch,
    text_batch,
)
from experiments.nano.phone_screens import actions, dialogues, digits, generator, speech
from glm_edge.errors import DataError
from glm_edge.preprocess.tokens import ASSISTANT

STATE = {"params": {"part": {"w": jnp.ones((3, 2))}}, "heads": {"h": jnp.zeros(2)}}


class KilledError(Exception):
    pass


def run(directory, steps=12, seed=0, kill_at=None, orders=None, save_minutes=0.0):
    def draw(name):
        def batch(rng):
            values = rng.normal(size=3).astype(np.float32)
            if orders is not None:
                orders.append((name, float(values[0])))
            if kill_at is not None and orders is not None and len(orders) > kill_at:
                raise KilledError
            return values

        return batch

    def loss(state, batch, rng):
        del rng
        error = jnp.sum((batch @ state["params"]["part"]["w"] - state["heads"]["h"] - 1.0) ** 2)
        return error, {"loss": error}

    schedule = stages.Schedule(
        steps, 1e-2, ((0.5, ("a", "b")), (1.0, ("b",))), seed, evaluate_every=4,
        save_minutes=save_minutes,
    )  # fmt: skip
    return stages.run_stage(
        "stage",
        directory,
        schedule,
        STATE,
        stages.make_optimizer(0.1, lambda name: 1.0),
        {"a": (draw("a"), loss), "b": (draw("b"), loss)},
        lambda state: {"norm": float(jnp.abs(state["heads"]["h"]).sum())},
    )


def test_an_interrupted_stage_ends_like_another(tmp_path):
    expected_order, order = [], []
    expected = run(tmp_path / "all", orders=expected_order)
    with pytest.raises(KilledError):
        run(tmp_path / "two", kill_at=9, orders=order)
    progress = json.loads((tmp_path / "two/stage.json").read_text())
    assert 1 <= progress["step"] < 12
    actual = run(tmp_path / "two", orders=order)
    np.testing.assert_array_equal(actual["params"]["part"]["w"], expected["params"]["part"]["w"])
    assert order[-(12 - progress["step"]) :] == expected_order[progress["step"] :]
    curves = [
        [re.sub(r",[^,]*", "", line, count=1) for line in file.read_text().split()]
        for file in (tmp_path / "all/stage.csv", tmp_path / "two/stage.csv")
    ]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 10


def test_a_finished_stage_is_read_back(tmp_path):
    expected, orders = run(tmp_path), []
    actual = run(tmp_path, orders=orders)
    assert orders == []
    np.testing.assert_array_equal(actual["heads"]["h"], expected["heads"]["h"])


@pytest.mark.parametrize(("changes", "message"), [({"steps": 13}, "steps 12, not 13"),
                                                  ({"seed": 1}, "seed 0, not 1")])  # fmt: skip
def test_a_stage_with_another_budget_is_refused(tmp_path, changes, message):
    run(tmp_path)
    with pytest.raises(DataError, match=message):
        run(tmp_path, **changes)


def test_seeds_draw_other_batches(tmp_path):
    orders = [[], []]
    for seed, order in enumerate(orders):
        run(tmp_path / str(seed), seed=seed, orders=order)
    assert [name for name, _ in orders[0]] == [name for name, _ in orders[1]]
    assert not {value for _, value in orders[0]} & {value for _, value in orders[1]}
    assert [name for name, _ in orders[0]] == [*"abababa", *"bbbbb"]


@pytest.fixture(scope="module")
def batches():
    images = digits.DigitImages((np.full((1, 28, 28), 200, np.uint8),) * 10)
    clips = [speech.Utterance(np.zeros(4000, np.float32), d, "ann") for d in range(10)]
    tokenizer = ge.load_tokenizer(ge.shipped("nano"))
    drawer = generator.ScreenGenerator(images)
    return ScreenBatches(ge.preset("nano"), tokenizer, [drawer], clips, noise=0.5)


def answers(batches, drawn):
    for row in range(len(drawn["tokens"])):
        for slots, labels, weights in zip(
            drawn["slots"][row], drawn["labels"][row], drawn["weights"][row], strict=True
        ):
            learned = weights > 0
            tokens = drawn["tokens"][row, slots[learned] + 1]
            np.testing.assert_array_equal(tokens, labels[learned])
            answer = labels[weights == 1]
            assert answer[-1] == batches.end or len(answer) == ANSWER_LENGTH
            yield batches.tokenizer.decode(answer[:-1].tolist(), skip_special_tokens=False)


def test_blocks_hold_questions_and_dialogues(batches):
    shape = (2, 2, 0, 3)
    drawn = batches.draw(np.random.default_rng(0), *shape)
    layout = batches.layout(*shape[1:])
    assert layout.block_lengths[-3:] == (DIALOGUE_BLOCK,) * 3
    assert drawn["tokens"].shape == (2, layout.length)
    for text in answers(batches, drawn):
        assert actions.parse_action(text)
    before = np.take_along_axis(drawn["tokens"], drawn["acting"], 1)
    line_break = batches.tokenizer.encode("\n").ids[0]
    assert (before[:, :2] == batches.assistant).all()
    assert set(before[:, 2:].ravel()) == {batches.assistant, line_break}
    at = np.take_along_axis(drawn["slots"], drawn["action"][..., None], 2)[..., 0]
    np.testing.assert_array_equal(at, drawn["acting"])


def test_thoughts_of_all_steps_are_learned(batches):
    rng = np.random.default_rng(1)
    for _ in range(20):
        screen = batches._screen(rng, "keypad")
        turn, parts = batches._dialogue(rng, screen)
        learned = [
            batches.tokenizer.decode(ids) for ids, weight in parts if 0 < weight < 1 and len(ids)
        ]
        thoughts = [a.thought for a in (*turn.history, turn.answer) if a.thought]
        assert [line.removeprefix(" ") for line in learned] == [f"{t}\n" for t in thoughts]
        task = parts[0][0]
        sources = [i for i in _sources(parts) if i >= 0]
        assert [task[i] for i in sources] == [i for ids, w in parts if 0 < w < 1 for i in ids[:-1]]
        assert sources == sorted(set(sources))
        text = dialogues.prompt_text(turn) + ASSISTANT + turn.answer.text(turn.task)
        written = [token for ids, _ in parts for token in ids]
        assert written == [*batches.tokenizer.encode(text).ids, batches.end]


def test_a_tap_after_a_wrong_thought_misses(batches):
    rng, first_x = np.random.default_rng(3), batches.tokenizer.token_to_id("[5,")
    drawn = batches.draw(rng, 8, 0, 0, 3)
    vocabulary = ge.preset("nano").decoder.vocab_size
    right = np.eye(vocabulary, dtype=np.float32)[drawn["labels"]]
    size = ge.preset("nano").vision.image_size
    inside, asked = objectives.taps_in_box(right, drawn, first_x, size)
    np.testing.assert_array_equal(inside, asked)
    thought = drawn["weights"] == np.float32(THOUGHT_WEIGHT)
    present = thought & (
        drawn["slots"] - np.arange(thought.shape[-1])
        == (drawn["acting"] - drawn["action"])[..., None]
    )
    for wrong, hits in ((thought & ~present, inside), (present, inside & ~present.any(-1))):
        logits = np.where(wrong[..., None], np.roll(right, 1, axis=-1), right)
        now, _ = objectives.taps_in_box(logits, drawn, first_x, size)
        np.testing.assert_array_equal(now, hits)


def test_batches_depend_on_the_generator_only(batches):
    first, again = (batches.draw(np.random.default_rng(4), 1, 2, 1, 1) for _ in range(2))
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])


def test_noise_inserts_words_between_words(batches):
    rng = np.random.default_rng(0)
    prompt = batches.tokenizer.encode("tap the magnifying glass").ids
    target = generator.Element("icon", "search", (0, 0, 1, 1))
    question = type("Question", (), {"target": target})
    longer = {len(batches._noisy(rng, prompt, question)) - len(prompt) for _ in range(100)}
    assert longer == {0, 1, 2}
    question.target = None
    assert all(batches._noisy(rng, prompt, question) == prompt for _ in range(20))


def test_speakers_of_a_kind_are_equally_frequent():
    clips = [speech.Utterance(np.full(900, 0.1, np.float32), 1, "ann")] * 30
    clips += [speech.Utterance(np.full(900, 0.1, np.float32), 2, "bob")]
    groups = [by_speaker(clips)]
    assert [len(group) for group in groups[0]] == [30, 1]
    samples, spoken = speech_batch(np.random.default_rng(0), groups, [1.0], 200, 8000)
    assert samples.shape == (200, 8000)
    assert 70 < (spoken == 1).sum() < 130


def test_text_windows_cover_the_end():
    windows = text_batch(np.random.default_rng(0), np.arange(20), 400, 8)
    assert windows.shape == (400, 9)
    assert windows.min() == 0
    assert windows.max() == 19
    assert (np.diff(windows, axis=1) == 1).all()
