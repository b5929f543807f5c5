"""Recipes as strangers write them."""

import json
import os

import pytest

import glm_edge as ge
from glm_edge.compress import recipes
from glm_edge.compress.recipes import NAMED, named, recipe_from_json
from glm_edge.errors import RecipeError


def text(name, **options):
    return json.dumps({"name": name, "options": options})


CHAINS = '{"name":"chain","options":{"transforms":['


@pytest.mark.parametrize("name", NAMED)
def test_recipe_from_json_knows_names(name):
    assert recipe_from_json(name) == named(name)


REFUSED = {
    "phon: cannot read a recipe .* phone, small": "phon",
    "cannot read a recipe": "\0",
    "not JSON text, a path|not a int": 3,
    "not a bytes": b"{}",
    'expected {"name"': "[]",
    "nested": '{"name":"chain","options":{"transforms":[' * 200
    + text("quantize.rtn")
    + "]}}" * 200,
    "nested too deep|not JSON": '{"name":' + "[" * 100_000,
    "integer of 1000000 digits": '{"name":"quantize.rtn","options":{"bits":' + "9" * 10**6 + "}}",
    "'name' appears twice": '{"name":"quantize.rtn","name":"quantize.hqq"}',
    "at most 1000 transforms": CHAINS + ",".join([text("quantize.rtn")] * 1001) + "]}}",
    "symmetric must be": text("quantize.rtn", symmetric="no"),
    "where=": text("quantize.rtn", where="(" * 5000 + ")" * 5000),
    "stacked=": text("quantize.rtn", stacked="(a)\\1"),
    "steps must be": text("distill", steps=10**18),
    "must be finite": '{"name":"distill","options":{"learning_rate":NaN}}',
    "state_dir must be": text("distill", state_dir=["a"]),
    "seed must be": text("quantize.rotate", seed=2**40),
    "tokenizer must be": text("prune.vocabulary", keep=[1], tokenizer="x"),
    "damping must be": text("quantize.gptq", damping=1e300),
    "sweeps must be": text("quantize.gptq", sweeps=10**9),
}


@pytest.mark.parametrize("message", REFUSED)
def test_recipe_from_json_refuses_in_one_line(message):
    with pytest.raises(RecipeError, match=message) as caught:
        recipe_from_json(REFUSED[message])
    assert "\n" not in str(caught.value)


def test_recipe_from_json_opens_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(RecipeError, match="a pipe, socket or device"):
        recipe_from_json(tmp_path / "pipe.json")
    with pytest.raises(RecipeError, match="a pipe, socket or device"):
        recipe_from_json("/dev/zero")


def test_options_have_the_type_that_they_say():
    with pytest.raises(RecipeError, match="norms must be bool"):
        ge.quantize.distill_scales(norms=1)
    with pytest.raises(RecipeError, match="exponent must be"):
        ge.quantize.hqq(exponent=float("nan"))


def test_options_that_are_sequences_are_left_to_their_transform():
    recipe = ge.prune.mask(0.5, levels=(0.0, 0.5))
    assert recipe.levels == (0.0, 0.5)


def test_every_recipe_is_described():
    assert [name for name in recipes.NAMED if f"`{name}`" not in recipes.named.__doc__] == []
