import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from glm_edge import params as boxes
from glm_edge.compress import quantize
from glm_edge.errors import CheckpointError, RecipeError
from glm_edge.generate import generate, skip_neurons, steps
from glm_edge.kernels.sparse_mlp import SparseMLP, sparse_mlp


@functools.partial(jax.jit, static_argnums=0)
def applied(model, variables, *inputs):
    return model.apply(variables, *inputs)


WIDTH, NEURONS = 24, 64


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    return rng.normal(size=(NEURONS, WIDTH)), rng.normal(size=(NEURONS, 2 * WIDTH))


@pytest.fixture(scope="module")
def rows():
    x = np.random.default_rng(1).normal(size=(6, WIDTH)) * np.geomspace(0.02, 1.0, 6)[:, None]
    return x.astype(np.float32)


def laid_out(weights, threshold, sizes):
    gate, rows = (jnp.asarray(w, jnp.float32) for w in weights)
    return SparseMLP(gate, rows, jnp.float32(threshold), sizes)


def in_float64(x, weights, threshold, limit):
    """Neuron by neuron: those above the threshold, the `limit` largest of them."""
    gate, rows = weights
    total = np.zeros_like(x, np.float64)
    counts = []
    for row, out in zip(np.float64(x), total, strict=True):
        activated = gate @ row / (1 + np.exp(-(gate @ row)))
        size = np.abs(activated)
        active = np.flatnonzero(size >= threshold * size.max())
        active = active[np.argsort(-size[active], kind="stable")][:limit]
        counts.append(len(active))
        for neuron in active:
            out += activated[neuron] * (rows[neuron, :WIDTH] @ row) * rows[neuron, WIDTH:]
    return total, counts


@pytest.mark.parametrize(
    ("threshold", "sizes"),
    [(0.0, (16,)), (0.0, (64,)), (0.1, (8, 16, 32, 64)), (0.5, (8, 16, 32, 64)), (0.3, (4,))],
)
def test_a_row_uses_the_neurons_whose_gates_are_open(weights, rows, threshold, sizes):
    expected, counts = in_float64(rows, weights, threshold, sizes[-1])
    run = jax.jit(sparse_mlp)
    one = np.concatenate([run(row[None], laid_out(weights, threshold, sizes)) for row in rows])
    scale = np.abs(expected).max(axis=1, keepdims=True)
    np.testing.assert_allclose(one / scale, expected / scale, atol=2e-6)
    together = run(rows[None], laid_out(weights, threshold, sizes))[0]
    np.testing.assert_allclose(together / scale, expected / scale, atol=2e-6)
    if threshold == 0.1:
        # Programs of several sizes ran.
        assert len({int(np.searchsorted(sizes, count)) for count in counts}) > 1


def test_compute_falls_with_the_neurons_that_are_kept(weights):
    x = jnp.ones((1, WIDTH))

    def flops(size):
        compiled = jax.jit(sparse_mlp).lower(x, laid_out(weights, 0.0, (size,))).compile()
        return compiled.cost_analysis()["flops"]

    # The gate is computed in full: a third of all products.
    assert flops(8) < 0.6 * flops(NEURONS)


def test_all_neurons_are_the_model_itself(make_model):
    model, params = make_model(num_layers=1)
    tokens = np.arange(10, 20)[None]
    expected = generate(model, params, tokens, max_new_tokens=8, return_logits=True)
    for options in ({"keep": 1.0}, {"threshold": 0.0}):
        skipping = skip_neurons(model, params, **options)
        actual = generate(model, skipping, tokens, max_new_tokens=8, return_logits=True)
        np.testing.assert_allclose(actual.logits, expected.logits, atol=1e-4)
        np.testing.assert_array_equal(actual.tokens, expected.tokens)


def test_another_threshold_compiles_nothing_anew(make_model):
    model, params = make_model(num_layers=1)
    tokens, compiled, scores = np.arange(10, 20)[None], [], []
    for threshold in (0.05, 0.2, 0.6):
        skipping = skip_neurons(model, params, threshold=threshold)
        result = generate(model, skipping, tokens, max_new_tokens=8, return_logits=True)
        scores.append(np.asarray(result.logits)[:, 0])
        compiled.append(steps._prefill._cache_size() + steps.decode._cache_size())
    assert len(set(compiled)) == 1
    assert not np.allclose(scores[0], scores[2], atol=1e-3)


def test_skipping_follows_masks_and_layers_and_cannot_be_saved(make_model, tmp_path):
    model, params = make_model()
    tokens = np.arange(10, 20)[None]
    rng = np.random.default_rng(0)
    masked = boxes.map_with_path(
        lambda path, leaf: (
            boxes.mask(leaf, rng.random(leaf.shape) < 0.5) if "mlp" in path else leaf
        ),
        params,
    )
    expected = applied(model, {"params": masked}, tokens)[0]
    actual = applied(model, {"params": skip_neurons(model, masked, keep=1.0)}, tokens)[0]
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    one = skip_neurons(model, params, keep=0.1, layers=[1])
    assert "skipping" in one["decoder"]["layers"]["1"]["mlp"]
    assert one["decoder"]["layers"]["0"] is params["decoder"]["layers"]["0"]
    other, plain = (np.asarray(applied(model, {"params": p}, tokens)[0]) for p in (one, params))
    assert np.abs(other - plain).max() > 1e-4
    with pytest.raises(CheckpointError, match="skipping"):
        ge.save(model, one, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass keep= or threshold=, one of them"),
        ({"keep": 0.5, "threshold": 0.5}, "pass keep= or threshold=, one of them"),
        ({"keep": 0.0}, "keep must be above 0 and up to 1, not 0.0"),
        ({"keep": 1.5}, "keep must be above 0"),
        ({"threshold": 1.5}, r"threshold must be in 0\.\.1, not 1.5"),
        ({"threshold": -0.5}, r"threshold must be in 0\.\.1"),
        ({"keep": 0.5, "layers": [2]}, "no layer 2"),
    ],
)
def test_options_without_a_meaning_are_refused(make_model, options, message):
    with pytest.raises(RecipeError, match=message):
        skip_neurons(*make_model(), **options)


def test_skip_neurons_refuses_quantized_or_laid_out_weights(make_model):
    """Weights that are rounded or laid out already are refused."""
    model, params = make_model()
    _, rounded, _ = quantize.rtn("int8", where="layers/0/mlp/gate")(model, params)
    with pytest.raises(RecipeError, match="mlp/gate_up_proj is quantized"):
        skip_neurons(model, rounded, keep=0.5)
    with pytest.raises(RecipeError, match="layer 0 skips already"):
        skip_neurons(model, skip_neurons(model, params, keep=0.5), keep=0.5)
