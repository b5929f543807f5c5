"""Parameter counts and shapes of the presets, without building them."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from glm_edge import configs
from glm_edge import params as boxes
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.models.multimodal import MultimodalGLM


@functools.cache
def shapes(name):
    return expected_shapes(MultimodalGLM(configs.preset(name)))


def count(name, *prefixes):
    """Parameters whose paths begin with one of the prefixes, by default all."""
    return sum(
        math.prod(shape) for path, shape in shapes(name).items() if path.startswith(prefixes or "")
    )


@pytest.mark.parametrize(
    "name",
    [
        "nano",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("tiny", "mobile", "large", "phone_9b")),
    ],
)
def test_expected_shapes_are_those_of_all_layers(name):
    model = MultimodalGLM(configs.preset(name))
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    assert {path: leaf.shape for path, leaf in boxes.path_items(params)} == shapes(name)


@pytest.mark.parametrize(("name", "millions"), [("tiny", 86), ("mobile", 340)])
def test_counts_within_three_percent(name, millions):
    assert count(name) == pytest.approx(millions * 1e6, rel=0.03)


def test_large_is_exactly_glm_edge_1_5b():
    assert count("large") == 1_472_055_296


def test_phone_9b_is_glm_4_1v_9b_with_the_glm_asr_encoder():
    projector = count("phone_9b", "speech/linear_1/", "speech/linear_2/")
    assert count("phone_9b", "speech/") - projector == 635_048_960
    assert count("phone_9b") - count("phone_9b", "speech/") == 10_292_777_472


@pytest.mark.parametrize("name", ["mobile", "large", "phone_9b"])
def test_context_is_8192(name):
    assert configs.preset(name).decoder.max_position_embeddings == 8192


def test_nano_decoder_widths_are_multiples_of_256():
    """Widths that nano contracts in its decoder are multiples of 256."""
    contracted = {
        path: shape[-1]
        for path, shape in shapes("nano").items()
        if path.startswith(("decoder/", "embed/"))
        and boxes.is_matrix(path, jax.ShapeDtypeStruct(shape, jnp.float32))
    }
    assert len(contracted) == 6 * configs.preset("nano").decoder.num_layers + 1
    assert {path: width for path, width in contracted.items() if width % 256} == {}


@pytest.mark.parametrize("name", list(configs.PRESETS))
def test_configurations_round_trip_through_json(name):
    import json

    config = configs.preset(name)
    assert configs.from_dict(json.loads(json.dumps(configs.to_dict(config)))) == config


def test_every_matrix_is_stored_out_in():
    config = configs.preset("nano")
    width, neurons = config.decoder.hidden_size, config.decoder.intermediate_size
    mlp = "decoder/layers/0/mlp"
    assert shapes("nano")[f"{mlp}/gate_up_proj/weight"] == (2 * neurons, width)
    assert shapes("nano")[f"{mlp}/down_proj/weight"] == (width, neurons)
    assert not any(path.startswith("head") for path in shapes("nano"))
