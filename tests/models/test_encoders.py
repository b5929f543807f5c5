"""Vision, speech and text encoders: windows, order, padding, layer-wise running."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from glm_edge.configs import TextConfig, VisionConfig
from glm_edge.errors import ConfigError
from glm_edge.models.text import TextEncoder
from glm_edge.models.vision import VisionEncoder, patches
from tests.tiny_models import init


@functools.partial(jax.jit, static_argnums=0)
def applied(model, variables, *inputs):
    return model.apply(variables, *inputs)


VISION = VisionConfig(
    image_size=(16, 8),
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    intermediate_size=32,
    projector_size=32,
    patch_size=2,
    patch_stride=2,
    temporal_patch_size=1,
    position_grid=(8, 4),
    window=(4, 4),
)


def encode(config, images):
    module = VisionEncoder(config, 24)
    params = init(module, images)["params"]
    return np.asarray(applied(module, {"params": params}, images)[0])


def test_patches_match_a_loop():
    config = dataclasses.replace(VISION, patch_size=4, image_size=(8, 8), window=None)
    images = np.random.default_rng(0).random((2, 8, 8, 3))
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    result = jax.jit(patches, static_argnums=1)(np.float32(images), config)
    assert result.shape == (2, 16, 48)
    for b, r, c in np.ndindex(2, 4, 4):
        cut = padded[b, 2 * r : 2 * r + 4, 2 * c : 2 * c + 4]
        np.testing.assert_allclose(result[b, 4 * r + c], cut.reshape(-1), atol=1e-6)


def test_windows_are_separate_except_in_global_layers():
    """Windows do not see each other unless the layer is global."""
    images = np.random.default_rng(1).random((1, 16, 8, 3)).astype(np.float32)
    changed = images.copy()
    changed[:, :8] = 0.0
    lower = slice(4, 8)
    one, other = encode(VISION, images), encode(VISION, changed)
    np.testing.assert_allclose(one[:, lower], other[:, lower], atol=1e-6)
    complete = dataclasses.replace(VISION, global_layers=(0,))
    one, other = encode(complete, images), encode(complete, changed)
    assert not np.allclose(one[:, lower], other[:, lower], atol=1e-4)


def test_one_feature_for_each_merged_cell():
    images = np.zeros((3, 16, 8, 3), np.float32)
    assert encode(VISION, images).shape == (3, VISION.num_tokens, 24)
    assert VISION.num_tokens == 8


@pytest.mark.parametrize(
    "change",
    [{"image_size": (14, 8)}, {"patch_size": 3}, {"window": (3, 4)}],
)
def test_shapes_that_do_not_divide_are_refused(change):
    with pytest.raises(ConfigError):
        dataclasses.replace(VISION, **change)


@pytest.fixture
def text():
    config = TextConfig(
        vocab_size=30,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        num_labels=3,
    )
    module = TextEncoder(config)
    tokens = np.random.default_rng(0).integers(0, 30, (2, 6)).astype(np.int32)
    return module, init(module, tokens)["params"], tokens


def test_the_text_encoder_sees_both_sides(text):
    module, params, tokens = text
    bare = module.clone(config=dataclasses.replace(module.config, num_labels=0))
    params = {name: params[name] for name in params if name not in ("pooler", "classifier")}
    changed = np.array(tokens)
    changed[:, -1] = (changed[:, -1] + 1) % 30
    one, other = (
        np.asarray(applied(bare, {"params": params}, ids)[0]) for ids in (tokens, changed)
    )
    assert one.shape == (2, 6, 16)
    assert not np.allclose(one[:, 0], other[:, 0], atol=1e-5)


def test_padding_is_not_seen(text):
    module, params, tokens = text
    longer = np.pad(tokens, ((0, 0), (0, 3)), constant_values=7)
    valid = np.broadcast_to(np.arange(9)[None] < 6, (2, 9))
    actual, _ = applied(module, {"params": params}, longer, valid)
    expected, aux = applied(module, {"params": params}, tokens)
    assert expected.shape == (2, 3)
    assert len(aux["hidden"]) == 3
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_without_token_types_there_is_no_table(text):
    module, _, tokens = text
    config = dataclasses.replace(module.config, type_vocab_size=0, num_labels=0)
    params = init(TextEncoder(config), tokens)["params"]
    assert set(params) == {"embed", "position", "norm", "layers"}
