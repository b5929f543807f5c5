"""Limits of a template: steps, bytes of values, and characters of output."""

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
# A step is about a microsecond; comparing and copying takes less than one per this many characters.
CHARACTERS_PER_STEP = 256
# Pairs of numbers, or of short tuples, that are compared in a step.
COMPARED_PER_STEP = 16
# A small object and its slot in a list.
OBJECT_BYTES = 72
# Python hashes lesser integers to themselves; among larger ones any number have the same hash.
MAX_OWN_HASH = 1 << 53


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """Raised when a template exceeds its budget."""


class Budget:
    """The budget of one rendering, to which its inputs add.

    Attributes:
      output: characters that it may write.
    """

    def __init__(self, values: int = 0, characters: int = 0) -> None:
        """Starts full.

        Args:
          values: JSON values that the template is given.
          characters: of the texts among them.
        """
        self._max_steps = self._steps = MAX_STEPS + STEPS_PER_VALUE * values + characters // 2
        self._max_bytes = self._bytes = MAX_BYTES + BYTES_PER_CHARACTER * characters
        self.output = MAX_OUTPUT + OUTPUT_PER_CHARACTER * characters

    def step(self, count: int = 1) -> None:
        """Counts steps.

        Raises:
          TemplateLimitError: there are none left.
        """
        self._steps -= count
        if self._steps < 0:
            raise TemplateLimitError(f"takes more than {self._max_steps} steps")

    def touch(self, characters: int) -> None:
        """Counts the steps of reading a text."""
        self.step(1 + characters // CHARACTERS_PER_STEP)

    def search(self, characters: int, wanted: int, backwards: bool = False) -> None:
        """Counts the steps of searching a text.

        Python searches a long text forwards in time in proportion to its length. Backwards, and in
        a short text, it may compare all that is searched for at each character.

        Args:
          characters: of the text.
          wanted: characters that are searched for in it.
          backwards: from its end.
        """
        self.touch(8 * (characters + wanted))
        short = characters < 2500 or (characters < 30_000 and wanted < 100)
        if wanted > 1 and (backwards or short):
            self.touch(max(characters - wanted + 1, 0) * wanted)

    def reserve(self, size: int) -> None:
        """Counts bytes before they are taken.

        Raises:
          TemplateLimitError: there are not as many left.
        """
        self._bytes -= size
        if self._bytes < 0:
            raise TemplateLimitError(f"makes values of more than {self._max_bytes} bytes")
        self.step(size // (CHARACTERS_PER_STEP * 4))

    def items(self, count: int) -> None:
        """Counts the elements of a list before it is made."""
        self.step(count // 8)
        self.reserve(count * OBJECT_BYTES)

    def made(self, text: str) -> str:
        """Counts a text that was made of counted ones, and returns it."""
        self.reserve(sys.getsizeof(text))
        return text

    def number(self, value: Any) -> Any:
        """Returns a number unless it has too many digits.

        Raises:
          TemplateLimitError: it has.
        """
        if type(value) is int and value.bit_length() > MAX_INTEGER_BITS:
            raise TemplateLimitError(f"makes an integer of more than {MAX_INTEGER_BITS} bits")
        return value


class Keys:
    """A count of the steps of comparing the keys of one dict.

    A dict compares a key with all others of the same hash. An attacker can choose integers and
    tuples that have one hash; those count as compared with each other. Hashes of texts are random.
    """

    def __init__(self, budget: Budget) -> None:
        """Starts without keys."""
        self._budget, self._alike = budget, 0

    def add(self, key: Any) -> Any:
        """Counts a key, whose comparison is counted already, and returns it."""
        if not isinstance(key, str):
            self._budget.step(self._alike // COMPARED_PER_STEP)
            large = isinstance(key, int) and abs(key) > MAX_OWN_HASH
            self._alike += large or isinstance(key, tuple)
        return key


class Sink:
    """Output that is written piece by piece."""

    def __init__(self, budget: Budget) -> None:
        """Starts empty."""
        self._budget, self._length = budget, 0
        self._pieces: list[str] = []

    def write(self, text: str) -> None:
        """Appends text.

        Raises:
          TemplateLimitError: there is too much of it.
        """
        self._length += len(text)
        if self._length > self._budget.output:
            raise TemplateLimitError(f"writes more than {self._budget.output} characters")
        self._budget.touch(len(text))
        self._pieces.append(text)

    def text(self) -> str:
        """Returns all of it."""
        return self._budget.made("".join(self._pieces))
