"""Rendering of conversations with chat templates, interpreted within limits."""

import datetime
import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from glm_edge.errors import CheckpointError, ConfigError, DataError
from glm_edge.files import file_inside, read_text
from glm_edge.preprocess.processor_config import read_json
from glm_edge.preprocess.sandbox import MAX_TEMPLATE, Budget, Interpreter, Marks, parse
from glm_edge.preprocess.sandbox.marks import PRIVATE

FAMILIES = ("glm_edge", "glm_edge_v", "glm_4", "glm_4_0414", "glm_4_1v", "glm_asr")
MEDIA_TYPES = {
    "image": "image",
    "image_url": "image",
    "video": "video",
    "video_url": "video",
    "audio": "audio",
    "audio_url": "audio",
}

MAX_DEPTH = 64
# Roles whose messages must have a content.
_SPEAKERS = ("system", "user")
MAX_LAYOUT = 200
# Half of a surrogate pair, which UTF-8 cannot encode.
LONE = re.compile("[\ud800-\udfff]")

Message = Mapping[str, Any]


def family_template(family: str) -> str:
    """Return this library's template of a family, for checkpoints without a template.

    Args:
      family: one of `FAMILIES`.

    Returns:
      Jinja source.

    Raises:
      ConfigError: the family is unknown.
    """
    if family not in FAMILIES:
        raise ConfigError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    folder = resources.files("glm_edge.preprocess") / "templates"
    return (folder / f"{family}.jinja").read_text(encoding="utf-8")


def checkpoint_template(directory: Path) -> str | None:
    """Read a checkpoint's chat template.

    Args:
      directory: checkpoint directory. The first template in `chat_template.jinja`,
        `chat_template.json` and `tokenizer_config.json` applies.

    Returns:
      Jinja source, or None without a template. Of several templates, the one named `default`.

    Raises:
      CheckpointError: a file is damaged, or no template is named `default`.
    """
    name = "chat_template.jinja"
    if os.path.lexists(directory / name):
        return read_text(file_inside(directory, name), limit=MAX_TEMPLATE)
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_json(directory / name).get("chat_template")
        where = f"{directory / name}: field 'chat_template'"
        if isinstance(template, list):
            named = (item for item in template if isinstance(item, dict))
            defaults = [x.get("template") for x in named if x.get("name") == "default"]
            template = defaults[0] if defaults else None
            if template is None:
                raise CheckpointError(f"{where} has no template named 'default'")
        if template is not None:
            if not isinstance(template, str):
                raise CheckpointError(f"{where} must be a string or a list of named strings")
            if len(template) > MAX_TEMPLATE:
                raise CheckpointError(
                    f"{where} has {len(template)} characters; the limit is {MAX_TEMPLATE}"
                )
            return template
    return None


@dataclass(frozen=True)
class Rendered:
    """A prompt with marks that distinguish untrusted text from the template's text.

    Attributes:
      text: text with marks.
      marks: marks; `marks.reveal` removes them from a text.
    """

    text: str
    marks: Marks


