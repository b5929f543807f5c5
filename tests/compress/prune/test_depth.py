import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from glm_edge.compress import batches
from glm_edge.compress.prune.depth import depth
from glm_edge.compress.prune.scores.influence import influence
from glm_edge.compress.prune.shrink.layers import shrink_depth
from glm_edge.configs import DecoderConfig, GLMConfig
from glm_edge.errors import DataError, RecipeError
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.models.vision import VisionEncoder
from tests.tiny_models import init


@functools.partial(jax.jit, static_argnums=0)
def applied(model, variables, *inputs):
    return model.apply(variables, *inputs)


apply = jax.jit(batches.apply_batch, static_argnums=0)
mean_loss = jax.jit(batches.mean_loss, static_argnums=0)

WIDTHS = {"num_heads": (4, 2, 4), "num_kv_heads": (2, 2, 2), "intermediate_size": (24, 16, 40)}


def three_layers(**changes):
    fields = {"vocab_size": 40, "hidden_size": 16, "num_layers": 3, "num_heads": 4}
    fields |= {"num_kv_heads": 2, "head_dim": 4, "intermediate_size": 24, **changes}
    model = MultimodalGLM(GLMConfig("three", DecoderConfig(**fields), pad_token_id=0))
    params = init(model, jnp.zeros((1, 2), jnp.int32), seed=1)["params"]
    return model, params


@pytest.fixture(scope="module")
def three():
    return three_layers()


def silenced(params, index, part="decoder"):
    """The layer's branches give nothing, so that its output is its input."""
    layers = dict(params[part]["layers"])
    layer = dict(layers[str(index)])
    out = ("o_proj", "down_proj", "fc2")

    def silence(tree):
        return {
            name: jax.tree.map(jnp.zeros_like, node)
            if name in out
            else silence(node)
            if isinstance(node, dict)
            else node
            for name, node in tree.items()
        }

    layers[str(index)] = silence(layer)
    return {**params, part: {**params[part], "layers": layers}}


@pytest.fixture
def batch():
    return {"tokens": np.random.default_rng(0).integers(1, 40, (2, 9)).astype(np.int32)}


def test_depth_equals_a_silent_decoder_layer(batch):
    """A decoder without a layer gives the outputs of a silent layer."""
    model, params = three_layers(**WIDTHS)
    smaller, small = shrink_depth(model, params, [0, 2])
    actual = apply(smaller, small, batch)
    expected = apply(model, silenced(params, 1), batch)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert float(jnp.abs(expected - apply(model, params, batch)).max()) > 1e-3
    config = smaller.config.decoder
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (2, 4, 2)
    assert config.intermediate_size == (24, 40)


@pytest.mark.parametrize("part", [pytest.param("vision", marks=pytest.mark.slow), "speech"])
def test_depth_equals_a_silent_encoder_layer(make_shallow, batch_of, part):
    """An encoder without a layer gives the outputs of a silent layer."""
    config = make_shallow("nano")[0].config
    encoder = dataclasses.replace(getattr(config, part), num_layers=2)
    if part == "vision":
        encoder = dataclasses.replace(encoder, window=(2, 2), global_layers=(1,))
    model = MultimodalGLM(dataclasses.replace(config, **{part: encoder}))
    params = init(model, jnp.zeros((1, 2), jnp.int32))["params"]
    batch = batch_of(model)
    transform = depth([0], part=part)
    smaller, small, report = transform(model, params)
    actual = apply(smaller, small, batch)
    expected = apply(model, silenced(params, 0, part), batch)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    work = {"vision": "image", "speech": "clip"}[part]
    assert report.flops_after[work] < report.flops_before[work]
    assert report.count_after < report.count_before
    assert any(row.action == "removed" for row in report.rows)
    if part == "vision":
        assert smaller.config.vision.global_layers == (0,)


