"""The table of methods says what the transforms do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge.compress import transform
from glm_edge.compress.methods import ANY, GLM, MAGNITUDE, METHODS, NEAREST, NO, YES, to_markdown
from glm_edge.errors import DataError, RecipeError

# Options without which a factory refuses.
REQUIRED = {
    "prune.mask": {"sparsity": 0.5},
    "prune.magnitude": {"sparsity": 0.5},
    "prune.sparsegpt": {"sparsity": 0.5},
    "prune.sparsegpt_quantize": {"sparsity": 0.5, "format": "int4"},
    "prune.structured": {"heads": 0.25, "score": "magnitude"},
    "prune.encoders": {"heads": 0.25, "score": "magnitude"},
    "prune.depth": {"layers": 1},
    "prune.vocabulary": {"keep": [0, 1]},
    "quantize.hqq": {"format": "int4-g8-affine-zero=float16"},
    "prune.channels": {"fraction": 0.5},
}
NAMES = {method.name: method for method in METHODS}


class Plain(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(8, use_bias=False)(nn.Embed(8, 8)(tokens))


PARAMS = {
    "Dense_0": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)},
    "Embed_0": {"embedding": jnp.ones((8, 8))},
}


def build(name):
    return transform.registered(name)(**REQUIRED.get(name, {}))


def test_table_names_every_registered_transform():
    # Tests of other files register transforms of their own.
    local = {name for name in transform._REGISTRY if name.startswith(("quantize.", "prune."))}
    assert {*local, "distill", "reparameterize"} == set(NAMES)
    assert to_markdown().count("\n") == len(METHODS) + 1


@pytest.mark.parametrize("name", NAMES)
def test_table_says_which_transforms_need_a_model(name):
    method = NAMES[name]
    assert build(name).needs_model == (method.data == YES or method.models != ANY)


@pytest.mark.parametrize("name", [m.name for m in METHODS if (m.data, m.models) == (NO, ANY)])
def test_method_for_any_model_runs_without_data(name):
    model, after, report = build(name)(Plain(), PARAMS)
    assert isinstance(model, Plain)
    assert report.rows
    assert after["Dense_0"]["kernel"] is not PARAMS["Dense_0"]["kernel"]


@pytest.mark.parametrize("name", [m.name for m in METHODS if m.data == YES])
def test_method_that_needs_data_says_so(name, small):
    params = PARAMS if NAMES[name].models != GLM else small[1]
    model = Plain() if NAMES[name].models != GLM else small[0]
    with pytest.raises((DataError, RecipeError), match=r"calibration|teacher"):
        build(name)(model, params)


@pytest.mark.parametrize("name", [m.name for m in METHODS if m.models == GLM])
def test_method_for_a_glm_refuses_other_models(name):
    batches = [{"tokens": np.zeros((1, 4), np.int32)}]
    with pytest.raises(RecipeError, match=name.replace(".", r"\.")):
        build(name)(Plain(), PARAMS, batches)


@pytest.mark.parametrize("name", ["quantize.awq", "quantize.smoothquant", "reparameterize"])
def test_where_no_factor_moves_transform_and_model_are_named(name):
    batches = [{"tokens": np.zeros((1, 4), np.int32)}]
    with pytest.raises(RecipeError, match=f"^{name}: Plain: no factor is known to move"):
        build(name)(Plain(), PARAMS, batches)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = layers(name="layers")(nn.Embed(8, 8, name="embed")(tokens), None)
        return nn.Dense(8, name="head")(x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(8, name="dense")(x)), None


@pytest.mark.slow
@pytest.mark.parametrize("name", [m.name for m in METHODS if m.stacked and m.data == YES])
def test_what_becomes_of_a_scanned_stack_is_what_the_table_says(name):
    tokens = np.arange(8).reshape(1, 8)
    shapes = jax.eval_shape(Scanned().init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.float32(rng.normal(size=leaf.shape)), shapes)
    trained = ("quantize.qat", "quantize.blockwise", "quantize.catq")
    options = {"train": {"steps": 2}} if name in trained else {}
    method = transform.registered(name)(**REQUIRED.get(name, {}), **options)
    _, _, report = method(Scanned(), params, [{"tokens": tokens}])
    (action,) = [row.action for row in report.rows if row.path == "layers/dense/kernel"]
    assert [word for word in (NEAREST, MAGNITUDE) if f"{word}: " in action] == [
        word for word in (NEAREST, MAGNITUDE) if word == NAMES[name].stacked
    ]
