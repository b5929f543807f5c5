"""Instructions about a screen, as text or as a spoken digit, and their actions."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from experiments.nano.phone_screens import wordings as words
from experiments.nano.phone_screens.actions import Action, tap_at
from experiments.nano.phone_screens.generator import (
    HEIGHT,
    MIN_KEYS_FOR_SPEECH,
    MIN_OF_TYPE,
    WIDTH,
    Element,
    Screen,
)
from experiments.nano.phone_screens.speech import DIGIT_WORDS
from glm_edge.errors import DataError

Option = TypeVar("Option")

TYPED_WORDS = (
    "hello", "goodbye", "thanks", "yes", "no", "maybe", "coffee", "tea", "water", "bread",
    "milk", "apple", "orange", "paper", "river", "mountain", "train", "station", "hotel", "garden",
    "music", "morning", "evening", "today", "tomorrow", "summer", "winter", "london", "paris",
    "berlin", "doctor", "school", "market", "bridge", "window", "table", "friend", "mother",
    "father", "brother", "sister", "house", "street", "money", "ticket", "message", "answer",
    "question", "story", "picture",
)  # fmt: skip
_UPWARD, _DOWNWARD, _LEFTWARD, _RIGHTWARD = (505, 295), (505, 705), (295, 505), (705, 505)
SWIPES = {
    "down": (_DOWNWARD, _UPWARD),
    "up": (_UPWARD, _DOWNWARD),
    "left": (_RIGHTWARD, _LEFTWARD),
    "right": (_LEFTWARD, _RIGHTWARD),
}
FINISH = {"done": "done", "stopped": "stopped"}
TEXT_MIX = {"tap": 0.8, "type": 0.06, "swipe": 0.06, "back": 0.04, "finish": 0.04}
SPEECH_MIX = {"speech": 1.0}
# Wordings of questions: of the parts of `wordings`, or trained ones with untrained names.
WORDINGS = ("exam", "train", "names")
_NAMED = ("icon", "row")
# How often a sentence has an opening, a closing, a capital letter, and a full stop.
_OPENING, _CLOSING, _CAPITAL, _STOP = 0.12, 0.12, 0.3, 0.2


@dataclasses.dataclass(frozen=True)
class Question:
    """An instruction and its answer.

    Args:
      instruction_text: text of the instruction; empty if it is spoken.
      spoken: digit of a spoken instruction, else None.
      answer_action: correct action.
      target: element to tap, None for other actions.
    """

    instruction_text: str
    spoken: int | None
    answer_action: Action
    target: Element | None


def _pick(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    return options[int(rng.integers(len(options)))]


def _tap(element: Element) -> Action:
    return tap_at(*element.centre, WIDTH, HEIGHT)


def describe(
    rng: np.random.Generator, element: Element, wording: str = "train", plain: bool = False
) -> str:
    """Write an instruction to tap an element.

    Args:
      rng: random generator of the words.
      element: element to tap.
      wording: one of `WORDINGS`.
      plain: whether to write a short sentence that other sentences can follow.

    Returns:
      The instruction, which is unambiguous on a screen with unique (type, class) and glyphs.

    Raises:
      DataError: the wording is unknown, or the element has no untrained name.
    """
    part = _part_of(wording)
    if wording == "names":
        if element.type not in _NAMED:
            raise DataError(f"a {element.type} has no untrained name; use an icon or a row")
        name = words.UNTRAINED_NAMES[element.name]
    elif element.type == "key":
        name = element.name if rng.random() < 0.5 else DIGIT_WORDS[int(element.name)]
    elif element.type == "button":
        name = _pick(rng, words.COLOUR_NAMES[element.name])
    else:
        name = _pick(rng, words.SYNONYMS[element.name])
    noun = _pick(rng, part.nouns[element.type])
    thing = _pick(rng, words.PHRASES[element.type]).format(name=name, noun=noun)
    templates = part.templates[element.type]
    if plain:
        return _pick(rng, _plain(templates)).format(thing=thing, name=name, noun=noun)
    sentence = _pick(rng, templates).format(thing=thing, name=name, noun=noun)
    return _spoken_style(rng, sentence, part)


def _part_of(wording: str) -> words.Wordings:
    if wording not in WORDINGS:
        raise DataError(f"unknown wording {wording!r}; use one of {', '.join(WORDINGS)}")
    return words.wordings("train" if wording == "names" else wording)


def _plain(templates: Sequence[str]) -> list[str]:
    """Return the templates of one short clause."""
    return [t for t in templates if len(t.split()) <= 5 and not set(t) & set("?:,")]


def _spoken_style(
    rng: np.random.Generator, sentence: str, part: words.Wordings, closing: bool = True
) -> str:
    """Add an opening, a closing, a capital letter or a full stop, each at random."""
    draws = rng.random(4)
    if draws[0] < _OPENING:
        sentence = f"{_pick(rng, part.openings)} {sentence}"
    if closing and draws[1] < _CLOSING and not sentence.endswith("?"):
        sentence = f"{sentence} {_pick(rng, part.closings)}"
    if draws[2] < _CAPITAL:
        sentence = sentence[0].upper() + sentence[1:]
    if draws[3] < _STOP and not sentence.endswith("?"):
        sentence += "."
    return sentence


def targets(screen: Screen) -> list[Element]:
    """Return the elements of a screen that have distractors of their type."""
    types = [e.type for e in screen.elements]
    return [e for e in screen.elements if types.count(e.type) >= MIN_OF_TYPE]


def nameable(screen: Screen) -> list[Element]:
    """Return the targets of a screen that have untrained names."""
    return [e for e in targets(screen) if e.type in _NAMED]


def questions(
    rng: np.random.Generator,
    screen: Screen,
    count: int,
    mix: Mapping[str, float] = TEXT_MIX,
    wording: str = "train",
) -> list[Question]:
    """Draw several questions about one screen; a target repeats only after all others.

    Args:
      rng: random generator.
      screen: screen of the questions.
      count: number of questions.
      mix: relative frequencies of "tap", "speech", "type", "swipe", "back" and "finish". "speech"
        asks for a digit key, and is skipped on screens with fewer than `MIN_KEYS_FOR_SPEECH`.
      wording: one of `WORDINGS`; "names" asks for icons and rows only.

    Returns:
      The questions.

    Raises:
      DataError: the mix contains an unknown kind, or no kind that fits the screen, or the wording
        is unknown.
    """
    if unknown := set(mix) - {"tap", "speech", "type", "swipe", "back", "finish"}:
        raise DataError(f"unknown kind of question {min(unknown)!r}")
    keys = [e for e in screen.elements if e.type == "key"]
    weights = {k: w for k, w in mix.items() if k != "speech" or len(keys) >= MIN_KEYS_FOR_SPEECH}
    total = sum(weights.values())
    if total <= 0:
        raise DataError(
            f"no question of {dict(mix)} fits a screen with {len(keys)} digit keys; "
            f"speech needs {MIN_KEYS_FOR_SPEECH}"
        )
    asked = nameable(screen) if wording == "names" else targets(screen)
    if not asked:
        raise DataError("the screen has no icon and no row, which have untrained names")
    pools = {"tap": _Shuffled(rng, asked), "speech": _Shuffled(rng, keys)}
    shares = np.array(list(weights.values()), float) / total
    kinds = rng.choice(list(weights), size=count, p=shares)
    return [_ask(rng, str(kind), pools, wording) for kind in kinds]


class _Shuffled:
    """An endless source of elements in random order without early repeats."""

    def __init__(self, rng: np.random.Generator, elements: list[Element]):
        self._rng, self._elements, self._remaining = rng, elements, []

    def deal(self) -> Element:
        if not self._remaining:
            order = self._rng.permutation(len(self._elements))
            self._remaining = [self._elements[i] for i in order]
        return self._remaining.pop()


def _ask(
    rng: np.random.Generator, kind: str, pools: Mapping[str, _Shuffled], wording: str
) -> Question:
    if kind == "tap":
        target = pools["tap"].deal()
        return Question(describe(rng, target, wording), None, _tap(target), target)
    if kind == "speech":
        target = pools["speech"].deal()
        return Question("", int(target.name), _tap(target), target)
    return untargeted(rng, kind, wording)


def untargeted(
    rng: np.random.Generator, kind: str, wording: str = "train", plain: bool = False
) -> Question:
    """Draw a question that no element of a screen answers.

    Args:
      rng: random generator.
      kind: "type", "swipe", "back" or "finish".
      wording: one of `WORDINGS`.
      plain: whether to write a short sentence that other sentences can follow.

    Returns:
      The question.
    """
    part = _part_of(wording)
    slots: dict[str, str] = {}
    if kind == "type":
        template, slots = "type", {"word": _pick(rng, TYPED_WORDS)}
        action = Action("Type", text=slots["word"])
    elif kind == "swipe":
        direction = _pick(rng, tuple(SWIPES))
        start, end = SWIPES[direction]
        action = Action("Swipe", start=start, end=end)
        if direction in words.TOWARD:
            template, choices = "scroll", {"toward": words.TOWARD, "at": words.AT}
        else:
            template, choices = "page", {"aside": words.ASIDE, "which": words.WHICH}
        slots = {slot: _pick(rng, names[direction]) for slot, names in choices.items()}
    elif kind == "back":
        template, action = "back", Action("Back")
    else:
        template = _pick(rng, tuple(FINISH))
        action = Action("finish", message=FINISH[template])
    templates = part.templates[template]
    sentence = _pick(rng, _plain(templates) if plain else templates).format(**slots)
    if not plain:
        # A word after the text to type would be a part of that text.
        sentence = _spoken_style(rng, sentence, part, closing=kind != "type")
    return Question(sentence, None, action, None)
