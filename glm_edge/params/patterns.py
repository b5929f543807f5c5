"""Regular expressions of recipes, searched in paths in bounded time.

A recipe may be untrusted, and Python's `re` backtracks, which can take exponential time. This
module simulates an automaton instead: a set of positions moves through the expression, and each
part is evaluated once per position. All searches of one call share a budget of steps.
"""

import contextlib
import contextvars
import functools
import re
from collections.abc import Callable, Iterator
from re import _constants as sre  # type: ignore[attr-defined]  # no stubs
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from glm_edge.errors import RecipeError

MAX_PATTERN = 20_000
MAX_PATH = 1000
# Limit of steps per search, one or two seconds; ordinary searches take thousands.
_MAX_STEPS = 500_000
# Limit of steps of all searches of one call, such as a recipe's: a few seconds.
_MAX_SHARED_STEPS = 2_000_000
# Paths per pattern whose results are cached.
_MAX_KNOWN = 10_000
_FLAGS = re.UNICODE | re.IGNORECASE
# End positions of a part that starts at a position, as a bit set.
_Ends = Callable[["_Text", int], int]


class _Work:
    """Step counter of one or several searches."""

    def __init__(self, limit: int) -> None:
        self.steps, self.limit = 0, limit


_SHARED: contextvars.ContextVar[_Work | None] = contextvars.ContextVar("_SHARED", default=None)


@contextlib.contextmanager
def shared_steps() -> Iterator[None]:
    """Bound the total time of all searches inside, including inner calls; also a decorator.

    A search raises RecipeError once the total exceeds the limit.
    """
    if _SHARED.get() is not None:
        yield
        return
    token = _SHARED.set(_Work(_MAX_SHARED_STEPS))
    try:
        yield
    finally:
        _SHARED.reset(token)


class Pattern:
    """A regular expression that can be searched in a path.

    Groups, alternatives, repeats, classes, anchors, lookahead and lookbehind work as in `re`. The
    only supported flag is `i`.

    Attributes:
      text: the expression.
    """

    def __init__(self, text: str) -> None:
        """Compile an expression.

        Args:
          text: regular expression.

        Raises:
          ValueError: the text is not a regular expression, is longer than `MAX_PATTERN`, or uses
            back references, conditions or atomic groups.
        """
        if not isinstance(text, str):
            raise ValueError(f"a {type(text).__name__} is not a string")
        if len(text) > MAX_PATTERN:
            raise ValueError(f"it has {len(text)} characters; the limit is {MAX_PATTERN}")
        self.text = text
        self._known: dict[str, str | None] = {}
        try:
            tree = parser.parse(text)
            if tree.state.flags & ~_FLAGS:
                raise ValueError("the only supported flag is i")
            self._ends = _sequence(tree, bool(tree.state.flags & re.IGNORECASE))
        except (re.error, OverflowError) as error:
            raise ValueError(str(error)) from error
        except RecursionError as error:
            raise ValueError("it is nested too deep") from error

    def search(self, path: str) -> bool:
        """Test for a match anywhere in a path."""
        return self.match(path) is not None

    def match(self, path: str) -> str | None:
        """Return the leftmost match in a path (the longest at that position), or None.

        Args:
          path: parameter path.

        Returns:
          The matched part, or None.

        Raises:
          RecipeError: the path is longer than `MAX_PATH`, or the search, alone or with others
            inside `shared_steps`, exceeds its step limit.
        """
        if len(path) > MAX_PATH:
            raise RecipeError(f"a path of {len(path)} characters; the limit is {MAX_PATH}")
        if path not in self._known:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[path] = self._match(path)
        return self._known[path]

    def _match(self, path: str) -> str | None:
        text = _Text(path, self.text)
        for start in range(len(path) + 1):
            text.count(1)
            if ends := self._ends(text, start):
                return path[start : ends.bit_length() - 1]
        return None


