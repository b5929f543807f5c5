"""A multimodal GLM small enough to compile in a second, with every feature of the decoder."""

import functools

import jax
import jax.numpy as jnp
import pytest

from glm_edge.configs import DecoderConfig, GLMConfig, SpeechConfig, VisionConfig
from glm_edge.models.multimodal import MultimodalGLM


def small_config(**decoder) -> GLMConfig:
    fields = {
        "vocab_size": 48,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
    }
    return GLMConfig(
        name="small",
        decoder=DecoderConfig(**{**fields, **decoder}),
        vision=VisionConfig(
            image_size=(16, 16),
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            intermediate_size=32,
            projector_size=32,
            patch_size=8,
            patch_stride=4,
            temporal_patch_size=1,
            position_grid=(4, 4),
            window=(2, 4),
            global_layers=(1,),
            separable_positions=True,
        ),
        speech=SpeechConfig(
            mel_bins=8,
            num_frames=16,
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            intermediate_size=32,
            projector_size=32,
        ),
        image_token_id=5,
        audio_token_id=8,
        eos_token_ids=(0,),
        pad_token_id=10,
    )


@pytest.fixture(scope="session")
def make_model():
    """Builds `(model, params)` from changes to the decoder's configuration."""

    @functools.cache
    def build(**decoder):
        model = MultimodalGLM(small_config(**decoder))
        params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        return model, params

    return build
