"""Recipes of earlier versions, as `to_json` wrote them then, still load."""

import json
from pathlib import Path

import pytest

from glm_edge.compress import (
    IntermediateLosses,
    OnPolicy,
    SolverOptions,
    Trainable,
    TrainOptions,
    chain,
    distill,
    prune,
    quantize,
    reparameterize,
)
from glm_edge.compress.methods import METHODS
from glm_edge.compress.recipes import recipe_from_json
from glm_edge.compress.transform import VERSION, to_json
from glm_edge.errors import RecipeError

NAMES = {
    "IntermediateLosses": IntermediateLosses,
    "OnPolicy": OnPolicy,
    "SolverOptions": SolverOptions,
    "Trainable": Trainable,
    "TrainOptions": TrainOptions,
    "distill": distill,
    "prune": prune,
    "quantize": quantize,
    "reparameterize": reparameterize,
}
# Transforms that version 0 did not have.
LATER = {"quantize.catq", "quantize.reorder"}
# The object that was written, every option spelled out, and the call that makes its equal.
CASES, CASES_1 = (
    json.loads(Path(__file__).with_name(f"recipes_version_{version}.json").read_text("utf-8"))
    for version in (0, 1)
)


@pytest.mark.parametrize("case", CASES + CASES_1, ids=lambda case: case["transform"])
def test_recipe_of_earlier_version_loads_to_an_equal_transform(case):
    assert case["recipe"].get("version", 0) < VERSION
    expected = eval(case["transform"], dict(NAMES))
    assert recipe_from_json(json.dumps(case["recipe"])) == expected
    assert recipe_from_json(to_json(expected)) == expected


def test_cases_hold_every_transform():
    earlier = {case["recipe"]["name"] for case in CASES}
    assert not earlier & LATER
    assert earlier | LATER == {method.name for method in METHODS}


def test_cases_of_version_1_change_every_option_that_moved():
    defaults = {
        "distill": distill(),
        "quantize.gptq": quantize.gptq(),
        "quantize.qat": quantize.qat(),
        "prune.sparsegpt": prune.sparsegpt(0.5),
    }
    moved = "intermediates on_policy solver trainable"
    changed = set()
    for case in CASES_1:
        transform = recipe_from_json(json.dumps(case["recipe"]))
        default = defaults.get(transform.name, prune.sparsegpt(0.5))
        changed |= {
            (transform.name, name)
            for name in moved.split()
            if getattr(transform, name, None) != getattr(default, name, None)
        }
    assert changed == {
        ("distill", "intermediates"),
        ("distill", "on_policy"),
        ("quantize.gptq", "solver"),
        ("quantize.qat", "trainable"),
        ("prune.sparsegpt", "solver"),
    }


def test_prompt_of_version_1_without_on_policy_is_refused():
    old = {"name": "distill", "version": 1, "options": {"prompt": 3}}
    with pytest.raises(RecipeError, match="prompt= needs on_policy= above zero"):
        recipe_from_json(json.dumps(old))


def test_option_of_version_1_in_version_2_is_refused():
    for name, option in (("distill", "hidden"), ("quantize.gptq", "damping")):
        recipe = {"name": name, "version": VERSION, "options": {option: 0.5}}
        with pytest.raises(RecipeError, match=f"has no option '{option}'"):
            recipe_from_json(json.dumps(recipe))


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
