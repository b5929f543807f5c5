"""A check of untrusted regular expressions before use.

Backtracking engines can take polynomial or exponential time, if repetitions can divide the same
characters in several ways. The check analyzes the structure of an expression; accepted expressions
take at most quadratic time in the length of the text.
"""

import re
import string
from collections.abc import Callable
from dataclasses import dataclass

MAX_LENGTH = 4096
MAX_NESTING = 24
MAX_REPEATS = 1000
# Maximum of repeats of a group that can match in several ways, as in `(?:ab?){1,3}`.
FEW = 3
GROUP = re.compile(r"\((?:\?(?P<kind><=|<!|[:=!>]|P?<[A-Za-z_]\w*>|[imsxaLu-]*:|[imsx-]+\)|))?")
REPEAT = re.compile(r"(?:([*+?])|\{(\d{0,6})(,?)(\d{0,6})\})([?+]?)")
# Characters to compare two sets, in addition to those of the expression.
SAMPLES = (
    *(string.ascii_letters + string.digits + string.punctuation + " \t\n\r\x0b\x00\x7f"),
    *"\u00a0\u00df\u00e9\u0130\u0301\u0416\u05d0\u0661\u0939\u093f\u0e01\u1100\u2028\u200d\u3042",
    *"\u4e2d\uac00\uff21\uff10\u2160\u00b2\u20ac\u00ab\u2014\u02b0\u01c5\U0001f600\ue000",
)


class PatternError(ValueError):
    """Raised when a regular expression may take unbounded time, or is not understood."""


@dataclass
class _Item:
    """An item of a sequence.

    Attributes:
      source: pattern of a single character; None for a group.
      lowest: minimum of repeats.
      highest: maximum of repeats; None for no limit.
      several: True if the item can match the same text in several ways.
      endless: True if the item contains an unlimited repeat.
      repeats: maximum of repeats, including nested ones.
      asserts: True if the item consumes nothing and can fail.
      fails: False if the item cannot cause backtracking.
    """

    source: str | None = None
    lowest: int = 1
    highest: int | None = 1
    several: bool = False
    endless: bool = False
    repeats: int = 1
    asserts: bool = False
    fails: bool = True


def check_pattern(pattern: str, matches: Callable[[str, str], bool] | None = None) -> None:
    """Refuse an expression that can take more than quadratic time.

    Args:
      pattern: expression in the common syntax of Python's `re` and Oniguruma, with `\\p{…}`.
      matches: function that tests a one-character pattern against a character; None uses `re`.

    Raises:
      PatternError: a repeat is repeated, adjacent repeats match the same characters before an item
        that can fail, there is a back reference, a count is large, or the expression is not
        supported.
    """
    if len(pattern) > MAX_LENGTH:
        raise PatternError(f"has {len(pattern)} characters; the limit is {MAX_LENGTH}")
    parser = _Parser(pattern, matches or _python_matches)
    parser.alternatives(0)
    if parser.at < len(pattern):
        raise PatternError(f"has a ')' at {parser.at} that closes nothing")


def _python_matches(source: str, character: str) -> bool:
    return re.fullmatch(source, character) is not None


