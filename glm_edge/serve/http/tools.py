"""Tools: functions that a model may call, in the syntax of GLM-4's templates.

An answer of GLM-4 calls a function by its name on the first line and its arguments as JSON from the
second on. A further call begins after the token of the assistant's role.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from glm_edge.errors import GlmEdgeError
from glm_edge.generate.constraint import Constraints
from glm_edge.generate.grammar import Grammar
from glm_edge.preprocess.processor import Processor
from glm_edge.preprocess.tokens import ASSISTANT, text_ids
from glm_edge.serve.http.errors import ApiError
from glm_edge.serve.http.fields import Fields
from glm_edge.serve.requests import Matcher

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PROBE = "probe_of_syntax"


@dataclass(frozen=True, kw_only=True)
class Tools:
    """Functions of a request.

    Attributes:
      schemas: as the client sent them, for the template.
      parameters: JSON schema of the arguments, by name.
      choice: "none", "auto", "required", or the name of the function to call.
      parallel: allows several calls in one answer.
    """

    schemas: Sequence[Mapping[str, Any]]
    parameters: Mapping[str, Mapping[str, Any]]
    choice: str
    parallel: bool

    @property
    def callable_names(self) -> tuple[str, ...]:
        """Names that an answer may call."""
        if self.choice == "none":
            return ()
        return (self.choice,) if self.choice in self.parameters else tuple(self.parameters)

    @property
    def forced(self) -> bool:
        """True if the answer must be a call."""
        return self.choice not in ("none", "auto")


def read_tools(fields: Fields) -> Tools | None:
    """Read `tools`, `tool_choice` and `parallel_tool_calls`.

    Args:
      fields: of the body.

    Returns:
      The tools, or None.

    Raises:
      ApiError: a tool is malformed, or the choice names none of them.
    """
    items = fields.items("tools", MAX_TOOLS)
    choice = fields.take("tool_choice")
    parallel = fields.boolean("parallel_tool_calls")
    if not items:
        if choice not in (None, "none", "auto"):
            raise fields.refused("tool_choice", "needs tools")
        return None
    parameters: dict[str, Mapping[str, Any]] = {}
    for index, item in enumerate(items):
        tool = Fields(item, f"tools[{index}]")
        if tool.choice("type", ("function",)) is None:
            raise tool.refused("type", "must be 'function'")
        function = tool.object("function")
        name = None if function is None else function.text("name")
        if function is None or name is None or not _NAME.fullmatch(name) or name in parameters:
            raise tool.refused("function", "needs a name of its own: letters, digits, _ and -")
        schema = function.take("parameters")
        schema = {"type": "object"} if schema is None else schema
        if not isinstance(schema, dict):
            raise function.refused("parameters", "must be a JSON schema")
        parameters[name] = schema
    if isinstance(choice, dict):
        function = Fields(choice, "tool_choice").object("function")
        choice = None if function is None else function.text("name")
        if choice not in parameters:
            raise fields.refused("tool_choice", "must name one of the tools")
    elif choice not in (None, "none", "auto", "required"):
        raise fields.refused("tool_choice", "must be none, auto, required or a function")
    return Tools(
        schemas=items,
        parameters=parameters,
        choice=choice or "auto",
        parallel=parallel is not False,
    )


@dataclass(frozen=True)
class CallSyntax:
    """A model's way to write calls.

    Attributes:
      separator: text between the name of a function and its arguments.
      next_call: token before a further call, or None.
    """

    separator: str
    next_call: int | None

    @classmethod
    def of(cls, processor: Processor) -> "CallSyntax | None":
        """Read the syntax from a conversation that the template renders with a call.

        Args:
          processor: of the model.

        Returns:
          The syntax, or None if the template has no tools or writes calls in another way.
        """
        call = {"name": _PROBE, "arguments": {"a": 1}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": call}]},
        ]
        function = {"name": _PROBE, "description": "", "parameters": {"type": "object"}}
        tools = [{"type": "function", "function": function}]
        try:
            text = processor.render(messages, tools, add_generation_prompt=False)
        except GlmEdgeError:
            return None
        pattern = re.escape(ASSISTANT + _PROBE) + r"( ?\n)\{\s*\"a\": ?1\}"
        match = re.search(pattern, text)
        if match is None or text.count(_PROBE) < 2:
            return None
        return cls(match[1], processor.tokenizer.token_to_id(ASSISTANT))


class CallMatcher:
    """A matcher of one call: a name, the separator, and arguments that match the schema."""

    def __init__(
        self, beginnings: Mapping[str, Sequence[int]], arguments: Mapping[str, Matcher], words: int
    ) -> None:
        """Start before the name; see `call_matcher`."""
        self._beginnings, self._arguments, self._words = beginnings, arguments, words
        self._tokens: tuple[int, ...] = ()
        self._inner: Matcher | None = None

    def allowed(self) -> np.ndarray:
        """Return the tokens that continue a name, or the arguments."""
        if self._inner is not None:
            return self._inner.allowed()
        bits = np.zeros(self._words, np.uint32)
        for token in self._following():
            bits[token // 32] |= np.uint32(1 << token % 32)
        return bits

    def forced(self) -> list[int]:
        """Return the tokens that must follow."""
        if self._inner is not None:
            return self._inner.forced()
        # Up to the last token, behind which the arguments decide.
        forced: list[int] = []
        twin = self.copy()
        while twin._inner is None and len(following := twin._following()) == 1:
            forced += following
            twin.accept(forced[-1])
        return forced

    def accept(self, token: int) -> None:
        """Advance by one token."""
        if self._inner is not None:
            self._inner.accept(token)
            return
        self._tokens += (token,)
        for name, beginning in self._beginnings.items():
            if tuple(beginning) == self._tokens:
                self._inner = self._arguments[name].copy()

    def copy(self) -> "CallMatcher":
        """Return an independent copy."""
        twin = CallMatcher(self._beginnings, self._arguments, self._words)
        twin._tokens = self._tokens
        twin._inner = None if self._inner is None else self._inner.copy()
        return twin

    def _following(self) -> set[int]:
        count = len(self._tokens)
        return {
            tokens[count]
            for tokens in self._beginnings.values()
            if len(tokens) > count and tuple(tokens[:count]) == self._tokens
        }


def call_matcher(
    tools: Tools, syntax: CallSyntax, tokenizer: Tokenizer, constraints: Constraints
) -> CallMatcher:
    """Make the matcher of `tool_choice` "required" or a named function.

    Args:
      tools: of the request.
      syntax: of the model.
      tokenizer: of the model.
      constraints: compiled grammars.

    Returns:
      The matcher.

    Raises:
      DataError: a schema is not supported.
    """
    names = tools.callable_names
    beginnings = {name: text_ids(tokenizer, name + syntax.separator) for name in names}
    arguments: dict[str, Matcher] = {
        name: constraints.start(Grammar.json_schema(tools.parameters[name])) for name in names
    }
    return CallMatcher(beginnings, arguments, -(-constraints.vocab_size // 32))


def check_supported(tools: Tools | None, syntax: CallSyntax | None) -> CallSyntax | None:
    """Refuse tools that a model cannot call.

    Raises:
      ApiError: the model's template has no tools, or another syntax of calls.
    """
    if tools is None or tools.choice == "none":
        return None
    if syntax is None:
        raise ApiError(
            "tools: this model's chat template has no tools in the syntax of GLM-4", "tools"
        )
    return syntax
