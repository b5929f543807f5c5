"""Scores of weights and units against float64 numpy and central differences of the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import prune
from glm_edge.compress.batches import row_losses
from glm_edge.compress.prune.masks import shapes
from glm_edge.compress.prune.scores import from_gradients, from_inputs
from glm_edge.compress.prune.scores import from_model as model_scores
from glm_edge.compress.prune.scores import from_weights as weight_scores
from glm_edge.compress.transform import Context
from glm_edge.errors import DataError, RecipeError

STEP = 1e-4
LAYER = 1
QUERY = f"decoder/layers/{LAYER}/attention/q_proj/weight"
DOWN = f"decoder/layers/{LAYER}/mlp/down_proj/weight"


def pools_of(model, params, shape, where=None):
    leaves, chosen = dict(boxes.path_items(params)), boxes.select(params, where)
    return model_scores.pools_of("test", shapes.parse("test", shape), model, leaves, chosen)


@pytest.fixture(scope="module")
def gradients(make_model):
    """Scores from gradients of two batches, by score and shape; each is compiled once."""
    model, params = make_model()
    rng = np.random.default_rng(3)
    results = [{"tokens": rng.integers(10, 40, (3, 10)).astype(np.int32)} for _ in range(2)]
    context = Context(results, None, (model, params))
    where = f"layers/{LAYER}/"
    both = [*pools_of(model, params, "head", where), *pools_of(model, params, "neuron", where)]
    both += pools_of(model, params, "layer", where)
    single = pools_of(model, params, "unstructured", f"{QUERY}|{DOWN}")
    cases = {"taylor": both, "taylor2": both, "sensitivity": single}
    scores = {
        name: from_gradients.by_gradients(
            weight_scores.parse("test", name), model, params, pools, context
        )
        for name, pools in cases.items()
    }
    return model, params, results, scores


def slopes(decoder64, batches, kinds, unit, units):
    """Derivative of each row's loss by epsilon where a unit is scaled by 1 - epsilon."""

    def losses(tokens, epsilon):
        gate = np.ones(units)
        gate[unit] = 1.0 - epsilon
        decoder64.gates = {(LAYER, kind): gate for kind in kinds}
        return decoder64.row_losses(tokens, 0)

    rows = [
        (losses(batch["tokens"], STEP) - losses(batch["tokens"], -STEP)) / (2 * STEP)
        for batch in batches
    ]
    decoder64.gates = {}
    return np.concatenate(rows)


@pytest.mark.parametrize(
    ("kinds", "units", "position"),
    [(("heads",), 8, 0), (("neurons",), 128, 1), (("heads", "neurons"), 1, 2)],
    ids=["head", "neuron", "layer"],
)
def test_taylor_is_the_central_difference(gradients, decoder64, kinds, units, position):
    _, _, batches, scores = gradients
    first, second = (np.asarray(scores[name][position]).ravel() for name in ("taylor", "taylor2"))
    for unit in range(0, units, 17 if units == 128 else 1):
        slope = slopes(decoder64, batches, kinds, unit, units)
        assert first[unit] == pytest.approx(np.abs(slope).mean(), rel=1e-4, abs=1e-7)
        # The term of a sample is the derivative by the factor, that is by minus epsilon.
        change = abs((-slope).mean() - 0.5 * np.square(slope).mean())
        assert second[unit] == pytest.approx(change, rel=1e-4, abs=1e-7)


def test_taylor_of_weights_and_of_gates_agree(gradients):
    model, params, batches, scores = gradients
    gates = {"attention": {"heads": np.ones(8)}, "mlp": {"neurons": np.ones(128)}}

    @jax.jit
    @jax.jacrev
    def slopes_of_rows(gates, batch):
        layers = {"decoder": {"layers": {str(LAYER): gates}}}
        return row_losses(model, params, batch, {"gates": layers})

    rows = [slopes_of_rows(gates, batch) for batch in batches]
    heads, neurons = (
        np.abs(np.concatenate([row[branch][kind] for row in rows])).mean(0)
        for branch, kind in (("attention", "heads"), ("mlp", "neurons"))
    )
    np.testing.assert_allclose(scores["taylor"][0].ravel(), heads, rtol=1e-4)
    np.testing.assert_allclose(scores["taylor"][1].ravel(), neurons, rtol=1e-4, atol=1e-7)


def test_sensitivity_is_the_slope_times_the_weight(gradients, decoder64):
    _, _, batches, scores = gradients
    for path, result in zip((QUERY, DOWN), scores["sensitivity"], strict=True):
        for position in (0, 77, 500):
            weight = decoder64.weights[path].reshape(-1)
            before, means = weight[position], []
            for sign in (1, -1):
                weight[position] = before * (1 + sign * STEP)
                rows = [decoder64.row_losses(batch["tokens"], 0) for batch in batches]
                means.append(np.concatenate(rows).mean())
            weight[position] = before
            slope = abs(means[0] - means[1]) / (2 * STEP)
            assert float(result[0, position]) == pytest.approx(slope, rel=1e-3, abs=1e-8)


