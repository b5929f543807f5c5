"""The action grammar of Open-AutoGLM: writing it and reading it back.

    do(action="Tap", element=[435,715])    do(action="Type", text="hello")    do(action="Back")
    do(action="Swipe", start=[505,705], end=[505,295])    finish(message="done")

Coordinates are 0..999 along each axis of the screen, whatever its size.

References:
  Open-AutoGLM, https://github.com/zai-org/Open-AutoGLM
"""

import ast
import dataclasses
import warnings

from glm_edge.errors import DataError

GRID = 1000
BINS = 100
FINISH = "finish"
_TEXT, _POINT = "text", "point"
# For every action its fields in the order written, each with what it holds and whether it must be.
GRAMMAR: dict[str, tuple[tuple[str, str, bool], ...]] = {
    "Tap": (("element", _POINT, True), ("message", _TEXT, False)),
    "Type": (("text", _TEXT, True),),
    "Swipe": (("start", _POINT, True), ("end", _POINT, True)),
    "Back": (),
    "Home": (),
    "Launch": (("app", _TEXT, True),),
    "Long Press": (("element", _POINT, True),),
    "Double Tap": (("element", _POINT, True),),
    "Wait": (("duration", _TEXT, True),),
    FINISH: (("message", _TEXT, True),),
}
_OPENINGS = ("do(action=", "finish(message=")
_LONGEST = 4096


@dataclasses.dataclass(frozen=True)
class Action:
    """One step on the phone; `GRAMMAR` says which fields its kind has, the others are None.

    Args:
      kind: a key of `GRAMMAR`.
      element: (x, y) where a tap goes, 0..999.
      start: (x, y) where a swipe begins, 0..999.
      end: (x, y) where it ends.
      text: what is typed.
      app: what is launched.
      duration: how long to wait, such as "2 seconds".
      message: what is said with it.

    Raises:
      DataError: the kind is unknown, a field is missing, of another type, or does not belong to it.
    """

    kind: str
    element: tuple[int, int] | None = None
    start: tuple[int, int] | None = None
    end: tuple[int, int] | None = None
    text: str | None = None
    app: str | None = None
    duration: str | None = None
    message: str | None = None

    def __post_init__(self):
        if self.kind not in GRAMMAR:
            raise DataError(f"unknown action {self.kind!r}; one of {', '.join(GRAMMAR)}")
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
                raise DataError(f"{field.name}={value!r}; two integers 0..{GRID - 1} are needed")
            elif holds == _TEXT and not isinstance(value, str):
                raise DataError(f"{field.name}={value!r}; a string is needed")


def _is_point(value) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(type(v) is int and 0 <= v < GRID for v in value)
    )


def tap_at(x: float, y: float, width: int, height: int) -> Action:
    """Makes the tap whose coordinates are the centres of the bins, 10 b + 5, that hold a point.

    Args:
      x: pixels from the left.
      y: pixels from the top.
      width: of the screen in pixels.
      height: of the screen in pixels.

    Returns:
      The tap.
    """
    bins = (min(max(int(v / n * BINS), 0), BINS - 1) for v, n in ((x, width), (y, height)))
    return Action("Tap", element=tuple(10 * b + 5 for b in bins))


def to_pixels(point: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """Says where on a screen a point of the grid is executed.

    Args:
      point: (x, y), 0..999.
      width: of the screen in pixels.
      height: of the screen in pixels.

    Returns:
      (x, y) in whole pixels.
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
    """Writes an action in one line.

    Args:
      action: what to write.

    Returns:
      The text; `parse_action` gives the action back.
    """
    parts = [] if action.kind == FINISH else [f'action="{action.kind}"']
    for name, holds, _ in GRAMMAR[action.kind]:
        value = getattr(action, name)
        if value is not None:
            written = _quote(value) if holds == _TEXT else f"[{value[0]},{value[1]}]"
            parts.append(f"{name}={written}")
    return f"{'finish' if action.kind == FINISH else 'do'}({', '.join(parts)})"


def parse_action(text: str) -> Action:
    """Reads an action from a model's answer.

    The answer begins at the first `do(action=` or `finish(message=`: thoughts before it are skipped
    and a closing `</answer>` after it is dropped, as Open-AutoGLM does. Nothing is evaluated.

    Args:
      text: the answer.

    Returns:
      The action.

    Raises:
      DataError: there is no action, or it does not follow `GRAMMAR`.
    """
    starts = [at for opening in _OPENINGS if (at := text.find(opening)) >= 0]
    if not starts:
        raise DataError(f"no action in {_shown(text)}; do(action=...) or finish(message=...)")
    answer = text[min(starts) :].strip().removesuffix("</answer>").strip()
    if len(answer) > _LONGEST:
        raise DataError(f"an action of {len(answer)} characters; at most {_LONGEST} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            call = ast.parse(answer, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"{_shown(answer)} is not one call of do or finish") from error
    if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
        raise DataError(f"{_shown(answer)} is not one call of do or finish with named fields")
    fields = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise DataError(f"{_shown(answer)} unpacks a mapping; named fields are needed")
        if keyword.arg in fields:
            raise DataError(f"{_shown(answer)} has the field {keyword.arg!r} twice")
        fields[keyword.arg] = _literal(keyword.value, answer)
    kind = FINISH if call.func.id == FINISH else fields.pop("action", None)
    known = {field.name for field in dataclasses.fields(Action)} - {"kind"}
    if not isinstance(kind, str) or (kind == FINISH) != (call.func.id == FINISH):
        raise DataError(f"{_shown(answer)} names no action of do")
    if unknown := sorted(set(fields) - known):
        raise DataError(f"{_shown(answer)} has the unknown field {unknown[0]!r}")
    return Action(kind, **fields)


def _literal(node: ast.expr, answer: str):
    if isinstance(node, ast.Constant) and type(node.value) in (str, int):
        return node.value
    if isinstance(node, ast.List) and all(isinstance(e, ast.Constant) for e in node.elts):
        return tuple(e.value for e in node.elts)
    raise DataError(f"{_shown(answer)} holds something other than strings and [x,y]")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
