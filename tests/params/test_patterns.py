"""Patterns find what Python's `re` finds, and always end."""

import re
import time

import numpy as np
import pytest

from glm_edge.errors import RecipeError
from glm_edge.params import patterns, select
from glm_edge.params.patterns import MAX_PATTERN, Pattern, compiled, shared_steps

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
    "e.*e+i?[a-h]*t$",
    "^.*?/l+a",
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
    start = time.process_time()
    assert not Pattern(text).search("decoder/layers/1/mlp/gate_up_proj/weight")
    assert time.process_time() - start < 20.0


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


def search_all(patterns, count=1000):
    """Searches as one call does, and counts the matches."""
    with shared_steps():
        return sum(
            bool(compiled(text).search(f"decoder/layers/{index}/mlp/gate_up_proj/weight"))
            for index in range(count)
            for text in patterns
        )


@pytest.mark.slow
@pytest.mark.parametrize("text", [".*" * 300 + "!", "(?:.*|x)*" * 300 + "!"])
def test_searches_of_one_call_end_within_seconds(text):
    start = time.process_time()
    with pytest.raises(RecipeError, match="takes too long"):
        search_all([text])
    assert time.process_time() - start < 20.0


def test_paths_and_patterns_of_one_call_share_a_budget(monkeypatch):
    monkeypatch.setattr(patterns, "_MAX_SHARED_STEPS", 50_000)
    text = ".*" * 30 + "!"
    search_all([text], 1)
    with pytest.raises(RecipeError, match=r"pattern '.+' takes too long at") as caught:
        search_all([text])
    assert text[:20] in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match="takes too long"):
        search_all([f"{text}{index}" for index in range(60)], 1)
    # The next call starts anew.
    search_all([f"{text}x"], 1)


def test_selection_shares_a_budget_with_the_call_around_it(monkeypatch):
    monkeypatch.setattr(patterns, "_MAX_SHARED_STEPS", 50_000)
    leaf = np.zeros((2, 2), np.float32)
    params = {f"layer{index}": {"weight": leaf} for index in range(200)}

    def select_often():
        with shared_steps():
            for index in range(200):
                select(params, f"layer{index}.*weight")

    assert select(params, "layer7.*weight") == [
        "layer7/weight",
        *(f"layer7{i}/weight" for i in range(10)),
    ]
    with pytest.raises(RecipeError, match="takes too long"):
        select_often()


def test_honest_patterns_search_many_paths():
    patterns = [".*mlp.*gate.*", r"layers/\d+/(mlp|self_attn)/", "^decoder/", "down|up"]
    assert search_all(patterns, 200) == 200 * len(patterns)


def test_compiled_of_an_empty_refusal_matches_nothing():
    assert not compiled("(?!)").search("decoder/layers/0")
