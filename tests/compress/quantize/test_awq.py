"""AWQ as a transform: folds are exact, errors fall, boxes are what was asked for."""

import importlib

import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from glm_edge import params as boxes
from glm_edge.compress import folding, recipe_from_json, to_json
from glm_edge.compress.layerwise.stream import compress_checkpoint
from glm_edge.compress.quantize.awq import awq
from glm_edge.compress.quantize.rtn import rtn
from glm_edge.compress.quantize.smoothquant import smoothquant
from glm_edge.errors import DataError, RecipeError

LAYER = r"layers/0/"
module = importlib.import_module("glm_edge.compress.quantize.awq")


@pytest.mark.parametrize(
    "name", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("edge_v", "pruned"))]
)
def test_folds_are_exact_before_rounding(square, make_member, batch_of, logits, monkeypatch, name):
    model, params = square if name is None else make_member(name)
    monkeypatch.setattr(module, "_rounded", lambda work, path, leaf, *others: leaf)
    changed = awq("int4", where=r"layers/1/")(model, params, [batch_of(model, rows=4, seed=1)])[1]
    batch = batch_of(model, rows=4)
    expected = logits(model, params, batch)
    assert jnp.abs(logits(model, changed, batch) - expected).max() < 1e-5 * jnp.abs(expected).max()
    before, after = (dict(boxes.path_items(tree)) for tree in (params, changed))
    moved = [
        fold
        for fold in folding.folds(model.config)
        if not np.allclose(before[fold.consumers[0]], after[fold.consumers[0]])
    ]
    assert {fold.kind for fold in moved} >= {"norm", "value", "neurons"}


def test_loses_less_than_rounding_to_nearest(square, batch_of, logits):
    model, params = square
    leaves = dict(boxes.path_items(params))
    rng = np.random.default_rng(0)
    for fold in folding.folds(model.config):
        spread = np.float32(np.exp(rng.normal(0, 1.5, fold.channels)))
        leaves |= folding.move(fold, leaves, spread)
    params = boxes.tree.nested(leaves)
    calibration = [batch_of(model, rows=4, seed=seed) for seed in (1, 2)]
    batch = batch_of(model, rows=4, seed=3)
    expected = logits(model, params, batch)

    def error(transform):
        actual = transform(model, params, calibration)[1]
        return float(jnp.linalg.norm(logits(model, actual, batch) - expected))

    plain = error(rtn("int4", where=LAYER))
    assert error(awq("int4", where=LAYER, clip=False)) < 0.8 * plain


@pytest.mark.parametrize(
    "where",
    [r"^speech/layers/0/fc|^decoder/layers/0/mlp/", pytest.param(None, marks=pytest.mark.slow)],
)
def test_boxes_and_report(make_member, make_shallow, batch_of, where):
    model, params = (make_shallow if where else make_member)("asr")
    calibration = [batch_of(model)]
    recipe = awq("int4-g16", where=where, fallback_bits=8)
    _, changed, report = recipe(model, params, calibration)
    after = dict(boxes.path_items(changed))
    for path in boxes.select(params, where):
        complete = after[path].shape[-1] % 16 == 0
        assert str(after[path].format) == ("int4-g16" if complete else "int8-channel"), path
    actions = {row.path: row.action for row in report.rows}
    assert "ratio" in actions["speech/layers/0/fc1/weight"]
    assert "fallback" in actions["decoder/layers/0/mlp/down_proj/weight"]
    assert "ratio" not in actions["speech/layers/0/fc2/weight"]
    assert report.bytes_after == boxes.stored_bytes(changed)
    assert recipe_from_json(to_json(recipe)) == recipe


def test_part_of_a_group_is_rounded_without_factors(square, batch_of):
    model, params = square
    _, changed, report = awq("int4", where="q_proj")(model, params, [batch_of(model, rows=4)])
    assert {row.path.split("/")[-2] for row in report.rows} == {"q_proj"}
    leaves = dict(boxes.path_items(changed))
    path = "decoder/layers/0/input_norm/weight"
    np.testing.assert_array_equal(leaves[path], dict(boxes.path_items(params))[path])


def test_masked_and_bfloat16_weights(square, batch_of, logits):
    model, params = square
    path = "decoder/layers/0/mlp/gate_up_proj/weight"
    keep = np.random.default_rng(0).random((64, 32)) > 0.5

    def narrow(name, leaf):
        leaf = leaf.astype(jnp.bfloat16)
        return boxes.mask(leaf, jnp.asarray(keep)) if name == path else leaf

    params = boxes.map_with_path(narrow, params)
    where = f"{LAYER}mlp"
    _, changed, _ = awq("int4", where=where)(model, params, [batch_of(model, rows=4)])
    leaves = dict(boxes.path_items(changed))
    assert leaves[path].dtype == "bfloat16"
    np.testing.assert_array_equal(np.float32(boxes.dense(leaves[path]))[~keep], 0)
    batch = batch_of(model, rows=4, seed=4)
    expected = logits(model, params, batch)
    rounded = rtn("int4", where=where)(model, params)[1]
    errors = [jnp.linalg.norm(logits(model, tree, batch) - expected) for tree in (changed, rounded)]
    assert errors[0] < 1.5 * errors[1]


def test_streams_the_same(square, batch_of, tmp_path):
    model, params = square
    calibration = [batch_of(model, rows=4)]
    ge.save(model, params, tmp_path / "dense")
    for number, recipe in enumerate((smoothquant(), awq("int4", where=LAYER))):
        output = tmp_path / str(number)
        compress_checkpoint(tmp_path / "dense", output, recipe, calibration)
        streamed = boxes.to_flat(ge.load(output)[1])[0]
        expected = boxes.to_flat(recipe(model, params, calibration)[1])[0]
        assert set(streamed) == set(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(streamed[name], array, err_msg=name)


def test_refuses(make_member, batch_of):
    for options in (
        {"format": "int7"},
        {"steps": 0},
        {"clip": 1},
        {"format": "bfloat16"},
        {"scale": "x"},
    ):
        with pytest.raises(RecipeError, match=r"quantize\.awq"):
            awq(**options)
    model, params = make_member("edge")
    with pytest.raises(DataError, match="calibration"):
        awq()(model, params)
    with pytest.raises(RecipeError, match="do not divide into groups of 7"):
        awq("int4-g7")(model, params, [batch_of(model)])
