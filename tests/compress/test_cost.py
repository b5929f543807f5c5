"""FLOPs from the configuration against products counted in the program, and against XLA's own."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge.compress import cost
from glm_edge.compress.prune.shrink.heads_neurons import shrink, shrink_encoder
from glm_edge.configs import DecoderConfig, GLMConfig, TextConfig
from glm_edge.errors import RecipeError
from glm_edge.models.glm import init_cache
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.models.text import TextEncoder
from glm_edge.models.vision import VisionEncoder

CONTEXT = 16


def products(jaxpr) -> int:
    """Floating-point operations of every product in a program, calls followed."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            remaining = equation.invars[0].aval.shape
            depth = math.prod(remaining[axis] for axis in contracting)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += products(inner)
    return total


def counted(model, params, x, method=None, **inputs) -> int:
    def run(params, x):
        return model.apply({"params": params}, x, method=method, **inputs)

    return products(jax.make_jaxpr(run)(params, x).jaxpr)


def abstract(model):
    tokens = jnp.zeros((1, 2), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def step(model, params, context=CONTEXT):
    cache = init_cache(model.config.decoder, 1, context)
    cache["length"] = jnp.int32(context - 1)
    return counted(model, params, jnp.zeros((1, 1), jnp.int32), cache=cache)


@pytest.mark.parametrize("name", ["edge", "pruned", "nano", "edge_v", "ocr", "asr"])
def test_flops_are_the_products_of_the_program(make_member, name):
    model, params = make_member(name)
    result = cost.flops(model, CONTEXT)
    config = model.config
    assert result["token"] == step(model, params)
    assert ("image" in result, "clip" in result) == (config.vision is not None, "asr" in name or
                                                   name == "nano")  # fmt: skip
    if config.vision is not None:
        image = jnp.zeros((1, *config.vision.image_size, 3))
        assert result["image"] == counted(model, params, image, "encode_images")
    if config.speech is not None:
        mel = jnp.zeros((1, config.speech.num_frames, config.speech.mel_bins))
        assert result["clip"] == counted(model, params, mel, "encode_audio")


def test_flops_follow_what_was_removed(make_member):
    model, params = make_member("nano")
    smaller, small = shrink(model, params, {0: {"heads": [0, 2], "neurons": [1, 2, 3]}})
    for part in ("vision", "speech"):
        smaller, small = shrink_encoder(smaller, small, {0: {"heads": [1], "neurons": [4]}}, part)
    before, after = cost.flops(model, CONTEXT), cost.flops(smaller, CONTEXT)
    assert after["token"] == step(smaller, small) < before["token"]
    image = jnp.zeros((1, *smaller.config.vision.image_size, 3))
    assert after["image"] == counted(smaller, small, image, "encode_images") < before["image"]
    assert after["clip"] < before["clip"]


def test_flops_of_encoders_on_their_own(make_member):
    vision = make_member("edge_v")[0].config.vision
    changes = {"window": (2, 4), "global_layers": (1,), "num_layers": 2, "pooling_head": True}
    changes |= {"projector_size": 0, "merge_size": 1, "boundary_embeddings": False}
    model = VisionEncoder(dataclasses.replace(vision, **changes))
    image = jnp.zeros((1, 16, 16, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    assert cost.flops(model) == {"image": counted(model, params, image)}
    model = TextEncoder(TextConfig(30, 16, 2, 2, 24, num_labels=3, pooler="tanh"))
    tokens = jnp.zeros((1, CONTEXT), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    assert cost.flops(model, CONTEXT) == {"sentence": counted(model, params, tokens)}
    assert cost.flops(jax.nn) is None


def test_xla_counts_as_many_within_three_percent():
    config = DecoderConfig(512, 256, 1, 8, 2, 32, 1024, tie_embeddings=False)
    model = MultimodalGLM(GLMConfig("wide", config))
    params, cache = abstract(model), init_cache(config, 1, CONTEXT)

    def run(params, token, cache):
        return model.apply({"params": params}, token, cache=cache)[0]

    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    analysis = jax.jit(run).lower(params, token, cache).compile().cost_analysis()
    result = cost.flops(model, CONTEXT)["token"]
    np.testing.assert_allclose(analysis["flops"], result, rtol=0.03)


def test_only_models_that_share_an_input_are_timed(make_member):
    model, params = make_member("edge")
    encoder = VisionEncoder(make_member("nano")[0].config.vision, 24)
    with pytest.raises(RecipeError, match="share no kind of input"):
        cost.measure((model, params), (encoder, make_member("nano")[1]["vision"]))
