"""Finds the measured values in a document, and looks each up in the logs that it links to.

A row of a table that begins with the name of an entry of a log is compared with that entry only.
Any other value is looked up in all logs to which its section links.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

LINK = re.compile(r"\]\(([^)#]+\.json)\)")
# Not part of a word, a format such as int4-g32, a version, or a path.
NUMBER = re.compile(
    r"(?<![\w./:-])(?<!\d,)[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?(?![\w/:]|,\d{3}|\.\d|-[^\W\d])"
)
# A fraction is printed in percent or thousandths, and bytes in kilobytes to gigabytes.
SCALES = (1.0, 1e2, 1e3, 1e-3, 1e-6, 1e-9)
UNMEASURED = (
    re.compile(r"```.*?```", re.DOTALL),
    re.compile(r"^    .*$", re.MULTILINE),
    re.compile(r"!\[[^\]]*\]\([^)]*\)"),
    re.compile(r"`[^`]*`"),
)


class Value(NamedTuple):
    """A value of a document that is in no log of its section."""

    section: str
    text: str
    context: str


def unlogged(document: Path, statements: Iterable[str] = ()) -> list[Value]:
    """List the values of a document that its logs do not contain.

    Args:
      document: Markdown file.
      statements: phrases whose values are not looked up.

    Returns:
      The values, in the order of the document.
    """
    text = document.read_text(encoding="utf-8")
    for pattern in UNMEASURED[:3]:
        text = pattern.sub("", text)
    for statement in statements:
        text = text.replace(statement, "")
    missing = []
    for section in re.split(r"^(?=#+ )", text, flags=re.MULTILINE):
        title = section.partition("\n")[0]
        logs = [
            json.loads((document.parent / path).read_text(encoding="utf-8"))
            for path in dict.fromkeys(LINK.findall(section))
        ]
        logged = {value for log in logs for value in numbers(log)}
        for line in re.split(r"\n(?=\||\n|- )", section):
            values = _entry_values(line, logs) or logged
            visible = UNMEASURED[3].sub("", re.sub(r"\]\([^)]*\)", "]", line))
            for match in NUMBER.finditer(visible):
                if not is_in(match.group(), values):
                    around = visible[max(0, match.start() - 40) : match.end() + 20]
                    missing.append(Value(title, match.group(), " ".join(around.split())))
    return missing


def numbers(node: Any) -> Iterator[float]:
    """Iterate over the numbers of a log, and those inside its strings, such as its command."""
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            yield from numbers(value)
    elif isinstance(node, str):
        yield from (float(digits) for digits in re.findall(r"\d+(?:\.\d+)?", node))
    elif isinstance(node, (int, float)) and not isinstance(node, bool):
        yield float(node)


def _entry_values(line: str, logs: list[Any]) -> set[float]:
    """Return the numbers of the entries that a table's row names in its first cell."""
    if not line.lstrip().startswith("|"):
        return set()
    name = line.strip().strip("|").split("|")[0].strip(" *`")
    return {value for log in logs for entry in _entries(log, name) for value in numbers(entry)}


def _entries(node: Any, name: str) -> Iterator[Any]:
    if isinstance(node, list):
        for value in node:
            yield from _entries(value, name)
    if isinstance(node, dict):
        if any(isinstance(value, str) and value == name for value in node.values()):
            yield node
        for key, value in node.items():
            if key == name:
                yield value
            else:
                yield from _entries(value, name)


def is_in(text: str, values: set[float]) -> bool:
    """Tell whether a value is a number of the logs, rounded to the digits of the text."""
    mantissa, _, exponent = text.replace(",", "").lstrip("+-").partition("e")
    decimals = len(mantissa.partition(".")[2])
    printed = float(f"{mantissa}e{exponent or 0}")
    half = 0.5000001 * 10.0 ** (int(exponent or 0) - decimals)
    return any(abs(scale * abs(value) - printed) <= half for value in values for scale in SCALES)
