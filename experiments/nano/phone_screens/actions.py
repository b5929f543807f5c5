"""The action grammar of Open-AutoGLM: formatting and parsing.

    do(action="Tap", element=[435,715])    do(action="Type", text="hello")    do(action="Back")
    do(action="Swipe", start=[505,705], end=[505,295])    finish(message="done")

Coordinates are 0..999 along each axis of a screen of any size.

References:
  Open-AutoGLM, https://github.com/zai-org/Open-AutoGLM
"""

import ast
import dataclasses
import itertools
import re
import warnings
from collections.abc import Iterator
from typing import NamedTuple

from glm_edge.errors import DataError

GRID = 1000
BINS = 100
FINISH = "finish"
_TEXT, _POINT = "text", "point"
# Fields of every action in written order, each with its content and whether it is required.
GRAMMAR: dict[str, tuple[tuple[str, str, bool], ...]] = {
    "Tap": (("element", _POINT, True), ("message", _TEXT, False)),
    "Type": (("text", _TEXT, True),),
    "Type_Name": (("text", _TEXT, True),),
    "Swipe": (("start", _POINT, True), ("end", _POINT, True)),
    "Back": (),
    "Home": (),
    "Launch": (("app", _TEXT, True),),
    "Long Press": (("element", _POINT, True),),
    "Double Tap": (("element", _POINT, True),),
    "Wait": (("duration", _TEXT, True),),
    "Take_over": (("message", _TEXT, True),),
    "Interact": (),
    "Note": (("message", _TEXT, True),),
    "Call_API": (("instruction", _TEXT, True),),
    FINISH: (("message", _TEXT, True),),
}
_OPENING = re.compile(r"\bdo\s*\(\s*action\s*=|\bfinish\s*\(\s*message\s*=")
# Markers of the start of an answer: actions before them are part of the reasoning.
_MARK = re.compile(r"</think>|<answer>|<\|begin_of_box\|>")
_NAME = re.compile(r"\s*([a-z_]\w*)\s*=\s*")
_POINT_VALUE = re.compile(r"\[\s*(-?\d{1,6})\s*,\s*(-?\d{1,6})\s*\]")
_NEXT = re.compile(r"\s*([,)])\s*")
# An escape, or a quote that closes a string, after which another field or the end of the call
# follows.
_QUOTE = {
    quote: re.compile(rf"\\.|{quote}(?=\s*(?:\)|,\s*[a-z_]\w*\s*=))", re.DOTALL) for quote in "\"'"
}
# After a call whose text contains quotes: nothing, a tag, or another call.
_AFTER_CALL = re.compile(r"\s*(?:$|<|\n|do\s*\(|finish\s*\()")
_LONGEST = 4096
_LONGEST_ANSWER = 1 << 16
_MOST_CALLS = 200
_MOST_QUOTES = 32
_MOST_FIELDS = 8


@dataclasses.dataclass(frozen=True)
class Action:
    """One step on the phone; `GRAMMAR` lists the fields of its kind, others are None.

    Args:
      kind: a key of `GRAMMAR`.
      element: (x, y) of a tap, 0..999.
      start: (x, y) of the start of a swipe, 0..999.
      end: (x, y) of its end, 0..999.
      text: text to type.
      app: app to launch.
      duration: waiting time, such as "2 seconds".
      message: message of the action.
      instruction: request to a service about the screens so far.

    Raises:
      DataError: the kind is unknown, or a field is missing, has the wrong type, or does not belong
        to the kind.
    """

    kind: str
    element: tuple[int, int] | None = None
    start: tuple[int, int] | None = None
    end: tuple[int, int] | None = None
    text: str | None = None
    app: str | None = None
    duration: str | None = None
    message: str | None = None
    instruction: str | None = None

    def __post_init__(self):
        if self.kind not in GRAMMAR:
            raise DataError(f"unknown action {self.kind!r}; use one of {', '.join(GRAMMAR)}")
        fields = {name: (holds, must) for name, holds, must in GRAMMAR[self.kind]}
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            holds, must = fields.get(field.name, (None, False))
            if value is None:
                if must:
                    raise DataError(f"{self.kind} lacks {field.name}, a {holds}")
            elif holds is None:
                raise DataError(f"{self.kind} has no field {field.name!r}")
            elif holds == _POINT and not _is_point(value):
                raise DataError(
                    f"{field.name}={value!r}: must be two integers from 0 to {GRID - 1}"
                )
            elif holds == _TEXT and not isinstance(value, str):
                raise DataError(f"{field.name}={value!r}: must be a string")