@functools.lru_cache(maxsize=256)
def compiled(pattern: str | None) -> Pattern:
    """Compile an expression with a cache; None matches everything."""
    return Pattern(pattern or "")


class _Text:
    """A path with cached end positions per part and start position."""

    def __init__(self, letters: str, pattern: str) -> None:
        self.letters, self._pattern = letters, pattern
        self.known: dict[tuple[int, int], int] = {}
        self._counters = [_Work(_MAX_STEPS)]
        if (shared := _SHARED.get()) is not None:
            self._counters.append(shared)

    def count(self, steps: int) -> None:
        for work in self._counters:
            work.steps += steps
            if work.steps > work.limit:
                shown = self._pattern if len(self._pattern) <= 60 else f"{self._pattern[:60]}…"
                raise RecipeError(
                    f"searching for the pattern {shown!r} takes too long at {self.letters[:60]!r}; "
                    "use fewer repeats, or fewer and shorter patterns"
                )


def _positions(bits: int) -> list[int]:
    positions = []
    while bits:
        lowest = bits & -bits
        positions.append(lowest.bit_length() - 1)
        bits ^= lowest
    return positions


def _remembered(ends: _Ends) -> _Ends:
    def once(text: _Text, start: int) -> int:
        key = (id(once), start)
        if key not in text.known:
            text.known[key] = ends(text, start)
        return text.known[key]

    return once


def _sequence(items: Any, ignore_case: bool) -> _Ends:
    parts = [_part(operation, argument, ignore_case) for operation, argument in items]

    def ends(text: _Text, start: int) -> int:
        now = 1 << start
        for part in parts:
            if not now:
                break
            now = _union(part, text, now)
        return now

    return _remembered(ends)


def _union(part: _Ends, text: _Text, starts: int) -> int:
    if isinstance(part, _Letters):
        text.count(1)
        return part.after(text, starts)
    ends, positions = 0, _positions(starts)
    text.count(len(positions))
    for start in positions:
        ends |= part(text, start)
    return ends


def _part(operation: Any, argument: Any, ignore_case: bool) -> _Ends:
    if operation in (sre.LITERAL, sre.NOT_LITERAL, sre.IN, sre.ANY):
        return _letter(operation, argument, ignore_case)
    if operation is sre.BRANCH:
        branches = [_sequence(items, ignore_case) for items in argument[1]]

        def any_of(text: _Text, start: int) -> int:
            text.count(len(branches))
            return _joined(branch(text, start) for branch in branches)

        return any_of
    if operation is sre.SUBPATTERN:
        _, added, removed, items = argument
        if added or removed:
            raise ValueError("flags for a part of the expression are not supported")
        return _sequence(items, ignore_case)
    if operation in (sre.MAX_REPEAT, sre.MIN_REPEAT):
        low, high, items = argument
        unbounded = high is sre.MAXREPEAT
        if len(items) == 1 and low <= 1 and (unbounded or high == 1):
            letter = _part(items[0][0], items[0][1], ignore_case)
            if isinstance(letter, _Letters):
                return _Letters(letter.matches, low == 1, unbounded)
        return _repeat(int(low), int(high), _sequence(items, ignore_case))
    if operation is sre.AT:
        return _anchor(argument)
    if operation in (sre.ASSERT, sre.ASSERT_NOT):
        direction, items = argument
        back = items.getwidth()[0] if direction < 0 else 0
        return _look(_sequence(items, ignore_case), back, direction < 0, operation is sre.ASSERT)
    if operation is sre.FAILURE:
        # Python 3.13 parses `(?!)`, which matches nothing, as this.
        return lambda text, start: 0
    raise ValueError(f"{str(operation).lower()} is not supported")


