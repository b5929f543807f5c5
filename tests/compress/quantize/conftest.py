"""A tiny decoder whose matrices have few shapes, so that solvers compile few programs."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import batches
from tests.tiny_models import init


@pytest.fixture
def square(make_model):
    """A tied decoder of two layers: all its matrices are 32 wide, and all but one 32 high."""
    return make_model(num_heads=4, num_kv_heads=4, intermediate_size=32)


@pytest.fixture
def stock():
    """A network of Flax, which trains in smaller programs than a decoder."""

    class Stock(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(40, 32, name="embed")(tokens)
            return nn.Dense(40, name="out")(nn.relu(nn.Dense(32, name="hidden")(x)))

    model = Stock()
    return model, init(model, np.zeros((4, 12), np.int32))["params"]


@pytest.fixture(scope="session")
def dense():
    """Replaces boxes by their dense weights, so that a model runs one program for all formats."""
    return functools.partial(jax.tree.map, boxes.dense, is_leaf=boxes.is_box)


@pytest.fixture(scope="session")
def logits(dense):
    """Runs a model on a batch with the dense weights of its parameters."""
    run = jax.jit(batches.apply_batch, static_argnums=0)
    return lambda model, params, batch: run(model, dense(params), batch)
