"""Parameter counts and shapes of the presets, without building them."""

import functools

import jax
import jax.numpy as jnp
import pytest

from glm_edge import configs
from glm_edge import params as boxes
from glm_edge.models.multimodal import MultimodalGLM


@functools.cache
def abstract_params(name):
    model = MultimodalGLM(configs.preset(name))
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def counts(name):
    return {part: boxes.count(tree) for part, tree in abstract_params(name).items()}


@pytest.mark.parametrize(("name", "millions"), [("tiny", 86), ("mobile", 340)])
def test_counts_within_three_percent(name, millions):
    assert sum(counts(name).values()) == pytest.approx(millions * 1e6, rel=0.03)


def test_large_is_exactly_glm_edge_1_5b():
    assert sum(counts("large").values()) == 1_472_055_296


def test_phone_9b_is_glm_4_1v_9b_with_the_glm_asr_encoder():
    result = counts("phone_9b")
    speech = abstract_params("phone_9b")["speech"]
    projector = boxes.count({name: speech[name] for name in ("linear_1", "linear_2")})
    assert result["speech"] - projector == 635_048_960
    assert sum(result.values()) - result["speech"] == 10_292_777_472


@pytest.mark.parametrize("name", ["mobile", "large", "phone_9b"])
def test_context_is_8192(name):
    assert configs.preset(name).decoder.max_position_embeddings == 8192


def test_nano_decoder_widths_are_multiples_of_256():
    """Widths that nano contracts in its decoder are multiples of 256."""
    params = abstract_params("nano")
    contracted = {
        path: leaf.shape[-1]
        for path, leaf in boxes.path_items(params)
        if path.startswith(("decoder/", "embed/")) and boxes.is_matrix(path, leaf)
    }
    assert len(contracted) == 6 * configs.preset("nano").decoder.num_layers + 1
    assert {path: width for path, width in contracted.items() if width % 256} == {}


@pytest.mark.parametrize("name", list(configs.PRESETS))
def test_configurations_round_trip_through_json(name):
    import json

    config = configs.preset(name)
    assert configs.from_dict(json.loads(json.dumps(configs.to_dict(config)))) == config


def test_every_matrix_is_stored_out_in():
    params = abstract_params("nano")
    config = configs.preset("nano")
    layer = params["decoder"]["layers"]["0"]
    width, neurons = config.decoder.hidden_size, config.decoder.intermediate_size
    assert layer["mlp"]["gate_up_proj"]["weight"].shape == (2 * neurons, width)
    assert layer["mlp"]["down_proj"]["weight"].shape == (width, neurons)
    assert "head" not in params
