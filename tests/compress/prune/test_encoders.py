import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from glm_edge import params as boxes
from glm_edge.compress import batches, prune
from glm_edge.compress.folding import folds, move
from glm_edge.compress.prune.encoders import encoders
from glm_edge.compress.prune.shrink.heads_neurons import shrink_encoder
from glm_edge.compress.quantize import rtn
from glm_edge.configs import SpeechConfig, TextConfig
from glm_edge.errors import DataError, RecipeError
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.models.speech import SpeechEncoder
from glm_edge.models.text import TextEncoder
from glm_edge.models.vision import VisionEncoder
from glm_edge.params.tree import nested
from tests.tiny_models import init


@functools.partial(jax.jit, static_argnums=0)
def applied(model, variables, *inputs):
    return model.apply(variables, *inputs)


apply = jax.jit(batches.apply_batch, static_argnums=0)


def zeroed(tree, keep, head_size):
    """Weights that read from removed heads and neurons at zero, nothing else changed."""
    layers = dict(tree["layers"])
    for index, retained in keep.items():
        layer = jax.tree.map(np.array, layers[str(index)])
        attention = layer.get("attention", layer)
        mlp = layer.get("mlp", layer)
        if "heads" in retained:
            weight = attention["o_proj"]["weight"]
            gone = np.ones(weight.shape[1] // head_size, bool)
            gone[retained["heads"]] = False
            weight[:, np.repeat(gone, head_size)] = 0
        if "neurons" in retained:
            weight = (mlp.get("down_proj") or mlp["fc2"])["weight"]
            weight[:, np.setdiff1d(np.arange(weight.shape[1]), retained["neurons"])] = 0
        layers[str(index)] = jax.tree.map(jnp.asarray, layer)
    return {**tree, "layers": layers}


KEEP = {0: {"heads": [1], "neurons": [0, 1, 7, 12, 23]}}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        pytest.param("nano", "vision", marks=pytest.mark.slow),
        ("nano", "speech"),
        ("edge_v", "vision"),
    ],
)
def test_a_shrunk_encoder_gives_the_outputs_of_the_zeroed_one(make_shallow, batch_of, name, part):
    model, params = make_shallow(name)
    batch = batch_of(model)
    smaller, small = shrink_encoder(model, params, KEEP, part)
    masked = {**params, part: zeroed(params[part], KEEP, 8)}
    expected = apply(model, masked, batch)
    np.testing.assert_allclose(apply(smaller, small, batch), expected, atol=1e-5)
    assert float(jnp.abs(expected - apply(model, params, batch)).max()) > 1e-3
    config = getattr(smaller.config, part)
    assert (config.num_heads, config.head_dim, config.intermediate_size) == (1, 8, 5)


def test_a_tower_on_its_own_with_windows_and_a_pooling_head(make_member):
    vision = make_member("edge_v")[0].config.vision
    changes = {"num_layers": 2, "window": (2, 4), "global_layers": (1,), "pooling_head": True}
    changes |= {"projector_size": 0, "merge_size": 1, "boundary_embeddings": False}
    model = VisionEncoder(dataclasses.replace(vision, **changes))
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    params = init(model, images)["params"]
    smaller, small = shrink_encoder(model, params, KEEP)
    assert smaller.config.num_heads == (1, 2, 2)
    assert smaller.config.intermediate_size == (5, 24, 24)
    actual, between = applied(smaller, {"params": small}, images)
    expected, complete = applied(model, {"params": zeroed(params, KEEP, 8)}, images)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    np.testing.assert_allclose(between["pooled"], complete["pooled"], atol=1e-5)


def test_a_text_encoder_shrinks():
    model = TextEncoder(TextConfig(30, 16, 2, 2, 24, num_labels=3, pooler="tanh"))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 30, (2, 7)), jnp.int32)
    params = init(model, tokens)["params"]
    smaller, small = shrink_encoder(model, params, KEEP)
    expected = applied(model, {"params": zeroed(params, KEEP, 8)}, tokens)[0]
    np.testing.assert_allclose(applied(smaller, {"params": small}, tokens)[0], expected, atol=1e-5)
    scores = prune.scores_of(model, params, "magnitude", "neuron")
    layer = jax.tree.map(np.asarray, params["layers"]["1"])
    owned = np.concatenate([layer["fc1"]["weight"][3], layer["fc2"]["weight"][:, 3]])
    assert scores["layers/1"][0, 3] == pytest.approx(np.linalg.norm(owned), rel=1e-5)


