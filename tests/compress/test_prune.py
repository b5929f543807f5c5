"""Masks by magnitude, and shrinking by heads and neurons."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import batches, prune, quantize
from glm_edge.compress.prune.masks.allocation import keep_highest
from glm_edge.compress.prune.structured import heads_to_keep, neurons_to_keep
from glm_edge.errors import DataError, RecipeError
from tests.tiny_models import init


def weight(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


apply_batch = jax.jit(batches.apply_batch, static_argnums=0)
row_losses = jax.jit(batches.row_losses, static_argnums=0)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_the_smallest_of_each_tensor_go_exactly(sparsity):
    params = {"a": {"kernel": weight(7, 9)}, "b": {"kernel": 10 * weight(5, 4, seed=1)}}
    model, pruned, report = prune.magnitude(sparsity)(nn.Dense(9), params)
    assert isinstance(model, nn.Dense)
    for name, leaf in params.items():
        values, keep = np.abs(leaf["kernel"]), np.asarray(pruned[name]["kernel"].mask)
        assert (~keep).sum() == round(sparsity * keep.size)
        if sparsity:
            assert values[~keep].max() <= values[keep].min()
    assert report.rows[0].keep_ratio == pytest.approx(1.0 - sparsity, abs=0.01)


def test_global_scope_compares_across_tensors():
    params = {"a": {"kernel": weight(8, 8)}, "b": {"kernel": 100 * weight(8, 8, seed=1)}}
    _, pruned, _ = prune.magnitude(0.5, scope="global")(None, params)
    counts = [int((~np.asarray(pruned[name]["kernel"].mask)).sum()) for name in ("a", "b")]
    assert sum(counts) == 64
    assert counts[0] > 60


def test_equal_magnitudes_go_in_order():
    params = {"kernel": jnp.array([[1.0, -1.0, 1.0, -1.0], [2.0, 1.0, 1.0, 1.0]])}
    _, pruned, _ = prune.magnitude(0.5)(None, params)
    expected = [[False] * 4, [True] * 4]
    np.testing.assert_array_equal(pruned["kernel"].mask, expected)


def test_a_second_mask_only_adds():
    params = {"kernel": weight(16, 16)}
    _, first, _ = prune.magnitude(0.3)(None, params)
    _, second, _ = prune.magnitude(0.6)(None, first)
    before, after = (np.asarray(tree["kernel"].mask) for tree in (first, second))
    assert (before | ~after).all()
    assert (~after).sum() == round(0.6 * 256)


def test_a_stock_module_runs_masked():
    module, x = nn.Dense(96), weight(3, 32)
    params = init(module, x)["params"]
    module, pruned, report = prune.magnitude(sparsity=0.5)(module, params)
    kernel = np.asarray(boxes.dense(pruned["kernel"]))
    assert (kernel == 0).mean() == 0.5
    result = jax.jit(module.apply)({"params": pruned}, x)
    np.testing.assert_allclose(result, x @ kernel, atol=1e-5)
    assert report.rows[0].bits == pytest.approx(40.0)
    assert 0.0 < report.rows[0].relative_error < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "keep ratio is above 0 and at most 1, not 1.0"),
        ({"sparsity": 1.5}, "sparsity must be at least 0 and below 1"),
        ({"sparsity": -0.5}, "keep ratio is above 0 and at most 1, not -0.5"),
        ({"sparsity": float("nan")}, "sparsity must be finite"),
        ({"sparsity": "half"}, "sparsity must be float"),
        ({"sparsity": 0.5, "scope": "layer"}, "scope must be tensor or global"),
        ({"sparsity": 0.5, "where": "("}, "not a regular expression"),
    ],
)
def test_magnitude_refuses_options_without_a_meaning(options, message):
    with pytest.raises(RecipeError, match=message):
        prune.magnitude(**options)


def test_quantized_weights_are_not_pruned(small):
    model, params = small
    _, rounded, _ = quantize.rtn("int8", where="down_proj")(model, params)
    with pytest.raises(RecipeError, match="prune before quantizing"):
        prune.magnitude(0.5)(model, rounded)
    with pytest.raises(RecipeError, match="prune before quantizing"):
        prune.structured(neurons=0.5, score="magnitude")(model, rounded)


def test_heads_go_evenly_from_every_group():
    values = np.array([0.9, 0.1, 0.8, 0.7, 0.01, 0.03, 0.02, 0.04])

    def heads(groups, fraction):
        grouped = values.reshape(groups, -1)
        return np.flatnonzero(keep_highest(grouped, heads_to_keep(grouped.shape[1], fraction)))

    np.testing.assert_array_equal(heads(2, 0.25), [0, 2, 3, 5, 6, 7])
    np.testing.assert_array_equal(heads(2, 0.3), [0, 2, 5, 7])
    np.testing.assert_array_equal(heads(1, 0.25), [0, 1, 2, 3, 5, 7])
    with pytest.raises(RecipeError, match="leaves no query head in groups of 2"):
        heads(4, 0.75)


@pytest.mark.parametrize(
    ("width", "fraction", "multiple", "retained"),
    [
        (512, 0.3, 32, 352),
        (6144, 0.3, 32, 4288),
        (13696, 0.3, 32, 9568),
        (100, 0.3, 32, 70),
        (128, 0.5, 32, 64),
        (10, 0.3, 1, 7),
    ],
)
def test_structured_neurons_are_multiples(width, fraction, multiple, retained):
    """Neurons are whole multiples and at least the fraction goes."""
    assert neurons_to_keep(width, fraction, multiple) == retained
    assert retained <= width * (1 - fraction) + 1e-6


def gate_out(model, params, batch, keep):
    """Logits of the whole model with the gates of what is not kept at zero."""
    config, layers = model.config.decoder, {}
    for index, retained in keep.items():
        heads = np.zeros(config.heads(index), np.float32)
        neurons = np.zeros(config.neurons(index), np.float32)
        heads[retained.get("heads", slice(None))] = 1.0
        neurons[retained.get("neurons", slice(None))] = 1.0
        layers[str(index)] = {
            "attention": {"heads": heads},
            "mlp": {"neurons": neurons},
        }
    return apply_batch(model, params, batch, {"gates": {"decoder": {"layers": layers}}})


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({}, id="plain", marks=pytest.mark.slow),
        pytest.param({"attention_bias": True, "sandwich_norm": True}, id="bias-sandwich_norm"),
        pytest.param({"num_kv_heads": 8}, id="num_kv_heads", marks=pytest.mark.slow),
    ],
)
def test_a_shrunk_model_equals_its_gated_original(make_model, calibration, variant):
    model, params = make_model(**variant)
    if variant.get("attention_bias"):
        params = jax.tree.map(
            lambda leaf: leaf + np.float32(0.1 * np.sin(np.arange(leaf.shape[-1]))), params
        )
    local = variant.get("num_kv_heads") == 8
    keep = {
        0: {"heads": np.array([0, 2, 3, 4, 6, 7]), "neurons": np.arange(0, 128, 2)},
        1: {"neurons": np.arange(32, 128)},
    }
    smaller, shrunk = prune.shrink(model, params, keep)
    config = smaller.config.decoder
    assert config.num_heads == (6, 8)
    assert config.num_kv_heads == ((6, 8) if local else 2)
    assert config.intermediate_size == (64, 96)
    batch = calibration[0]
    result = apply_batch(smaller, shrunk, batch)
    np.testing.assert_allclose(result, gate_out(model, params, batch, keep), atol=1e-5)
    tokens = jnp.zeros((1, 2), jnp.int32)
    needed = jax.eval_shape(smaller.init, jax.random.key(0), tokens)["params"]
    assert jax.tree.map(jnp.shape, shrunk) == jax.tree.map(lambda leaf: leaf.shape, needed)


@pytest.mark.parametrize("score", ["taylor", "magnitude"])
def test_structured_shrinks_arrays_and_configuration(small, calibration, score):
    model, params = small
    before = jax.device_get(params)
    transform = prune.structured(heads=0.25, neurons=0.30, score=score)
    smaller, shrunk, report = transform(model, params, calibration=calibration)
    config = smaller.config.decoder
    assert (config.num_heads, config.num_kv_heads, config.intermediate_size) == (6, 2, 64)
    layer = shrunk["decoder"]["layers"]["1"]
    assert layer["attention"]["q_proj"]["weight"].shape == (48, 32)
    assert layer["attention"]["o_proj"]["weight"].shape == (32, 48)
    assert layer["mlp"]["gate_up_proj"]["weight"].shape == (128, 32)
    assert layer["mlp"]["down_proj"]["weight"].shape == (32, 64)
    assert report.count_after == boxes.count(shrunk) < boxes.count(params)
    assert report.bytes_after == boxes.stored_bytes(shrunk)
    assert len(report.rows) == 2 * 4
    assert jax.tree.all(jax.tree.map(np.array_equal, before, params))
    logits = apply_batch(smaller, shrunk, calibration[0])
    assert bool(jnp.isfinite(logits).all())


def test_where_prunes_some_layers_and_widths_are_listed(small):
    model, params = small
    transform = prune.structured(0.25, neurons=0.5, score="magnitude", where="layers/1/")
    smaller, _, _ = transform(model, params)
    assert smaller.config.decoder.num_heads == (8, 6)
    assert smaller.config.decoder.intermediate_size == (128, 64)
    transform = prune.structured(0.25, neurons=0.5, score="magnitude", where="mlp")
    smaller, _, _ = transform(model, params)
    assert smaller.config.decoder.num_heads == 8
    assert smaller.config.decoder.intermediate_size == 64
    with pytest.raises(RecipeError, match="matches no decoder layer"):
        prune.structured(0.25, where="embed", score="magnitude")(model, params)


def test_a_pruned_model_is_pruned_again(small):
    model, params = small
    for index in range(2):
        where = f"layers/{index}/"
        model, params, _ = prune.structured(0.25, neurons=0.25, score="magnitude", where=where)(
            model, params
        )
    assert model.config.decoder.num_heads == 6
    assert model.config.decoder.intermediate_size == 96


def test_masks_shrink_with_their_weights(small):
    model, params = small
    _, masked, _ = prune.magnitude(0.5, where="mlp")(model, params)
    smaller, shrunk, _ = prune.structured(neurons=0.5, score="magnitude")(model, masked)
    box = shrunk["decoder"]["layers"]["0"]["mlp"]["down_proj"]["weight"]
    assert isinstance(box, boxes.Masked)
    assert box.mask.shape == box.value.shape == (32, 64)
    assert smaller.config.decoder.intermediate_size == 64


@pytest.fixture
def shallow(make_model):
    return make_model(num_layers=1)


def unit_scores(model, params, score, layer, calibration=None):
    """Scores of the heads and the neurons of a layer of the decoder, by kind."""
    folders = {"head": "attention", "neuron": "mlp"}
    where = f"decoder/layers/{layer}/"
    return {
        f"{kind}s": prune.scores_of(model, params, score, kind, where, calibration)[
            f"{where}{folder}"
        ].ravel()
        for kind, folder in folders.items()
    }


def test_taylor_scores_are_each_rows_own_first_order_change(shallow, calibration):
    model, params = shallow
    layer, head, neuron, step = 0, 3, 17, 1e-2
    result = unit_scores(model, params, "taylor", layer, calibration[:2])
    totals = {"heads": 0.0, "neurons": 0.0}
    for batch in calibration[:2]:
        for kind, size, index in (("heads", 8, head), ("neurons", 128, neuron)):
            branch = "attention" if kind == "heads" else "mlp"

            def losses(gate, batch=batch, kind=kind, size=size, index=index, branch=branch):
                ones = np.ones(size, np.float32)
                ones[index] = gate
                gates = {branch: {kind: ones}}
                variables = {"gates": {"decoder": {"layers": {str(layer): gates}}}}
                return np.asarray(row_losses(model, params, batch, variables), np.float64)

            slope = (losses(1 + step) - losses(1 - step)) / (2 * step)
            totals[kind] += np.abs(slope).sum()
    assert result["heads"][head] == pytest.approx(totals["heads"] / 8, rel=0.02)
    assert result["neurons"][neuron] == pytest.approx(totals["neurons"] / 8, rel=0.05)


def test_taylor_keeps_what_the_loss_needs(shallow, calibration):
    model, params = shallow
    params = jax.device_get(params)
    down = params["decoder"]["layers"]["0"]["mlp"]["down_proj"]
    useless = np.arange(0, 128, 3)
    down["weight"] = np.array(down["weight"])
    down["weight"][:, useless] *= 1e-3
    result = unit_scores(model, params, "taylor", 0, calibration[:1])
    order = np.argsort(result["neurons"])
    assert set(order[:30]) <= set(useless)


def test_magnitude_scores_are_the_norms_of_what_a_unit_owns(small):
    model, params = small
    result = unit_scores(model, params, "magnitude", 0)
    layer = jax.tree.map(np.asarray, params["decoder"]["layers"]["0"])
    fused, down = (layer["mlp"][name]["weight"] for name in ("gate_up_proj", "down_proj"))
    owned = np.concatenate([fused[7], fused[128 + 7], down[:, 7]])
    assert result["neurons"][7] == pytest.approx(np.linalg.norm(owned), rel=1e-5)
    query, out = (layer["attention"][name]["weight"] for name in ("q_proj", "o_proj"))
    owned = np.concatenate([query[16:24].ravel(), out[:, 16:24].ravel()])
    assert result["heads"][2] == pytest.approx(np.linalg.norm(owned), rel=1e-5)


def test_calibration_is_checked_and_what_it_lacks_is_noted(make_model, calibration):
    model, params = make_model(vision=True, num_layers=1)
    with pytest.raises(DataError, match="needs calibration="):
        prune.structured(0.25)(model, params)
    _, _, report = prune.structured(0.25)(model, params, calibration=calibration)
    assert "had no images" in report.notes[0]
    tokens = np.full((2, 8), 11, np.int32)
    tokens[:, 1:5] = 5
    images = np.random.default_rng(0).random((2, 8, 8, 3)).astype(np.float32)
    batch = {"tokens": tokens, "images": images, "loss_mask": np.ones((2, 8))}
    _, _, report = prune.structured(0.25)(model, params, calibration=[batch])
    assert report.notes == ()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "at least 'tokens'"),
        ({"tokens": np.zeros((2, 8))}, "tokens must be integers"),
        ({"tokens": np.zeros((2, 8), int), "labels": 1}, "unknown key 'labels'"),
        ({"tokens": np.zeros((2, 8), int), "loss_mask": np.ones((2, 7))}, "loss_mask must be"),
        ({"tokens": np.zeros((2, 8), int), "images": np.ones((1, 8, 8, 3))}, "images has"),
    ],
)
def test_batches_that_are_none_are_refused(small, batch, message):
    model, params = small
    with pytest.raises(DataError, match=message):
        prune.structured(0.25)(model, params, calibration=[batch])


def test_nan_weights_are_noticed_by_the_scores(small, calibration):
    model, params = small
    broken = jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(np.nan), params)
    with pytest.raises(DataError, match="not finite"):
        prune.structured(0.25)(model, broken, calibration=calibration)


def test_only_a_model_with_a_glm_decoder_shrinks():
    with pytest.raises(RecipeError, match="Dense has no GLM decoder"):
        prune.structured(0.25)(nn.Dense(3), {"kernel": weight(3, 3)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 1.0}, "heads must be at least 0 and below 1"),
        ({"heads": True}, "heads must be float, not True"),
        ({"neurons": 1.2}, "neurons must be at least 0 and below 1"),
        ({"neurons": -0.1}, "keep ratio is above 0 and at most 1, not -0.1"),
        ({"score": "wanda"}, "score must be taylor or magnitude"),
        ({"neuron_multiple": 0}, "neuron_multiple must be a whole number"),
        ({"max_batches": 1.5}, "max_batches must be int"),
    ],
)
def test_structured_refuses_options_without_a_meaning(options, message):
    with pytest.raises(RecipeError, match=message):
        prune.structured(**options)


def test_a_shrunk_configuration_round_trips(small):
    from glm_edge import configs

    model, params = small
    smaller, _, _ = prune.structured(0.25, neurons=0.5, score="magnitude", where="layers/1")(
        model, params
    )
    assert configs.from_dict(configs.to_dict(smaller.config)) == smaller.config
    assert dataclasses.is_dataclass(smaller.config)
