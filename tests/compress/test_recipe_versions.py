"""Recipes without a version, as `to_json` wrote them before there was one, still load."""

import json
from pathlib import Path

import pytest

from glm_edge.compress import TrainOptions, chain, distill, prune, quantize, reparameterize
from glm_edge.compress.methods import METHODS
from glm_edge.compress.recipes import recipe_from_json
from glm_edge.compress.transform import VERSION, to_json
from glm_edge.errors import RecipeError

NAMES = {
    "TrainOptions": TrainOptions,
    "distill": distill,
    "prune": prune,
    "quantize": quantize,
    "reparameterize": reparameterize,
}
# The object that was written, every option spelled out, and the call that makes its equal.
CASES = json.loads(Path(__file__).with_name("recipes_version_0.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["transform"])
def test_recipe_without_version_loads_to_an_equal_transform(case):
    expected = eval(case["transform"], dict(NAMES))
    assert recipe_from_json(json.dumps(case["recipe"])) == expected
    assert recipe_from_json(to_json(expected)) == expected


def test_cases_hold_every_transform():
    assert {case["recipe"]["name"] for case in CASES} == {method.name for method in METHODS}


def test_chain_without_version_loads_to_an_equal_chain():
    steps = [case["recipe"] for case in CASES]
    recipe = {"name": "chain", "options": {"transforms": steps}}
    expected = chain(*(eval(case["transform"], dict(NAMES)) for case in CASES))
    assert recipe_from_json(json.dumps(recipe)) == expected


def test_defaults_of_recipes_without_version_are_those_of_then():
    for name, expected in {
        "quantize.rtn": quantize.rtn("int8"),
        "quantize.gptq": quantize.gptq("int4"),
        "quantize.hqq": quantize.hqq("int4-g64-affine-zero=float16"),
        "quantize.qat": quantize.qat("int4", train=TrainOptions(steps=1000, warmup=0.05)),
        "distill": distill(train=TrainOptions(steps=200)),
    }.items():
        assert recipe_from_json(json.dumps({"name": name})) == expected
    old = {"name": "quantize.gptq", "options": {"group_size": 32}}
    assert recipe_from_json(json.dumps(old)) == quantize.gptq("int4-g32")
    old = {"name": "quantize.hqq", "options": {"bits": 3, "group_size": None}}
    assert recipe_from_json(json.dumps(old)) == quantize.hqq("int3-affine-zero=float16")
    old = {"name": "quantize.qat", "options": {"learning_rate": 0.01}}
    training = TrainOptions(steps=1000, warmup=0.05, learning_rate=0.01)
    assert recipe_from_json(json.dumps(old)) == quantize.qat(train=training)


def test_recipe_is_written_with_its_version():
    assert json.loads(to_json(quantize.rtn("int4-g32")))["version"] == VERSION
    written = json.loads(to_json(chain(quantize.rtn("int4-g32"))))
    assert [set(step) for step in written["options"]["transforms"]] == [{"name", "options"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, "quantize.rtn: bits must be 8, 6, 5, 4, 3 or 2, not 7"),
        ({"bits": "4"}, "bits must be"),
        ({"group_size": 0}, "group_size must be positive"),
        ({"symmetric": "no"}, "symmetric must be"),
        ({"qtype": "int7"}, "'int7' is unknown"),
        ({"scale_dtype": "int8"}, "scale_dtype"),
        ({"group_size": [32]}, "group_size must be positive"),
    ],
)
def test_options_of_then_without_meaning_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        recipe_from_json(json.dumps({"name": "quantize.rtn", "options": options}))