@pytest.fixture(scope="module")
def grouped():
    """A speech encoder whose query heads share keys and values by twos, and frames for it."""
    sizes = {"mel_bins": 6, "num_frames": 12, "hidden_size": 16, "num_layers": 1, "num_heads": 4}
    sizes |= {"intermediate_size": 24, "projector_size": 0, "merge_size": 1}
    model = SpeechEncoder(SpeechConfig(**sizes, head_dim=8, num_kv_heads=2))
    mel = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 6)), jnp.float32)
    return model, init(model, mel)["params"], mel


def test_query_heads_leave_each_group_and_shared_ones_stay(grouped):
    model, params, mel = grouped
    keep = {0: {"heads": [1, 2]}}
    smaller, small = shrink_encoder(model, params, keep)
    expected = applied(model, {"params": zeroed(params, keep, 8)}, mel)[0]
    np.testing.assert_allclose(applied(smaller, {"params": small}, mel)[0], expected, atol=1e-5)
    assert small["layers"]["0"]["attention"]["k_proj"]["weight"].shape == (16, 16)
    scores = prune.scores_of(model, params, "magnitude", "head")
    assert scores["layers/0/attention"].shape == (2, 2)
    with pytest.raises(RecipeError, match=r"groups would keep .* query heads"):
        shrink_encoder(model, params, {0: {"heads": [0, 1, 2]}})
    with pytest.raises(RecipeError, match="group 1 would lose all 2 query heads"):
        shrink_encoder(model, params, {0: {"heads": [0, 1]}})
    removed = encoders(heads=0.25, score="magnitude")(model, params)[0]
    assert (removed.config.num_heads, removed.config.num_kv_heads) == (2, 2)


def test_factors_move_through_shared_values(grouped):
    model, params, mel = grouped
    expected, leaves = (
        applied(model, {"params": params}, mel)[0],
        dict(boxes.path_items(params)),
    )
    actual = folds(model.config)
    assert [fold.channels for fold in actual if fold.kind == "value"] == [16]
    for fold in actual:
        factor = np.random.default_rng(1).uniform(0.5, 2, fold.channels)
        leaves |= move(fold, leaves, factor)
    np.testing.assert_allclose(
        applied(model, {"params": nested(leaves)}, mel)[0], expected, atol=1e-4
    )


@pytest.fixture(scope="module")
def nano(make_shallow, batch_of):
    model, params = make_shallow("nano")
    return model, params, batch_of(model)


# Neurons' gates run in the next test too.
@pytest.mark.parametrize(
    ("part", "kind"),
    [("vision", "head"), pytest.param("speech", "neuron", marks=pytest.mark.slow)],
)
def test_taylor_is_the_slope_of_each_rows_loss(nano, part, kind):
    model, params, batch = nano
    results = prune.scores_of(model, params, "taylor", kind, calibration=[batch])
    step = 1e-2

    @jax.jit
    def losses(gates):
        return batches.row_losses(model, params, batch, {"gates": gates})

    def slope(part, index):
        sides = []
        for gate in (1 + step, 1 - step):
            heads, neurons = np.ones((1, 2, 1), np.float32), np.ones(24, np.float32)
            if part == "vision":
                heads[0, index, 0] = gate
            else:
                neurons[index] = gate
            gates = {
                "vision": {"layers": {"0": {"attention": {"heads": heads}}}},
                "speech": {"layers": {"0": {"neurons": neurons}}},
            }
            sides.append(np.asarray(losses(gates), np.float64))
        return np.mean(np.abs(sides[0] - sides[1])) / (2 * step)

    path, count = {"head": ("vision/layers/0/attention", 2), "neuron": ("speech/layers/0", 24)}[
        kind
    ]
    scores = np.asarray(results[path]).ravel()
    assert scores.shape == (count,)
    index = 1 if kind == "head" else int(np.argmax(scores))
    assert scores[index] == pytest.approx(slope(part, index), rel=0.03)