class _Letters:
    """A letter, an optional letter or a run of letters, matched at all positions at once."""

    def __init__(
        self, matches: Callable[[str], bool], needed: bool = True, many: bool = False
    ) -> None:
        self.matches, self._needed, self._many = matches, needed, many

    def __call__(self, text: _Text, start: int) -> int:
        return self.after(text, 1 << start)

    def after(self, text: _Text, starts: int) -> int:
        key = (id(self), -1)
        if key not in text.known:
            text.count(1 + len(text.letters) // 4)
            fits = (1 << at for at, letter in enumerate(text.letters) if self.matches(letter))
            text.known[key] = sum(fits)
        fitting = text.known[key]
        if self._many:
            # Adding propagates a carry from each start to the end of its run of matching letters.
            reached = (((starts & fitting) + fitting) ^ fitting) | starts
            return (reached & fitting) << 1 if self._needed else reached
        once = (starts & fitting) << 1
        return once if self._needed else starts | once


def _joined(bitsets: Any) -> int:
    bits = 0
    for more in bitsets:
        bits |= more
    return bits


def _repeat(low: int, high: int, body: _Ends) -> _Ends:
    def ends(text: _Text, start: int) -> int:
        now, count = 1 << start, 0
        # The set of positions reaches a fixed point after at most one round per letter, even if
        # `low` is large.
        while count < low and now:
            after = _union(body, text, now)
            if after == now:
                break
            now, count = after, count + 1
        reached, count = now, low
        while now and count < high:
            now = _union(body, text, now) & ~reached
            reached, count = reached | now, count + 1
        return reached

    return _remembered(ends)


def _look(part: _Ends, back: int, behind: bool, wanted: bool) -> _Ends:
    def ends(text: _Text, start: int) -> int:
        if behind:
            matches = start >= back and part(text, start - back) >> start & 1
        else:
            matches = part(text, start)
        return (1 << start) if bool(matches) == wanted else 0

    return ends


def _anchor(code: Any) -> _Ends:
    def holds(letters: str, start: int) -> bool:
        if code in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
            return start == 0
        if code is sre.AT_END:
            return letters[start:] in ("", "\n")
        if code is sre.AT_END_STRING:
            return start == len(letters)
        before = start > 0 and _is_word(letters[start - 1])
        after = start < len(letters) and _is_word(letters[start])
        return (before != after) == (code is sre.AT_BOUNDARY)

    known = (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING, sre.AT_END, sre.AT_END_STRING)
    if code not in (*known, sre.AT_BOUNDARY, sre.AT_NON_BOUNDARY):
        raise ValueError(f"{str(code).lower()} is not supported")
    return lambda text, start: (1 << start) if holds(text.letters, start) else 0


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


_CATEGORIES = {
    sre.CATEGORY_DIGIT: str.isdecimal,
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_WORD: _is_word,
    sre.CATEGORY_NOT_DIGIT: lambda letter: not letter.isdecimal(),
    sre.CATEGORY_NOT_SPACE: lambda letter: not letter.isspace(),
    sre.CATEGORY_NOT_WORD: lambda letter: not _is_word(letter),
}


def _letter(operation: Any, argument: Any, ignore_case: bool) -> _Letters:
    if operation is sre.IN:
        negated = argument[0][0] is sre.NEGATE
        tests = [_test(*item) for item in argument if item[0] is not sre.NEGATE]
    elif operation is sre.ANY:
        negated, tests = True, [_test(sre.LITERAL, ord("\n"))]
    else:
        negated, tests = operation is sre.NOT_LITERAL, [_test(sre.LITERAL, argument)]

    def matches(letter: str) -> bool:
        cases = {letter, letter.lower(), letter.upper()} if ignore_case else {letter}
        return any(test(case) for test in tests for case in cases if len(case) == 1) != negated

    return _Letters(matches)


def _test(operation: Any, argument: Any) -> Callable[[str], bool]:
    if operation is sre.LITERAL:
        return lambda letter: ord(letter) == argument
    if operation is sre.RANGE:
        return lambda letter: argument[0] <= ord(letter) <= argument[1]
    if operation is sre.CATEGORY and argument in _CATEGORIES:
        return _CATEGORIES[argument]
    raise ValueError(f"{str(operation).lower()} is not supported in a class")
