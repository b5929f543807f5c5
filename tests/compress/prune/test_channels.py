"""Removal of hidden channels, against the whole model with their weights at zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import prune, quantize, recipe_from_json, to_json
from glm_edge.errors import RecipeError
from glm_edge.models.cnn import CNN, Inverted, MobileNetV2Config, Stem, preset
from tests.tiny_models import init

CONFIG = MobileNetV2Config(
    "narrow",
    Stem(8, stride=1),
    (Inverted(8, 8, 1, expand=False), Inverted(8, 40, 2), Inverted(12, 30, 1)),
    head_features=16,
    num_classes=10,
    image_size=(8, 8, 1),
)
LOGITS = jax.jit(lambda model, variables, x: model.apply(variables, x)[0], static_argnums=0)


@pytest.fixture(scope="module")
def narrow():
    model, rng = CNN(CONFIG), np.random.default_rng(0)
    variables = init(model, jnp.zeros((1, 8, 8, 1)))
    # Norms that differ from channel to channel; kernels are drawn already.
    return model, jax.tree.map(
        lambda leaf: leaf if leaf.ndim > 1 else jnp.asarray(rng.uniform(0.5, 1.0, leaf.shape)),
        variables,
    )


def hidden(model):
    return [block.hidden for block in model.config.blocks]


def test_the_model_is_the_whole_one_with_weights_at_zero(narrow):
    model, variables = narrow
    small, fewer, report = prune.channels(0.6)(model, variables)
    assert hidden(small) == [8, 16, 12]
    assert boxes.count(fewer) == report.count_after < report.count_before
    params = dict(variables["params"])
    for index in (1, 2):
        name = f"blocks_{index}"
        block = params[name]
        kernel = np.asarray(block["project"]["conv"]["kernel"], np.float64)
        scale = np.abs(np.asarray(block["depthwise"]["norm"]["scale"], np.float64))
        matter = [scale[i] * np.sqrt((kernel[0, 0, i] ** 2).sum()) for i in range(len(scale))]
        stays = np.sort(np.argsort(matter)[-hidden(small)[index] :])
        remaining = fewer["params"][name]["project"]["conv"]["kernel"]
        np.testing.assert_array_equal(remaining, kernel[:, :, stays].astype(np.float32))
        zeroed = np.zeros_like(kernel)
        zeroed[:, :, stays] = kernel[:, :, stays]
        masked = {"conv": {"kernel": jnp.asarray(zeroed, jnp.float32)}}
        params[name] = {**block, "project": {**block["project"], **masked}}
    images = np.random.default_rng(1).normal(size=(2, 8, 8, 1)).astype(np.float32)
    expected = LOGITS(model, {**variables, "params": params}, images)
    actual = LOGITS(small, fewer, images)
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(actual - LOGITS(model, variables, images)).max() > 1e-3


def test_remaining_channels_are_multiples(narrow):
    """Channels left are whole multiples where there are so many."""
    assert hidden(prune.channels(0.25, multiple=1)(*narrow)[0]) == [8, 30, 22]
    assert hidden(prune.channels(0.25, multiple=8)(*narrow)[0]) == [8, 24, 16]
    assert hidden(prune.channels(0.95, multiple=8)(*narrow)[0]) == [8, 2, 1]
    assert hidden(prune.channels(0.0)(*narrow)[0]) == [8, 40, 28]


def test_masks_are_shrunk_with_their_values(narrow):
    model, variables = narrow
    masked = prune.mask(0.5, where=r"project/conv")(model, variables)[1]
    _, fewer, _ = prune.channels(0.5)(model, masked)
    leaf = fewer["params"]["blocks_1"]["project"]["conv"]["kernel"]
    assert isinstance(leaf, boxes.Masked)
    assert leaf.mask.shape == leaf.shape == (1, 1, 20, 8)


def test_the_transform_is_written_and_read():
    transform = prune.channels(0.3, multiple=2)
    assert recipe_from_json(to_json(transform)) == transform


def test_what_has_no_meaning_is_refused(narrow):
    with pytest.raises(RecipeError, match=r"channels: fraction must be at least 0 and below 1"):
        prune.channels(1.0)
    with pytest.raises(RecipeError, match="multiple must be a whole number"):
        prune.channels(0.5, multiple=0)
    with pytest.raises(RecipeError, match="only a MobileNetV2"):
        prune.channels(0.5)(CNN(preset("resnet_digits")), {})
    with pytest.raises(RecipeError, match="only a MobileNetV2"):
        prune.channels(0.5)(narrow[0].clone(deploy=True), {})
    with pytest.raises(RecipeError, match="its variables, params and batch_stats"):
        prune.channels(0.5)(narrow[0], narrow[1]["params"])
    rounded = quantize.rtn("int8", where="blocks_1/expand")(*narrow)[1]
    with pytest.raises(RecipeError, match="is quantized; prune before quantizing"):
        prune.channels(0.5)(narrow[0], rounded)
