"""A multimodal GLM small enough to compile in a second, with every feature of the decoder."""

import functools

import pytest

from tests.tiny_models import PAD, init_glm, tiny_config

WINDOWED = {
    "num_layers": 2,
    "patch_size": 8,
    "window": (2, 4),
    "global_layers": (1,),
    "separable_positions": True,
}


@pytest.fixture(scope="session")
def make_model():
    """Builds `(model, params)` from changes to the decoder's configuration."""

    @functools.cache
    def build(**decoder):
        return init_glm(tiny_config(decoder, WINDOWED, {}, eos_token_ids=(0,), pad_token_id=PAD))

    return build