def _is_point(value) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(type(v) is int and 0 <= v < GRID for v in value)
    )


def tap_at(x: float, y: float, width: int, height: int) -> Action:
    """Make a tap at the centres, 10 b + 5, of the bins that contain a point.

    Args:
      x: distance from the left in pixels.
      y: distance from the top in pixels.
      width: width of the screen in pixels.
      height: height of the screen in pixels.

    Returns:
      The tap.
    """
    bins = (min(max(int(v / n * BINS), 0), BINS - 1) for v, n in ((x, width), (y, height)))
    return Action("Tap", element=tuple(10 * b + 5 for b in bins))


def to_pixels(point: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """Convert a point of the grid to pixels of a screen.

    Args:
      point: (x, y), 0..999.
      width: width of the screen in pixels.
      height: height of the screen in pixels.

    Returns:
      (x, y) in integer pixels.
    """
    return int(point[0] / GRID * width), int(point[1] / GRID * height)


def _quote(text: str) -> str:
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(plain, escaped)
    return f'"{"".join(c if c.isprintable() else _escape(c) for c in text)}"'


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def format_action(action: Action) -> str:
    """Write an action in one line.

    Args:
      action: the action.

    Returns:
      The text; `parse_action` returns the same action from it.

    Raises:
      DataError: the text would exceed the limit of `parse_action`.
    """
    parts = [] if action.kind == FINISH else [f'action="{action.kind}"']
    for name, holds, _ in GRAMMAR[action.kind]:
        value = getattr(action, name)
        if value is not None:
            written = _quote(value) if holds == _TEXT else f"[{value[0]},{value[1]}]"
            parts.append(f"{name}={written}")
    text = f"{'finish' if action.kind == FINISH else 'do'}({', '.join(parts)})"
    if len(text) > _LONGEST:
        raise DataError(f"{_shown(text)} has {len(text)} characters; the maximum is {_LONGEST}")
    return text


class _Call(NamedTuple):
    """A call: `do` or `finish`, its fields in order, and the offset of its end."""

    name: str
    fields: list[tuple[str, str | tuple[int, int]]]
    end: int


def parse_action(text: str) -> Action:
    """Read an action from a model's answer.

    The last well-formed call of `do` or `finish` is used. Text before `</think>`, `<answer>` or
    `<|begin_of_box|>` is reasoning and is ignored; so are tags, box tokens and other text around
    the call. A string may contain line breaks and quotes: it ends at a quote before another field
    or the end of the call. The text is not evaluated.

    Args:
      text: the model's answer.

    Returns:
      The action.

    Raises:
      DataError: the answer contains no such call, or the call does not follow `GRAMMAR`.

    References:
      Open-AutoGLM, https://github.com/zai-org/Open-AutoGLM, issues 59, 154, 286 and 347.
    """
    if len(text) > _LONGEST_ANSWER:
        raise DataError(f"an answer of {len(text)} characters; the maximum is {_LONGEST_ANSWER}")
    last, malformed, at, count = None, None, 0, 0
    while opening := _OPENING.search(text, at):
        count += 1
        if count > _MOST_CALLS:
            raise DataError(f"an answer with more than {_MOST_CALLS} calls of do or finish")
        if _MARK.search(text, at, opening.start()):
            last = malformed = None
        call = _read_call(text, opening.start())
        last, malformed = (call, None) if call else (last, opening.start())
        at = call.end if call else opening.end()
    if _MARK.search(text, at):
        last = malformed = None
    if last is not None:
        return _action(last)
    if malformed is None:
        raise DataError(f"no action in {_shown(text)}; use do(action=...) or finish(message=...)")
    answer = text[malformed:]
    long = f" within {_LONGEST} characters" if len(answer) > _LONGEST else ""
    raise DataError(f"{_shown(answer)} is not one call of do or finish with named fields{long}")


def _read_call(text: str, start: int) -> _Call | None:
    """Read the call that begins at `start`; return None if it is truncated."""
    text = text[: start + _LONGEST]
    inside = text.index("(", start) + 1
    parsed = _read_fields(text, inside, {}, _MOST_FIELDS)
    return parsed and _Call(text[start : inside - 1].strip(), *parsed)


def _read_fields(text: str, at: int, known: dict, room: int) -> tuple[list, int] | None:
    """Read up to `room` fields, starting at `at`, and find the end of the call.

    `known` stores earlier results by offset, as a string may end at several quotes.
    """
    if at not in known:
        name = _NAME.match(text, at) if room else None
        known[at] = name and _read_value(text, name.end(), name.group(1), known, room)
    return known[at]


def _read_value(text: str, at: int, name: str, known: dict, room: int) -> tuple[list, int] | None:
    if text[at : at + 1] in ('"', "'"):
        return _read_string(text, at, name, known, room)
    point = _POINT_VALUE.match(text, at)
    following = point and _read_next(text, point.end(), known, room)
    if not following:
        return None
    return [(name, (int(point.group(1)), int(point.group(2)))), *following[0]], following[1]


def _read_next(text: str, at: int, known: dict, room: int) -> tuple[list, int] | None:
    """Match further fields, or the end of the call, after a value."""
    after = _NEXT.match(text, at)
    if after is None:
        return None
    if after[1] == ")":
        return [], after.start(1) + 1
    return _read_fields(text, after.end(), known, room - 1)


def _read_string(text: str, at: int, name: str, known: dict, room: int) -> tuple[list, int] | None:
    """Read a string whose quote opens at `at`, and the text after it."""
    quote, first = text[at], None
    for close in itertools.islice(_closing_quotes(text, at), _MOST_QUOTES):
        following = _read_next(text, close + 1, known, room)
        value = following and _unescaped(text[at + 1 : close], quote)
        if value is None:
            continue
        read = [(name, value), *following[0]], following[1]
        # A string that quotes a call continues after the quoted call's closing parenthesis.
        if quote not in text[at + 1 : close] or _AFTER_CALL.match(text, read[1]):
            return read
        first = first or read
    return first


def _closing_quotes(text: str, at: int) -> Iterator[int]:
    for match in _QUOTE[text[at]].finditer(text, at + 1):
        if match[0] == text[at]:
            yield match.start()


def _unescaped(raw: str, quote: str) -> str | None:
    """Replace escapes as Python does; quotes and line breaks may be unescaped."""
    source = re.sub(
        rf"\\.|[{quote}\n\r]",
        lambda match: {quote: f"\\{quote}", "\n": "\\n", "\r": "\\r"}.get(match[0], match[0]),
        raw,
        flags=re.DOTALL,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.literal_eval(f"{quote}{source}{quote}")
    except (SyntaxError, ValueError, MemoryError):
        return None


def _action(call: _Call) -> Action:
    shown = _shown(f"{call.name}({', '.join(f'{name}={value!r}' for name, value in call.fields)})")
    fields = dict(call.fields)
    if len(fields) < len(call.fields):
        raise DataError(f"{shown} has a field twice")
    kind = FINISH if call.name == FINISH else fields.pop("action", None)
    if not isinstance(kind, str) or (kind == FINISH) != (call.name == FINISH):
        raise DataError(f"{shown} names no action of do")
    known = {field.name for field in dataclasses.fields(Action)} - {"kind"}
    if unknown := sorted(set(fields) - known):
        raise DataError(f"{shown} has the unknown field {unknown[0]!r}")
    return Action(kind, **fields)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
