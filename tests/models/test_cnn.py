"""Convolutional classifiers: published counts, shapes, and statistics that training updates."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.errors import ConfigError
from glm_edge.models import cnn
from glm_edge.models.cnn import CNN, preset
from tests.tiny_models import init


@functools.partial(jax.jit, static_argnums=0)
def applied(model, variables, *inputs):
    return model.apply(variables, *inputs)


def shapes(config, deploy=False):
    images = jnp.zeros((1, *config.image_size))
    return jax.eval_shape(CNN(config, deploy).init, jax.random.key(0), images)


@pytest.mark.parametrize(
    ("name", "trained", "deployed"),
    [
        # torchvision's `num_params` of resnet50 and mobilenet_v2.
        ("resnet_50", 25_557_032, None),
        ("mobilenet_v2_1", 3_504_872, None),
        # Trainable parameters of Keras' MobileNet, and of imgclsmob's MobileNet x1.0.
        ("mobilenet_v1", 4_231_976, None),
        # The paper's 57.42 M and 51.83 M, 28.21 M and 25.50 M; mmpretrain lists B1 as 57,483,112
        # with its 68,096 running statistics, and 51,829,480.
        ("repvgg_b1", 57_415_016, 51_829_480),
        ("repvgg_a2", 28_210_600, 25_499_944),
    ],
)
def test_published_parameter_counts(name, trained, deployed):
    variables = shapes(preset(name))
    assert boxes.count(variables["params"]) == trained
    if name == "repvgg_b1":
        assert boxes.count(variables) == 57_483_112
    if deployed is not None:
        assert boxes.count(shapes(preset(name), deploy=True)) == deployed


def test_widths_of_mobilenet_v2_are_the_published_ones():
    # torchvision's mobilenet_v2(width_mult=0.5) and (1.4); the papers give 1.95 M and 6.06 M.
    counts = [boxes.count(shapes(cnn.mobilenet_v2(width))["params"]) for width in (0.5, 1.4)]
    assert [round(count / 1e6, 2) for count in counts] == [1.97, 6.11]
    with pytest.raises(ConfigError, match="width must be at least"):
        cnn.mobilenet_v2(0.0)


DIGITS = [name for name in cnn.PRESETS if name.endswith("_digits")]


@pytest.mark.parametrize(
    ("size", "name"),
    [
        *((8, name) for name in DIGITS),
        (28, DIGITS[0]),
        *(pytest.param(28, name, marks=pytest.mark.slow) for name in DIGITS[1:]),
    ],
)
def test_small_models_read_digits_of_both_sizes(name, size):
    config = dataclasses.replace(preset(name), image_size=(size, size, 1))
    images = jnp.zeros((3, size, size, 1))
    model = CNN(config)
    logits, more = jax.eval_shape(lambda v: model.apply(v, images), shapes(config))
    assert logits.shape == (3, 10)
    assert more["pooled"].shape == (3, more["hidden"][-1].shape[-1]) or "mobilenet_v2" in name
    assert more["hidden"][0].shape[:3] == (3, size, size)


def test_shapes_of_resnet_50_fall_as_published():
    config = preset("resnet_50")
    _, more = jax.eval_shape(
        lambda v: CNN(config).apply(v, jnp.zeros((1, 224, 224, 3))), shapes(config)
    )
    sides = [h.shape[1:] for h in more["hidden"]]
    assert sides[0] == (56, 56, 64)
    assert sides[3] == (56, 56, 256)
    assert sides[-1] == (7, 7, 2048)


def test_training_updates_statistics_and_inference_reads_them():
    config = dataclasses.replace(preset("separable_digits"), image_size=(8, 8, 1))
    model, rng = CNN(config), np.random.default_rng(0)
    images = rng.normal(3.0, 2.0, (16, 8, 8, 1)).astype(np.float32)
    variables = init(model, images)
    run = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    (_, _), updated = jax.jit(run)(variables, images)
    stem = updated["batch_stats"]["stem"]["norm"]
    kernel = np.asarray(variables["params"]["stem"]["conv"]["kernel"], np.float64)
    padded = np.pad(np.asarray(images, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    result = sum(padded[:, i : i + 8, j : j + 8] @ kernel[i, j] for i in range(3) for j in range(3))
    np.testing.assert_allclose(stem["mean"], 0.1 * result.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(stem["var"], 0.9 + 0.1 * result.var((0, 1, 2)), rtol=1e-3)
    before, _ = applied(model, variables, images)
    after, _ = applied(model, {**variables, **updated}, images)
    assert np.abs(np.asarray(before) - np.asarray(after)).max() > 1e-3


def test_an_unknown_preset_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown preset 'vgg'; known: resnet_50"):
        preset("vgg")
