"""Descriptions of the texts that a model may generate."""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from glm_edge.errors import DataError
from glm_edge.files import parse_json
from glm_edge.generate.schema_check import checked_schema

THINKING_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# Optional white space in JSON: any amount would let a model run on without an end.
WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,16}"
# Without `\u`: a name such as "\u0061" would repeat the property "a" with another schema.
ESCAPES = r"nrbtf\""

_MAX_CHARACTERS = {"json_schema": 65536, "regex": 8192, "lark": 32768, "phone_actions": 0}
# llguidance overflowed a stack of 8 MiB between 2,000 and 5,000 rules that refer to each other.
_MAX_RULES = 500
# Intersections and complements: the states of their operands multiply.
_MAX_OPERATORS = 8
_LITERALS = re.compile(
    r'"(?:\\.|[^"\\\n])*"|/(?![/\s])(?:\\.|[^/\\\n])+/|//[^\n]*|#[^\n]*', re.DOTALL
)
_REFUSED_IN_LARK = (
    (re.compile(r"%(?!ignore\b|import\b)\w*"), "directives other than %ignore and %import"),
    (re.compile(r"<[^\s>]*"), "special tokens"),
    (re.compile(r"@\w*"), "references to other grammars"),
    (
        re.compile(r"\b(?:stop|stop_capture|max_tokens|temperature)\s*="),
        "options of a rule other than lazy, suffix and capture",
    ),
)


@dataclass(frozen=True)
class Grammar:
    """A set of texts, one of which a constrained model generates.

    Call a constructor: `json_schema`, `json_object`, `regex`, `lark` or `phone_actions`. The value
    is small and hashable; `glm_edge.generate.Constraints` compiles it.

    Attributes:
      kind: name of the constructor.
      source: the schema as JSON, the regular expression or the Lark grammar.
      thinking: allows a text before a phone action.

    Raises:
      DataError: the source exceeds a limit or cannot be encoded as UTF-8.
    """

    kind: str
    source: str = ""
    thinking: bool = False

    KINDS: ClassVar[tuple[str, ...]] = tuple(_MAX_CHARACTERS)

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise DataError(f"grammar: kind must be one of {', '.join(self.KINDS)}")
        if not isinstance(self.source, str):
            raise DataError(f"{self.kind}: must be a text, found {type(self.source).__name__}")
        limit = _MAX_CHARACTERS[self.kind]
        if len(self.source) > limit:
            raise DataError(f"{self.kind}: has {len(self.source)} characters; the limit is {limit}")
        try:
            self.source.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{self.kind}: {error}") from error

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> "Grammar":
        r"""Describe the JSON texts that match a schema.

        Properties come in the schema's order. Strings are written without `\u` escapes. White space
        between tokens has at most 16 characters.

        Args:
          schema: a JSON schema, as an object or as JSON text; see
            `glm_edge.generate.schema_check.checked_schema`.

        Returns:
          The grammar.

        Raises:
          DataError: the schema is not JSON, too large, or has keywords without support, which are
            never ignored.
        """
        limit = _MAX_CHARACTERS["json_schema"]
        value = (
            parse_json(schema, "schema", DataError, limit) if isinstance(schema, str) else schema
        )
        return cls("json_schema", json.dumps(checked_schema(value), separators=(",", ":")))

    @classmethod
    def json_object(cls) -> "Grammar":
        """Describe all JSON objects."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> "Grammar":
        """Describe the texts that match a regular expression from start to end.

        Args:
          pattern: expression in the syntax of Rust's `regex`, without word boundaries, anchors
            inside, look-around and back references. `.` does not match a line break.

        Returns:
          The grammar. `glm_edge.generate.Constraints` checks the syntax.

        Raises:
          DataError: the expression has more than 8,192 characters.
        """
        return cls("regex", pattern)

    @classmethod
    def lark(cls, source: str) -> "Grammar":
        """Describe the texts of a context-free grammar.

        Args:
          source: rules in llguidance's variant of Lark, which begin with `start`. Special tokens,
            nested schemas (`%json`), options of llguidance and `stop`, `max_tokens` and
            `temperature` of a rule are refused.

        Returns:
          The grammar. `glm_edge.generate.Constraints` checks the syntax.

        Raises:
          DataError: the grammar has more than 32,768 characters or 500 rules, more than 8
            operators `&` and `~`, or refused syntax.

        References:
          llguidance, https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
        """
        grammar = cls("lark", source)
        rules = _LITERALS.sub(" ", source)
        for pattern, meaning in _REFUSED_IN_LARK:
            if match := pattern.search(rules):
                raise DataError(f"lark: {match[0]!r:.60}: {meaning} are not supported")
        if rules.count(":") > _MAX_RULES:
            raise DataError(f"lark: has {rules.count(':')} rules; the limit is {_MAX_RULES}")
        operators = rules.count("&") + rules.count("~")
        if operators > _MAX_OPERATORS:
            raise DataError(
                f"lark: has {operators} operators & and ~; the limit is {_MAX_OPERATORS}"
            )
        return grammar

    @classmethod
    def phone_actions(cls, thinking: bool = False) -> "Grammar":
        r"""Describe one action of Open-AutoGLM, such as `do(action="Tap", element=[435,715])`.

        Coordinates are integers from 0 to 999. Strings contain no quotes, backslashes or control
        characters, as the client does not unescape them; nor `finish(message=` or `<answer>`, at
        which it would split the answer.

        Args:
          thinking: allows any text without those markers and `do(action=` before the action. It may
            be enclosed in `<think>` and `</think>`, and `<answer>` may stand before the action.

        Returns:
          The grammar. No `</answer>` follows the action, as the client would read it as a part of
          it.

        References:
          Open-AutoGLM, https://github.com/zai-org/Open-AutoGLM
        """
        return cls("phone_actions", thinking=bool(thinking))

    def to_lark(self, special_tags: bool = False) -> str:
        """Return the Lark grammar of phone actions, as llguidance reads it.

        Args:
          special_tags: the tags around thoughts are special tokens rather than text.
        """
        return _phone_lark(self.thinking, special_tags)


_PHONE = r"""
ACTION: "do(action=" CALL ")" | "finish(message=" STRING ")"
CALL: "\"Launch\", app=" NAME
  | "\"Tap\", element=" POINT (", message=" STRING)?
  | "\"Type\", text=" STRING
  | "\"Type_Name\", text=" STRING
  | "\"Swipe\", start=" POINT ", end=" POINT
  | "\"Long Press\", element=" POINT
  | "\"Double Tap\", element=" POINT
  | "\"Back\""
  | "\"Home\""
  | "\"Wait\", duration=\"" /[1-9][0-9]?/ " seconds\""
  | "\"Take_over\", message=" STRING
  | "\"Interact\""
  | "\"Note\", message=\"True\""
  | "\"Call_API\", instruction=" STRING
