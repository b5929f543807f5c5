"""Forged recipes: each is a recipe or one RecipeError, soon."""

import inspect
import json
import random
import re
import time

import numpy as np
import pytest

from glm_edge.compress.recipes import recipe_from_json
from glm_edge.compress.transform import _REGISTRY, CHAIN
from glm_edge.errors import RecipeError
from glm_edge.params.patterns import Pattern

VALUES = [
    None, True, False, 0, -1, 1, 7, 2**40, 10**19, -(10**19), 0.0, -0.5, 0.5, 1.0, 1e300, -1e300,
    float("nan"), float("inf"), "", "x", "4", "\0", "\ud800", "/etc/passwd", "a" * 30_000, "(((",
    "(a*)*b", [], [1], [[1]], ["a"], [1e30], {}, {"a": 1}, {"steps": 1}, {"text": float("nan")},
]  # fmt: skip


def outcome(text):
    start = time.monotonic()
    try:
        result = recipe_from_json(text)
    except RecipeError:
        result = None
    assert time.monotonic() - start < 10.0
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in _REGISTRY if name != CHAIN])
def test_every_option_takes_or_refuses_every_value(name):
    parameters = inspect.signature(_REGISTRY[name]).parameters
    needed = {"sparsity": 0.5, "keep": "0-4", "layers": 1, "heads": 0.25}
    base = {key: value for key, value in needed.items() if key in parameters}
    for option in parameters:
        for value in VALUES:
            text = json.dumps({"name": name, "options": {**base, option: value}})
            result = outcome(text)
            if result is not None and isinstance(value, float):
                assert np.isfinite(value) or not hasattr(result, option)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_damaged_json_is_refused(seed):
    rng = random.Random(1000 + seed)
    step = {"name": "quantize.rtn", "options": {"bits": 4, "group_size": 32, "where": "^a/(b|c)"}}
    complete = json.dumps({"name": "chain", "options": {"transforms": [step, step]}})
    pieces = [
        "{",
        "}",
        "[",
        "]",
        '"',
        ",",
        ":",
        "\\",
        "\0",
        "9" * 40,
        "NaN",
        "1e999",
        "\ud800",
        "é",
    ]
    for _ in range(300):
        text = list(complete)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(1, len(text))
            text[at : at + rng.randint(0, 3)] = rng.choice(pieces)
        outcome("".join(text))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_random_patterns_are_searched_as_re_does(seed):
    rng = random.Random(500 + seed)
    atoms = ["l", "/", "[a-m]", "[^e]", ".", r"\d", r"\w", "(?:ab|a)", "(d|e)", "(?!a)", "(?<=/)"]
    repeats = ["", "", "", "*", "+", "?", "{2}", "{1,3}", "*?", "{0,}"]

    def pattern(depth=0):
        parts = []
        for _ in range(rng.randint(1, 3)):
            atom = rng.choice(atoms)
            if depth < 2 and rng.random() < 0.4:
                atom = f"({pattern(depth + 1)})"
            parts.append(atom if atom.startswith(("(?!", "(?<")) else atom + rng.choice(repeats))
        return "".join(parts) + (
            "|" + pattern(depth + 1) if depth < 2 and rng.random() < 0.2 else ""
        )

    compared = 0
    for _ in range(500):
        text = pattern()
        for path in ("", "l/1", "deb/a0/", "layers/11/mlp"):
            assert Pattern(text).search(path) == bool(re.search(text, path)), (text, path)
            compared += 1
    assert compared == 2000


@pytest.mark.slow
def test_patterns_of_nested_repeats_end():
    path = "decoder/layers/17/self_attn/q_proj/weight"
    for inner in ("[a-z_]", "(a|[a-z])", "(?:.|/)", r"\w?"):
        for repeats in ("+*", "*+", "**", "{1,}*"):
            text = f"^(({inner}){repeats[0] if repeats[0] != '{' else '{1,}'}){repeats[-1]}!$"
            start = time.monotonic()
            assert not Pattern(text).search(path)
            assert time.monotonic() - start < 10.0