def test_influence_is_one_minus_the_cosine_of_input_and_output(three, batch):
    model, params = three
    batch["tokens"][:, -3:] = 0
    actual = influence(model, params, [batch], "decoder")
    paired = influence(model, params, [batch], "decoder", span=2)
    hidden = applied(model, {"params": params}, batch["tokens"])[1]["hidden"]
    hidden = [np.asarray(x, np.float64)[:, :-3] for x in hidden]

    def distance(x, y):
        norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
        return np.mean(1 - (x * y).sum(-1) / norms)

    expected = [distance(hidden[i], hidden[i + 1]) for i in range(3)]
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    expected = [distance(hidden[i], hidden[i + 2]) for i in range(2)]
    np.testing.assert_allclose(paired, expected, atol=1e-5)


@pytest.mark.parametrize("score", ["influence", "block", "loss"])
def test_a_layer_that_does_nothing_goes_first(three, batch, score):
    model, params = three
    quiet = silenced(params, 1)
    smaller, small, report = depth(1, score=score)(model, quiet, calibration=[batch])
    expected = apply(model, quiet, batch)
    actual = apply(smaller, small, batch)
    if score == "loss":
        # Leaving out another layer may lower the loss of an untrained model.
        losses = [
            float(mean_loss(*shrink_depth(model, quiet, keep), batch))
            for keep in ([1, 2], [0, 2], [0, 1])
        ]
        gone = int(np.argmin(losses))
        assert report.notes == (f"removed layers {gone} of the decoder by loss",)
        return
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert report.notes == (f"removed layers 1 of the decoder by {score}",)


def test_blocks_are_neighbours(three, batch):
    model, params = three
    quiet = silenced(silenced(params, 1), 2)
    _, _, report = depth(2, score="block")(model, quiet, calibration=[batch])
    assert report.notes == ("removed layers 1, 2 of the decoder by block",)


def test_an_encoder_on_its_own_loses_layers(make_member):
    vision = make_member("nano")[0].config.vision
    config = dataclasses.replace(vision, num_layers=3)
    model = VisionEncoder(config, 24)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    params = init(model, images)["params"]
    quiet = silenced({"vision": params}, 2, "vision")["vision"]
    smaller, small, _ = depth(1)(model, quiet, calibration=[{"images": images}])
    assert smaller.config.num_layers == 2
    result = applied(smaller, {"params": small}, images)[0]
    np.testing.assert_allclose(result, applied(model, {"params": quiet}, images)[0], atol=1e-5)


def test_the_transform_is_data_and_deterministic(three, batch):
    model, params = three
    for transform in (depth(1, score="block"), depth([0, 2])):
        assert ge.recipe_from_json(ge.to_json(transform)) == transform
    first, again = (depth(1)(model, params, calibration=[batch])[1] for _ in range(2))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, again))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers must be a whole number of at least 1"),
        ({"layers": []}, "layers must be a number or indices"),
        ({"layers": [-1]}, "layers must be a number or indices"),
        ({"layers": 1, "part": "head"}, "part must be decoder, vision or speech"),
        ({"layers": 1, "score": "angle"}, "score must be influence, block or loss"),
        ({"layers": 1, "max_batches": 0}, "max_batches must be a whole number"),
    ],
)
def test_options_without_a_meaning_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        depth(**options)


@pytest.mark.parametrize(
    ("transform", "error", "message"),
    [
        (depth(3), RecipeError, "removing 3 of 3 layers leaves none"),
        (depth([0, 1, 2]), RecipeError, "removing 3 of 3 layers leaves none"),
        (depth([3]), RecipeError, r"no layer 3, only 0\.\.2"),
        (depth(1, part="vision"), RecipeError, "has no vision"),
        (depth(1), DataError, "needs calibration="),
    ],
)
def test_models_that_do_not_fit_are_refused(three, transform, error, message):
    with pytest.raises(error, match=message):
        transform(*three)


def test_activations_that_are_not_finite_are_noticed(three, batch):
    model, params = three
    broken = jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(np.nan), params)
    for score in ("influence", "loss"):
        with pytest.raises(DataError, match="not finite"):
            depth(1, score=score)(model, broken, calibration=[batch])
