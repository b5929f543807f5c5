"""Conversations as text: chat templates of checkpoints, rendered in a sandbox."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import jinja2.utils
import numpy as np

from glm_edge.errors import CheckpointError, ConfigError, DataError
from glm_edge.preprocess.hugging_face import read_json

FAMILIES = ("glm_edge", "glm_edge_v", "glm_4", "glm_4_0414", "glm_4_1v", "glm_asr")
MEDIA_TYPES = {
    "image": "image",
    "image_url": "image",
    "video": "video",
    "video_url": "video",
    "audio": "audio",
    "audio_url": "audio",
}

Message = Mapping[str, Any]


def family_template(family: str) -> str:
    """Returns this library's own template of a family, for checkpoints that bring none.

    Args:
      family: one of `FAMILIES`.

    Returns:
      Jinja source.

    Raises:
      ConfigError: the family is not known.
    """
    if family not in FAMILIES:
        raise ConfigError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    folder = resources.files("glm_edge.preprocess") / "templates"
    return (folder / f"{family}.jinja").read_text(encoding="utf-8")


def checkpoint_template(directory: Path) -> str | None:
    """Reads a checkpoint's chat template.

    Args:
      directory: with `chat_template.jinja`, `chat_template.json` or `tokenizer_config.json`, the
        first of which that has a template counts.

    Returns:
      Jinja source, that named `default` where there are several, or None where there is none.

    Raises:
      CheckpointError: a file is damaged, or no template is named `default`.
    """
    file = directory / "chat_template.jinja"
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as text: {error}") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_json(directory / name).get("chat_template")
        where = f"{directory / name}: field 'chat_template'"
        if isinstance(template, list):
            named = {
                item.get("name"): item.get("template")
                for item in template
                if isinstance(item, dict)
            }
            template = named.get("default")
            if template is None:
                raise CheckpointError(f"{where} has no template named 'default'")
        if template is not None:
            if not isinstance(template, str):
                raise CheckpointError(f"{where} must be a string or named strings")
            return template
    return None


def render(
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """Renders a conversation.

    The template is a stranger's program: it runs in a sandbox, on copies made of plain JSON
    values. It writes one string, in which the text of a message is not told from the template's
    own, so a text that spells a special token becomes that token where the string is tokenised;
    `glm_edge.preprocess.Processor` prevents that.

    Args:
      template: Jinja source.
      messages: each with a `role` and a `content`, which is a string or a list of parts such as
        `{"type": "text", "text": …}` and `{"type": "image"}`.
      tools: JSON schemas of functions that the model may call.
      add_generation_prompt: whether the assistant's turn is opened at the end.
      **variables: what else the template reads.

    Returns:
      The text.

    Raises:
      DataError: messages are malformed, or the template fails or refuses them.
    """
    values = {
        "messages": [_message(message, f"messages[{i}]") for i, message in enumerate(messages)],
        "tools": None if tools is None else [_plain(tool) for tool in tools],
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **{name: _plain(value) for name, value in variables.items()},
    }
    try:
        return _compiled(template).render(values)
    # A template is a program: it can divide by zero or recurse as well as fail as a template.
    except Exception as error:
        raise DataError(
            f"chat template: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def split_thinking(text: str) -> tuple[str, str]:
    """Parts GLM-4.1V's reasoning from its answer.

    Args:
      text: generated, `<think>…</think><answer>…</answer>`; either part may be missing or left
        open.

    Returns:
      `(thinking, answer)`, both stripped; without `<think>` or `</think>` all is answer.
    """
    before, closed, after = text.partition("</think>")
    if not closed and "<think>" not in text:
        before, after = "", text
    thinking = before.partition("<think>")[2] if "<think>" in before else before
    answer = after.partition("<answer>")[2] if "<answer>" in after else after
    return thinking.strip(), answer.partition("</answer>")[0].strip()


def _message(message: Message, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DataError(f"{where}: must be an object with a 'role'")
    plain = {name: _plain(value) for name, value in message.items() if name != "content"}
    plain["content"] = _content(message.get("content"), where)
    return plain


def _content(content: Any, where: str) -> Any:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise DataError(f"{where}: content must be a string or a list of parts")
    parts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind in MEDIA_TYPES:
            # Templates look at the type or for a key of that name.
            parts.append({"type": MEDIA_TYPES[kind], MEDIA_TYPES[kind]: ""})
        else:
            raise DataError(
                f"{where}: content[{index}] must be a text part with its 'text', or of type "
                f"{', '.join(MEDIA_TYPES)}"
            )
    return parts


def _plain(value: Any) -> Any:
    """Copies what a template may see; methods of richer objects would lead out of the sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise DataError(f"a template can be given JSON values only, found {type(value).__name__}")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what training scores; rendering passes it through."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` whose attributes cannot take the names of Python's own."""

    def __init__(*args: Any, **attributes: Any):
        for name in dict(*args[1:], **attributes):
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(*args, **attributes)

    def __setitem__(self, name: str, value: Any):
        _check_attribute(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_attribute(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"attribute {name!r} of a namespace is not allowed")


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    return environment.from_string(template)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