def render(
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """Render a conversation.

    The template is an untrusted program. It is interpreted within limits of time and memory, on
    copies of plain JSON values. The result is one string that does not distinguish messages from
    the template's text. A message that spells a special token therefore becomes that token when the
    string is tokenized; `glm_edge.preprocess.Processor` prevents that.

    Args:
      template: Jinja source, at most `sandbox.MAX_TEMPLATE` characters.
      messages: messages with a `role` and a `content`. The content is a string or a list of parts
        such as `{"type": "text", "text": …}` and `{"type": "image"}`.
      tools: JSON schemas of functions that the model may call.
      add_generation_prompt: opens the assistant's turn at the end.
      **variables: further variables of the template.

    Returns:
      The text.

    Raises:
      DataError: messages are malformed, or the template fails, rejects them, or exceeds its limits
        of time or memory.

    Example:
      >>> text = render(family_template("glm_4"), [{"role": "user", "content": "Hello"}])
      >>> text.endswith("Hello<|assistant|>")
      True
    """
    return render_marked(template, messages, tools, add_generation_prompt, variables).text


def render_marked(
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
    constants: Mapping[str, str] | None = None,
    special: Sequence[str] = (),
) -> Rendered:
    """Render a conversation so that untrusted text cannot spell a special token.

    Args:
      template: as in `render`.
      messages: as in `render`.
      tools: as in `render`.
      add_generation_prompt: as in `render`.
      variables: further, untrusted variables of the template.
      constants: trusted variables of the checkpoint, such as `bos_token`.
      special: names of special tokens, which marks replace in all untrusted text.

    Returns:
      The prompt with its marks.

    Raises:
      DataError: as in `render`.
    """
    copier = _Copier()
    conversation = [copier.message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    others = {
        "tools": None if tools is None else [copier.plain(tool, "tools") for tool in tools],
        "documents": None,
        **{name: copier.plain(value, name) for name, value in (variables or {}).items()},
    }
    marks = Marks(special, copier.private)
    values = {
        **(constants or {}),
        "messages": [marks.hide_message(message) for message in conversation],
        **{name: marks.hide_all(value) for name, value in others.items()},
        "add_generation_prompt": add_generation_prompt,
        "raise_exception": functools.partial(_raise_exception, marks),
        "strftime_now": _strftime_now,
    }
    budget = Budget(copier.values, copier.characters)
    try:
        return Rendered(Interpreter(values, budget, marks).render(parse(template)), marks)
    # A template is a program: it can divide by zero or recurse too deep, for instance.
    except Exception as error:
        shown = marks.reveal(" ".join(str(error).split()))
        raise DataError(f"chat template: {type(error).__name__}: {shown}") from error


def split_thinking(text: str) -> tuple[str, str]:
    """Separate GLM-4.1V's reasoning from its answer.

    Args:
      text: generated text, `<think>…</think><answer>…</answer>`. Either part may be missing or
        unclosed.

    Returns:
      `(thinking, answer)`, both stripped. Without `<think>` and `</think>`, the answer is the
      complete text.

    Example:
      >>> split_thinking("<think>2 + 2 = 4</think><answer>4</answer>")
      ('2 + 2 = 4', '4')
    """
    before, closed, after = text.partition("</think>")
    if not closed and "<think>" not in text:
        before, after = "", text
    thinking = before.partition("<think>")[2] if "<think>" in before else before
    answer = after.partition("<answer>")[2] if "<answer>" in after else after
    return thinking.strip(), answer.partition("</answer>")[0].strip()


class _Copier:
    """A copier of the values that a template may read, with a count of their size.

    Methods of other objects would lead out of the interpreter.

    Attributes:
      values: count of copied JSON values.
      characters: count of characters of copied texts.
      private: private-use characters of copied texts.
    """

    def __init__(self) -> None:
        self.values = self.characters = 0
        self.private: set[str] = set()

    def message(self, message: Message, where: str) -> dict[str, Any]:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: must be an object with a 'role'")
        plain = {
            self._name(name, where): self._content(value, where)
            if name == "content"
            else self.plain(value, where)
            for name, value in message.items()
        }
        # An assistant's turn may contain only tool calls.
        if plain.get("content") is None and (plain["role"] in _SPEAKERS or len(plain) == 1):
            raise DataError(f"{where}: a message of {plain['role']!r} must have a 'content'")
        return {"content": None, **plain} if "content" not in plain else plain

    def _content(self, content: Any, where: str) -> Any:
        if content is None or isinstance(content, str):
            return self.plain(content, where)
        if not isinstance(content, Sequence) or isinstance(content, bytes | bytearray):
            raise DataError(f"{where}: content must be a string or a list of parts")
        parts = []
        for index, part in enumerate(content):
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text" and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": self.plain(part["text"], where)})
            elif isinstance(kind, str) and kind in MEDIA_TYPES:
                # Templates test the type or a key of that name.
                parts.append({"type": MEDIA_TYPES[kind], MEDIA_TYPES[kind]: ""})
            else:
                raise DataError(
                    f"{where}: content[{index}] must be a text part with its 'text', or of type "
                    f"{', '.join(MEDIA_TYPES)}"
                )
            self.values += 1
        return parts

    def plain(self, value: Any, where: str, depth: int = 0) -> Any:
        self.values += 1
        if depth > MAX_DEPTH:
            raise DataError(f"{where}: is nested deeper than {MAX_DEPTH}")
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, str):
            return self._text(value, where)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int | float):
            # Subclasses such as enumerations print differently.
            return int(value) if isinstance(value, int) else float(value)
        if isinstance(value, Mapping):
            return {
                self._name(name, where): self.plain(item, where, depth + 1)
                for name, item in value.items()
            }
        if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
            return [self.plain(item, where, depth + 1) for item in value]
        raise DataError(
            f"{where}: a template can read JSON values only, found {type(value).__name__}"
        )

    def _name(self, name: Any, where: str) -> str:
        if name is not None and not isinstance(name, str | int | float):
            raise DataError(f"{where}: field names must be strings, found {type(name).__name__}")
        return self._text(name if isinstance(name, str) else str(name), where)

    def _text(self, text: str, where: str) -> str:
        # A subclass may print differently.
        text = str.__str__(text)
        self.characters += len(text)
        if not text.isascii():
            self.private.update(PRIVATE.findall(text))
            if LONE.search(text):
                raise DataError(f"{where}: half of a surrogate pair is not a character")
        return text


def _raise_exception(marks: Marks, message: Any = "") -> None:
    raise jinja2.TemplateError(marks.reveal(str(message)))


def _strftime_now(layout: str) -> str:
    # A width in a directive could produce a text of any length.
    if len(layout) > MAX_LAYOUT or re.search(r"%[-_0^#]*[0-9]", layout):
        raise ValueError("the layout of a date is too long")
    return datetime.datetime.now().strftime(layout)
