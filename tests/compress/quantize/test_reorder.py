"""Orders of neurons and values: the function stays, groups become alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from glm_edge import params as boxes
from glm_edge.compress import chain, recipe_from_json, to_json
from glm_edge.compress.layerwise.stream import compress_checkpoint
from glm_edge.compress.quantize.reorder import reorder, similar_columns
from glm_edge.compress.quantize.rtn import rtn
from glm_edge.compress.quantize.solvers import scales as grids
from glm_edge.errors import RecipeError
from glm_edge.params import Format

DOWN = "decoder/layers/0/mlp/down_proj/weight"
GATE_UP = "decoder/layers/0/mlp/gate_up_proj/weight"


@pytest.mark.parametrize("name", ["pruned", pytest.param("edge_v", marks=pytest.mark.slow)])
def test_reorder_keeps_the_function(make_member, batch_of, logits, name):
    """Heads of eight values in groups of four, two query heads per key and value head."""
    model, params = make_member(name)
    _, ordered, report = recipe_from_json(to_json(reorder(4)))(model, params)
    expected = np.asarray(logits(model, params, batch_of(model)))
    changed = np.abs(logits(model, ordered, batch_of(model)) - expected).max()
    assert changed < 1e-5 * np.abs(expected).max()
    before, after = (dict(boxes.path_items(tree)) for tree in (params, ordered))
    paths = {row.path for row in report.rows}
    names = {path.split("/")[-2] for path in paths}
    assert names >= {"v_proj", "o_proj", "gate_up_proj", "down_proj"}
    for path in before:
        same = np.array_equal(before[path], after[path])
        assert same == (path not in paths)
    assert report.bytes_after == report.bytes_before


def test_reorder_takes_masks_along(small, batch_of, logits):
    model, params = small
    leaves = dict(boxes.path_items(params))
    keep = np.random.default_rng(0).random(leaves[DOWN].shape) < 0.5
    leaves[DOWN] = boxes.mask(leaves[DOWN], jnp.asarray(keep))
    masked = boxes.tree.nested(leaves)
    _, ordered, _ = reorder(16, where="0/mlp")(model, masked)
    box = dict(boxes.path_items(ordered))[DOWN]
    order = similar_columns(boxes.dense(leaves[DOWN]), 16)
    np.testing.assert_array_equal(box.mask, keep[:, order])
    expected = np.asarray(logits(model, masked, batch_of(model)))
    np.testing.assert_allclose(
        logits(model, ordered, batch_of(model)), expected, atol=1e-5 * np.abs(expected).max()
    )


def test_reorder_before_affine_ternary_streams_the_same(make_member, tmp_path):
    model, params = make_member("edge")
    where = "layers/0/(mlp|attention/o)"
    recipe = chain(reorder(8, where=where), rtn("ternary-g8-affine", where=where, scale="fit"))
    ge.save(model, params, tmp_path / "dense", extras={})
    compress_checkpoint(tmp_path / "dense", tmp_path / "ternary", recipe)
    streamed, spec = boxes.to_flat(ge.load(tmp_path / "ternary")[1])
    expected, expected_spec = boxes.to_flat(recipe(model, params)[1])
    assert spec == expected_spec
    assert "ternary" in str(spec)
    for name, array in expected.items():
        np.testing.assert_array_equal(streamed[name], array, err_msg=name)


def test_reorder_refuses_where_nothing_moves(small):
    model, params = small
    with pytest.raises(RecipeError, match="selects no down projection"):
        reorder(32, where="q_proj")(model, params)
    with pytest.raises(RecipeError, match="group_size must be a whole number"):
        reorder(0)


@pytest.mark.parametrize("count", [24, 21])
def test_similar_columns_are_those_of_a_greedy_loop(count):
    weight = np.random.default_rng(1).normal(size=(12, count)).astype(np.float32)
    available, order = list(range(count)), []
    while available:
        mean = np.float64(weight[:, available]).mean(axis=1)
        cosine = weight[:, available].T @ mean / np.linalg.norm(weight[:, available], axis=0)
        group = [available[i] for i in np.argsort(-cosine, kind="stable")[:8]]
        order += group
        available = [column for column in available if column not in group]
    np.testing.assert_array_equal(similar_columns(weight, 8), order)


def test_similar_columns_lower_the_error_of_affine_groups():
    """Columns of four kinds, each with its own offset per row, in random order."""
    rng = np.random.default_rng(2)
    offsets = rng.normal(size=(32, 4))[:, rng.permutation(np.arange(64) % 4)]
    weight = jnp.float32(offsets + 0.2 * rng.normal(size=offsets.shape))
    format = Format.parse("ternary-g16-affine")
    nearest = jax.jit(grids.nearest, static_argnums=(1, 2))

    def error(weight):
        lost = grids.decode(*nearest(weight, format, "fit"), format) - weight
        return float(jnp.sum(jnp.square(lost)))

    assert error(weight[:, similar_columns(weight, 16)]) < 0.7 * error(weight)