def test_the_functions_of_arrays_are_their_formulas():
    rng = np.random.default_rng(0)
    weight, slope = rng.normal(size=(2, 5, 6))
    squares, terms = rng.random(6), rng.normal(size=(7, 5))
    close = {"rtol": 1e-5}
    np.testing.assert_allclose(weight_scores.magnitude(weight), np.abs(weight), **close)
    result = weight_scores.sensitivity(weight, slope)
    np.testing.assert_allclose(result, np.abs(weight * slope), **close)
    for order in (1.0, 2.0, 3.0, np.inf):
        result = weight_scores.l_norm(weight, order, axis=1)
        np.testing.assert_allclose(
            result,
            np.linalg.norm(weight, order, axis=1)
            if order != 3.0
            else (np.abs(weight) ** 3).sum(1) ** (1 / 3),
            **close,
        )
    result = weight_scores.taylor(np.abs(terms).sum(0), len(terms))
    np.testing.assert_allclose(result, np.abs(terms).mean(0), **close)
    fisher = np.abs(terms.mean(0) - (terms**2).mean(0) / 2)
    result = weight_scores.second_order_taylor(terms.sum(0), (terms**2).sum(0), len(terms))
    np.testing.assert_allclose(result, fisher, **close)
    result = weight_scores.wanda(weight, squares)
    np.testing.assert_allclose(result, np.abs(weight) * np.sqrt(squares), **close)
    rows = rng.normal(size=(30, 6))
    result = weight_scores.output_norm(weight, rows.T @ rows)
    np.testing.assert_allclose(result, np.linalg.norm(rows @ weight.T, axis=0), rtol=1e-4)


@pytest.mark.parametrize("shape", ["unstructured", "2:4"])
def test_wanda_is_a_float64_pass_over_the_layers(small, decoder64, calibration, shape):
    model, params = small
    sparsity = 0.5 if shape == "unstructured" else None
    transform = prune.mask(sparsity, score="wanda", shape=shape, where="layers/")
    _, pruned, report = transform(model, params, calibration)
    assert len(report.rows) == 12
    masks = {p: leaf.mask for p, leaf in boxes.path_items(pruned) if boxes.is_box(leaf)}
    size = 4 if shape == "2:4" else None
    for index in range(2):
        squares = {}
        for batch in calibration:
            decoder64.logits(batch["tokens"])
            for path, rows in decoder64.inputs.items():
                squares[path] = squares.get(path, 0.0) + np.square(rows).sum(0)
        # A layer is scored on what the pruned layers before it give.
        for path in [path for path in decoder64.weights if f"layers/{index}/" in path]:
            if path not in squares:
                continue
            weight = decoder64.weights[path]
            scores = np.abs(weight) * np.sqrt(squares[path])
            grouped = scores.reshape(-1, size or weight.shape[1])
            keep = np.ones(grouped.shape, bool)
            lowest = np.argsort(grouped, axis=1, kind="stable")[:, : grouped.shape[1] // 2]
            np.put_along_axis(keep, lowest, False, axis=1)
            np.testing.assert_array_equal(masks[path], keep.reshape(weight.shape))
            decoder64.weights[path] = weight * keep.reshape(weight.shape)


def test_activation_norms_are_of_what_a_unit_passes_on(small, decoder64, calibration):
    model, params = small
    leaves, score = dict(boxes.path_items(params)), weight_scores.parse("test", "activation")
    decoder64.logits(calibration[0]["tokens"])
    results = {}
    for shape, paths in (("head", "o_proj"), ("neuron", "down_proj"), ("channel", "down_proj")):
        parsed = shapes.parse("test", shape)
        pools = pools_of(model, params, shape, f"layers/{LAYER}/.*{paths}")
        owned = [member.path for pool in pools for member in pool.members]
        statistic = from_inputs.statistic_of(score, parsed)
        inputs = from_inputs.statistics(model, params, calibration[:1], statistic, owned)
        rows = {path: leaves[path] for path in owned}
        results[shape] = from_inputs.by_inputs(score, parsed, pools, rows, inputs)[0]
    mixed = decoder64.inputs[f"decoder/layers/{LAYER}/attention/o_proj/weight"]
    norms = np.linalg.norm(mixed.reshape(-1, 2, 4, 8), axis=(0, 3))
    np.testing.assert_allclose(results["head"], norms, rtol=1e-4)
    hidden = decoder64.inputs[DOWN]
    np.testing.assert_allclose(results["neuron"][0], np.linalg.norm(hidden, axis=0), rtol=1e-4)
    output = np.linalg.norm(hidden @ decoder64.weights[DOWN].T, axis=0)
    np.testing.assert_allclose(results["channel"][0], output, rtol=1e-4)


def test_random_masks_follow_the_key(small):
    model, params = small
    transform = prune.mask(0.3, score="random", where="q_proj")
    one, same, other = (transform(model, params, rng=jax.random.key(seed))[1] for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    first, second = (dict(boxes.path_items(tree))[QUERY].mask for tree in (one, other))
    assert int(jnp.sum(first != second)) > 0
    layers = one["decoder"]["layers"]
    masks = [layers[i]["attention"]["q_proj"]["weight"].mask for i in "01"]
    assert int(jnp.sum(masks[0] != masks[1])) > 0
    with pytest.raises(RecipeError, match="pass rng="):
        transform(model, params)


def test_wanda_uses_magnitude_for_an_embedding(small, calibration):
    """An embedding goes by magnitude where wanda sees no input."""
    model, params = small
    _, pruned, report = prune.mask(0.5, score="wanda", where="embed")(model, params, calibration)
    assert "by magnitude: its rows are looked up, not multiplied" in report.rows[0].action
    retained = pruned["embed"]["weight"].mask.sum(axis=1)
    assert set(np.asarray(retained).tolist()) == {16}
    with pytest.raises(RecipeError, match="calibration has none of embed/weight"):
        prune.mask(0.5, score="activation", where="embed")(model, params, calibration)
    with pytest.raises(RecipeError, match="calibration has none of embed/weight"):
        prune.mask(0.5, score="wanda", allocation="global")(model, params, calibration)


@pytest.mark.parametrize("score", ["wanda", "activation", "taylor", "taylor2", "sensitivity"])
def test_scores_that_read_calibration_ask_for_it(small, score):
    model, params = small
    with pytest.raises(DataError, match="calibration"):
        prune.mask(0.5, score=score, where="q_proj")(model, params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "importance"}, "score must be one of"),
        ({"score": "l0"}, "score must be one of"),
        ({"score": None}, "score must be str, not None"),
        ({"score": "activation", "shape": "layer"}, "not for shape='layer'"),
        ({"score": "wanda", "shape": "vocab"}, "not for shape='vocab'"),
    ],
)
def test_scores_without_meaning_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        prune.mask(0.5, **options)


