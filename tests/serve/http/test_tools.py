"""The syntax of calls, read from templates, and the constraint of a forced call."""

import json

import numpy as np
import pytest

from glm_edge.preprocess.chat import family_template
from glm_edge.preprocess.processor import Processor
from glm_edge.preprocess.tokenizer_files import read_tokenizer
from glm_edge.serve.http.errors import ApiError
from glm_edge.serve.http.fields import Fields
from glm_edge.serve.http.tools import CallSyntax, call_matcher, check_supported, read_tools
from tests.serve.http.fakes import NANO

TOKENIZER = read_tokenizer(NANO / "tokenizer.json")
SCHEMA = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["x"],
    "additionalProperties": False,
}


def tools(choice="required", **fields):
    items = [
        {"type": "function", "function": {"name": name, "parameters": SCHEMA}}
        for name in ("tap", "tap_twice")
    ]
    return read_tools(Fields({"tools": items, "tool_choice": choice, **fields}))


@pytest.mark.parametrize(
    ("family", "separator"),
    [("glm_4", "\n"), ("glm_4_0414", " \n"), ("glm_4_1v", None), ("glm_edge", None)],
)
def test_syntax_comes_from_the_template(family, separator):
    syntax = CallSyntax.of(Processor(TOKENIZER, family_template(family)))
    assert (None if syntax is None else syntax.separator) == separator


def test_tools_without_a_syntax_are_refused():
    with pytest.raises(ApiError, match="no tools"):
        check_supported(tools("auto"), None)
    assert check_supported(tools("none"), None) is None
    assert check_supported(None, None) is None


def test_choices():
    assert tools("auto").callable_names == ("tap", "tap_twice")
    assert not tools("auto").forced
    assert tools("none").callable_names == ()
    named = tools({"type": "function", "function": {"name": "tap"}})
    assert named.callable_names == ("tap",)
    assert named.forced
    assert tools("required").forced
    for choice in ("any", 5, {"function": {"name": "swipe"}}, {"type": "function"}):
        with pytest.raises(ApiError):
            tools(choice)


def test_a_forced_call_is_one_of_the_functions_with_valid_arguments():
    pytest.importorskip("llguidance")
    from glm_edge.generate.constraint import Constraints

    constraints = Constraints(TOKENIZER, [0], 2304)
    syntax = CallSyntax("\n", TOKENIZER.token_to_id("<|assistant|>"))
    start = call_matcher(tools(), syntax, TOKENIZER, constraints)
    draw, names = np.random.default_rng(0), set()
    for _ in range(20):
        matcher, tokens = start.copy(), []
        for _ in range(200):
            forced = matcher.forced()
            words = matcher.allowed()
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
            token = int(draw.choice(allowed))
            if forced:
                assert forced[0] in allowed
                token = forced[0]
            if token == 0:
                break
            matcher.accept(token)
            tokens.append(token)
        name, _, arguments = TOKENIZER.decode(tokens).partition("\n")
        names.add(name)
        assert json.loads(arguments)["x"] in range(10)
    assert names == {"tap", "tap_twice"}
