"""Reader of a JSON object's fields with checks of type and range."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from glm_edge.serve.http.errors import ApiError


class Fields:
    """The fields of a JSON object, each of which must be read once.

    A null counts as absent, as in OpenAI's API.
    """

    def __init__(self, values: Any, where: str = "") -> None:
        """Take the fields.

        Args:
          values: a JSON object.
          where: path of the object in the body, empty for the body.

        Raises:
          ApiError: `values` is not an object.
        """
        if not isinstance(values, Mapping):
            raise ApiError(f"{where or 'body'}: must be an object", where or None)
        self._values = {name: value for name, value in values.items() if value is not None}
        self.where = where

    def __contains__(self, name: str) -> bool:
        return name in self._values

    @property
    def names(self) -> list[str]:
        """Names of the fields that were not read yet."""
        return list(self._values)

    def path(self, name: str) -> str:
        """Return the path of a field in the body."""
        return f"{self.where}.{name}" if self.where else name

    def refused(self, name: str, fault: str) -> ApiError:
        """Make the error of a field."""
        return ApiError(f"{self.path(name)}: {fault}", self.path(name))

    def take(self, name: str) -> Any:
        """Return a field of any type, or None if it is absent."""
        return self._values.pop(name, None)

    def integer(self, name: str, low: int, high: int) -> int | None:
        """Return an integer in a range, or None."""
        value = self.take(name)
        # A number such as 5.0 is an integer in JSON.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refused(name, f"must be an integer in {low}..{high}, got {value!r:.60}")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """Return a finite number in a range, or None."""
        value = self.take(name)
        if value is None:
            return None
        # An integer of more than 308 digits has no float.
        usable = isinstance(value, int | float) and not isinstance(value, bool)
        if not usable or not low <= value <= high or not math.isfinite(value):
            raise self.refused(name, f"must be a number in {low:g}..{high:g}, got {value!r:.60}")
        return float(value)

    def boolean(self, name: str) -> bool | None:
        """Return a boolean, or None."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self.refused(name, f"must be true or false, got {value!r:.60}")
        return value

    def text(self, name: str, most: int | None = None) -> str | None:
        """Return a string, or None."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.refused(name, f"must be a string, got {value!r:.60}")
        if most is not None and len(value) > most:
            raise self.refused(name, f"has {len(value)} characters; the limit is {most}")
        return value

    def choice(self, name: str, known: Iterable[str]) -> str | None:
        """Return one of several strings, or None."""
        known = tuple(known)
        value = self.take(name)
        if value is not None and (not isinstance(value, str) or value not in known):
            raise self.refused(name, f"must be one of {', '.join(known)}; got {value!r:.60}")
        return value

    def items(self, name: str, most: int) -> list[Any] | None:
        """Return a list of at most `most` values, or None."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.refused(name, f"must be a list, got {value!r:.60}")
        if len(value) > most:
            raise self.refused(name, f"has {len(value)} items; the limit is {most}")
        return value

    def object(self, name: str) -> "Fields | None":
        """Return the fields of an object, or None."""
        value = self.take(name)
        return None if value is None else Fields(value, self.path(name))

    def ignore(self, *names: str) -> None:
        """Skip fields that change nothing in the answer."""
        for name in names:
            self.take(name)

    def finish(self) -> None:
        """Check that every field was read.

        Raises:
          ApiError: a field is unknown.
        """
        for name in self._values:
            raise self.refused(name[:80], "this service does not know this parameter")
