"""The table of methods says what the transforms do."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge.compress import transform
from glm_edge.compress.methods import ANY, GLM, METHODS, NO, YES, to_markdown
from glm_edge.errors import DataError, RecipeError

# Options without which a factory refuses.
REQUIRED = {
    "prune.mask": {"sparsity": 0.5},
    "prune.magnitude": {"sparsity": 0.5},
    "prune.sparsegpt": {"sparsity": 0.5},
    "prune.sparsegpt_quantize": {"sparsity": 0.5, "bits": 4},
    "prune.structured": {"heads": 0.25, "score": "magnitude"},
    "prune.encoders": {"heads": 0.25, "score": "magnitude"},
    "prune.depth": {"layers": 1},
    "prune.vocabulary": {"keep": [0, 1]},
    "quantize.hqq": {"group_size": 8},
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
    return transform.entry(name).factory(**REQUIRED.get(name, {}))


def test_table_names_every_registered_transform():
    # Tests of other files register transforms of their own.
    own = {name for name in transform._REGISTRY if name.startswith(("quantize.", "prune."))}
    assert {*own, "distill", "reparameterize"} == set(NAMES)
    assert to_markdown().count("\n") == len(METHODS) + 1


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


@pytest.mark.parametrize(
    "name", [m.name for m in METHODS if m.models == GLM and m.name != "quantize.awq"]
)
def test_method_for_a_glm_refuses_other_models(name):
    batches = [{"tokens": np.zeros((1, 4), np.int32)}]
    with pytest.raises(RecipeError):
        build(name)(Plain(), PARAMS, batches)
