"""A multimodal GLM small enough to compile in a second, and its uncached forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge.configs import DecoderConfig, GLMConfig, SpeechConfig, VisionConfig
from glm_edge.models.multimodal import MultimodalGLM

IMAGE, AUDIO, VOCABULARY = 5, 8, 48
IMAGE_TOKENS, AUDIO_TOKENS = 4, 2


def config_of(**decoder) -> GLMConfig:
    fields = {
        "vocab_size": VOCABULARY,
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
            num_layers=1,
            num_heads=2,
            intermediate_size=32,
            projector_size=32,
            patch_size=4,
            patch_stride=4,
            temporal_patch_size=1,
            position_grid=(4, 4),
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
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
        eos_token_ids=(0,),
    )


@pytest.fixture(scope="session")
def make_model():
    """Builds `(model, params)` from changes to the decoder's configuration."""

    @functools.cache
    def build(**decoder):
        model = MultimodalGLM(config_of(**decoder))
        params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        return model, params

    return build


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, params, tokens, images, audio, audio_frames):
    return model.apply({"params": params}, tokens, images, audio, audio_frames=audio_frames)[0]


@pytest.fixture(scope="session")
def continue_uncached():
    """`(ids, scores)` of greedy decoding that runs everything again for each token."""

    def run(
        model, params, ids, steps, images=None, audio=None, audio_frames=None, stops=(), width=80
    ):
        ids, start, scores = list(ids), len(ids), []
        while len(scores) < steps and not (scores and ids[-1] in stops):
            tokens = np.full((1, width), 11, np.int32)
            tokens[0, : len(ids)] = ids
            logits = _forward(model, params, tokens, images, audio, audio_frames)
            scores.append(np.asarray(logits[0, len(ids) - 1]))
            ids.append(int(scores[-1].argmax()))
        return np.array(ids[start:]), np.stack(scores)

    return run
