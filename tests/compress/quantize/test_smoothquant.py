"""SmoothQuant: the published factor, moved exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import batches, folding, recipe_from_json, to_json
from glm_edge.compress.quantize.awq import awq
from glm_edge.compress.quantize.rtn import rtn
from glm_edge.compress.quantize.smoothquant import smooth_factor, smoothquant
from glm_edge.errors import DataError, RecipeError


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, batch):
    inputs = {name: batch[name] for name in batches.INPUTS if name in batch}
    output, sown = model.apply({"params": params}, batch["tokens"], **inputs, mutable=["inputs"])
    return output[0], sown["inputs"]


def rows_of(model, params, calibration, path):
    """What meets a weight, from the collection `inputs` of whole runs."""
    names, result = path.split("/")[:-1], []
    for batch in calibration:
        sown = run(model, params, batch)[1]
        for name in names:
            sown = sown[name]
        result.append(np.float64(sown["rows"][0]))
    return np.concatenate(result)


def factor_loop(rows, weights, alpha, blocks):
    count, repeats, width = blocks
    factor = np.ones(count * width)
    for head in range(count):
        for channel in range(width):
            columns = [width * (repeats * head + r) + channel for r in range(repeats)]
            largest = max(abs(rows[:, c]).max() for c in columns)
            weight = max(abs(w[:, c]).max() for w in weights for c in columns)
            factor[width * head + channel] = largest**alpha / weight ** (1 - alpha)
    return factor


@pytest.mark.parametrize(
    "name",
    ["glm4", *(pytest.param(x, marks=pytest.mark.slow) for x in ("asr", "pruned", "sandwich"))],
)
def test_matches_a_loop_and_keeps_the_function(make_member, make_shallow, batch_of, name):
    # Layers of the pruned member have other widths; of the others one is like another.
    model, params = (make_member if name == "pruned" else make_shallow)(name)
    calibration = [batch_of(model, seed=seed) for seed in (1, 2)]
    changed_model, changed, report = smoothquant(alpha=0.7)(model, params, calibration)
    assert changed_model is model
    before, after = (dict(boxes.path_items(tree)) for tree in (params, changed))
    expected = {path: np.float64(leaf) for path, leaf in before.items()}
    for fold in folding.folds(model.config):
        rows = rows_of(model, params, calibration, fold.consumers[0])
        weights = [expected[path] for path in fold.consumers]
        factor = factor_loop(rows, weights, 0.7, fold.blocks)
        columns = np.broadcast_to(
            factor.reshape(fold.blocks[0], 1, fold.blocks[2]), fold.blocks
        ).ravel()
        for path in fold.producers:
            divided = expected[path].copy()
            ending = (slice(fold.start, fold.start + len(factor)),)
            divided[ending] /= factor.reshape(-1, *[1] * (divided.ndim - 1))
            expected[path] = divided
        for path in fold.consumers:
            expected[path] = expected[path] * columns
    for path, leaf in expected.items():
        np.testing.assert_allclose(after[path], leaf, rtol=2e-4, atol=1e-6, err_msg=path)
    batch = batch_of(model, seed=9)
    logits = run(model, params, batch)[0]
    assert np.abs(run(model, changed, batch)[0] - logits).max() < 1e-5 * np.abs(logits).max()
    folds = folding.folds(model.config)
    moved = ("rows divided", "columns times")
    assert {r.path for r in report.rows if any(words in r.action for words in moved)} == {
        path for fold in folds for path in (*fold.producers, *fold.consumers)
    }
    # Of the matrices that nothing eases, each is counted.
    matrices = set(boxes.select(params, None))
    (note,) = report.notes
    eased = {path for fold in folds for path in fold.consumers}
    counted = f"{len(matrices - eased)} of {len(matrices)} matrices went without a factor"
    assert note.startswith(f"quantize.smoothquant: {counted}")


def test_a_factor_by_hand():
    activations, weights = jnp.float32([4.0, 0.0, 9.0, 1.0]), jnp.float32([1.0, 2.0, 0.0, 16.0])
    np.testing.assert_allclose(smooth_factor(activations, weights, 0.5), [2.0, 1.0, 1.0, 0.25])
    np.testing.assert_allclose(smooth_factor(activations, weights, 1.0), [4.0, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(smooth_factor(activations, weights, 0.0), [1, 1, 1, 1 / 16])


def test_eases_int8_activations(make_model, batch_of):
    model, params = make_model(num_layers=1, num_heads=4, num_kv_heads=4, intermediate_size=32)
    leaves = dict(boxes.path_items(params))
    spike = np.where(np.arange(32) == 7, 100.0, 1.0).astype(np.float32)
    for layer in range(1):
        leaves |= folding.move(
            next(
                f
                for f in folding.folds(model.config)
                if f"{layer}/input_norm/weight" in f.producers[0]
            ),
            leaves,
            1 / spike,
        )
    params = boxes.tree.nested(leaves)
    batch = batch_of(model)
    expected = run(model, params, batch)[0]
    phone = model.clone(compute="int8_dynamic")

    def error(tree):
        rounded = rtn("int8")(model, tree)[1]
        return float(jnp.linalg.norm(run(phone, rounded, batch)[0] - expected))

    smooth = smoothquant()(model, params, [batch_of(model, seed=3)])[1]
    assert error(smooth) < 0.7 * error(params)


def test_kinds_and_where(square, batch_of):
    model, params = square
    calibration = [batch_of(model)]
    recipe = smoothquant(kinds=["value"], where=r"layers/1/")
    report = recipe(model, params, calibration)[2]
    attention = "decoder/layers/1/attention"
    assert {row.path for row in report.rows} == {
        f"{attention}/v_proj/weight",
        f"{attention}/o_proj/weight",
    }
    assert recipe_from_json(to_json(recipe)) == recipe
    with pytest.raises(RecipeError, match="between which a factor can move"):
        smoothquant(where="q_proj")(model, params, calibration)
    report = smoothquant(where=r"layers/1/.*(q_proj|o_proj)")(model, params, calibration)[2]
    assert report.notes == (
        "quantize.smoothquant: 1 of 2 matrices went without a factor: "
        "1 as where= excludes a matrix with the same input",
    )


@pytest.mark.parametrize(
    "where",
    [r"^speech/layers/0/fc|^decoder/layers/0/mlp/", pytest.param(None, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("method", [smoothquant, functools.partial(awq, "int8")])
def test_an_encoder_without_inputs_is_counted(make_shallow, batch_of, method, where):
    model, params = make_shallow("asr")
    tokens = batch_of(model)["tokens"]
    batch = {"tokens": np.where(tokens == model.config.audio_token_id, 10, tokens)}
    _, _, report = method(where=where)(model, params, [batch], without=["audio"])
    skipped = [row for row in report.rows if row.path.startswith("speech/")]
    assert skipped
    assert all("without a factor: " in r.action or "to nearest: " in r.action for r in skipped)
    assert any(" matrices went " in note for note in report.notes)


def test_refuses(square, batch_of):
    for options in ({"alpha": 1.5}, {"alpha": "half"}, {"kinds": ["up"]}, {"where": "("}):
        with pytest.raises(RecipeError, match=r"quantize\.smoothquant"):
            smoothquant(**options)
    model, params = square
    with pytest.raises(DataError, match="calibration"):
        smoothquant()(model, params)
    params = boxes.map_with_path(
        lambda path, leaf: leaf * np.float32(np.inf) if "input_norm" in path else leaf, params
    )
    with pytest.raises(DataError, match="weight: calibration inputs are not finite"):
        smoothquant()(model, params, [batch_of(model)])