def test_one_array_for_each_weight_or_pool_of_units(small, calibration):
    model, params = small
    result = prune.scores_of(model, params, "l2", where="q_proj")
    assert list(result) == boxes.select(params, "q_proj")
    np.testing.assert_array_equal(result[QUERY], np.abs(dict(boxes.path_items(params))[QUERY]))
    units = prune.scores_of(model, params, "magnitude", "head", where="layers/0")
    assert {name: scores.shape for name, scores in units.items()} == {
        "decoder/layers/0/attention": (2, 4)
    }
    attention = params["decoder"]["layers"]["0"]["attention"]
    query, output = (np.asarray(attention[name]["weight"]) for name in ("q_proj", "o_proj"))
    owned = np.concatenate([query.reshape(8, -1), output.T.reshape(8, -1)], axis=1)
    norms = np.linalg.norm(owned, axis=1).reshape(2, 4)
    np.testing.assert_allclose(units["decoder/layers/0/attention"], norms, rtol=1e-5)
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 2, 4)), jnp.float32)
    stock = prune.scores_of(None, {"kernel": kernel}, "l1", "2:3")["kernel"]
    np.testing.assert_array_equal(stock, np.abs(kernel))
    with pytest.raises(DataError, match="calibration"):
        prune.scores_of(model, params, "wanda", where="q_proj")
    with pytest.raises(RecipeError, match="calibration has none of embed/weight"):
        prune.scores_of(model, params, "wanda", where="embed", calibration=calibration)


@pytest.mark.parametrize(
    ("score", "used"),
    [
        ("magnitude", "l_norm"),
        ("l1", "l_norm"),
        ("sensitivity", "sensitivity"),
        ("taylor", "taylor"),
        ("taylor2", "second_order_taylor"),
        ("wanda", "wanda"),
        ("activation", "activation_norm"),
        ("random", "random"),
    ],
)
def test_masks_score_by_the_public_functions(make_model, calibration, monkeypatch, score, used):
    model, params = make_model(num_layers=1)
    plain, asked = getattr(weight_scores, used), []

    def reversed_score(*args, **kwargs):
        asked.append(used)
        return 1.0 / (plain(*args, **kwargs) + 1e-9)

    transform = prune.mask(0.5, score=score, where="layers/0/attention/q_proj")
    call = {"calibration": calibration[:1], "rng": jax.random.key(0)}
    _, before, _ = transform(model, params, **call)
    for module in (weight_scores, shapes):
        if hasattr(module, used):
            monkeypatch.setattr(module, used, reversed_score)
    # A compiled norm would not ask for its score again.
    monkeypatch.setattr(shapes, "_norm", shapes._norm.__wrapped__)
    _, after, _ = transform(model, params, **call)
    assert asked
    query = "decoder/layers/0/attention/q_proj/weight"
    masks = [dict(boxes.path_items(tree))[query].mask for tree in (before, after)]
    # Where the score is reversed, what stayed goes.
    assert float(jnp.mean(masks[0] == masks[1])) < 0.1
