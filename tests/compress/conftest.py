"""A small multimodal GLM with calibration batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge.configs import DecoderConfig, GLMConfig, VisionConfig
from glm_edge.models.multimodal import MultimodalGLM

VOCAB, IMAGE, PAD = 40, 5, 0


def config_of(vision: bool = False, **decoder) -> GLMConfig:
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 128,
    }
    tower = VisionConfig(
        image_size=(8, 8),
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        intermediate_size=32,
        projector_size=32,
        patch_size=2,
        patch_stride=2,
        temporal_patch_size=1,
        position_grid=(4, 4),
    )
    return GLMConfig(
        name="small",
        decoder=DecoderConfig(**{**fields, **decoder}),
        vision=tower if vision else None,
        image_token_id=IMAGE,
        pad_token_id=PAD,
    )


@pytest.fixture(scope="session")
def make_model():
    """Builds `(model, params)`; changes to the decoder's configuration by keyword."""

    @functools.cache
    def build(vision: bool = False, **decoder):
        model = MultimodalGLM(config_of(vision, **decoder))
        params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        return model, params

    return build


@pytest.fixture
def small(make_model):
    return make_model()


@pytest.fixture
def calibration():
    """Four batches of counting: each token is the one before plus a step that the row keeps."""
    rng = np.random.default_rng(0)

    def batch():
        start, step = rng.integers(0, 30, (4, 1)), rng.integers(1, 4, (4, 1))
        return {"tokens": (10 + (start + step * np.arange(12)) % 30).astype(np.int32)}

    return [batch() for _ in range(4)]