class _Parser:
    def __init__(self, pattern: str, matches: Callable[[str, str], bool]) -> None:
        self.pattern, self.at, self._matches = pattern, 0, matches
        self._samples = frozenset(SAMPLES) | frozenset(pattern)
        self._sets: dict[str, frozenset[str]] = {}

    def alternatives(self, depth: int) -> _Item:
        """Parse up to the end of a group; return the group as one item."""
        if depth > MAX_NESTING:
            raise PatternError(f"is nested deeper than {MAX_NESTING}")
        sequences = [self._sequence(depth)]
        while self.pattern.startswith("|", self.at):
            self.at += 1
            sequences.append(self._sequence(depth))
        return _Item(
            several=len(sequences) > 1 or any(x.several for x in sequences),
            endless=any(x.endless for x in sequences),
            repeats=max(x.repeats for x in sequences),
            lowest=min(x.lowest for x in sequences),
        )

    def _sequence(self, depth: int) -> _Item:
        items: list[_Item] = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            items.append(self._repeated(self._atom(depth)))
        self._check_row(items)
        return _Item(
            several=any(x.several or x.lowest != x.highest for x in items),
            endless=any(x.endless for x in items),
            repeats=max((x.repeats for x in items), default=1),
            lowest=int(any(x.lowest for x in items)),
        )

    def _atom(self, depth: int) -> _Item:
        start, character = self.at, self.pattern[self.at]
        if character == "(":
            return self._group(depth)
        if character in "*+?":
            raise PatternError(f"repeats nothing at {start}")
        if character == "[":
            self._class()
        elif character == "\\":
            self._escape()
        else:
            self.at += 1
        source = self.pattern[start : self.at]
        anchor = source in ("^", "$", r"\A", r"\Z", r"\z", r"\b", r"\B", r"\G")
        return _Item(lowest=0, highest=0, asserts=True) if anchor else _Item(source)

    def _group(self, depth: int) -> _Item:
        opening = GROUP.match(self.pattern, self.at)
        kind = opening["kind"] if opening else ""
        if opening is None or kind == "":
            raise PatternError(f"has a group at {self.at} that is not understood")
        self.at = opening.end()
        if kind is not None and kind.endswith(")"):
            # Flags for the remaining expression.
            return _Item(lowest=0, highest=0, fails=False)
        item = self.alternatives(depth + 1)
        if not self.pattern.startswith(")", self.at):
            raise PatternError("has a group that is not closed")
        self.at += 1
        if kind in ("=", "!", "<=", "<!"):
            return _Item(lowest=0, highest=0, endless=item.endless, asserts=True)
        return item

    def _class(self) -> None:
        """Skip `[…]`, which may be nested."""
        depth, first = 0, True
        while self.at < len(self.pattern):
            character = self.pattern[self.at]
            if character == "\\":
                self.at += 1
            elif character == "[":
                depth += 1
                if self.pattern.startswith("^", self.at + 1):
                    self.at += 1
                self.at += 1
                first = True
                continue
            elif character == "]" and not first:
                depth -= 1
            self.at += 1
            first = False
            if not depth:
                return
        raise PatternError("has a set that is not closed")

    def _escape(self) -> None:
        escaped = self.pattern[self.at + 1 : self.at + 2]
        if not escaped:
            raise PatternError("ends with a backslash")
        if escaped in "123456789kg":
            raise PatternError("has a back reference")
        self.at += 2
        following = re.compile(r"\{[^{}]*\}").match(self.pattern, self.at)
        if escaped in "pPx" and following:
            self.at = following.end()
        elif escaped in "xuU":
            self.at += {"x": 2, "u": 4, "U": 8}[escaped]

    def _repeated(self, item: _Item) -> _Item:
        while match := REPEAT.match(self.pattern, self.at):
            sign, low, comma, high, mode = match.groups()
            if sign is None and not low and not high:
                return item
            self.at = match.end()
            if sign:
                lowest, highest = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
            else:
                lowest = int(low or 0)
                highest = (int(high) if high else None) if comma else lowest
            if max(lowest, highest or 0) > MAX_REPEATS:
                raise PatternError(f"repeats something more than {MAX_REPEATS} times")
            many = highest is None or highest > FEW
            nested = item.several or item.highest is None or item.lowest != item.highest
            nested = nested if item.source is None else item.highest != 1
            if item.highest == 0:
                raise PatternError("repeats an item that consumes nothing")
            if many and nested:
                raise PatternError(
                    "repeats an item that can match in several ways, as in (a+)+ or (a|a)*"
                )
            repeats = item.repeats * max(highest or 1, lowest, 1)
            if repeats > MAX_REPEATS:
                raise PatternError(f"repeats something more than {MAX_REPEATS} times")
            item = _Item(
                source=item.source,
                lowest=item.lowest * lowest,
                highest=item.highest * highest if item.highest and highest else None,
                several=item.several or lowest != highest,
                endless=item.endless or highest is None,
                repeats=repeats,
                # Possessive repeats do not backtrack.
                fails=item.fails and mode != "+",
            )
        return item

    def _check_row(self, items: list[_Item]) -> None:
        """Refuse adjacent unlimited repeats of equal characters before an item that can fail."""
        endless: list[_Item] = []
        crossed = False
        for item in items:
            if item.endless and item.fails:
                crossing = [x for x in endless if self._overlap(x, item)]
                if len(crossing) > 1 or (crossing and (crossed or item.asserts)):
                    raise PatternError("has more than two repetitions of the same characters")
                crossed = crossed or bool(crossing)
                endless.append(item)
            elif item.lowest or item.asserts:
                if crossed and item.fails:
                    raise PatternError(
                        "has two repetitions of the same characters before an item that can fail"
                    )
                endless = [x for x in endless if self._overlap(x, item)]

    def _overlap(self, one: _Item, other: _Item) -> bool:
        first, second = self._set(one), self._set(other)
        return first is None or second is None or bool(first & second)

    def _set(self, item: _Item) -> frozenset[str] | None:
        if item.source is None:
            return None
        if item.source not in self._sets:
            try:
                characters = (c for c in self._samples if self._matches(item.source, c))
                self._sets[item.source] = frozenset(characters)
            except Exception as error:
                raise PatternError(f"is not understood: {error}") from error
        return self._sets[item.source]
