"""The exam's wordings are never trained: templates, nouns, openings and closings."""

import re

import numpy as np
import pytest

from experiments.common import tap_items
from experiments.nano.phone_screens import digits, generator, instructions, wordings
from glm_edge.errors import DataError

TRAIN, EXAM = wordings.wordings("train"), wordings.wordings("exam")
SLOTS = {"thing", "name", "noun", "word", "toward", "at", "aside", "which"}


@pytest.fixture(scope="module")
def drawer():
    images = digits.DigitImages((np.full((1, 28, 28), 200, np.uint8),) * 10)
    return generator.ScreenGenerator(images)


def patterns(part):
    """Return regular expressions of the sentences of a part, without opening and closing."""
    known = (n for names in wordings.SYNONYMS.values() for n in names)
    names = [*known, *wordings.UNTRAINED_NAMES.values()]
    names += [n for colours in wordings.COLOUR_NAMES.values() for n in colours]
    names += [*"0123456789", *instructions.DIGIT_WORDS]
    name = f"(?:{'|'.join(names)})"
    for kind, templates in part.templates.items():
        noun = f"(?:{'|'.join(part.nouns.get(kind, ()))})"
        phrases = [p.format(name=name, noun=noun) for p in wordings.PHRASES.get(kind, ())]
        slots = dict.fromkeys(SLOTS, r"[a-z ]+") | {"name": name, "noun": noun}
        slots["thing"] = f"(?:{'|'.join(phrases)})"
        for template in templates:
            yield re.sub(r"\\{(\w+)\\}", lambda m, s=slots: s[m[1]], re.escape(template))


def sentences(part):
    openings = f"(?:(?:{'|'.join(map(re.escape, part.openings))}) )?"
    closings = f"(?: (?:{'|'.join(map(re.escape, part.closings))}))?"
    return re.compile(f"{openings}(?:{'|'.join(patterns(part))}){closings}\\.?", re.IGNORECASE)


def test_every_kind_has_forty_templates():
    for kind, templates in wordings.TEMPLATES.items():
        assert len(set(templates)) == len(templates) >= 40, kind
        assert len(EXAM.templates[kind]) >= 5, kind
        fields = {name for t in templates for name in re.findall(r"\{(\w+)\}", t)}
        assert fields <= SLOTS
    for kind, nouns in wordings.NOUNS.items():
        assert len(nouns) >= 10, kind
        assert len(EXAM.nouns[kind]) >= 3, kind


def test_parts_share_no_wording():
    for name in ("templates", "nouns"):
        everything = {
            part: {
                text for texts in getattr(wordings.wordings(part), name).values() for text in texts
            }
            for part in wordings.PARTS
        }
        assert not everything["train"] & everything["exam"]
    assert not {*TRAIN.openings, *TRAIN.closings} & {*EXAM.openings, *EXAM.closings}


def test_training_contains_no_noun_of_the_exam():
    nouns = {noun for kind in EXAM.nouns.values() for noun in kind}
    trained = [*(t for kind in TRAIN.templates.values() for t in kind)]
    trained += [t for kind in TRAIN.nouns.values() for t in kind]
    for text in trained:
        assert not nouns & set(re.findall(r"[a-z]+", text)), text


def test_untrained_names_are_no_trained_words():
    trained = {w for names in wordings.SYNONYMS.values() for n in names for w in n.split()}
    assert not set(wordings.UNTRAINED_NAMES.values()) & trained
    assert len(set(wordings.UNTRAINED_NAMES.values())) == len(wordings.SYNONYMS)


def test_the_split_does_not_depend_on_the_list():
    assert wordings.part_of("pick {thing}") == "exam"
    assert wordings.part_of("i need {thing}") == "train"
    assert wordings.part_of("tap {thing}") == "train"
    with pytest.raises(DataError, match="unknown part 'test'"):
        wordings.wordings("test")


@pytest.mark.parametrize("part", wordings.PARTS)
def test_questions_use_only_wordings_of_their_part(drawer, part):
    rng = np.random.default_rng(0)
    expected = sentences(wordings.wordings(part))
    for _ in range(60):
        for question in instructions.questions(rng, drawer.draw(rng), 5, wording=part):
            assert expected.fullmatch(question.instruction_text), question.instruction_text


def test_the_exam_draws_wordings_of_the_exam():
    exam, train = sentences(EXAM), sentences(TRAIN)
    texts = [item.question.instruction_text for item in tap_items.draw_items(40, 3)]
    assert all(exam.fullmatch(text) for text in texts)
    calibrated = tap_items.draw_items(40, 3, split="calibration")
    assert all(train.fullmatch(item.question.instruction_text) for item in calibrated)
    trained = tap_items.draw_items(40, 3, wording="train")
    assert all(train.fullmatch(item.question.instruction_text) for item in trained)


def test_untrained_names_are_asked_in_trained_wordings():
    items = tap_items.draw_items(40, 3, wording="names")
    tapped = [item.question for item in items if item.question.target is not None]
    assert len(tapped) > 20
    for question in tapped:
        assert wordings.UNTRAINED_NAMES[question.target.name] in question.instruction_text.lower()


def test_exam_screens_do_not_depend_on_the_wording():
    kinds = [tap_items.draw_items(1, 5, wording=part)[0] for part in wordings.PARTS]
    np.testing.assert_array_equal(kinds[0].image, kinds[1].image)


def test_unknown_wordings_are_refused(drawer):
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match="unknown wording 'old'"):
        instructions.questions(rng, drawer.draw(rng), 1, {"back": 1.0}, wording="old")
    key = generator.Element("key", "3", (0, 0, 1, 1))
    with pytest.raises(DataError, match="a key has no untrained name"):
        instructions.describe(rng, key, "names")
