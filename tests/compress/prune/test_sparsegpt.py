"""SparseGPT against its published algorithm in float64, and joined with rounding."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import (
    SolverOptions,
    batches,
    chain,
    prune,
    quantize,
    recipe_from_json,
    to_json,
)
from glm_edge.compress.prune.masks import sparse_columns
from glm_edge.errors import DataError, RecipeError

QUERY = "decoder/layers/0/attention/q_proj/weight"
DOWN = "decoder/layers/0/mlp/down_proj/weight"
PUBLISHED = {"refine": 0, "solver": SolverOptions(propagate=0.0)}


def published(weight, gram, sparsity, n_m, block, damping=0.01):
    """Prunes [out, in] in float64 by the inverse of the Gram matrix, columns in turn."""
    weight, count = np.array(weight, np.float64), len(gram)
    gram = np.asarray(gram, np.float64)
    damped = gram + damping * np.mean(np.diag(gram)) * np.eye(count)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    keep = np.ones(weight.shape, bool)
    for start in range(0, count, block):
        inside = range(start, start + block)
        if n_m is None:
            worth = (weight[:, start : start + block] / np.diag(upper)[start : start + block]) ** 2
            lowest = np.argsort(worth.T.ravel(), kind="stable")[: round(sparsity * worth.size)]
            part = np.ones(worth.size, bool)
            part[lowest] = False
            keep[:, start : start + block] = part.reshape(block, -1).T
        for column in inside:
            if n_m is not None and column % n_m[1] == 0:
                group = slice(column, column + n_m[1])
                worth = (weight[:, group] / np.diag(upper)[group]) ** 2
                lowest = np.argsort(worth, axis=1, kind="stable")[:, : n_m[1] - n_m[0]]
                part = np.ones(worth.shape, bool)
                np.put_along_axis(part, lowest, False, axis=1)
                keep[:, group] = part
            retained = np.where(keep[:, column], weight[:, column], 0.0)
            error = (weight[:, column] - retained) / upper[column, column]
            weight[:, column:] -= np.outer(error, upper[column, column:])
            weight[:, column] = retained
    return weight, keep


@pytest.fixture(scope="module")
def layer():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 24)) @ rng.normal(size=(24, 24))
    weight = rng.normal(size=(20, 24)).astype(np.float32)
    return weight, (rows.T @ rows).astype(np.float32)


@pytest.mark.parametrize(
    ("sparsity", "n_m", "block"),
    [(0.5, None, 24), (0.3, None, 8), (0.5, (2, 4), 24), (0, (1, 3), 6)],
)
def test_equals_the_published_algorithm(layer, sparsity, n_m, block):
    weight, gram = layer
    actual, keep, info = sparse_columns.solve(weight, gram, sparsity, n_m, block=block)
    expected, expected_keep = published(weight, gram, sparsity, n_m, block)
    np.testing.assert_array_equal(keep, expected_keep)
    np.testing.assert_allclose(actual, expected, atol=2e-4)
    lost = expected - weight
    loss = np.sum(lost @ gram * lost) / np.sum(weight @ gram * weight)
    assert info.loss == pytest.approx(loss, rel=1e-3)


def test_solve_with_shrinkage_equals_the_published_algorithm(layer):
    weight, gram = layer
    actual, keep, info = sparse_columns.solve(weight, gram, 0.5, block=24, shrinkage=0.3)
    shrunk = 0.7 * np.float64(gram) + 0.3 * np.diag(np.diag(np.float64(gram)))
    expected, expected_keep = published(weight, shrunk, 0.5, None, 24)
    np.testing.assert_array_equal(keep, expected_keep)
    np.testing.assert_allclose(actual, expected, atol=2e-4)
    lost = expected - weight
    loss = np.sum(lost @ gram * lost) / np.sum(weight @ gram * weight)
    assert info.loss == pytest.approx(loss, rel=1e-3)


def test_refining_fits_the_weights_that_stay(layer):
    weight, gram = layer
    plain, keep, before = sparse_columns.solve(weight, gram, 0.5)
    result, same, after = sparse_columns.solve(weight, gram, 0.5, refine=60)
    np.testing.assert_array_equal(keep, same)
    assert after.loss < before.loss
    damped = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(24)
    for row, stays, local in zip(weight, np.asarray(keep), np.asarray(result), strict=True):
        best = np.linalg.solve(damped[np.ix_(stays, stays)], (damped @ row)[stays])
        np.testing.assert_allclose(local[stays], best, atol=2e-3)
    assert not np.any(np.asarray(plain)[~np.asarray(keep)])


def test_what_is_masked_before_goes_first(layer):
    weight, gram = layer
    before = np.random.default_rng(1).random(weight.shape) > 0.25
    weight = np.where(before, weight, 0)
    for n_m in (None, (2, 4)):
        result, keep, _ = sparse_columns.solve(weight, gram, 0.5, n_m, mask=jnp.asarray(before))
        assert not np.any(np.asarray(keep) & ~before)
        assert not np.any(np.asarray(result)[~before])
        if n_m is None:
            assert int(keep.sum()) == weight.size // 2


@pytest.mark.parametrize("shape", ["unstructured", "2:4"])
def test_a_matrix_of_a_model_is_pruned_against_its_own_inputs(small, decoder64, calibration, shape):
    model, params = small
    sparsity = 0.5 if shape == "unstructured" else None
    transform = prune.sparsegpt(
        sparsity, shape=shape, where="layers/0/attention/q_proj", **PUBLISHED
    )
    _, pruned, report = transform(model, params, calibration)
    gram = 0.0
    for batch in calibration:
        decoder64.logits(batch["tokens"])
        gram = gram + decoder64.inputs[QUERY].T @ decoder64.inputs[QUERY]
    n_m = (2, 4) if shape == "2:4" else None
    expected, keep = published(decoder64.weights[QUERY], gram, 0.5, n_m, 32)
    box = dict(boxes.path_items(pruned))[QUERY]
    np.testing.assert_array_equal(box.mask, keep)
    np.testing.assert_allclose(box.unbox(), expected, atol=1e-4)
    assert report.rows[0].keep_ratio == 0.5
    assert report.rows[0].bytes_after == box.value.nbytes + box.mask.nbytes
    assert "output error" in report.rows[0].action


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, batch):
    return batches.apply_batch(model, params, batch)


def error(model, params, changed, batch):
    # Without boxes, so that one program serves all.
    changed = jax.tree.map(boxes.dense, changed, is_leaf=boxes.is_box)
    return np.linalg.norm(np.subtract(*(logits(model, p, batch) for p in (changed, params))))


@pytest.fixture(scope="module")
def compressed(make_model):
    """The small model after several transforms, on data that each of them saw."""
    model, params = make_model(num_layers=1)
    rng = np.random.default_rng(0)
    calibration = [{"tokens": rng.integers(10, 40, (8, 16)).astype(np.int32)} for _ in range(2)]
    where = DOWN
    kinds = {
        "magnitude": prune.mask(0.5, where=where),
        "published": prune.sparsegpt(0.5, where=where, **PUBLISHED),
        "sparsegpt": prune.sparsegpt(0.5, where=where),
        "apart": chain(
            prune.mask(shape="2:4", where=where), quantize.rtn("int4-g8", where=where, scale="mse")
        ),
        "joint": prune.sparsegpt(format="int4-g8", shape="2:4", where=where),
        "ternary34": prune.sparsegpt(format="ternary34-g8", where=where),
    }
    # Each when a test asks for it.
    apply = functools.cache(lambda name: kinds[name](model, params, calibration)[1:])
    return model, params, calibration, kinds, apply


@pytest.mark.slow
def test_loses_less_than_magnitude_and_refining_less_still(compressed):
    model, params, calibration, kinds, result = compressed
    lost = {name: error(model, params, result(name)[0], calibration[0]) for name in kinds}
    assert lost["sparsegpt"] < lost["published"] < lost["magnitude"]
    assert lost["joint"] < lost["apart"]


def test_masks_and_rounds_in_one(compressed):
    _, _, _, _, result = compressed
    pruned, report = result("joint")
    for path, leaf in boxes.path_items(pruned):
        if path == DOWN:
            assert str(leaf.format) == "int4-g8"
            zeros = (leaf.unbox().reshape(-1, 4) == 0).sum(1)
            assert int(zeros.min()) >= 2
    assert {row.keep_ratio for row in report.rows} == {0.5}
    assert all(row.action.startswith("int4-g8 (2:4, output error") for row in report.rows)
    assert report.bytes_after < report.bytes_before


@pytest.mark.parametrize("name", ["published", pytest.param("joint", marks=pytest.mark.slow)])
def test_sparsegpt_chooses_a_shrinkage_by_domains(compressed, name):
    model, params, calibration, kinds, _ = compressed
    data = [{**batch, "domain": name} for batch, name in zip(calibration, "ab", strict=True)]
    _, pruned, report = kinds[name](model, params, data)
    gamma = re.search(r", shrinkage (\S+) by 2 domains\)$", report.rows[0].action)
    solver = dataclasses.replace(kinds[name].solver, shrinkage=float(gamma[1]))
    fixed = dataclasses.replace(kinds[name], solver=solver)(model, params, calibration)
    # The sum of the domains' Gram matrices differs from the total in its last bits.
    before, after = (dict(boxes.path_items(tree))[DOWN].unbox() for tree in (fixed[1], pruned))
    assert np.mean(np.abs(before - after) > 1e-3) < 0.02


@pytest.mark.slow
def test_ternary34_has_one_zero_in_four(compressed):
    model, params, calibration, _, result = compressed
    pruned, report = result("ternary34")
    same = quantize.gptq("ternary34-g8", where=DOWN)
    expected = same(model, params, calibration)[1]
    jax.tree.map(np.testing.assert_array_equal, pruned, expected)
    codes = dict(boxes.path_items(pruned))[DOWN].codes().reshape(-1, 4)
    assert bool(((codes == 0).sum(1) == 1).all())
    assert {row.keep_ratio for row in report.rows} == {0.75}


def test_goes_through_json_and_gives_the_same_again(compressed):
    model, params, calibration, kinds, result = compressed
    for name in ("sparsegpt", "joint", "ternary34"):
        again = recipe_from_json(to_json(kinds[name]))
        assert again == kinds[name]
    again = recipe_from_json(to_json(kinds["joint"]))(model, params, calibration)[1]
    jax.tree.map(np.testing.assert_array_equal, result("joint")[0], again)


@pytest.mark.slow
def test_masks_can_be_rounded_later_and_stay(compressed):
    model, _, _, _, result = compressed
    masked = result("sparsegpt")[0]
    rounded = quantize.rtn("int8", where="layers/0/mlp/down_proj")(model, masked)[1]
    keep = dict(boxes.path_items(masked))[DOWN].mask
    assert not bool(jnp.any(dict(boxes.path_items(rounded))[DOWN].unbox()[~keep] != 0))


def test_what_no_input_meets_goes_by_magnitude(small, calibration):
    model, params = small
    _, pruned, report = prune.sparsegpt(0.5, where="embed")(model, params, calibration)
    assert "by magnitude: its rows are looked up" in report.rows[0].action
    expected = prune.mask(0.5, where="embed")(model, params)[1]["embed"]["weight"].mask
    np.testing.assert_array_equal(pruned["embed"]["weight"].mask, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "sparsity is None"),
        ({"sparsity": 1.0}, "below 1"),
        ({"sparsity": float("nan")}, "sparsity must be finite"),
        ({"sparsity": 0.5, "shape": "channel"}, "shape must be unstructured or N:M"),
        ({"sparsity": 0.3, "shape": "2:4"}, "the shape says 0.5"),
        ({"shape": "4:4"}, "1 <= N < M"),
        ({"sparsity": 0.5, "format": "int7"}, "'int7' is not a type; types: int8"),
        ({"sparsity": 0.5, "format": "bfloat16"}, "cannot round to"),
        ({"sparsity": 0.5, "format": "ternary34"}, "one zero in four"),
        ({"sparsity": 0.5, "solver": {"damping": -1}}, "damping must be"),
        ({"sparsity": 0.5, "solver": {"propagate": 2}}, "propagate must be"),
        ({"sparsity": 0.5, "refine": -1}, "refine must be"),
        ({"sparsity": 0.5, "block": 0}, "block must be"),
        ({"sparsity": 0.5, "solver": {"sequential": 1}}, "sequential must be"),
    ],
)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        prune.sparsegpt(**options)


def test_what_does_not_fit_the_model_is_refused(small, calibration):
    model, params = small
    with pytest.raises(DataError, match="calibration"):
        prune.sparsegpt(0.5, where="q_proj")(model, params)
    with pytest.raises(RecipeError, match="do not divide into groups of 5"):
        prune.sparsegpt(shape="2:5", where="q_proj")(model, params, calibration)
    broken = jax.tree.map(lambda leaf: leaf, params)
    weight = broken["decoder"]["layers"]["0"]["attention"]["q_proj"]
    weight["weight"] = weight["weight"].at[0, 0].set(jnp.nan)
    with pytest.raises(RecipeError, match="q_proj/weight: NaN or infinity"):
        prune.sparsegpt(0.5, where="layers/0/attention/q_proj")(model, broken, calibration)
    rounded = quantize.rtn("int8", where="q_proj")(model, params)[1]
    with pytest.raises(RecipeError, match="prune before quantizing"):
        prune.sparsegpt(0.5, where="q_proj")(model, rounded, calibration)
