"""Patterns find what Python's `re` finds, and always end."""

import re
import time

import pytest

from glm_edge.errors import RecipeError
from glm_edge.params.patterns import MAX_PATTERN, Pattern

PATHS = ["", "embed/weight", "decoder/layers/1/mlp/down_proj/weight", "vision/patch/weight", "a_B"]
HONEST = [
    "",
    "^decoder/",
    r"^decoder/|^vision/(?!patch/)|^speech/(?!conv1/)",
    r"(^|/)(embed|position|token_type)/weight|^head/",
    r"^decoder/layers/[01]/mlp",
    r"layers/\d+/(mlp|self_attn)/",
    "down_proj",
    r"(?<!down_)proj|(?<=em)bed",
    r"\bmlp\b",
    r"weight$",
    r"l.{3,5}s",
    r"[^/]+/[^/]+$",
    r"(?i)A_b",
    r"a?b??(?:c|d)*\D+\W*\s?",
]


@pytest.mark.parametrize("text", HONEST)
def test_search_agrees_with_re(text):
    pattern = Pattern(text)
    for path in PATHS:
        assert pattern.search(path) == bool(re.search(text, path))


def test_match_is_the_first_and_longest_part():
    assert Pattern(r"layers/\d+").match("decoder/layers/10/layers/2") == "layers/10"
    assert Pattern("^x").match("decoder") is None


@pytest.mark.parametrize(
    "text",
    [r"(([a-z/0-9_]+)+)+$X", r"^(([a-z_]|[a-z_])*/?)*!$", r"(.*)*\d\d\d", "(a|a)*(b?){999999}!"],
)
def test_search_ends_where_re_does_not(text):
    start = time.monotonic()
    assert not Pattern(text).search("decoder/layers/1/mlp/gate_up_proj/weight")
    assert time.monotonic() - start < 5.0


def test_search_gives_up_on_a_flood_of_repeats():
    with pytest.raises(RecipeError, match="takes too long"):
        Pattern("(.*x?)*" * 2000 + "!").search("ab/" * 100)


@pytest.mark.parametrize(
    "text",
    ["([", "(" * 5000 + ")" * 5000, "a" * (MAX_PATTERN + 1), r"(a)\1", "(?m)a", "(?>a)", 3, ["a"]],
)
def test_what_is_no_pattern_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"\w"):
        Pattern(text)