def test_the_transform_shrinks_both_encoders_and_saves(nano, tmp_path):
    model, params, batch = nano
    transform = encoders(heads=0.5, neurons=0.5, neuron_multiple=4)
    smaller, small, report = transform(model, params, calibration=[batch])
    for part in ("vision", "speech"):
        config = getattr(smaller.config, part)
        assert (config.num_heads, config.head_dim, config.intermediate_size) == (1, 8, 12)
        work = {"vision": "image", "speech": "clip"}[part]
        assert report.flops_after[work] < report.flops_before[work]
    assert smaller.config.decoder == model.config.decoder
    assert report.bytes_after < report.bytes_before
    ge.save(smaller, small, tmp_path / "out")
    loaded, read = ge.load(tmp_path / "out")
    assert loaded.config == smaller.config
    result = apply(loaded, read, batch)
    np.testing.assert_array_equal(result, apply(smaller, small, batch))
    _, rounded, _ = rtn("int8", where="^(vision|speech)/layers/0/(mlp/down_proj|fc2)")(loaded, read)
    rounded = jax.tree.map(boxes.dense, rounded, is_leaf=boxes.is_box)
    assert float(jnp.abs(apply(loaded, rounded, batch) - result).max()) < 0.5
    assert ge.recipe_from_json(ge.to_json(transform)) == transform


def test_where_takes_one_encoder_or_one_kind(nano):
    model, params, _ = nano
    transform = encoders(0.5, neurons=0.5, score="magnitude", where=r"^speech/layers/\d+/fc")
    smaller, _, _ = transform(model, params)
    assert smaller.config.vision == model.config.vision
    assert smaller.config.speech.num_heads == 2
    assert smaller.config.speech.intermediate_size == 12
    with pytest.raises(RecipeError, match="matches no layer of an encoder"):
        encoders(0.5, score="magnitude", where="^decoder")(model, params)


def test_bad_input_is_refused(nano, make_member):
    model, params, batch = nano
    with pytest.raises(DataError, match="needs calibration= batches with images"):
        encoders(0.5)(model, params, calibration=[{"tokens": batch["tokens"]}])
    broken = jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(np.nan), params)
    with pytest.raises(DataError, match="not finite"):
        encoders(0.5, neurons=0.5, neuron_multiple=4)(model, broken, calibration=[batch])
    with pytest.raises(RecipeError, match="leaves no query head"):
        encoders(heads=0.9, score="magnitude")(model, params)
    with pytest.raises(RecipeError, match="leaves none of 24"):
        encoders(neurons=0.99, score="magnitude")(model, params)
    for options in ({"heads": 1.0}, {"heads": -0.1}, {"neurons": 1.5}):
        with pytest.raises(RecipeError, match=r"must be at least 0 and below 1"):
            encoders(**options)
    with pytest.raises(RecipeError, match="score must be taylor or magnitude"):
        encoders(score="loss")
    with pytest.raises(RecipeError, match="has no encoder"):
        encoders(0.5)(*make_member("edge"))
    with pytest.raises(RecipeError, match="no encoder 'text'"):
        shrink_encoder(model, params, {}, "text")
    with pytest.raises(RecipeError, match="no layer 3 of 1"):
        shrink_encoder(model, params, {3: {}}, "speech")
    _, rounded, _ = rtn("int8", where="^vision/layers/0/attention")(model, params)
    with pytest.raises(RecipeError, match="prune before quantizing"):
        encoders(0.5, score="magnitude")(model, rounded)
    alone = VisionEncoder(dataclasses.replace(model.config.vision), 24)
    with pytest.raises(RecipeError, match="score by magnitude"):
        encoders(0.5)(alone, params["vision"], calibration=[batch])
    assert isinstance(model, MultimodalGLM)
