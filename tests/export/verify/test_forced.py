"""Answers under a grammar: runs that it forces ride along, and change no token."""

import dataclasses

import numpy as np
import pytest
import tokenizers

import glm_edge as ge
from experiments.common import tap_items
from glm_edge import export
from glm_edge.errors import DataError
from glm_edge.export.tflite import file as tflite_file
from glm_edge.export.tflite.flatbuffer import FlatModel
from glm_edge.export.verify.schedule import split, split_with_logits
from glm_edge.generate import Constraints, Grammar
from tests.constrained import STOP, VOCABULARY, nano_constraints, nano_tokenizer, tokens_of

pytest.importorskip("llguidance")

LIMIT = 24
SCREENS, MANY_SCREENS = 6, 500
STEPS = ("decode", "prefill_4", "prefill_8")
# Taps without the message that `phone_actions` also allows, so that the end is forced, too.
TAPS = Grammar.regex(r'do\(action="Tap", element=\[[0-9]{1,3},[0-9]{1,3}\]\)')
# Two free digits, and runs of one to twelve tokens before, between and behind them.
RUNS = Grammar.regex(r"the phone rings \[[0-9], then the phone rings again and again [0-9]\]\.")


@pytest.fixture(scope="module")
def nano_file(tmp_path_factory):
    """The file of nano without its speech encoder."""
    model, params = ge.load(ge.shipped("nano"))
    config = dataclasses.replace(model.config, speech=None, audio_token_id=None)
    params = {name: tree for name, tree in params.items() if name != "speech"}
    path = tmp_path_factory.mktemp("nano") / "nano.tflite"
    return export.tflite(model.clone(config=config), params, path, (64,), 256)


@pytest.fixture
def phone(nano_file):
    """The file's runner, which records the steps that ran in `phone.steps`."""
    runner = export.LiteRTRunner(nano_file.path)
    run, runner.steps = runner.run, []

    def recorded(signature, **inputs):
        runner.steps += [signature] if signature in STEPS else []
        return run(signature, **inputs)

    runner.run = recorded
    return runner


def one_by_one(phone, prompt, matcher, limit=LIMIT):
    """Decodes every token of an answer, those that the grammar forces included."""
    matcher, answer = matcher.copy(), []
    logits, cache = phone.prefill(**prompt)
    while len(answer) < limit:
        allowed = tokens_of(matcher.allowed())
        token = int(allowed[np.argmax(logits[-1][allowed])])
        answer.append(token)
        if token == STOP:
            break
        matcher.accept(token)
        row = phone.run("embed", tokens=np.array([[token]], np.int32))["embeddings"][0]
        slot = len(prompt["tokens"]) + len(answer) - 1
        outputs = phone.run("decode", **phone.step_inputs(row, slot, 1), **cache)
        logits, cache = outputs.pop("logits")[0], outputs
    return answer


def compared(phone, items, grammar):
    """Counts the answers, those that are equal, and the steps of both ways."""
    equal, steps, matcher = 0, [0, 0], nano_constraints().start(grammar)
    for item in items:
        prompt = tap_items.prompt(item, phone.config, nano_tokenizer())
        phone.steps.clear()
        expected = one_by_one(phone, prompt, matcher)
        steps[0] += len(phone.steps)
        phone.steps.clear()
        answer = phone.generate(**prompt, max_new_tokens=LIMIT, matcher=matcher)
        steps[1] += len(phone.steps)
        equal += answer == expected
    return equal, steps


@pytest.mark.parametrize(
    ("grammar", "saved"), [(Grammar.phone_actions(), 1), (TAPS, 3)], ids=["actions", "taps"]
)
def test_forced_runs_change_no_answer_and_save_steps(phone, grammar, saved):
    items = tap_items.draw_items(SCREENS, 11)
    equal, (single, along) = compared(phone, items, grammar)
    assert equal == SCREENS
    assert along <= single - saved * SCREENS


@pytest.mark.slow
def test_forced_runs_change_no_answer_on_many_screens(phone):
    items = tap_items.draw_items(MANY_SCREENS, 12)
    equal, (single, along) = compared(phone, items, Grammar.phone_actions())
    # Rounding of a row depends on the rows beside it; it may decide between nearly equal scores.
    assert equal >= MANY_SCREENS - 1
    assert along <= single - MANY_SCREENS


def test_runs_of_any_length_are_fed_with_the_token_before_them(phone):
    prompt = {"tokens": np.array(nano_tokenizer().encode("hello phone").ids, np.int32)}
    matcher = nano_constraints().start(RUNS)
    expected = one_by_one(phone, prompt, matcher, 64)
    assert expected[-1] == STOP
    phone.steps.clear()
    assert phone.generate(**prompt, max_new_tokens=64, matcher=matcher) == expected
    assert len(phone.steps) <= 7 < len(expected) // 2
    # A limit cuts the answer wherever it falls, in a run as well.
    for limit in (1, 2, 5, len(expected) - 1):
        answer = phone.generate(**prompt, max_new_tokens=limit, matcher=matcher)
        assert answer == expected[:limit]
    # The matcher of the caller remains at the beginning of a text.
    assert matcher.forced()


