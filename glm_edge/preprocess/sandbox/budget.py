"""Limits of a template on steps, bytes of values, and characters of output."""

import sys
from typing import Any

import jinja2

MAX_STEPS = 250_000
STEPS_PER_VALUE = 500
MAX_BYTES = 1 << 27
BYTES_PER_CHARACTER = 64
MAX_OUTPUT = 1 << 20
OUTPUT_PER_CHARACTER = 8
MAX_INTEGER_BITS = 4096
# A step is about a microsecond. Comparing or copying this many characters takes less than a step.
CHARACTERS_PER_STEP = 256
# Pairs of numbers or short tuples compared per step.
COMPARED_PER_STEP = 16
# Bytes of a small object and its slot in a list.
OBJECT_BYTES = 72
# Python hashes smaller integers to themselves; arbitrarily many larger integers share a hash.
MAX_OWN_HASH = 1 << 53


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """Raised when a template exceeds its budget."""


class Budget:
    """The budget of one rendering, which grows with its inputs.

    Attributes:
      output: maximum of output characters.
    """

    def __init__(self, values: int = 0, characters: int = 0) -> None:
        """Create a full budget.

        Args:
          values: count of JSON values in the template's inputs.
          characters: count of characters in the template's inputs.
        """
        self._max_steps = self._steps = MAX_STEPS + STEPS_PER_VALUE * values + characters // 2
        self._max_bytes = self._bytes = MAX_BYTES + BYTES_PER_CHARACTER * characters
        self.output = MAX_OUTPUT + OUTPUT_PER_CHARACTER * characters

    def step(self, count: int = 1) -> None:
        """Count steps.

        Raises:
          TemplateLimitError: the budget of steps is exhausted.
        """
        self._steps -= count
        if self._steps < 0:
            raise TemplateLimitError(f"takes more than {self._max_steps} steps")

    def touch(self, characters: int) -> None:
        """Count the steps of reading a text."""
        self.step(1 + characters // CHARACTERS_PER_STEP)

    def search(self, characters: int, wanted: int, backwards: bool = False) -> None:
        """Count the steps of searching a text.

        Python's forward search in a long text takes linear time. A backward search, and a search
        in a short text, may compare the complete pattern at each character.

        Args:
          characters: length of the text.
          wanted: length of the pattern.
          backwards: searches from the end.
        """
        self.touch(8 * (characters + wanted))
        short = characters < 2500 or (characters < 30_000 and wanted < 100)
        if wanted > 1 and (backwards or short):
            self.touch(max(characters - wanted + 1, 0) * wanted)

    def reserve(self, size: int) -> None:
        """Count bytes before they are allocated.

        Raises:
          TemplateLimitError: the budget of bytes is exhausted.
        """
        self._bytes -= size
        if self._bytes < 0:
            raise TemplateLimitError(f"makes values of more than {self._max_bytes} bytes")
        self.step(size // (CHARACTERS_PER_STEP * 4))

    def items(self, count: int) -> None:
        """Count the elements of a list before it is created."""
        self.step(count // 8)
        self.reserve(count * OBJECT_BYTES)

    def made(self, text: str) -> str:
        """Count the bytes of a new text, and return it."""
        self.reserve(sys.getsizeof(text))
        return text

    def number(self, value: Any) -> Any:
        """Return a number after checking its count of digits.

        Raises:
          TemplateLimitError: an integer has too many bits.
        """
        if type(value) is int and value.bit_length() > MAX_INTEGER_BITS:
            raise TemplateLimitError(f"makes an integer of more than {MAX_INTEGER_BITS} bits")
        return value


class Keys:
    """A counter of the comparisons between keys of one dict.

    A dict compares a key with all keys of equal hash. An attacker can choose integers and tuples of
    equal hash, so each one counts as compared with all others. Hashes of strings are random.
    """

    def __init__(self, budget: Budget) -> None:
        """Create a counter without keys."""
        self._budget, self._alike = budget, 0

    def add(self, key: Any) -> Any:
        """Count the comparisons of a new key with earlier keys, and return it."""
        if not isinstance(key, str):
            self._budget.step(self._alike // COMPARED_PER_STEP)
            large = isinstance(key, int) and abs(key) > MAX_OWN_HASH
            self._alike += large or isinstance(key, tuple)
        return key


class Sink:
    """Output of a template, written in pieces."""

    def __init__(self, budget: Budget) -> None:
        """Create an empty output."""
        self._budget, self._length = budget, 0
        self._pieces: list[str] = []

    def write(self, text: str) -> None:
        """Append text.

        Raises:
          TemplateLimitError: the output exceeds the budget.
        """
        self._length += len(text)
        if self._length > self._budget.output:
            raise TemplateLimitError(f"writes more than {self._budget.output} characters")
        self._budget.touch(len(text))
        self._pieces.append(text)

    def text(self) -> str:
        """Return the complete output."""
        return self._budget.made("".join(self._pieces))
