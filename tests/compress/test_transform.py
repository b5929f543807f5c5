"""Transforms and recipes as values: printing, equality, JSON, and the same bytes again."""

import hashlib
import json

import jax
import numpy as np
import pytest

import glm_edge as ge
from glm_edge import params as boxes
from glm_edge.compress import ProgressLine, chain, distill, prune, quantize, recipes, to_json
from glm_edge.compress.recipe import recipe_from_json
from glm_edge.errors import DataError, RecipeError

RECIPE = chain(
    prune.structured(heads=0.25, neurons=0.3),
    distill(steps=2),
    quantize.rtn(bits=4, group_size=16, where=r"decoder/.*"),
    quantize.rtn(bits=8, where=r"embed"),
)


def digest(params):
    arrays, spec = boxes.to_flat(params)
    total = hashlib.sha256(json.dumps(spec, sort_keys=True).encode())
    for name in sorted(arrays):
        total.update(name.encode() + np.asarray(arrays[name]).tobytes())
    return total.hexdigest()


def test_a_transform_prints_what_differs_from_its_defaults():
    assert repr(prune.structured(heads=0.25, neurons=0.3)) == (
        "prune.structured(heads=0.25, neurons=0.3)"
    )
    assert repr(quantize.rtn()) == "quantize.rtn()"
    assert repr(chain()) == "chain()"
    assert repr(chain(quantize.rtn(4, 32))) == ("chain(\n  quantize.rtn(bits=4, group_size=32),\n)")


def test_what_prints_evaluates_to_an_equal_transform():
    names = {"chain": chain, "prune": prune, "distill": distill, "quantize": quantize}
    for transform in (RECIPE, *(recipes.named(name) for name in recipes.NAMED)):
        assert eval(repr(transform), names) == transform


def test_equality_is_by_value():
    assert quantize.rtn(8) == quantize.rtn(bits=8)
    assert quantize.rtn(8) != quantize.rtn(4)
    assert quantize.rtn(8) != "quantize.rtn"
    assert hash(quantize.rtn(8)) == hash(quantize.rtn(bits=8))
    teacher = (None, {})
    assert distill(teacher=teacher) == distill(teacher=teacher)
    assert distill(teacher=teacher) != distill()


def test_grouping_of_a_chain_changes_nothing():
    a, b, c = prune.magnitude(0.5), quantize.rtn(4, 32), quantize.rtn(8)
    assert chain(chain(a, b), c) == chain(a, chain(b, c)) == chain(a, b, c)
    assert hash(chain(chain(a, b), c)) == hash(chain(a, b, c))


def test_options_cannot_be_changed():
    with pytest.raises(TypeError):
        quantize.rtn(8).options["bits"] = 4


@pytest.mark.parametrize("name", ["phone", "small", "quickstart"])
def test_named_recipes_round_trip_through_json(name, tmp_path):
    recipe = recipes.named(name)
    assert recipe_from_json(to_json(recipe)) == recipe
    path = tmp_path / "recipe.json"
    path.write_text(to_json(recipe))
    assert recipe_from_json(path) == recipe_from_json(str(path)) == recipe
    assert recipes.find(name) == recipes.find(str(path)) == recipe


def test_the_public_names_are_on_the_package():
    assert ge.chain is chain
    assert ge.distill is distill
    assert ge.recipe_from_json is recipe_from_json
    assert ge.prune.structured is prune.structured
    assert ge.quantize.rtn is quantize.rtn


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "quantize.magic"}', "unknown transform 'quantize.magic'; known: .*quantize.rtn"),
        ('{"name": "quantize.rtn", "options": {"bit": 4}}', "no option 'bit'; known: bits"),
        ('{"name": "quantize.rtn", "options": {"bits": 7}}', "bits must be 8, 6, 5, 4, 3 or 2"),
        ('{"name": "prune.magnitude", "options": {"sparsity": "x"}}', "prune.magnitude"),
        ('{"name": "prune.magnitude"}', "prune.magnitude: .*sparsity"),
        ('{"name": "chain", "options": {"steps": []}}', "chain takes one option"),
        ('{"name": "chain", "options": {"transforms": [3]}}', "expected"),
        ('{"options": {}}', "expected"),
        ('{"name": "quantize.rtn", "options": []}', "options an object"),
        ('{"name": ', "not JSON"),
        ("no/such/file.json", "no/such/file.json: cannot read a recipe .*phone"),
    ],
)
def test_recipes_that_are_none_are_refused(text, message):
    with pytest.raises(RecipeError, match=message):
        recipe_from_json(text)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="unknown recipe 'laptop'; known: phone"):
        recipes.named("laptop")
    with pytest.raises(RecipeError, match="chain takes transforms, found int"):
        chain(3)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"binary.json: not JSON"):
        recipe_from_json(tmp_path / "binary.json")


def test_a_teacher_of_arrays_cannot_be_written(small):
    with pytest.raises(RecipeError, match="teacher= holds arrays"):
        to_json(chain(distill(teacher=small)))


def test_the_same_recipe_seed_and_calibration_give_the_same_bytes(small, calibration):
    model, params = small
    before = digest(params)

    def run(recipe, seed=0):
        rng = jax.random.key(seed)
        smaller, compressed, _ = recipe(model, params, calibration=calibration, rng=rng)
        return smaller, digest(compressed)

    first = run(RECIPE)
    assert run(recipe_from_json(to_json(RECIPE))) == first
    assert run(RECIPE, seed=3)[1] != first[1]
    assert digest(params) == before


def test_a_chain_reports_every_step_and_the_totals_of_all(small, calibration):
    model, params = small
    _, compressed, report = RECIPE(model, params, calibration=calibration)
    assert [row.transform for row in report.rows].count("quantize.rtn") == 13
    assert report.bytes_before == boxes.stored_bytes(params)
    assert report.bytes_after == boxes.stored_bytes(compressed)
    assert report.count_before == boxes.count(params)
    assert report.count_after == boxes.count(compressed)
    assert len(report.curve) == 2


def test_an_empty_chain_changes_nothing(small):
    model, params = small
    same, same_params, report = chain()(model, params)
    assert same is model
    assert same_params is params
    assert report.bytes_before == report.bytes_after


def test_progress_is_told(small, calibration, capsys):
    model, params = small
    seen = []
    RECIPE(
        model,
        params,
        calibration=calibration,
        progress=lambda stage, done, total: seen.append((stage.split(":")[0], done, total)),
    )
    assert [stage for stage, done, total in seen if done == total] == [
        "score",
        "distill",
        "quantize.rtn",
        "quantize.rtn",
    ]
    quantize.rtn(8)(model, params, progress=ProgressLine())
    assert "13/13 quantize" in capsys.readouterr().err


def test_calibration_is_read_more_than_once(small, calibration):
    with pytest.raises(DataError, match="can be read only once"):
        RECIPE(*small, calibration=(batch for batch in calibration))
