"""Filters and tests of templates, with the names and results of Jinja's."""

import functools
import itertools
import json
import math
import re
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import TemplateAssertionError

from glm_edge.preprocess.sandbox.budget import OBJECT_BYTES, Keys, TemplateLimitError
from glm_edge.preprocess.sandbox.objects import (
    ITERABLE,
    Cycler,
    Function,
    Group,
    Joiner,
    Macro,
    Safe,
)

if TYPE_CHECKING:
    from glm_edge.preprocess.sandbox.interpreter import Interpreter

WORD_BREAKS = re.compile(r"([-\s({\[<]+)")
MAX_INDENT = 64
MAX_NAME = 64
NUMBERS = (int, float)
SERIES = (list, tuple)
MAX_DIGITS = 300
MAX_GROUPS = 100_000
ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&#39;", '"': "&#34;"}
ALIASES = {
    "d": "default",
    "e": "escape",
    "count": "length",
    "==": "eq",
    "equalto": "eq",
    "!=": "ne",
    ">": "gt",
    "greaterthan": "gt",
    ">=": "ge",
    "<": "lt",
    "lessthan": "lt",
    "<=": "le",
}
ORDERS = {"eq": "eq", "ne": "ne", "gt": "gt", "ge": "gteq", "lt": "lt", "le": "lteq", "in": "in"}