POINT: "[" NUMBER "," NUMBER "]"
NUMBER: /0|[1-9][0-9]{0,2}/
NAME: STRING & ~/""/
STRING: /"[^"\\\x00-\x1f\x7f]*"/ & ~/(?s:.*)(finish\(message=|<answer>)(?s:.*)/
"""
_MARKERS = r"do\(action=|finish\(message=|<think>|<\/think>|<answer>|<\/answer>"
_THOUGHT = rf"THOUGHT: /(?s:.+)/ & ~/(?s:.*)({_MARKERS})(?s:.*)/"


@functools.cache
def _phone_lark(thinking: bool, special_tags: bool) -> str:
    if not thinking:
        return f"start: ACTION{_PHONE}"
    # A lexeme takes as much text as it can, so that a thought and the action after it, or a tag of
    # plain text, must be one lexeme. `glm_edge.preprocess.chat.split_thinking` needs `</think>`
    # after `<think>`.
    if special_tags:
        return rf"""
start: <think> THOUGHT? </think> SPACE? <answer>? ANSWER
  | THOUGHT? </think> SPACE? <answer>? ANSWER
  | THOUGHT? <answer> ANSWER
  | LINE
LINE: THOUGHT? ACTION
ANSWER: /[ \n]{{0,4}}/ ACTION
SPACE: /[ \n]{{1,4}}/
{_THOUGHT}{_PHONE}"""
    return rf"""
start: LINE
LINE: ("<think>"? THOUGHT? "</think>" SPACE | THOUGHT?) ("<answer>" SPACE)? ACTION
SPACE: /[ \n]{{0,4}}/
{_THOUGHT}{_PHONE}"""
