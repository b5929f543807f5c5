"""Instructions about a screen, as text or as a spoken digit, and their actions."""

import dataclasses
from collections.abc import Mapping

import numpy as np

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

SYNONYMS = {
    "star": ("star", "favorites"),
    "heart": ("heart", "like"),
    "camera": ("camera", "photo"),
    "mail": ("mail", "envelope"),
    "home": ("home", "house"),
    "search": ("search", "magnifier"),
    "lock": ("lock", "padlock"),
    "cloud": ("cloud", "weather"),
    "flag": ("flag",),
    "user": ("user", "profile"),
    "play": ("play", "video"),
    "clock": ("clock", "time"),
    "music": ("music", "song"),
    "plus": ("plus", "add"),
    "bell": ("bell", "alarm"),
    "pin": ("pin", "map"),
}
TAP_TEMPLATES = {
    "icon": (
        "tap the {} icon",
        "tap {}",
        "open the {} icon",
        "press the {} icon",
        "click on the {} icon",
        "touch the {} symbol",
        "select the {} icon",
        "please tap the {} icon",
        "hit the {} icon",
        "choose the {} symbol",
    ),
    "key": (
        "press {}",
        "tap {}",
        "press the {} key",
        "hit {}",
        "dial {}",
        "enter {}",
        "push the number {}",
        "tap the digit {}",
        "please press {}",
        "touch key {}",
    ),
    "button": (
        "hit the {} button",
        "press the {} button",
        "tap {}",
        "tap the {} button",
        "click the {} one",
        "push the {} button",
        "choose the {} button",
        "please press the {} button",
        "select {}",
        "touch the {} button",
    ),
    "row": (
        "open the {} row",
        "tap the {} row",
        "select the {} entry",
        "open the {} entry",
        "choose the {} item",
        "go to the {} row",
        "click the {} item",
        "please open the {} row",
        "show the {} entry",
        "pick the {} row",
    ),
}
TYPE_TEMPLATES = ("type {}", "write {}", "type the word {}", "please type {}", "write down {}")
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
    "scroll down": (_DOWNWARD, _UPWARD),
    "show me what is below": (_DOWNWARD, _UPWARD),
    "go further down": (_DOWNWARD, _UPWARD),
    "scroll up": (_UPWARD, _DOWNWARD),
    "go back to the top": (_UPWARD, _DOWNWARD),
    "show me what is above": (_UPWARD, _DOWNWARD),
    "swipe left": (_RIGHTWARD, _LEFTWARD),
    "next page": (_RIGHTWARD, _LEFTWARD),
    "swipe right": (_LEFTWARD, _RIGHTWARD),
    "previous page": (_LEFTWARD, _RIGHTWARD),
}
BACK = ("go back", "return to the last screen", "back please", "leave this screen", "one step back")
FINISH = {
    "say done": "done",
    "we are finished": "done",
    "that is all": "done",
    "the task is complete": "done",
    "stop here": "stopped",
    "cancel the task": "stopped",
}
TEXT_MIX = {"tap": 0.8, "type": 0.06, "swipe": 0.06, "back": 0.04, "finish": 0.04}
SPEECH_MIX = {"speech": 1.0}


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


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _tap(element: Element) -> Action:
    return tap_at(*element.centre, WIDTH, HEIGHT)


def describe(rng: np.random.Generator, element: Element) -> str:
    """Write an instruction to tap an element.

    Args:
      rng: random generator of the words.
      element: element to tap.

    Returns:
      The instruction, which is unambiguous on a screen with unique (type, class) and glyphs.
    """
    name = element.name
    if element.type == "key":
        name = name if rng.random() < 0.5 else DIGIT_WORDS[int(name)]
    elif element.type in ("icon", "row"):
        name = _pick(rng, SYNONYMS[name])
    return _pick(rng, TAP_TEMPLATES[element.type]).format(name)


def questions(
    rng: np.random.Generator,
    screen: Screen,
    count: int,
    mix: Mapping[str, float] = TEXT_MIX,
) -> list[Question]:
    """Draw several questions about one screen; a target repeats only after all others.

    Args:
      rng: random generator.
      screen: screen of the questions.
      count: number of questions.
      mix: relative frequencies of "tap", "speech", "type", "swipe", "back" and "finish". "speech"
        asks for a digit key, and is skipped on screens with fewer than `MIN_KEYS_FOR_SPEECH`.

    Returns:
      The questions.

    Raises:
      DataError: the mix contains an unknown kind, or no kind that fits the screen.
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
    types = [e.type for e in screen.elements]
    pools = {
        "tap": _Shuffled(rng, [e for e in screen.elements if types.count(e.type) >= MIN_OF_TYPE]),
        "speech": _Shuffled(rng, keys),
    }
    shares = np.array(list(weights.values()), float) / total
    kinds = rng.choice(list(weights), size=count, p=shares)
    return [_ask(rng, str(kind), pools) for kind in kinds]


class _Shuffled:
    """An endless source of elements in random order without early repeats."""

    def __init__(self, rng: np.random.Generator, elements: list[Element]):
        self._rng, self._elements, self._remaining = rng, elements, []

    def deal(self) -> Element:
        if not self._remaining:
            order = self._rng.permutation(len(self._elements))
            self._remaining = [self._elements[i] for i in order]
        return self._remaining.pop()


def _ask(rng: np.random.Generator, kind: str, pools: Mapping[str, _Shuffled]) -> Question:
    if kind == "tap":
        target = pools["tap"].deal()
        return Question(describe(rng, target), None, _tap(target), target)
    if kind == "speech":
        target = pools["speech"].deal()
        return Question("", int(target.name), _tap(target), target)
    if kind == "type":
        word = _pick(rng, TYPED_WORDS)
        text = _pick(rng, TYPE_TEMPLATES).format(word)
        return Question(text, None, Action("Type", text=word), None)
    if kind == "swipe":
        text = _pick(rng, tuple(SWIPES))
        start, end = SWIPES[text]
        return Question(text, None, Action("Swipe", start=start, end=end), None)
    if kind == "back":
        return Question(_pick(rng, BACK), None, Action("Back"), None)
    text = _pick(rng, tuple(FINISH))
    return Question(text, None, Action("finish", message=FINISH[text]), None)
