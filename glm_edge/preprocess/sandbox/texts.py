"""String methods that treat marks as their characters and count the memory of results."""

import re
import string
from collections.abc import Callable, Sequence
from typing import Any

from glm_edge.preprocess.sandbox.budget import OBJECT_BYTES, Budget, TemplateLimitError
from glm_edge.preprocess.sandbox.marks import Marks

MAX_WIDTH = 1000
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
DIGITS = re.compile(r"\d+")
# Methods that return a value, not a text, without splitting it.
QUESTIONS = (
    "count",
    "endswith",
    "find",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "islower",
    "isnumeric",
    "isspace",
    "istitle",
    "isupper",
    "rfind",
    "rindex",
    "startswith",
)
SEARCHES = ("count", "find", "index", "rfind", "rindex")
CHANGES = ("capitalize", "casefold", "lower", "swapcase", "title", "upper")
PADDINGS = ("center", "ljust", "rjust", "zfill")
DIRECTIVE = re.compile(
    r"%(?:\((?P<name>[^()]*)\))?(?P<flags>[-+ #0]*+)(?P<width>\d*+)(?:\.(?P<precision>\d*+))?"
    r"(?P<kind>[diouxXeEfFgGcs%])"
)


class Texts:
    """The methods of `str` that templates may call, by name in `methods`."""

    def __init__(self, budget: Budget, marks: Marks, show: Callable[[Any], str]) -> None:
        """Bind the methods.

        Args:
          budget: budget of the rendering.
          marks: marks of the rendering.
          show: function that returns the text of any value.
        """
        self._budget, self._marks, self._show = budget, marks, show
        self.plain = marks.reveal
        cuts = {
            name: getattr(self, f"_{name}")
            for name in (
                "expandtabs",
                "format",
                "format_map",
                "join",
                "lstrip",
                "partition",
                "removeprefix",
                "removesuffix",
                "replace",
                "rpartition",
                "rsplit",
                "rstrip",
                "split",
                "splitlines",
                "strip",
            )
        }
        self.methods: dict[str, Callable[..., Any]] = {
            **{name: self._question(name) for name in QUESTIONS},
            **{name: self._change(name) for name in CHANGES},
            **{name: self._padding(name) for name in PADDINGS},
            **cuts,
        }

    def _read(self, *texts: Any) -> tuple[Any, ...]:
        """Return texts without marks, and count the steps of reading them."""
        characters = sum(len(text) for text in texts if isinstance(text, str))
        self._budget.touch(4 * characters)
        return tuple(
            self.plain(text)
            if isinstance(text, str)
            else self._read(*text)
            if isinstance(text, tuple)
            else text
            for text in texts
        )

    def _question(self, name: str) -> Callable[..., Any]:
        method = getattr(str, name)

        def answer(text: str, *args: Any) -> Any:
            if name in SEARCHES and args and isinstance(args[0], str):
                self._budget.search(len(text), len(args[0]), backwards=name.startswith("r"))
            # Each element of a tuple of prefixes is compared, including duplicates.
            return method(*self._read(text, *args))

        return answer

    def _change(self, name: str) -> Callable[..., str]:
        method = getattr(str, name)

        def change(text: str) -> str:
            self._budget.touch(16 * len(text))
            return self._budget.made(method(text))

        return change

    def _padding(self, name: str) -> Callable[..., str]:
        method = getattr(str, name)

        def pad(text: str, width: int, *fill: str) -> str:
            self._budget.reserve(4 * max(int(width), 0))
            return self._budget.made(method(text, width, *fill))

        return pad

    def cut(self, text: str, pieces: list[str], gap: int | None) -> list[str]:
        """Split the marked text at the splits of its plain text.

        Args:
          text: text with marks.
          pieces: pieces of the plain text.
          gap: characters between adjacent pieces; None for any count of spaces.

        Returns:
          Pieces of the marked text.
        """
        self._budget.items(len(pieces))
        self._budget.reserve(4 * len(text))
        plain = self.plain(text)
        if plain is text:
            return pieces
        cut, at = [], 0
        for piece in pieces:
            at = plain.index(piece, at) if gap is None else at
            cut.append(text[at : at + len(piece)])
            at += len(piece) + (gap or 0)
        return cut

    def _count_pieces(self, plain: str, separator: str | None, backwards: bool = False) -> None:
        # Counted before the pieces are created.
        if separator:
            self._budget.search(len(plain), len(separator), backwards)
        pieces = plain.count(separator) if separator else len(plain) // 2
        self._budget.reserve(pieces * OBJECT_BYTES // 2)

    def _split(self, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
        plain, sep = self._read(text, sep)
        self._count_pieces(plain, sep)
        return self.cut(text, plain.split(sep, maxsplit), None if sep is None else len(sep))

    def _rsplit(self, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
        plain, sep = self._read(text, sep)
        self._count_pieces(plain, sep, backwards=True)
        return self.cut(text, plain.rsplit(sep, maxsplit), None if sep is None else len(sep))

    def _splitlines(self, text: str, keepends: bool = False) -> list[str]:
        plain, _ = self._read(text, "")
        self._budget.reserve(sum(map(plain.count, LINE_ENDS)) * OBJECT_BYTES // 2)
        lines = plain.splitlines(True)
        cut = self.cut(text, lines, 0)
        if keepends:
            return cut
        lengths = (len(line.splitlines()[0]) for line in lines)
        return [line[:length] for line, length in zip(cut, lengths, strict=True)]

    def _partition(self, text: str, sep: str) -> tuple[str, str, str]:
        return self._cut_at(text, self._read(text, sep), str.find, len(text))

    def _rpartition(self, text: str, sep: str) -> tuple[str, str, str]:
        return self._cut_at(text, self._read(text, sep), str.rfind, 0)

    def _cut_at(
        self, text: str, reading: Sequence[str], find: Callable[..., int], missing: int
    ) -> tuple[str, str, str]:
        plain, sep = reading
        if not sep:
            raise ValueError("empty separator")
        self._budget.reserve(4 * len(text))
        self._budget.search(len(text), len(sep), backwards=find is str.rfind)
        at = find(plain, sep)
        if at < 0:
            return text[:missing], "", text[missing:]
        return text[:at], text[at : at + len(sep)], text[at + len(sep) :]

    def _strip(self, text: str, chars: str | None = None) -> str:
        return self._lstrip(self._rstrip(text, chars), chars)

    def _lstrip(self, text: str, chars: str | None = None) -> str:
        plain, chars = self._stripped(text, chars)
        return self._budget.made(text[len(plain) - len(plain.lstrip(chars)) :])

    def _rstrip(self, text: str, chars: str | None = None) -> str:
        plain, chars = self._stripped(text, chars)
        return self._budget.made(text[: len(plain.rstrip(chars))])

    def _stripped(self, text: str, chars: str | None) -> tuple[str, str | None]:
        """Return both without marks, and `chars` without duplicates, to count each once."""
        plain, chars = self._read(text, chars)
        if isinstance(chars, str) and len(chars) > 1:
            self._budget.items(len(chars))
            chars = "".join(set(chars))
            self._budget.touch(len(plain) * len(chars))
        return plain, chars

    def _removeprefix(self, text: str, prefix: str) -> str:
        plain, prefix = self._read(text, prefix)
        return self._budget.made(text[len(prefix) :] if plain.startswith(prefix) else text)

    def _removesuffix(self, text: str, suffix: str) -> str:
        plain, suffix = self._read(text, suffix)
        ends = suffix and plain.endswith(suffix)
        return self._budget.made(text[: len(text) - len(suffix)] if ends else text)

    def _replace(self, text: str, old: str, new: str, count: int = -1) -> str:
        plain, target = self._read(text, old)
        self._budget.search(len(plain), len(target))
        times = plain.count(target)
        times = min(times, count) if count >= 0 else times
        self._budget.reserve(times * 4 * max(len(new) - len(old), 0))
        if plain is text:
            return self._budget.made(text.replace(target, new, count))
        pieces, at = [], 0
        self._budget.items(times)
        if not target:
            return self._budget.made(text.replace("", new, count))
        for _ in range(times):
            end = plain.index(target, at)
            pieces += [text[at:end], new]
            at = end + len(target)
        return self._budget.made("".join([*pieces, text[at:]]))

    def _expandtabs(self, text: str, tabsize: int = 8) -> str:
        self._budget.reserve(4 * text.count("\t") * max(int(tabsize), 0))
        return self._budget.made(text.expandtabs(tabsize))

    def _join(self, text: str, items: Any) -> str:
        items = list(items)
        if not all(isinstance(item, str) for item in items):
            raise TypeError("only strings can be joined")
        self.check_join(text, items)
        return self._budget.made(text.join(items))

    def check_join(self, separator: str, items: list[str]) -> None:
        """Count the memory of joining texts, before joining."""
        self._budget.items(len(items))
        length = len(separator) * len(items) + sum(map(len, items))
        self._budget.reserve(length)

    def _format_map(self, text: str, values: Any) -> str:
        return self._format(text, **values)

    def _format(self, text: str, *args: Any, **kwargs: Any) -> str:
        pieces, automatic = [], 0
        for literal, name, spec, conversion in string.Formatter().parse(text):
            pieces.append(literal)
            if name is None or spec is None:
                continue
            if not name:
                name, automatic = str(automatic), automatic + 1
            if not re.fullmatch(r"\w+", name) or "{" in spec or conversion not in (None, "s"):
                raise TemplateLimitError(f"format field {{{name}}} is more than a name")
            if any(len(digits) > 4 or int(digits) > MAX_WIDTH for digits in DIGITS.findall(spec)):
                raise TemplateLimitError(f"format {spec!r} is wider than {MAX_WIDTH}")
            value = args[int(name)] if name.isdecimal() else kwargs[name]
            if type(value) not in (int, float, bool) or conversion:
                value = self._show(value)
            self._budget.step()
            pieces.append(self._budget.made(format(value, spec)))
        self.check_join("", pieces)
        return self._budget.made("".join(pieces))

    def percent(self, text: str, values: Any) -> str:
        """Format as `text % values` does."""
        pieces, at, used = [], 0, 0
        arguments = values if isinstance(values, tuple) else (values,)
        while (start := text.find("%", at)) >= 0:
            directive = DIRECTIVE.match(text, start)
            if directive is None:
                raise ValueError(f"unsupported format at character {start}")
            sizes = (directive["width"], directive["precision"] or "")
            if any(len(digits) > 4 or int(digits or 0) > MAX_WIDTH for digits in sizes):
                raise TemplateLimitError(f"format {directive.group()[:40]!r} is too wide")
            pieces.append(text[at:start])
            at = directive.end()
            if directive["kind"] == "%":
                pieces.append("%")
                continue
            if directive["name"] is not None:
                value = values[directive["name"]]
            elif used < len(arguments):
                value, used = arguments[used], used + 1
            else:
                raise TypeError("not enough values for a format")
            if directive["kind"] == "s":
                value = self._show(value)
            elif type(value) not in (int, float, bool, str):
                raise TypeError(f"%{directive['kind']} needs a number")
            shape = directive.group()
            if directive["name"] is not None:
                shape = shape.replace(f"({directive['name']})", "", 1)
            self._budget.step()
            pieces.append(self._budget.made(shape % (value,)))
        if used < len(arguments) and not isinstance(values, dict):
            raise TypeError("not all values are used by a format")
        pieces.append(text[at:])
        self.check_join("", pieces)
        return self._budget.made("".join(pieces))