class Filters:
    """Filters and tests of one rendering."""

    def __init__(self, interpreter: "Interpreter") -> None:
        """Bind the filters to an interpreter.

        Args:
          interpreter: interpreter of the rendering, which compares values and counts steps.
        """
        self._run, self._budget = interpreter, interpreter.budget

    def apply(self, name: str, value: Any, args: list[Any], kwargs: Mapping[str, Any]) -> Any:
        """Apply a filter.

        Raises:
          TemplateAssertionError: the name of the filter is unknown.
        """
        self._budget.step()
        function = self._named("filter", name)
        if function is None:
            raise TemplateAssertionError(f"no filter named {name[:80]!r}", 0)
        return function(value, *args, **kwargs)

    def test(self, name: str, value: Any, args: list[Any], kwargs: Mapping[str, Any]) -> bool:
        """Apply a test.

        Raises:
          TemplateAssertionError: the name of the test is unknown.
        """
        self._budget.step()
        test = self._named("test", name)
        if test is None:
            shown = name[:80] if isinstance(name, str) else type(name).__name__
            raise TemplateAssertionError(f"no test named {shown!r}", 0)
        return test(value, *args, **kwargs)

    def _named(self, kind: str, name: Any) -> Callable[..., Any] | None:
        """Look up a filter or test by name; the name may be any value of a template."""
        if not isinstance(name, str) or len(name) > MAX_NAME:
            return None
        name = ALIASES.get(name, name)
        if kind == "test" and name in ORDERS:
            return functools.partial(self._run.compare, ORDERS[name])
        return getattr(self, f"_{kind}_{name}", None)

    def _listed(self, value: Any) -> list[Any]:
        items = list(self._run.iterate(value))
        self._budget.items(len(items))
        return items

    def _text(self, value: Any) -> str:
        return value if isinstance(value, str) else self._run.show(value)

    def _getter(self, path: Any, default: Any = None) -> Callable[[Any], Any]:
        if isinstance(path, str):
            self._budget.items(len(path))
        parts = path.split(".") if isinstance(path, str) else [path]
        parts = [int(x) if isinstance(x, str) and x.isdecimal() else x for x in parts]

        def read(item: Any) -> Any:
            for part in parts:
                self._budget.step()
                item = self._run.item(item, part)
                if default is not None and isinstance(item, jinja2.Undefined):
                    item = default
            return item

        return read

    def _sort_key(self, attribute: Any, case_sensitive: bool) -> Callable[[Any], Any]:
        if isinstance(attribute, str) and "," in attribute:
            self._budget.items(len(attribute))
            getters = [self._getter(part) for part in attribute.split(",")]
            return lambda item: [self._folded(get(item), case_sensitive) for get in getters]
        if attribute is None:
            return lambda item: self._folded(item, case_sensitive)
        getter = self._getter(attribute)
        return lambda item: self._folded(getter(item), case_sensitive)

    def _folded(self, value: Any, case_sensitive: bool) -> Any:
        value = self._run.comparable(value)
        if case_sensitive or not isinstance(value, str):
            return value
        return self._run.method("lower", value)

    def _sorted(self, items: list[Any], key: Callable[[Any], Any], reverse: bool) -> list[Any]:
        keys = [key(item) for item in items]
        longest = max((len(k) for k in keys if isinstance(k, str | list | tuple | dict)), default=0)
        if any(isinstance(k, list | tuple | dict) for k in keys):
            longest = max(self._size(k) for k in keys) * 64
        self._budget.step(len(items) * len(items).bit_length() * (1 + longest // 64))
        order = sorted(range(len(items)), key=keys.__getitem__, reverse=reverse)
        return [items[index] for index in order]

    def _size(self, value: Any) -> int:
        """Count values and characters, one step each; shared values count repeatedly."""
        self._budget.step()
        if isinstance(value, str):
            self._budget.touch(len(value))
            return 1 + len(value)
        if isinstance(value, SERIES):
            return 1 + sum(map(self._size, value))
        if isinstance(value, dict):
            return 1 + sum(self._size(k) + self._size(v) for k, v in value.items())
        return 1

    # Filters of one value.

    def _filter_abs(self, value: Any) -> Any:
        return abs(value) if type(value) in (int, float, bool) else self._no_number(value)

    def _no_number(self, value: Any) -> Any:
        raise TypeError(f"a number is needed, not {type(value).__name__}")

    def _filter_attr(self, value: Any, name: str) -> Any:
        return self._run._attribute(value, name)

    def _filter_capitalize(self, value: Any) -> str:
        return self._run.method("capitalize", self._text(value))

    def _filter_center(self, value: Any, width: int = 80) -> str:
        return self._run.method("center", self._text(value), width)

    def _filter_default(self, value: Any, default_value: Any = "", boolean: bool = False) -> Any:
        missing = isinstance(value, jinja2.Undefined) or (boolean and not value)
        return default_value if missing else value

    def _filter_escape(self, value: Any) -> str:
        text = self._text(value)
        self._budget.reserve(5 * sum(map(text.count, ESCAPES)))
        marks = self._run.marks
        for character, escape in ESCAPES.items():
            for spelled in {character, marks.hide(character)}:
                text = text.replace(spelled, escape)
        return Safe(self._budget.made(text))

    def _filter_first(self, value: Any) -> Any:
        for item in self._run.iterate(value):
            return item
        return jinja2.Undefined("No first item, sequence was empty.")

    def _filter_float(self, value: Any, default: float = 0.0) -> Any:
        try:
            return float(self._numeral(value))
        except (TypeError, ValueError, OverflowError):
            return default

    def _filter_int(self, value: Any, default: int = 0, base: int = 10) -> Any:
        value = self._numeral(value)
        try:
            if isinstance(value, str):
                return self._budget.number(int(value, base))
            return int(value)
        except (TypeError, ValueError, OverflowError):
            try:
                return int(float(value))
            except (TypeError, ValueError, OverflowError):
                return default

    def _numeral(self, value: Any) -> Any:
        if isinstance(value, str):
            if len(value) > 10 * MAX_DIGITS:
                raise TemplateLimitError(f"reads a number of {len(value)} characters")
            return self._run.plain(value)
        return value if type(value) in (int, float, bool) else None

    def _filter_format(self, value: Any, *args: Any, **kwargs: Any) -> str:
        return self._run.format(self._text(value), kwargs or tuple(args))

    def _filter_indent(
        self, value: str, width: Any = 4, first: bool = False, blank: bool = False
    ) -> str:
        pad = width if isinstance(width, str) else " " * self._narrow(width)
        self._narrow(len(pad))
        text = self._text(value)
        lines = self._run.method("splitlines", text + "\n")
        if blank:
            shown = self._run.join("\n" + pad, lines)
        else:
            head, *others = lines
            indented = [pad + line if line else line for line in others]
            shown = self._run.join("\n", [head, *indented])
        return pad + shown if first else shown

    def _narrow(self, width: Any) -> int:
        if type(width) not in (int, bool) or width > MAX_INDENT:
            raise TemplateLimitError(f"an indent of {self._run.show(width)[:20]} is too wide")
        return width

    def _filter_length(self, value: Any) -> int:
        if isinstance(value, jinja2.Undefined) or type(value) in (str, Safe, list, tuple, dict):
            return len(value)
        if type(value) in (range, type({}.items()), type({}.keys()), type({}.values())):
            return len(value)
        raise TypeError(f"object of type {type(value).__name__!r} has no length")

    def _filter_list(self, value: Any) -> list[Any]:
        if isinstance(value, str):
            self._budget.items(len(value))
        return self._listed(value)

    def _filter_lower(self, value: Any) -> str:
        return self._run.method("lower", self._text(value))

    def _filter_upper(self, value: Any) -> str:
        return self._run.method("upper", self._text(value))

    def _filter_title(self, value: Any) -> str:
        words = self._run.pieces(self._text(value), WORD_BREAKS)
        return self._budget.made("".join(x[0].upper() + x[1:].lower() for x in words))

    def _filter_round(self, value: Any, precision: int = 0, method: str = "common") -> Any:
        if type(value) not in (int, float, bool):
            self._no_number(value)
        if type(precision) not in (int, bool) or abs(precision) > MAX_DIGITS:
            raise TemplateLimitError("rounds to too many digits")
        if method == "common":
            return round(value, precision)
        if method not in ("ceil", "floor"):
            raise ValueError("method must be common, ceil or floor")
        return getattr(math, method)(value * 10**precision) / 10**precision

    def _filter_safe(self, value: Any) -> str:
        return Safe(self._text(value))

    def _filter_string(self, value: Any) -> str:
        return self._text(value)

    def _filter_trim(self, value: Any, chars: str | None = None) -> str:
        return self._run.method("strip", self._text(value), chars)

    def _filter_truncate(
        self,
        value: Any,
        length: int = 255,
        killwords: bool = False,
        end: str = "...",
        leeway: int = 5,
    ) -> str:
        text = self._text(value)
        if len(text) <= length + leeway:
            return text
        text = text[: max(length - len(end), 0)]
        if not killwords:
            text = self._run.method("rsplit", text, " ", 1)[0]
        return self._budget.made(text + end)

    def _filter_urlencode(self, value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError("urlencode accepts strings only")
        self._budget.reserve(12 * len(value))
        self._budget.step(len(value))
        return urllib.parse.quote(self._run.plain(value), safe="/")

    def _filter_wordcount(self, value: Any) -> int:
        text = self._text(value)
        self._budget.step(1 + len(text) // 4)
        return sum(1 for _ in re.finditer(r"\w+", self._run.plain(text)))

    def _filter_replace(self, value: Any, old: str, new: str, count: int | None = None) -> str:
        times = -1 if count is None else count
        return self._run.method("replace", self._text(value), self._text(old), new, times)

    def _filter_tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        pad = 0 if indent is None else self._narrow(len(indent) if type(indent) is str else indent)
        between = separators or ()
        if type(between) not in (list, tuple) or not all(isinstance(x, str) for x in between):
            raise TypeError("separators must be two strings")
        self._narrow(sum(map(len, between)))
        depth, size = self._json_extent(value)
        self._budget.reserve(size * (6 + pad * depth + sum(map(len, between))))
        self._budget.step(size // 16)
        text = json.dumps(
            value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
        )
        if ensure_ascii and not text.isascii():
            # The encoder would escape marks, so they are encoded separately.
            is_mark = self._run.marks.is_mark
            pieces = (c if c.isascii() or is_mark(c) else json.dumps(c)[1:-1] for c in text)
            text = "".join(pieces)
        return self._budget.made(text)

    def _json_extent(self, value: Any) -> tuple[int, int]:
        """Measure the depth of a JSON value and a bound of its characters without indents."""
        self._budget.step()
        if isinstance(value, str):
            self._budget.touch(len(value))
            return 1, 2 + len(value)
        if value is None or isinstance(value, NUMBERS):
            return 1, 25 + (value.bit_length() // 3 if type(value) is int else 0)
        depth, size = 0, 1
        if isinstance(value, dict):
            size += sum(4 + len(self._text(name)) for name in value)
            value = value.values()
        elif not isinstance(value, SERIES):
            raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
        for item in value:
            inner, length = self._json_extent(item)
            depth, size = max(depth, inner), size + length + 2
        return depth + 1, size

    # Filters of several values. Generators of Jinja are iterators here, which can be read once and
    # are always true.

    def _filter_batch(self, value: Any, linecount: int, fill_with: Any = None) -> Iterator[Any]:
        if type(linecount) is not int or not 0 < linecount <= MAX_GROUPS:
            raise TemplateLimitError(f"batches must be of 1 to {MAX_GROUPS} items")
        items = self._listed(value)
        rows = [items[i : i + linecount] for i in range(0, len(items), linecount)]
        if rows and fill_with is not None:
            lacking = linecount - len(rows[-1])
            self._budget.items(lacking)
            rows[-1] += [fill_with] * lacking
        return iter(rows)

    def _filter_slice(self, value: Any, slices: int, fill_with: Any = None) -> Iterator[Any]:
        if type(slices) is not int or not 0 < slices <= MAX_GROUPS:
            raise TemplateLimitError(f"slices must be 1 to {MAX_GROUPS}")
        items = self._listed(value)
        self._budget.items(2 * slices)
        size, longer = divmod(len(items), slices)
        rows, at = [], 0
        for index in range(slices):
            end = at + size + (index < longer)
            row = items[at:end]
            if fill_with is not None and index >= longer:
                row.append(fill_with)
            rows.append(row)
            at = end
        return iter(rows)

    def _filter_dictsort(
        self, value: Any, case_sensitive: bool = False, by: str = "key", reverse: bool = False
    ) -> list[Any]:
        if type(value) is not dict or by not in ("key", "value"):
            raise TypeError("dictsort reads a dict, by 'key' or 'value'")
        items = self._listed(value.items())
        index = 0 if by == "key" else 1
        return self._sorted(items, lambda x: self._folded(x[index], case_sensitive), reverse)

    def _filter_groupby(
        self, value: Any, attribute: Any, default: Any = None, case_sensitive: bool = False
    ) -> list[Any]:
        getter = self._getter(attribute, default)
        items = self._listed(value)

        def key(item: Any) -> Any:
            return self._folded(getter(item), case_sensitive)

        ordered = self._sorted(items, key, False)
        groups = [list(group) for _, group in itertools.groupby(ordered, key)]
        return [Group((getter(group[0]), group)) for group in groups]

    def _filter_items(self, value: Any) -> Iterator[Any]:
        if isinstance(value, jinja2.Undefined):
            return iter([])
        if type(value) is not dict:
            raise TypeError("Can only get item pairs from a mapping.")
        return iter(self._listed(value.items()))

    def _filter_join(self, value: Any, d: str = "", attribute: Any = None) -> str:
        items = self._listed(value)
        if attribute is not None:
            items = list(map(self._getter(attribute), items))
        if any(isinstance(item, Safe) for item in (d, *items)):
            raise TypeError("a string marked as safe cannot be joined")
        return self._run.join(self._text(d), [self._text(item) for item in items])

    def _filter_last(self, value: Any) -> Any:
        if type(value) not in (str, Safe, list, tuple, range, dict):
            raise TypeError(f"{type(value).__name__!r} object is not reversible")
        for item in reversed(value):
            return item
        return jinja2.Undefined("No last item, sequence was empty.")

    def _filter_map(self, value: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        if not args and "attribute" in kwargs:
            attribute, default = kwargs.pop("attribute"), kwargs.pop("default", None)
            if kwargs:
                raise TypeError(f"unexpected keyword argument {next(iter(kwargs))!r}")
            function = self._getter(attribute, default)
        else:
            if not args or not isinstance(args[0], str):
                raise TypeError("map requires a filter argument")
            name, *others = args

            def function(item: Any) -> Any:
                return self.apply(name, item, others, kwargs)

        items = self._listed(value)
        return iter([function(item) for item in items])

    def _filter_max(self, value: Any, case_sensitive: bool = False, attribute: Any = None) -> Any:
        return self._extreme(value, max, case_sensitive, attribute)

    def _filter_min(self, value: Any, case_sensitive: bool = False, attribute: Any = None) -> Any:
        return self._extreme(value, min, case_sensitive, attribute)

    def _extreme(self, value: Any, choose: Any, case_sensitive: bool, attribute: Any) -> Any:
        items = self._listed(value)
        if not items:
            return jinja2.Undefined("No aggregated item, sequence was empty.")
        return choose(items, key=self._sort_key(attribute, case_sensitive))

    def _filter_reverse(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._budget.made(value[::-1])
        return iter(self._listed(value)[::-1])

    def _chosen(self, value: Any, args: tuple, kwargs: dict, wanted: bool, by: bool) -> Any:
        getter: Callable[[Any], Any] = lambda item: item  # noqa: E731
        if by:
            if not args:
                raise TypeError("Missing parameter for attribute name")
            getter, args = self._getter(args[0]), args[1:]

        def holds(item: Any) -> bool:
            item = getter(item)
            if not args:
                return bool(item)
            return bool(self.test(args[0], item, list(args[1:]), kwargs))

        return iter([item for item in self._listed(value) if holds(item) == wanted])

    def _filter_reject(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return self._chosen(value, args, kwargs, False, False)

    def _filter_rejectattr(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return self._chosen(value, args, kwargs, False, True)

    def _filter_select(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return self._chosen(value, args, kwargs, True, False)

    def _filter_selectattr(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return self._chosen(value, args, kwargs, True, True)

    def _filter_sort(
        self,
        value: Any,
        reverse: bool = False,
        case_sensitive: bool = False,
        attribute: Any = None,
    ) -> list[Any]:
        key = self._sort_key(attribute, case_sensitive)
        return self._sorted(self._listed(value), key, reverse)

    def _filter_sum(self, value: Any, attribute: Any = None, start: Any = 0) -> Any:
        items = self._listed(value)
        getter = (lambda item: item) if attribute is None else self._getter(attribute)
        for item in items:
            start = self._run.compute(nodes.Add, start, getter(item))
        return start

    def _filter_unique(
        self, value: Any, case_sensitive: bool = False, attribute: Any = None
    ) -> Iterator[Any]:
        key = self._sort_key(attribute, case_sensitive)
        firsts: dict[Any, Any] = {}
        keys = Keys(self._budget)
        for item in self._listed(value):
            self._budget.reserve(OBJECT_BYTES)
            firsts.setdefault(keys.add(key(item)), item)
        return iter(list(firsts.values()))

    # Tests.

    def _test_boolean(self, value: Any) -> bool:
        return type(value) is bool

    def _test_callable(self, value: Any) -> bool:
        return isinstance(value, Function | Macro | Cycler | Joiner)

    def _test_defined(self, value: Any) -> bool:
        return not isinstance(value, jinja2.Undefined)

    def _test_undefined(self, value: Any) -> bool:
        return isinstance(value, jinja2.Undefined)

    def _test_divisibleby(self, value: Any, num: int) -> bool:
        return self._run.compute(nodes.Mod, value, num) == 0

    def _test_even(self, value: Any) -> bool:
        return self._run.compute(nodes.Mod, value, 2) == 0

    def _test_odd(self, value: Any) -> bool:
        return self._run.compute(nodes.Mod, value, 2) == 1

    def _test_false(self, value: Any) -> bool:
        return value is False

    def _test_true(self, value: Any) -> bool:
        return value is True

    def _test_filter(self, value: Any) -> bool:
        return self._named("filter", value) is not None

    def _test_test(self, value: Any) -> bool:
        return self._named("test", value) is not None

    def _test_float(self, value: Any) -> bool:
        return type(value) is float

    def _test_integer(self, value: Any) -> bool:
        return type(value) is int

    def _test_number(self, value: Any) -> bool:
        return type(value) in (int, float, bool)

    def _test_iterable(self, value: Any) -> bool:
        return isinstance(value, (*ITERABLE, jinja2.Undefined))

    def _test_lower(self, value: Any) -> bool:
        return self._run.method("islower", self._text(value))

    def _test_upper(self, value: Any) -> bool:
        return self._run.method("isupper", self._text(value))

    def _test_mapping(self, value: Any) -> bool:
        return type(value) is dict

    def _test_none(self, value: Any) -> bool:
        return value is None

    def _test_sameas(self, value: Any, other: Any) -> bool:
        return value is other

    def _test_sequence(self, value: Any) -> bool:
        sized = (str, list, tuple, dict, range, jinja2.Undefined)
        return isinstance(value, sized)

    def _test_string(self, value: Any) -> bool:
        return isinstance(value, str)
