"""A check of untrusted JSON schemas: every keyword takes effect, or the schema is refused.

llguidance ignores names that are no keywords of a draft, such as a misspelt `minimun`, and some
keywords in some positions. A schema of many references could also exhaust its stack.
"""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from glm_edge.errors import DataError

MAX_DEPTH = 64
# llguidance overflowed a stack of 8 MiB between 1,000 and 2,000 nested subschemas.
MAX_REFERENCED_DEPTH = 400
# More optional properties exceed llguidance's 2,000 items per row of its parser.
MAX_OPTIONAL = 400
MAX_PATTERN = 8192
# Every pair of them is compared.
MAX_NAME_PATTERNS = 100
# The states of an intersection multiply: 16 short patterns ran for minutes.
MAX_INTERSECTED = 8
# Divisors become automata of that many states.
MAX_DIVISOR = 10_000
# Integers above it are rounded to float64.
MAX_INTEGER = 2**53

_ONE = frozenset(["items", "additionalItems", "additionalProperties"])
_LISTS = frozenset(["allOf", "anyOf", "oneOf", "prefixItems"])
_MAPS = frozenset(["properties", "patternProperties", "$defs", "definitions"])
_VALUES = frozenset(
    [
        *("$ref", "const", "enum", "type", "required", "format", "pattern"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        *("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"),
    ]
)
_STRINGS = frozenset(["pattern", "format"])
_ANNOTATIONS = frozenset(
    [
        *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
        *("$comment", "contentMediaType", "contentEncoding"),
    ]
)
_FORMATS = frozenset(
    [
        *("date-time", "time", "date", "duration", "email", "hostname"),
        *("ipv4", "ipv6", "uuid", "uri"),
    ]
)


def checked_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a schema without its annotations, and refuse keywords that would have no effect.

    Args:
      schema: a JSON schema of draft 2020-12; `definitions`, lists of `items` and boolean
        `exclusiveMinimum` of older drafts are supported. `$ref` begins at the root: `#/$defs/…`.

    Returns:
      The copy, of plain dictionaries and lists.

    Raises:
      DataError: a keyword is unknown, not supported, or exceeds a limit.
    """
    root = dict(schema) if isinstance(schema, Mapping) else schema
    if not isinstance(root, dict):
        raise DataError(f"schema: must be an object, found {type(schema).__name__}")
    for name in ("$schema", "$id"):
        root.pop(name, None)
    checker = _Checker()
    plain = checker.schema(root, "schema", 0)
    checker.check_references(plain)
    checker.check_intersections()
    return plain


class _Checker:
    """A copier of one schema.

    Attributes:
      references: where each `$ref` was first used.
      divisor: product of all `multipleOf`, as several can apply to one value.
      strings: patterns and formats.
      name_patterns: count of patterns of property names.
      intersection: where several schemas first apply to one value.
    """

    def __init__(self) -> None:
        self.references: dict[str, str] = {}
        self.divisor = Decimal(1)
        self.strings: set[str] = set()
        self.name_patterns = 0
        self.intersection = ""

    def schema(self, value: Any, where: str, depth: int) -> Any:
        if isinstance(value, bool):
            return value
        if not isinstance(value, Mapping):
            raise DataError(f"{where}: must be a schema, found {type(value).__name__}")
        self._check_depth(where, depth)
        plain: dict[str, Any] = {}
        for name, item in value.items():
            inner = f"{where}.{name}"
            if not isinstance(name, str):
                raise DataError(f"{where}: names must be strings, found {name!r:.60}")
            if name in _MAPS:
                plain[name] = self._map(item, inner, depth + 1)
            elif name in _LISTS or (name == "items" and isinstance(item, list | tuple)):
                plain[name] = self._list(item, inner, depth + 1)
            elif name in _ONE:
                plain[name] = self.schema(item, inner, depth + 1)
            elif name in _VALUES:
                plain[name] = self._value(item, inner, depth + 1)
            elif name not in _ANNOTATIONS:
                raise DataError(f"{where}: the keyword {name!r:.60} is not supported")
        self._check(plain, where)
        return plain

    def _map(self, value: Any, where: str, depth: int) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise DataError(f"{where}: must be an object")
        return {k: self.schema(item, f"{where}.{k}", depth + 1) for k, item in value.items()}

    def _list(self, value: Any, where: str, depth: int) -> list[Any]:
        if not isinstance(value, list | tuple):
            raise DataError(f"{where}: must be a list of schemas")
        return [self.schema(x, f"{where}[{i}]", depth + 1) for i, x in enumerate(value)]

    def _value(self, value: Any, where: str, depth: int) -> Any:
        """Copy a JSON value."""
        self._check_depth(where, depth)
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int | float):
            if not math.isfinite(value) or (isinstance(value, int) and abs(value) > MAX_INTEGER):
                raise DataError(f"{where}: integers must be within ±2^53, other values finite")
            return value
        if isinstance(value, Mapping):
            if not all(isinstance(name, str) for name in value):
                raise DataError(f"{where}: names must be strings")
            return {k: self._value(item, f"{where}.{k}", depth + 1) for k, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
            return [self._value(item, where, depth + 1) for item in value]
        raise DataError(f"{where}: must be a JSON value, found {type(value).__name__}")

    def _check_depth(self, where: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise DataError(f"{where[:60]}: is nested deeper than {MAX_DEPTH}")

    def _check(self, schema: dict[str, Any], where: str) -> None:
        """Refuse keywords that llguidance would ignore beside the others, or take long for."""
        reference = schema.get("$ref", "#")
        if not isinstance(reference, str):
            raise DataError(f"{where}.$ref: must be a string")
        if "$ref" in schema:
            self.references.setdefault(reference, f"{where}.$ref")
        if "additionalItems" in schema and (
            "prefixItems" in schema or not isinstance(schema.get("items"), list)
        ):
            raise DataError(f"{where}.additionalItems: needs a list of items; use 'items'")
        if "prefixItems" in schema and isinstance(schema.get("items"), list):
            raise DataError(f"{where}.items: must be a schema beside 'prefixItems'")
        if "format" in schema and schema["format"] not in _FORMATS:
            raise DataError(
                f"{where}.format: must be one of {', '.join(sorted(_FORMATS))}, "
                f"found {schema['format']!r:.60}"
            )
        # A generated name of an additional property can repeat an earlier one.
        least = schema.get("minProperties", 0)
        if not isinstance(least, int) or least > 1:
            raise DataError(f"{where}.minProperties: must be 0 or 1; list the names in 'required'")
        optional = set(schema.get("properties", ())) - set(_names(schema, where))
        if len(optional) > MAX_OPTIONAL:
            raise DataError(
                f"{where}.properties: {len(optional)} are optional; the limit is {MAX_OPTIONAL}"
            )
        patterns = [*schema.get("patternProperties", ()), schema.get("pattern", "")]
        if any(len(pattern) > MAX_PATTERN for pattern in patterns if isinstance(pattern, str)):
            raise DataError(f"{where}: a pattern has more than {MAX_PATTERN} characters")
        self.name_patterns += len(schema.get("patternProperties", ()))
        if self.name_patterns > MAX_NAME_PATTERNS:
            raise DataError(f"{where}.patternProperties: the limit is {MAX_NAME_PATTERNS}")
        self.strings.update(f"{name}: {schema[name]}" for name in _STRINGS & schema.keys())
        parts = len(schema.get("allOf", ())) + len({"anyOf", "oneOf", "$ref"} & schema.keys())
        siblings = (
            _STRINGS | _ONE | {"properties", "patternProperties", "prefixItems"}
        ) & schema.keys()
        if parts + bool(siblings) > 1 and not self.intersection:
            self.intersection = where
        divisor = schema.get("multipleOf", 1)
        if isinstance(divisor, bool) or not isinstance(divisor, int | float) or divisor <= 0:
            raise DataError(f"{where}.multipleOf: must be a number above 0")
        _, digits, _ = Decimal(str(divisor)).normalize().as_tuple()
        self.divisor *= int("".join(map(str, digits)))
        if self.divisor > MAX_DIVISOR:
            raise DataError(
                f"{where}.multipleOf: the digits of all divisors have the product {self.divisor}; "
                f"the limit is {MAX_DIVISOR}"
            )

    def check_intersections(self) -> None:
        """Refuse many patterns in a schema that can apply several to one string."""
        if self.intersection and len(self.strings) > MAX_INTERSECTED:
            raise DataError(
                f"{self.intersection}: several schemas apply to one value, and the schema has "
                f"{len(self.strings)} patterns and formats; the limit is {MAX_INTERSECTED}"
            )

    def check_references(self, root: dict[str, Any]) -> None:
        """Refuse references that lead nowhere, or to too many nested subschemas."""
        depths: dict[int, int] = {}
        total = _depth(root, depths)
        for reference, where in self.references.items():
            target = _resolve(root, reference)
            if not isinstance(target, bool | dict):
                raise DataError(
                    f"{where}: must be '#' or the plain path of a schema, such as '#/$defs/name', "
                    f"found {reference!r:.60}"
                )
            total += _depth(target, depths)
            if total > MAX_REFERENCED_DEPTH:
                raise DataError(
                    f"{where}: the schemas of all references are nested deeper than "
                    f"{MAX_REFERENCED_DEPTH} together"
                )


def _names(schema: dict[str, Any], where: str) -> list[str]:
    names = schema.get("required", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}.required: must be a list of names")
    return names


def _resolve(root: dict[str, Any], reference: str) -> Any:
    """Return a reference's schema; None if there is none, or the path is written in another way."""
    if reference == "#":
        return root
    start, *names = reference.split("/")
    # An escape would give one schema several names, each of which llguidance follows once.
    if start != "#" or not names or "%" in reference or "~" in reference:
        return None
    target: Any = root
    in_map = False
    for name in names:
        if isinstance(target, list) and name.isdecimal() and str(int(name)) == name:
            target = target[int(name)] if int(name) < len(target) else None
        elif isinstance(target, dict) and (in_map or name in _MAPS | _LISTS | _ONE):
            target, in_map = target.get(name), not in_map and name in _MAPS
        else:
            return None
    return None if in_map else target


def _depth(schema: Any, depths: dict[int, int]) -> int:
    """Count the levels of nested subschemas; `depths` stores results by identity."""
    if not isinstance(schema, dict):
        return 1
    if id(schema) not in depths:
        inner = [item for name, item in schema.items() if name in _ONE]
        inner += [x for name in _MAPS & schema.keys() for x in schema[name].values()]
        inner += [x for name in _LISTS & schema.keys() for x in schema[name]]
        flat = [x for item in inner for x in (item if isinstance(item, list) else [item])]
        depths[id(schema)] = 1 + max((_depth(item, depths) for item in flat), default=0)
    return depths[id(schema)]
