"""An interpreter of Jinja templates that counts every operation."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateRuntimeError

from glm_edge.preprocess.sandbox.budget import (
    COMPARED_PER_STEP,
    Budget,
    Keys,
    Sink,
    TemplateLimitError,
)
from glm_edge.preprocess.sandbox.filters import Filters
from glm_edge.preprocess.sandbox.marks import Marks
from glm_edge.preprocess.sandbox.objects import (
    GROUP_FIELDS,
    Cycler,
    Function,
    Group,
    Joiner,
    Loop,
    Macro,
    Namespace,
    Safe,
    Scope,
    values_of,
)
from glm_edge.preprocess.sandbox.texts import Texts

MAX_RANGE = 100_000
MAX_POWER_BITS = 1 << 14
MISSING = object()
COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
}
ARITHMETIC = {
    nodes.Add: ("+", operator.add),
    nodes.Sub: ("-", operator.sub),
    nodes.Mul: ("*", operator.mul),
    nodes.Div: ("/", operator.truediv),
    nodes.FloorDiv: ("//", operator.floordiv),
    nodes.Mod: ("%", operator.mod),
    nodes.Pow: ("**", operator.pow),
}
NUMBERS = (int, float, bool)
# Views of a dict that are compared by their contents.
VIEWS: tuple[type, ...] = (type({}.items()), type({}.keys()))
SCALARS = (str, int, float, bool, type(None))


class Interpreter:
    """An interpreter of one rendering of a template's tree.

    Values are JSON values and objects that the template creates. A template can call only
    functions, methods, filters and tests of this package. Python's recursion limit bounds nesting.
    """

    def __init__(self, values: Mapping[str, Any], budget: Budget, marks: Marks) -> None:
        """Prepare a rendering.

        Args:
          values: variables of the template by name. JSON values are not modified; functions must
            return JSON values.
          budget: budget of the rendering.
          marks: marks of untrusted texts.
        """
        self.budget, self.marks, self.plain = budget, marks, marks.reveal
        self._texts = Texts(budget, marks, self.show)
        self._filters = Filters(self)
        constructors: dict[str, Callable[..., Any]]
        constructors = {"dict": self._dict, "range": self._range, "namespace": self._namespace}
        constructors |= {"cycler": self._cycler, "joiner": self._joiner}
        self._globals = Scope(
            {name: Function(name, function) for name, function in constructors.items()}
            | {
                name: Function(name, value) if callable(value) else value
                for name, value in values.items()
            }
        )

    def render(self, template: nodes.Template) -> str:
        """Run a template.

        Args:
          template: tree from `parse`.

        Returns:
          The output.

        Raises:
          jinja2.TemplateError: the template fails, raises an exception, or exceeds its budget.
          Exception: an operation of the template fails, such as a division by zero.
        """
        sink = Sink(self.budget)
        self._run(template.body, Scope({}, self._globals), sink)
        return sink.text()

    # Statements write to a sink. They return the node of a `break` or `continue`, otherwise None.

    def _run(self, body: Iterable[nodes.Node], scope: Scope, sink: Sink) -> nodes.Node | None:
        for node in body:
            self.budget.step()
            run = STATEMENTS.get(type(node))
            if run is None:
                raise SecurityError(f"'{type(node).__name__.lower()}' is not allowed in a template")
            if (signal := run(self, node, scope, sink)) is not None:
                return signal
        return None

    def _run_output(self, node: nodes.Output, scope: Scope, sink: Sink) -> None:
        for child in node.nodes:
            if type(child) is nodes.TemplateData:
                sink.write(child.data)
            else:
                sink.write(self.show(self.evaluate(child, scope)))

    def _run_if(self, node: nodes.If, scope: Scope, sink: Sink) -> nodes.Node | None:
        if self.evaluate(node.test, scope):
            return self._run(node.body, scope, sink)
        for other in node.elif_:
            if self.evaluate(other.test, scope):
                return self._run(other.body, scope, sink)
        return self._run(node.else_, scope, sink)

    def _run_for(self, node: nodes.For, scope: Scope, sink: Sink) -> None:
        self._loop(node, self.evaluate(node.iter, scope), scope, sink, 0)

    def _loop(self, node: nodes.For, items: Any, scope: Scope, sink: Sink, depth: int) -> None:
        def recurse(items: Any) -> str:
            inner = Sink(self.budget)
            self._loop(node, items, scope, inner, depth + 1)
            return inner.text()

        def chosen() -> Iterator[Any]:
            for item in self.iterate(items):
                inner = Scope({}, scope)
                self._assign(node.target, item, inner)
                if node.test is None or self.evaluate(node.test, inner):
                    yield item

        iterator = self.iterate(items) if node.test is None else chosen()
        again = recurse if node.recursive else None
        loop = Loop(iterator, depth, again, self.budget, self.comparable)
        empty = True
        for item in loop:
            empty = False
            inner = Scope({"loop": loop}, scope)
            self._assign(node.target, item, inner)
            if type(self._run(node.body, inner, sink)) is nodes.Break:
                break
        if empty and node.else_:
            self._run(node.else_, Scope({}, scope), sink)

    def _run_break(self, node: nodes.Break, scope: Scope, sink: Sink) -> nodes.Node:
        return node

    def _run_continue(self, node: nodes.Continue, scope: Scope, sink: Sink) -> nodes.Node:
        return node

    def _run_macro(self, node: nodes.Macro, scope: Scope, sink: Sink) -> None:
        scope.values[node.name] = Macro(node.name, node, scope, self._call_macro)

    def _run_callblock(self, node: nodes.CallBlock, scope: Scope, sink: Sink) -> None:
        caller = Macro("caller", node, scope, self._call_macro)
        sink.write(self.show(self._call(node.call, scope, {"caller": caller})))

    def _run_filterblock(self, node: nodes.FilterBlock, scope: Scope, sink: Sink) -> None:
        text = self._captured(node.body, Scope({}, scope))
        sink.write(self.show(self._chain(node.filter, text, scope)))

    def _run_with(self, node: nodes.With, scope: Scope, sink: Sink) -> nodes.Node | None:
        inner = Scope({}, scope)
        for target, value in zip(node.targets, node.values, strict=True):
            self._assign(target, self.evaluate(value, scope), inner)
        return self._run(node.body, inner, sink)

    def _run_scope(self, node: nodes.Scope, scope: Scope, sink: Sink) -> nodes.Node | None:
        return self._run(node.body, Scope({}, scope), sink)

    def _run_assign(self, node: nodes.Assign, scope: Scope, sink: Sink) -> None:
        self._assign(node.target, self.evaluate(node.node, scope), scope)

    def _run_assignblock(self, node: nodes.AssignBlock, scope: Scope, sink: Sink) -> None:
        value: Any = self._captured(node.body, Scope({}, scope))
        if node.filter is not None:
            value = self._chain(node.filter, value, scope)
        self._assign(node.target, value, scope)

    def _captured(self, body: Iterable[nodes.Node], scope: Scope) -> str:
        sink = Sink(self.budget)
        self._run(body, scope, sink)
        return sink.text()

    def _assign(self, target: nodes.Node, value: Any, scope: Scope) -> None:
        if isinstance(target, nodes.Name):
            scope.values[target.name] = value
        elif isinstance(target, nodes.NSRef):
            space = scope.get(target.name)
            if not isinstance(space, Namespace):
                raise TemplateRuntimeError("cannot assign attribute on non-namespace object")
            space.set(target.attr, value)
        elif isinstance(target, nodes.Tuple | nodes.List):
            items = list(self.iterate(value))
            if len(items) != len(target.items):
                raise ValueError(f"{len(items)} values for {len(target.items)} names")
            for part, item in zip(target.items, items, strict=True):
                self._assign(part, item, scope)
        else:
            raise TemplateRuntimeError(f"cannot assign to {type(target).__name__}")

    # Expressions.

    def evaluate(self, node: nodes.Node, scope: Scope) -> Any:
        """Evaluate an expression."""
        self.budget.step()
        evaluator = EXPRESSIONS.get(type(node))
        if evaluator is None:
            raise SecurityError(f"'{type(node).__name__}' is not allowed in a template")
        return evaluator(self, node, scope)

    def _eval_const(self, node: nodes.Const, scope: Scope) -> Any:
        return self.budget.number(node.value)

    def _eval_templatedata(self, node: nodes.TemplateData, scope: Scope) -> str:
        return node.data

    def _eval_name(self, node: nodes.Name, scope: Scope) -> Any:
        value = scope.get(node.name, MISSING)
        return jinja2.Undefined(name=node.name) if value is MISSING else value

    def _eval_tuple(self, node: nodes.Tuple, scope: Scope) -> tuple:
        self.budget.items(len(node.items))
        return tuple(self.evaluate(item, scope) for item in node.items)

    def _eval_list(self, node: nodes.List, scope: Scope) -> list:
        self.budget.items(len(node.items))
        return [self.evaluate(item, scope) for item in node.items]

    def _eval_dict(self, node: nodes.Dict, scope: Scope) -> dict:
        self.budget.items(3 * len(node.items))
        keys = Keys(self.budget)
        return {
            keys.add(self.key(self.evaluate(pair.key, scope))): self.evaluate(pair.value, scope)
            for pair in node.items
        }

    def _eval_condexpr(self, node: nodes.CondExpr, scope: Scope) -> Any:
        if self.evaluate(node.test, scope):
            return self.evaluate(node.expr1, scope)
        if node.expr2 is None:
            return jinja2.Undefined("the inline if-expression evaluated to false, without an else")
        return self.evaluate(node.expr2, scope)

    def _eval_and(self, node: nodes.And, scope: Scope) -> Any:
        return self.evaluate(node.left, scope) and self.evaluate(node.right, scope)

    def _eval_or(self, node: nodes.Or, scope: Scope) -> Any:
        return self.evaluate(node.left, scope) or self.evaluate(node.right, scope)

    def _eval_not(self, node: nodes.Not, scope: Scope) -> bool:
        return not self.evaluate(node.node, scope)

    def _eval_neg(self, node: nodes.Neg, scope: Scope) -> Any:
        return -self._number(self.evaluate(node.node, scope))

    def _eval_pos(self, node: nodes.Pos, scope: Scope) -> Any:
        return +self._number(self.evaluate(node.node, scope))

    def _number(self, value: Any) -> Any:
        if type(value) not in NUMBERS and not isinstance(value, jinja2.Undefined):
            raise TypeError(f"a number is needed, not {type(value).__name__}")
        return value

    def _binary(self, node: nodes.BinExpr, scope: Scope) -> Any:
        first, second = self.evaluate(node.left, scope), self.evaluate(node.right, scope)
        return self.compute(type(node), first, second)

    def compute(self, kind: type[nodes.BinExpr], first: Any, second: Any) -> Any:
        """Apply an operator of `ARITHMETIC` to two values."""
        sign, function = ARITHMETIC[kind]
        if type(first) in NUMBERS and type(second) in NUMBERS:
            integers = float not in (type(first), type(second))
            # The size of a power is checked before it is computed.
            if kind is nodes.Pow and integers and int(first).bit_length() * second > MAX_POWER_BITS:
                raise TemplateLimitError("makes a power of too many digits")
            return self.budget.number(function(first, second))
        if isinstance(first, jinja2.Undefined) or isinstance(second, jinja2.Undefined):
            return function(first, second)
        if kind is nodes.Mod and type(first) is str:
            return self._texts.percent(first, second)
        sequences = (str, list, tuple)
        if kind is nodes.Add and type(first) is type(second) and type(first) in sequences:
            self._reserve(first, len(first) + len(second))
            return first + second
        if kind is nodes.Mul and {type(first), type(second)} & {int, bool}:
            series, times = (second, first) if type(first) in (int, bool) else (first, second)
            if type(series) in sequences:
                self._reserve(series, len(series) * max(times, 0))
                return series * times
        raise TypeError(
            f"unsupported operand types for {sign}: {type(first).__name__!r} and "
            f"{type(second).__name__!r}"
        )

    def _reserve(self, like: Any, length: int) -> None:
        if type(like) is str:
            width = 1 if like.isascii() else 4
            self.budget.reserve(width * length)
        else:
            self.budget.items(length)

    def _eval_concat(self, node: nodes.Concat, scope: Scope) -> str:
        values = [self.evaluate(child, scope) for child in node.nodes]
        if any(type(value) is Safe for value in values):
            raise TypeError("a string marked as safe cannot be joined")
        pieces = list(map(self.show, values))
        self._texts.check_join("", pieces)
        return self.budget.made("".join(pieces))

    def _eval_compare(self, node: nodes.Compare, scope: Scope) -> Any:
        first, result = self.evaluate(node.expr, scope), True
        for operand in node.ops:
            second = self.evaluate(operand.expr, scope)
            result = self.compare(operand.op, first, second)
            if not result:
                return result
            first = second
        return result

    def compare(self, kind: str, first: Any, second: Any) -> Any:
        """Compare two values with an operator such as `eq`, `lt` or `in`."""
        if kind in ("in", "notin"):
            inside = self._contains(first, second)
            return inside if kind == "in" else not inside
        first, second = self.comparable(first), self.comparable(second)
        return COMPARISONS[kind](first, second)

    def comparable(self, value: Any) -> Any:
        """Return a value without marks, after counting the steps of its comparison."""
        kind = type(value)
        if kind is str or kind is Safe:
            self.budget.touch(len(value))
            return self.plain(value)
        self.budget.step()
        if isinstance(value, (list, tuple)):
            self.budget.items(len(value))
            items = [self.comparable(item) for item in value]
            return items if kind is list else tuple(items)
        if kind is dict:
            self.budget.items(3 * len(value))
            keys = Keys(self.budget)
            return {keys.add(self.comparable(k)): self.comparable(v) for k, v in value.items()}
        if kind in VIEWS:
            fields = self.comparable(value.mapping.copy())
            return fields.items() if kind is type({}.items()) else fields.keys()
        return value

    def _contains(self, item: Any, container: Any) -> bool:
        kind = type(container)
        if isinstance(container, str):
            if not isinstance(item, str):
                raise TypeError(f"'in <string>' needs a string, not {type(item).__name__}")
            self.budget.search(len(container), len(item))
            return self.plain(item) in self.plain(container)
        if kind is dict:
            return self._find_key(container, item) is not MISSING
        if kind is range:
            if type(item) is float and item.is_integer():
                # Python compares a float with every element of the range.
                item = int(item)
            return type(item) in (int, bool) and item in container
        if isinstance(container, jinja2.Undefined):
            return False
        wanted = self.comparable(item)
        return any(wanted == self.comparable(other) for other in self.iterate(container))

    def key(self, value: Any) -> Any:
        """Return a value after checking that it can be a key of a dict.

        Raises:
          TypeError: the value cannot be a key.
        """
        if type(value) not in SCALARS:
            if type(value) is not tuple:
                raise TypeError(f"a key cannot be of type {type(value).__name__!r}")
            self.comparable(value)
            hash(value)
        return value

    def _find_key(self, fields: dict, name: Any) -> Any:
        try:
            name = self.key(name)
        except TypeError:
            return MISSING
        if isinstance(name, str):
            self._touch_name(name)
        else:
            self.budget.step(len(fields) // COMPARED_PER_STEP)
        if name in fields:
            return name
        if type(name) is str:
            for other in (self.marks.hide(name), self.plain(name)):
                if other in fields:
                    return other
        return MISSING

    def _touch_name(self, name: str) -> None:
        # Only computed names can be long, and the caller reads them several times.
        if len(name) > 64:
            self.budget.touch(8 * len(name))

    def _eval_getattr(self, node: nodes.Getattr, scope: Scope) -> Any:
        return self.attribute(self.evaluate(node.node, scope), node.attr)

    def _eval_getitem(self, node: nodes.Getitem, scope: Scope) -> Any:
        value = self.evaluate(node.node, scope)
        if isinstance(node.arg, nodes.Slice):
            bounds = [
                None if part is None else self.evaluate(part, scope)
                for part in (node.arg.start, node.arg.stop, node.arg.step)
            ]
            return self._slice(value, slice(*bounds))
        return self.item(value, self.evaluate(node.arg, scope))

    def _slice(self, value: Any, bounds: slice) -> Any:
        if type(value) is range:
            return value[bounds]
        if type(value) not in (str, list, tuple, Safe):
            return self.undefined(value, "a slice")
        length = len(range(*bounds.indices(len(value))))
        self._reserve(value, length)
        return value[bounds]

    def undefined(self, value: Any, name: Any) -> jinja2.Undefined:
        """Return the undefined value of a missing field or attribute."""
        shown = f"{type(value).__name__!r} object has no attribute {str(name)[:80]!r}"
        return jinja2.Undefined(shown, name=name)

    def item(self, value: Any, name: Any) -> Any:
        """Return `value[name]`, or the attribute of that name, as Jinja does."""
        kind = type(value)
        if kind is dict:
            key = self._find_key(value, name)
            if key is not MISSING:
                return value[key]
        elif type(name) in (int, bool) and kind in (str, Safe, list, tuple, range):
            return value[name] if -len(value) <= name < len(value) else self.undefined(value, name)
        if isinstance(name, str):
            return self._attribute(value, self.plain(name))
        return self.undefined(value, self.show(name))

    def attribute(self, value: Any, name: str) -> Any:
        """Return the attribute of a value, or its field of that name, as Jinja does."""
        if type(value) is dict and not hasattr(dict, name):
            key = self._find_key(value, name)
            return self.undefined(value, name) if key is MISSING else value[key]
        return self._attribute(value, name)

    def _attribute(self, value: Any, name: str) -> Any:
        self._touch_name(name)
        if isinstance(value, jinja2.Undefined):
            return value[name]
        kind = type(value)
        if isinstance(value, Namespace | Loop | Macro | Cycler):
            attributes = value.attributes()
            if name in attributes:
                return attributes[name]
            return (
                self._unsafe(value, name) if name.startswith("_") else self.undefined(value, name)
            )
        if kind is Group and name in GROUP_FIELDS:
            return value[GROUP_FIELDS.index(name)]
        methods: Mapping[str, Callable[..., Any]] = {}
        if isinstance(value, str):
            methods = self._texts.methods
        elif kind is dict:
            methods = {
                "get": self._get,
                "items": dict.items,
                "keys": dict.keys,
                "values": dict.values,
                "copy": self._copy,
            }
        elif kind in (list, tuple):
            methods = {"index": self._index, "count": self._count, "copy": self._copy}
        if name in methods:
            method = methods[name]
            return Function(name, lambda *args, **kwargs: method(value, *args, **kwargs))
        if name.startswith("_") or hasattr(kind, name):
            return self._unsafe(value, name)
        return self.undefined(value, name)

    def _unsafe(self, value: Any, name: str) -> jinja2.Undefined:
        hint = f"access to attribute {name!r} of {type(value).__name__!r} object is unsafe"
        return jinja2.Undefined(hint, value, name, SecurityError)

    def _get(self, fields: dict, name: Any, default: Any = None) -> Any:
        key = self._find_key(fields, name)
        return default if key is MISSING else fields[key]

    def _copy(self, value: Any) -> Any:
        self.budget.items(3 * len(value))
        return value.copy() if type(value) is dict else value[:]

    def _index(self, items: Any, wanted: Any) -> int:
        return self.comparable(items).index(self.comparable(wanted))

    def _count(self, items: Any, wanted: Any) -> int:
        return self.comparable(items).count(self.comparable(wanted))

    def _eval_call(self, node: nodes.Call, scope: Scope) -> Any:
        return self._call(node, scope, {})

    def _call(self, node: nodes.Call, scope: Scope, extra: dict[str, Any]) -> Any:
        function = self.evaluate(node.node, scope)
        args, kwargs = self._arguments(node, scope)
        return self.call(function, args, {**kwargs, **extra})

    def _arguments(self, node: Any, scope: Scope) -> tuple[list[Any], dict[str, Any]]:
        args = [self.evaluate(arg, scope) for arg in node.args]
        if node.dyn_args is not None:
            args.extend(self.iterate(self.evaluate(node.dyn_args, scope)))
        kwargs = {pair.key: self.evaluate(pair.value, scope) for pair in node.kwargs}
        if node.dyn_kwargs is not None:
            more = self.evaluate(node.dyn_kwargs, scope)
            if type(more) is not dict or not all(isinstance(name, str) for name in more):
                raise TypeError("an argument after ** must be a mapping with names")
            self.budget.items(3 * len(more))
            kwargs |= more
        return args, kwargs

    def call(self, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Call a function, macro, cycler, joiner or recursive loop."""
        self.budget.step()
        if isinstance(function, Function | Macro | Cycler | Joiner):
            return function(*args, **kwargs)
        if isinstance(function, Loop):
            return function.recurse(*args, **kwargs)
        if isinstance(function, jinja2.Undefined):
            return function()
        raise TypeError(f"{type(function).__name__!r} object is not callable")

    def _call_macro(self, macro: Macro, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        scope = Scope({}, macro.scope)
        if macro.reads("caller") and "caller" not in macro.arguments:
            missing = jinja2.Undefined("No caller defined", name="caller")
            scope.values["caller"] = kwargs.pop("caller", missing)
        defaults = macro.node.defaults
        offset = len(macro.arguments) - len(defaults)
        for index, name in enumerate(macro.arguments):
            if index < len(args):
                if name in kwargs:
                    raise TypeError(f"macro {macro.name!r} got multiple values for {name!r}")
                value = args[index]
            elif name in kwargs:
                value = kwargs.pop(name)
            elif index >= offset:
                value = self.evaluate(defaults[index - offset], scope)
            else:
                value = jinja2.Undefined(f"parameter {name!r} was not provided", name=name)
            scope.values[name] = value
        if macro.reads("varargs"):
            scope.values["varargs"] = tuple(args[len(macro.arguments) :])
        elif len(args) > len(macro.arguments):
            count = len(macro.arguments)
            raise TypeError(f"macro {macro.name!r} takes not more than {count} argument(s)")
        if macro.reads("kwargs"):
            scope.values["kwargs"] = kwargs
        elif kwargs:
            name = next(iter(kwargs))
            raise TypeError(f"macro {macro.name!r} takes no keyword argument {name!r}")
        return self._captured(macro.node.body, scope)

    def _eval_filter(self, node: nodes.Filter, scope: Scope) -> Any:
        if node.node is None:
            raise TemplateRuntimeError("a filter has nothing to filter")
        return self._filtered(node, self.evaluate(node.node, scope), scope)

    def _filtered(self, node: nodes.Filter, value: Any, scope: Scope) -> Any:
        args, kwargs = self._arguments(node, scope)
        return self._filters.apply(node.name, value, args, kwargs)

    def _chain(self, node: nodes.Filter, value: Any, scope: Scope) -> Any:
        """Apply the chained filters of a block, from the innermost."""
        if isinstance(node.node, nodes.Filter):
            value = self._chain(node.node, value, scope)
        return self._filtered(node, value, scope)

    def _eval_test(self, node: nodes.Test, scope: Scope) -> bool:
        value = self.evaluate(node.node, scope)
        args, kwargs = self._arguments(node, scope)
        return self._filters.test(node.name, value, args, kwargs)

    # Values.

    def iterate(self, value: Any) -> Iterator[Any]:
        """Yield the elements of a value, one step each."""
        if not isinstance(value, jinja2.Undefined):
            value = values_of(value)
        for item in value:
            self.budget.step()
            yield item

    def show(self, value: Any) -> str:
        """Return the printed text of a value."""
        kind = type(value)
        if kind is str:
            return value
        if kind in NUMBERS or value is None or isinstance(value, jinja2.Undefined | Safe):
            return str(value)
        return self._quote(value)

    def _quote(self, value: Any) -> str:
        """Return Python's `repr` of a value, with unescaped marks."""
        self.budget.step()
        kind = type(value)
        if isinstance(value, str):
            self.budget.reserve(4 * len(value))
            quoted = repr(str(value))
            return quoted if value.isascii() else self._unescape(quoted)
        if kind in NUMBERS or value is None:
            return str(value)
        if kind is dict:
            pieces = [f"{self._quote(k)}: {self._quote(v)}" for k, v in value.items()]
            return self._bracketed("{", pieces, "}")
        if kind is list:
            return self._bracketed("[", [self._quote(item) for item in value], "]")
        if isinstance(value, tuple):
            pieces = [self._quote(item) for item in value]
            return self._bracketed("(", pieces, ",)" if len(pieces) == 1 else ")")
        if kind is range:
            return repr(value)
        if kind in (type({}.items()), type({}.keys()), type({}.values())):
            pieces = [self._quote(item) for item in value]
            return f"{kind.__name__}({self._bracketed('[', pieces, ']')})"
        if isinstance(value, jinja2.Undefined):
            return "Undefined"
        return f"<{kind.__name__.lower()}>"

    def _unescape(self, quoted: str) -> str:
        """Restore marks that `repr` writes as escapes."""
        self.budget.items(2 * quoted.count("\\"))
        pieces, at = [], 0
        while (start := quoted.find("\\", at)) >= 0:
            pieces.append(quoted[at:start])
            at = start + 2
            if quoted[start + 1] == "u":
                at = start + 6
                mark = chr(int(quoted[start + 2 : at], 16))
                if self.marks.is_mark(mark):
                    pieces.append(mark)
                    continue
            pieces.append(quoted[start:at])
        pieces.append(quoted[at:])
        return "".join(pieces)

    def _bracketed(self, opening: str, pieces: list[str], closing: str) -> str:
        self._texts.check_join(", ", pieces)
        return self.budget.made(f"{opening}{', '.join(pieces)}{closing}")

    # Functions that templates call by name.

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        if len(numbers) > MAX_RANGE:
            raise OverflowError(f"a range of more than {MAX_RANGE} numbers")
        return numbers

    def _dict(self, *args: Any, **fields: Any) -> dict:
        return self._fields(args) | fields

    def _fields(self, args: tuple[Any, ...]) -> dict:
        if len(args) > 1:
            raise TypeError(f"expected at most 1 argument, got {len(args)}")
        if not args:
            return {}
        self.budget.items(3)
        if type(args[0]) is dict:
            return self._copy(args[0])
        fields, keys = {}, Keys(self.budget)
        for pair in self.iterate(args[0]):
            name, value = list(self.iterate(pair))
            self.budget.items(3)
            fields[keys.add(self.key(name))] = value
        return fields

    def _namespace(self, *args: Any, **fields: Any) -> Namespace:
        space = Namespace()
        for name, value in {**self._fields(args), **fields}.items():
            space.set(name, value)
        return space

    def _cycler(self, *items: Any) -> Cycler:
        return Cycler(items)

    def _joiner(self, separator: Any = ", ") -> Joiner:
        return Joiner(separator)

    def join(self, separator: str, items: list[str]) -> str:
        """Join texts."""
        self._texts.check_join(separator, items)
        return self.budget.made(separator.join(items))

    def method(self, name: str, text: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of a text."""
        return self._texts.methods[name](text, *args, **kwargs)

    def format(self, text: str, values: Any) -> str:
        """Return `text % values`."""
        return self._texts.percent(text, values)

    def pieces(self, text: str, pattern: Any) -> list[str]:
        """Split a text at a compiled pattern that is one group."""
        self.budget.items(len(text) // 2)
        return self._texts.cut(text, [x for x in pattern.split(self.plain(text)) if x], 0)


def _methods(prefix: str) -> dict[type, Callable[..., Any]]:
    """Return the methods of the interpreter by the node that they run."""
    kinds = {name.lower(): kind for name, kind in vars(nodes).items() if isinstance(kind, type)}
    names = [name for name in vars(Interpreter) if name.startswith(prefix)]
    return {kinds[name.removeprefix(prefix)]: getattr(Interpreter, name) for name in names}


STATEMENTS = _methods("_run_")
EXPRESSIONS = _methods("_eval_") | dict.fromkeys(ARITHMETIC, Interpreter._binary)
