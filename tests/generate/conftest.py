"""A multimodal GLM small enough to compile in a second, and its uncached forward pass."""

import functools

import jax
import numpy as np
import pytest

from tests.tiny_models import init_glm, tiny_config


@pytest.fixture(scope="session")
def make_model():
    """Builds `(model, params)` from changes to the decoder's configuration."""

    @functools.cache
    def build(**decoder):
        return init_glm(tiny_config(decoder, {}, {}, eos_token_ids=(0,)))

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
