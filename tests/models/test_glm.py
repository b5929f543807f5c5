"""The decoder and the multimodal GLM: caching, gates, intermediates, layer-wise running."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge.models.glm import init_cache
from glm_edge.models.multimodal import MultimodalGLM, place_features

FIELDS = [
    {"partial_rotary_factor": 0.5, "attention_bias": True, "sandwich_norm": True},
    {"tie_embeddings": False, "num_kv_heads": 4},
    {"mrope_section": (1, 1, 2)},
    {"num_heads": (4, 2), "intermediate_size": (64, 32)},
]
# Together they are in two models; each by itself is slow.
VARIANTS = [
    {},
    FIELDS[0] | FIELDS[1],
    FIELDS[2] | FIELDS[3],
    *(pytest.param(fields, marks=pytest.mark.slow) for fields in FIELDS),
]


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, *inputs, **options):
    return model.apply(variables, *inputs, **options)


def tokens_of(shape, seed=0):
    return np.random.default_rng(seed).integers(11, 48, shape).astype(np.int32)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v) or "plain")
def test_cached_decoding_equals_one_uncached_pass(make_model, variant):
    model, params = make_model(**variant)
    tokens = tokens_of((2, 10))
    run = functools.partial(apply, model)
    expected, _ = run({"params": params}, tokens)
    cache, pieces = init_cache(model.config.decoder, 2, 12), []
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 10)):
        logits, aux = run({"params": params}, tokens[:, start:stop], cache=cache)
        cache = aux["cache"]
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, 1), expected, atol=2e-5)
    assert int(cache["length"]) == 10


def test_a_token_changes_nothing_before_it(make_model):
    model, params = make_model()
    tokens = tokens_of((2, 6))
    changed = tokens.copy()
    changed[:, 3] = 11 + (tokens[:, 3] - 10) % 37
    run = functools.partial(apply, model)
    one, other = (run({"params": params}, t)[0] for t in (tokens, changed))
    one, other = np.asarray(one), np.asarray(other)
    np.testing.assert_allclose(one[:, :3], other[:, :3], atol=1e-6)
    for row in range(2):
        assert not np.allclose(one[row, 3:], other[row, 3:], atol=1e-4)


def test_unit_gates_change_nothing_and_a_zero_gate_removes(make_model):
    model, params = make_model()
    tokens = tokens_of((2, 6))
    config = model.config.decoder

    def gates(neurons, heads):
        layer = {"mlp": {"neurons": neurons}, "attention": {"heads": heads}}
        return {"decoder": {"layers": {"0": layer}}}

    neurons, heads = np.ones(64, np.float32), np.ones(4, np.float32)
    ones = gates(neurons.copy(), heads.copy())
    run = functools.partial(apply, model)
    plain, _ = run({"params": params}, tokens)
    gated, _ = run({"params": params, "gates": ones}, tokens)
    np.testing.assert_allclose(gated, plain, atol=1e-6)

    zeroed = jax.tree.map(np.array, params)
    layer = zeroed["decoder"]["layers"]["0"]
    down, out = layer["mlp"]["down_proj"], layer["attention"]["o_proj"]
    down["weight"][:, 7] = 0.0
    out["weight"][:, config.head_dim : 2 * config.head_dim] = 0.0
    neurons[7] = heads[1] = 0.0
    holes = gates(neurons, heads)
    actual, _ = run({"params": params, "gates": holes}, tokens)
    expected, _ = run({"params": zeroed}, tokens)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_features_replace_placeholders_in_order():
    x = np.zeros((2, 5, 3), np.float32)
    placeholder = np.array([[0, 1, 0, 1, 0], [1, 1, 0, 0, 0]], bool)
    features = np.arange(12, dtype=np.float32).reshape(2, 2, 3) + 1
    actual = jax.jit(place_features)(x, placeholder, features)
    expected = np.zeros((2, 5, 3))
    expected[0, 1], expected[0, 3] = features[0]
    expected[1, 0], expected[1, 1] = features[1]
    np.testing.assert_array_equal(actual, expected)


def test_features_replace_placeholders(make_model):
    """Features are placed where the model has its placeholders."""
    model, params = make_model()
    rng = np.random.default_rng(0)
    images = rng.random((2, 16, 16, 3)).astype(np.float32)
    audio = rng.normal(size=(2, 16, 8)).astype(np.float32)
    tokens = tokens_of((2, 10))
    tokens[:, 1:5], tokens[0, 6:8], tokens[1, 7:9] = 5, 8, 8
    plain, aux = jax.device_get(apply(model, {"params": params}, tokens, images, audio))
    embedded = np.asarray(params["embed"]["weight"])[tokens]
    first = np.asarray(aux["hidden"][0])
    np.testing.assert_allclose(first[:, 1:5], aux["vision"], atol=1e-6)
    np.testing.assert_allclose(first[0, 6:8], aux["speech"][0], atol=1e-6)
    np.testing.assert_allclose(first[1, 7:9], aux["speech"][1], atol=1e-6)
    np.testing.assert_allclose(first[:, 9], embedded[:, 9], atol=1e-6)
    assert aux["vision"].shape == (2, model.config.vision.num_tokens, 32)
    assert aux["speech"].shape == (2, model.config.speech.num_tokens, 32)
    # Both inputs change the answer.
    for other in ((1.0 - images, audio), (images, -audio)):
        changed, _ = apply(model, {"params": params}, tokens, *other)
        assert (np.abs(np.asarray(changed) - plain)[:, -1].max(axis=-1) > 1e-4).all()


def test_layer_by_layer_equals_the_whole(make_model):
    model, params = make_model()
    tokens = tokens_of((2, 6))
    expected, aux = apply(model, {"params": params}, tokens)

    def step_by_step(module):
        x, _ = module.embed_inputs(tokens)
        positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
        angle, mask, slot = module.decoder.prepare(x, positions, None, None)
        observed = [x]
        for index in range(module.config.decoder.num_layers):
            x, _ = module.decoder.run_layer(index, x, angle, mask, None, slot)
            observed.append(x)
        return module.predict(module.decoder.norm(x)), observed

    actual, observed = jax.jit(lambda p: model.apply({"params": p}, method=step_by_step))(params)
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert len(aux["hidden"]) == len(observed) == 3
    for one, other in zip(aux["hidden"], observed, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_calibration_collections_are_sown_only_when_asked(make_model):
    model, params = make_model()
    tokens = tokens_of((2, 6))
    run = functools.partial(model.apply, mutable=["inputs", "attention"])
    _, sown = jax.jit(run)({"params": params}, tokens)
    rows = sown["inputs"]["decoder"]["layers"]["0"]["mlp"]["down_proj"]["rows"][0]
    assert rows.shape == (12, 64)
    weights = sown["attention"]["decoder"]["layers"]["1"]["attention"]["weights"][0]
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
    abstract = jax.eval_shape(model.init, jax.random.key(0), tokens)
    assert set(abstract) == {"params"}


def test_bfloat16_stays_close_to_the_reference(make_model):
    model, params = make_model()
    tokens = tokens_of((2, 6))
    expected, _ = apply(model, {"params": params}, tokens)
    rough = model.clone(compute="bfloat16")
    actual, _ = apply(rough, {"params": params}, tokens)
    assert float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected)) < 0.03


def test_a_text_only_model_has_no_encoders(make_model):
    model, _ = make_model()
    alone = dataclasses.replace(model.config, vision=None, speech=None)
    init = MultimodalGLM(alone).init
    params = jax.eval_shape(init, jax.random.key(0), tokens_of((1, 2)))["params"]
    assert set(params) == {"embed", "decoder"}
