"""Constraints on answers that a request asks for, by OpenAI's and vLLM's names."""

import re
from collections.abc import Callable
from typing import Any

from glm_edge.generate.grammar import Grammar
from glm_edge.serve.http.errors import ApiError
from glm_edge.serve.http.fields import Fields

MAX_CHOICES = 1000


def read_grammar(fields: Fields) -> Grammar | None:
    """Read `response_format`, `regex`, `grammar` and `structured_outputs`.

    Args:
      fields: of the body.

    Returns:
      The only constraint, or None.

    Raises:
      ApiError: a constraint is malformed, or there are several.
      DataError: a schema or a grammar is too large or not supported.
    """
    grammars: list[Grammar] = []
    response_format = fields.object("response_format")
    if response_format is not None:
        grammars += _response_format(response_format)
    if (pattern := fields.text("regex")) is not None:
        grammars.append(Grammar.regex(pattern))
    if (source := fields.text("grammar")) is not None:
        grammars.append(Grammar.lark(source))
    outputs = fields.object("structured_outputs")
    if outputs is not None:
        grammars += _structured_outputs(outputs)
    if len(grammars) > 1:
        raise ApiError(
            "response_format, regex, grammar and structured_outputs: give one constraint only",
            "response_format",
        )
    return grammars[0] if grammars else None


def _response_format(fields: Fields) -> list[Grammar]:
    kind = fields.choice("type", ("text", "json_object", "json_schema"))
    if kind is None:
        raise fields.refused("type", "is missing")
    grammars = []
    if kind == "json_object":
        grammars = [Grammar.json_object()]
    elif kind == "json_schema":
        described = fields.object("json_schema")
        if described is None or "schema" not in described:
            raise fields.refused("json_schema", "must be an object with a 'schema'")
        # Every schema is enforced, strict or not.
        described.ignore("name", "description", "strict")
        grammars = [_schema(described.take("schema"), described.path("schema"))]
        described.finish()
    fields.finish()
    return grammars


def _structured_outputs(fields: Fields) -> list[Grammar]:
    readers: dict[str, Callable[[Any, str], Grammar | None]] = {
        "json": _schema,
        "json_object": lambda value, where: Grammar.json_object() if value is True else None,
        "regex": lambda value, where: Grammar.regex(_text(value, where)),
        "grammar": lambda value, where: Grammar.lark(_text(value, where)),
        "choice": _choice,
        "phone_actions": _phone_actions,
    }
    grammars = []
    for name, read in readers.items():
        if name in fields:
            grammars.append(read(fields.take(name), fields.path(name)))
    fields.finish()
    return [grammar for grammar in grammars if grammar is not None]


def _schema(value: Any, where: str) -> Grammar:
    if not isinstance(value, dict | str):
        raise ApiError(f"{where}: must be a JSON schema", where)
    return Grammar.json_schema(value)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ApiError(f"{where}: must be a string", where)
    return value


def _choice(value: Any, where: str) -> Grammar:
    texts = value if isinstance(value, list) else []
    usable = all(isinstance(text, str) and text for text in texts)
    if not usable or not 0 < len(texts) <= MAX_CHOICES:
        raise ApiError(f"{where}: must be a list of 1 to {MAX_CHOICES} texts", where)
    # `re.escape` also escapes the space, which is no escape in Rust's syntax.
    escaped = (re.sub(r"[\\.+*?()|\[\]{}^$#&\-~]", r"\\\g<0>", text) for text in texts)
    return Grammar.regex("|".join(escaped))


def _phone_actions(value: Any, where: str) -> Grammar | None:
    if isinstance(value, bool):
        return Grammar.phone_actions() if value else None
    options = Fields(value, where)
    thinking = options.boolean("thinking") or False
    options.finish()
    return Grammar.phone_actions(thinking=thinking)