def test_nothing_runs_behind_the_last_free_token(phone):
    tokens = np.array(nano_tokenizer().encode("hello phone").ids, np.int32)
    matcher = nano_constraints().start(Grammar.regex("the phone rings"))
    phone.steps.clear()
    answer = phone.generate(tokens, matcher=matcher)
    assert nano_tokenizer().decode(answer[:-1]) == "the phone rings"
    assert answer[-1] == STOP
    assert phone.steps == []


def test_a_file_without_short_signatures_gives_the_same_answer(nano_file, phone, tmp_path):
    described = export.read_metadata(nano_file.path)
    assert described.pop("forced_lengths") == [4, 8]
    graph = FlatModel(nano_file.path.read_bytes())
    graph.add_metadata(described)
    tflite_file.write(graph.model, tmp_path / "a.tflite", overwrite=False)
    older, used = export.LiteRTRunner(tmp_path / "a.tflite"), []
    run = older.run
    older.run = lambda name, **inputs: used.append(name) or run(name, **inputs)
    tokens = np.array(nano_tokenizer().encode("hello phone").ids, np.int32)
    matcher = nano_constraints().start(RUNS)
    answer = older.generate(tokens, max_new_tokens=64, matcher=matcher)
    assert answer == phone.generate(tokens, max_new_tokens=64, matcher=matcher)
    assert "decode" in used
    assert not [name for name in used if name.endswith(("_4", "_8"))]


@pytest.mark.parametrize("length", [4, 8])
def test_the_last_row_is_that_of_the_last_token(phone, length):
    """A run of any length through a signature, against the logits of every token."""
    tokens = np.array(nano_tokenizer().encode("the phone rings on the table").ids, np.int32)[:8]
    rows = phone.embed(tokens)
    for count in range(1, length + 1):
        cache = phone.empty_cache()
        expected = phone.extend(rows[:count], 0, cache, every_position=True)[0][-1]
        inputs = phone.step_inputs(rows[:count], 0, length)
        logits = phone.run(f"prefill_{length}", **inputs, **cache)["logits"]
        assert logits.shape == (1, 1, VOCABULARY)
        np.testing.assert_allclose(logits[0, 0], expected, atol=2e-3 * np.abs(expected).max())


def test_calls_take_the_least_time():
    assert split(0, 13, 64, [1, 4, 8]) == [(0, 8, 8), (8, 13, 8)]
    assert split(0, 100, 256, [1, 4, 8, 128]) == [(0, 100, 128)]
    assert split_with_logits(7, 10, 64, [1, 4, 8, 32], [1, 4, 8]) == [(7, 10, 4)]
    # A long prompt runs through prefill, and its last token by itself.
    assert split_with_logits(0, 100, 256, [1, 4, 8, 128], [1, 4, 8]) == [
        (0, 99, 128),
        (99, 100, 1),
    ]
    # No signature may write behind the last slot.
    assert split_with_logits(61, 64, 64, [1, 4, 8], [1, 4, 8]) == [
        (61, 62, 1),
        (62, 63, 1),
        (63, 64, 1),
    ]
    with pytest.raises(DataError, match="65 tokens do not fit the 64 slots"):
        split_with_logits(60, 65, 64, [1, 4], [1, 4])


def test_constraints_that_do_not_fit_are_refused(phone):
    tokens = np.array([30, 31], np.int32)
    other = Constraints(nano_tokenizer(), [STOP], VOCABULARY + 64)
    with pytest.raises(DataError, match=r"Constraints\(tokenizer, stop_tokens, 2304\)"):
        phone.generate(tokens, matcher=other.start(Grammar.regex("[ab]")))


@pytest.mark.parametrize("text", ["Z", "aZ", "[ab]Z"], ids=["first", "forced", "drawn"])
def test_a_grammar_that_the_tokenizer_cannot_write_is_refused(phone, text):
    """Wherever the first token without an entry comes."""
    letters = {letter: index for index, letter in enumerate("_abc")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    constraints = Constraints(tokenizer, [0], VOCABULARY)

    def answer():
        matcher = constraints.start(Grammar.regex(text))
        return phone.generate(np.array([30, 31], np.int32), matcher=matcher)

    with pytest.raises(DataError, match="regex: no token can follow") as caught:
        answer()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("isolated", [False, True])
def test_a_signature_that_the_file_lacks_is_refused(nano_file, isolated):
    phone = export.LiteRTRunner(nano_file.path, isolated=isolated)
    with pytest.raises(
        DataError, match=r"nano\.tflite: has no signature 'prefill_3'; it has decode, "
    ):
        phone.run("prefill_3")
    phone.close()
