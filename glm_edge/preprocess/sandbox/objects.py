"""Objects that a template creates: scopes, loops, macros, namespaces."""

from collections.abc import Callable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError

from glm_edge.preprocess.sandbox.budget import Budget

MISSING = object()
ITERABLE: tuple[type, ...] = (
    str,
    list,
    tuple,
    dict,
    range,
    type({}.items()),
    type({}.keys()),
    type({}.values()),
    type(iter([])),
)


class Safe(str):
    """Text from the filters `safe` and `escape`, which can be printed, split and compared."""

    __slots__ = ()


GROUP_FIELDS = ("grouper", "list")


class Group(tuple):
    """A value and its items, from the filter `groupby`."""

    __slots__ = ()


class Scope:
    """Names of a block, with a link to the enclosing scope."""

    __slots__ = ("_outer", "values")

    def __init__(self, values: dict[str, Any], outer: "Scope | None" = None) -> None:
        """Create a scope.

        Args:
          values: values by name.
          outer: enclosing scope, for names that are not in `values`.
        """
        self.values, self._outer = values, outer

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a name."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope._outer
        return default


class Function:
    """A function that a template may call."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        """Wrap a function."""
        self.name, self._function = name, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


class Macro:
    """A macro, or the body of a `call` block."""

    def __init__(
        self, name: str, node: nodes.Macro | nodes.CallBlock, scope: Scope, run: Callable[..., str]
    ):
        """Create a macro.

        Args:
          name: name of the macro.
          node: arguments, defaults and body.
          scope: scope of the definition.
          run: function of the interpreter that runs macros.
        """
        self.name, self.node, self.scope, self._run = name, node, scope, run
        self.arguments = tuple(argument.name for argument in node.args)
        self._names: frozenset[str] | None = None

    def reads(self, name: str) -> bool:
        """Test for a name in the body."""
        if self._names is None:
            inner = (part for child in self.node.body for part in _with_children(child))
            self._names = frozenset(part.name for part in inner if isinstance(part, nodes.Name))
        return name in self._names

    def attributes(self) -> dict[str, Any]:
        """Return the attributes that a template may read."""
        return {"name": self.name, "arguments": self.arguments, "caller": self.reads("caller")}

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return self._run(self, args, kwargs)


def _with_children(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    yield from node.find_all(nodes.Name)


class Namespace:
    """`namespace()`, an object whose fields a template can set."""

    def __init__(self) -> None:
        """Create an empty namespace."""
        self._fields: dict[str, Any] = {}

    def set(self, name: str, value: Any) -> None:
        """Set a field.

        Raises:
          SecurityError: the name begins with an underscore.
        """
        if not isinstance(name, str) or name.startswith("_"):
            raise SecurityError(f"attribute {name!r} of a namespace is not allowed")
        self._fields[name] = value

    def attributes(self) -> dict[str, Any]:
        """Return the fields."""
        return self._fields


class Cycler:
    """`cycler()`, an object that returns its items in turn."""

    def __init__(self, items: tuple[Any, ...]) -> None:
        """Create a cycler.

        Raises:
          RuntimeError: there are no items.
        """
        if not items:
            raise RuntimeError("at least one item has to be provided")
        self._items, self._at = items, 0

    def attributes(self) -> dict[str, Any]:
        """Return what a template may read and call."""
        return {
            "current": self._items[self._at],
            "next": Function("next", self._next),
            "reset": Function("reset", self._reset),
        }

    def _next(self) -> Any:
        current = self._items[self._at]
        self._at = (self._at + 1) % len(self._items)
        return current

    def _reset(self) -> None:
        self._at = 0

    def __call__(self) -> Any:
        raise TypeError("'Cycler' object is not callable")


class Joiner:
    """`joiner()`, which returns an empty text first, and then the separator."""

    def __init__(self, separator: Any) -> None:
        """Create a joiner."""
        self._separator, self._used = separator, False

    def __call__(self) -> Any:
        if self._used:
            return self._separator
        self._used = True
        return ""


class Loop:
    """`loop` inside a for block."""

    def __init__(
        self,
        items: Iterator[Any],
        depth: int,
        recurse: Callable[[Any], str] | None,
        budget: Budget,
        comparable: Callable[[Any], Any],
    ):
        """Create a loop.

        Args:
          items: items of the loop.
          depth: nesting depth of a recursive loop, from 0.
          recurse: function that runs the loop over other items; None if not recursive.
          budget: budget of the rendering.
          comparable: function that returns a value without marks and counts its comparison.
        """
        self._items, self._depth, self._recurse, self._budget = items, depth, recurse, budget
        self._comparable = comparable
        self._index = -1
        self._before = self._current = self._after = MISSING
        self._length: int | None = None
        self._changed: Any = MISSING

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._after is MISSING:
            item = next(self._items)
        else:
            item, self._after = self._after, MISSING
        self._index += 1
        self._before, self._current = self._current, item
        return item

    def _peek(self) -> Any:
        if self._after is MISSING:
            self._after = next(self._items, MISSING)
        return self._after

    def _count(self) -> int:
        if self._length is None:
            remaining = list(self._items)
            self._budget.items(len(remaining))
            self._items = iter(remaining)
            self._length = len(remaining) + self._index + 1 + (self._after is not MISSING)
        return self._length

    def attributes(self) -> "_LoopAttributes":
        """Return the attributes that a template may read, each computed on access."""
        return _LoopAttributes(self)

    def recurse(self, items: Any) -> str:
        """Run a recursive loop over other items."""
        if self._recurse is None:
            raise TypeError("the loop must have the 'recursive' marker to be called recursively")
        return self._recurse(items)

    def _cycle(self, *items: Any) -> Any:
        if not items:
            raise TypeError("no items for cycling given")
        return items[self._index % len(items)]

    def _has_changed(self, *values: Any) -> bool:
        values = self._comparable(values)
        if self._changed == values:
            return False
        self._changed = values
        return True

    def read(self, name: str) -> Any:
        """Return one of `LOOP_NAMES`."""
        undefined = jinja2.Undefined
        match name:
            case "index":
                return self._index + 1
            case "index0":
                return self._index
            case "revindex":
                return self._count() - self._index
            case "revindex0":
                return self._count() - self._index - 1
            case "first":
                return self._index == 0
            case "last":
                return self._peek() is MISSING
            case "length":
                return self._count()
            case "depth":
                return self._depth + 1
            case "depth0":
                return self._depth
            case "previtem":
                first = self._before is MISSING
                return undefined("there is no previous item") if first else self._before
            case "nextitem":
                after = self._peek()
                return undefined("there is no next item") if after is MISSING else after
            case "cycle":
                return Function(name, self._cycle)
            case _:
                return Function(name, self._has_changed)


LOOP_NAMES = (
    *("index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0"),
    *("previtem", "nextitem", "cycle", "changed"),
)


class _LoopAttributes:
    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def __contains__(self, name: str) -> bool:
        return name in LOOP_NAMES

    def __getitem__(self, name: str) -> Any:
        return self._loop.read(name)


def values_of(value: Any) -> Any:
    """Return a value as an iterable for a loop.

    Raises:
      TypeError: templates must not iterate over this type.
    """
    if isinstance(value, ITERABLE) or type(value) is type(reversed([])):
        return value
    raise TypeError(f"{type(value).__name__!r} object is not iterable")
