"""Tasks of several steps: a written task, the answers so far, and the next action.

A phone agent asks for one action per screen. Its request contains the task, the earlier answers,
and the present screen. A task either dials digits on one keypad, or joins instructions about
different screens. After the last step the answer is `finish(message="done")`.

An answer to one of several steps begins with a thought, the words of the task that describe the
step, on a line of its own. To find the next step, a small model continues the task after the
earlier thought; what to tap is then a question like any other. A thought has the space that is
before its words in the task, so that its tokens are those of the task.

The prompt of `prompt_text` is what nano's chat template makes of such a request: the present image
first, then the task, then the earlier answers.
"""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from experiments.nano.phone_screens import instructions
from experiments.nano.phone_screens.actions import Action, format_action, tap_at
from experiments.nano.phone_screens.generator import (
    HEIGHT,
    MIN_KEYS_FOR_SPEECH,
    NAMES,
    WIDTH,
    Element,
    Screen,
    ScreenGenerator,
)
from experiments.nano.phone_screens.speech import DIGIT_WORDS
from glm_edge.preprocess.tokens import ASSISTANT, USER

Option = TypeVar("Option")

SHORTEST, LONGEST = 2, 4
STOP = "<|endoftext|>"
# Forms of a task, with their frequencies.
FORMS = {"dial": 0.35, "sequence": 0.5, "turn": 0.15}
STEPS = {"tap": 0.7, "type": 0.08, "swipe": 0.1, "back": 0.12}
DIAL = {
    "train": (
        "dial {}", "enter {}", "press {}", "dial the number {}", "enter the code {}", "tap {}",
        "press the digits {}", "type in the code {}", "the code is {}", "please dial {}",
        "key in {}", "the number is {}, dial it", "use the code {}", "i want to dial {}",
        "dial {} please", "press {} on the keypad", "input {}", "call {}", "the pin is {}",
        "enter these digits: {}", "put in {} for me", "unlock it with {}", "tap the keys {}",
    ),
    "exam": (
        "please enter the number {}", "could you dial {}", "punch in {}", "my code is {}",
        "hit {}", "press these keys: {}",
    ),
}  # fmt: skip
JOINS = {
    "train": (
        " and then ",
        ", then ",
        " then ",
        ". then ",
        ", after that ",
        " and ",
        ", ",
        "; ",
        ". ",
        "; then ",
        ". after that ",
        ", and then ",
        ". when done ",
        ", followed by ",
        ", later ",
    ),
    "exam": (", and next ", ", afterwards ", ". next ", ", and after that ", " and afterwards "),
}
DIGIT_JOINS = {
    "train": (" ", ", ", " then ", " and ", ", and ", "; ", " followed by "),
    "exam": (" ", ", then ", " and then "),
}
# Probability that a request is about a task of one step, after which the agent has to end it.
SINGLE = 0.1
FINISHED = Action("finish", message="done")


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer of the agent.

    Args:
      action: action on the phone.
      thought: words of the task that describe the step; empty if the task has one step, or ends.
    """

    action: Action
    thought: str = ""

    def text(self, task: str) -> str:
        """Write the answer as the model does."""
        return thought_line(task, self.thought) + format_action(self.action)


@dataclasses.dataclass(frozen=True)
class Turn:
    """One request of a dialogue and its answer.

    Args:
      task: written task.
      history: earlier answers.
      question: what to answer now; its `instruction_text` is empty, or a new instruction of the
        user, which replaces the task.
      thought: thought of the answer.
    """

    task: str
    history: tuple[Answer, ...]
    question: instructions.Question
    thought: str = ""

    @property
    def answer(self) -> Answer:
        """The answer to this request."""
        return Answer(self.question.answer_action, self.thought)


def thought_line(task: str, thought: str) -> str:
    """Write the line of a thought; empty without a thought."""
    if not thought:
        return ""
    return f"{thought}\n" if task.startswith(thought) else f" {thought}\n"


def prompt_text(turn: Turn) -> str:
    """Write the part of a prompt between the image and the final `<|assistant|>`."""
    return turn.task + continuation(turn)


def continuation(turn: Turn) -> str:
    """Write the part of a prompt between the task and the final `<|assistant|>`."""
    text = "".join(f"{ASSISTANT}{answer.text(turn.task)}{STOP}" for answer in turn.history)
    if turn.question.instruction_text:
        text += f"{USER}{turn.question.instruction_text}"
    return text


def draw_turn(rng: np.random.Generator, screen: Screen, wording: str = "train") -> Turn:
    """Draw one request of a random dialogue whose present screen is `screen`.

    Args:
      rng: random generator.
      screen: present screen.
      wording: "train" or "exam", see `wordings`.

    Returns:
      The request; every step of a task, and its end, is equally frequent.
    """
    keys = [e for e in screen.elements if e.type == "key"]
    forms = {f: p for f, p in FORMS.items() if f != "dial" or len(keys) >= MIN_KEYS_FOR_SPEECH}
    shares = np.array(list(forms.values())) / sum(forms.values())
    form = list(forms)[int(rng.choice(len(forms), p=shares))]
    if form == "dial":
        return _dial(rng, keys, wording)
    if form == "turn":
        return _new_instruction(rng, screen, wording)
    return _sequence(rng, screen, wording)


def draw_task(
    rng: np.random.Generator, generator: ScreenGenerator, wording: str = "train"
) -> tuple[str, list[tuple[Screen, instructions.Question]]]:
    """Draw a complete task, with the screen that each of its steps is about.

    Args:
      rng: random generator.
      generator: source of the screens.
      wording: "train" or "exam", see `wordings`.

    Returns:
      `(task, steps)`: the written task, and per step its screen and its question without text.
    """
    if rng.random() < FORMS["dial"] / (FORMS["dial"] + FORMS["sequence"]):
        screen = generator.draw(rng, "keypad")
        task, number = _number(rng, [e for e in screen.elements if e.type == "key"], wording)
        return task, [(screen, _question(key)) for key, _ in number]
    screens = [generator.draw(rng) for _ in range(_length(rng))]
    elements = [_pick(rng, instructions.targets(screen)) for screen in screens]
    task, steps = _joined(rng, elements, wording)
    return task, [(screen, step) for screen, (step, _) in zip(screens, steps, strict=True)]


def _dial(rng: np.random.Generator, keys: list[Element], wording: str) -> Turn:
    task, number = _number(rng, keys, wording)
    step = int(rng.integers(len(number) + 1))
    return _at(step, task, [(_question(key), words) for key, words in number])


def _number(
    rng: np.random.Generator, keys: list[Element], wording: str
) -> tuple[str, list[tuple[Element, str]]]:
    """Draw a task to dial digits, and its keys with their names in the task."""
    number = [keys[int(i)] for i in rng.integers(len(keys), size=_length(rng))]
    words = rng.random() < 0.3
    digits = [DIGIT_WORDS[int(key.name)] if words else key.name for key in number]
    task = _pick(rng, DIAL[wording]).format(_pick(rng, DIGIT_JOINS[wording]).join(digits))
    return task, list(zip(number, digits, strict=True))


def _sequence(rng: np.random.Generator, screen: Screen, wording: str) -> Turn:
    count = 1 if rng.random() < SINGLE else _length(rng)
    step = int(rng.integers(count + 1))
    # Other steps have other screens, of which the request has only the answers.
    present = _pick(rng, instructions.targets(screen))
    elements = [present if index == step else _elsewhere(rng) for index in range(count)]
    return _at(step, *_joined(rng, elements, wording))


def _at(step: int, task: str, steps: Sequence[tuple[instructions.Question, str]]) -> Turn:
    """Return the request after `step` steps, of which each has its words in the task."""
    if len(steps) == 1:
        steps = [(steps[0][0], "")]
    history = tuple(Answer(question.answer_action, words) for question, words in steps[:step])
    question, thought = steps[step] if step < len(steps) else (_question(None), "")
    return Turn(task, history, question, thought)


def _joined(
    rng: np.random.Generator, elements: Sequence[Element], wording: str
) -> tuple[str, list[tuple[instructions.Question, str]]]:
    """Draw kinds of steps, and join their words to a task; some steps tap their element."""
    kinds = [str(kind) for kind in rng.choice(list(STEPS), len(elements), p=list(STEPS.values()))]
    if kinds[0] == "back":
        kinds[0] = "tap"
    steps = []
    for kind, element in zip(kinds, elements, strict=True):
        if kind == "tap":
            words = instructions.describe(rng, element, wording, plain=True)
            steps.append((_question(element), words))
        else:
            question = instructions.untargeted(rng, kind, wording, plain=True)
            words = question.instruction_text
            steps.append((dataclasses.replace(question, instruction_text=""), words))
    task = steps[0][1]
    join = _pick(rng, JOINS[wording])
    for _, words in steps[1:]:
        task += (join if rng.random() < 0.7 else _pick(rng, JOINS[wording])) + words
    return task, steps


def _new_instruction(rng: np.random.Generator, screen: Screen, wording: str) -> Turn:
    """Draw a conversation whose user gives a new instruction with each screen."""
    earlier = _elsewhere(rng)
    question = instructions.questions(rng, screen, 1, wording=wording)[0]
    task = instructions.describe(rng, earlier, wording)
    return Turn(task, (Answer(_tap_of(earlier)),), question)


def _length(rng: np.random.Generator) -> int:
    return int(rng.integers(SHORTEST, LONGEST + 1))


def _pick(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    return options[int(rng.integers(len(options)))]


def _elsewhere(rng: np.random.Generator) -> Element:
    """Draw an element of an unknown screen."""
    kind = _pick(rng, tuple(NAMES))
    x, y = rng.uniform(8, WIDTH - 8), rng.uniform(16, HEIGHT - 8)
    return Element(kind, _pick(rng, NAMES[kind]), (x - 8, y - 8, x + 8, y + 8))


def _tap_of(element: Element) -> Action:
    return tap_at(*element.centre, WIDTH, HEIGHT)


def _question(target: Element | None) -> instructions.Question:
    """Return the question that `target` answers; None is the end of the task."""
    if target is None:
        return instructions.Question("", None, FINISHED, None)
    return instructions.Question("", None, _tap_of(target), target)
