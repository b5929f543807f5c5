"""A small multimodal GLM with calibration batches."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from glm_edge.configs import GLMConfig
from tests.tiny_models import init_glm, tiny_config

VOCAB, PAD = 40, 0


def config_of(vision: bool = False, **decoder) -> GLMConfig:
    wide = {"vocab_size": VOCAB, "num_heads": 8, "intermediate_size": 128}
    tower = {"image_size": (8, 8), "patch_size": 2, "patch_stride": 2}
    return tiny_config(wide | decoder, tower if vision else None, pad_token_id=PAD)


@pytest.fixture(scope="session")
def make_model():
    """Builds `(model, params)`; changes to the decoder's configuration by keyword."""

    @functools.cache
    def build(vision: bool = False, **decoder):
        return init_glm(config_of(vision, **decoder))

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


def _members() -> dict[str, GLMConfig]:
    """A tiny model of each kind: what the decoders and encoders of the family can do."""
    decoder = {"hidden_size": 24, "intermediate_size": 40}
    vision = {"intermediate_size": 24, "projector_size": 40}
    speech = {"intermediate_size": 24, "projector_size": 40}
    siglip = {"norm": "layer", "gated_mlp": False, "attention_bias": True, "projection_bias": True}
    siglip |= {"rotary": False, "boundary_embeddings": True}
    pruned = {"num_heads": (4, 2), "num_kv_heads": (2, 1), "intermediate_size": (40, 24)}

    def member(name: str, vision=None, speech=None, **changes) -> GLMConfig:
        return tiny_config(decoder | changes, vision, speech, name=name, pad_token_id=PAD)

    return {
        "edge": member("edge", tie_embeddings=False),
        "tied": member("tied"),
        "glm4": member(
            "glm4", attention_bias=True, partial_rotary_factor=0.5, tie_embeddings=False
        ),
        "pruned": member("pruned", attention_bias=True, **pruned),
        "sandwich": member(
            "sandwich", vision, sandwich_norm=True, mrope_section=(1, 2, 1), tie_embeddings=False
        ),
        "edge_v": member("edge_v", vision | siglip),
        "ocr": member("ocr", vision | {"qk_norm": True, "projection_bias": True}),
        "asr": member("asr", None, speech, rotary_interleaved=False, tie_embeddings=False),
        "nano": member("nano", vision | {"separable_positions": True}, speech),
    }


MEMBERS = _members()


@pytest.fixture(scope="session")
def make_member():
    """Builds `(model, params)` of a member by name, no parameter at its initial ones or zeros."""

    @functools.cache
    def build(name: str, seed: int = 0):
        model, params = init_glm(MEMBERS[name], seed)
        rng = np.random.default_rng(seed)

        def shake(leaf):
            values = leaf * rng.uniform(0.5, 1.5, leaf.shape) + rng.normal(0, 0.1, leaf.shape)
            return values.astype(np.float32)

        return model, jax.device_put(jax.tree.map(shake, jax.device_get(params)))

    return build


@pytest.fixture(scope="session")
def make_shallow(make_member):
    """Builds a member with the first layer of its decoder alone, half of what compiles."""

    @functools.cache
    def build(name: str):
        model, params = make_member(name)
        decoder = dataclasses.replace(model.config.decoder, num_layers=1)
        layers = {"0": params["decoder"]["layers"]["0"]}
        params = {**params, "decoder": {**params["decoder"], "layers": layers}}
        return model.clone(config=dataclasses.replace(model.config, decoder=decoder)), params

    return build


@pytest.fixture(scope="session")
def batch_of():
    """Draws a batch that uses everything a model reads."""

    def draw(model, rows: int = 2, length: int = 24, seed: int = 0):
        config, rng = model.config, np.random.default_rng(seed)
        tokens = rng.integers(10, config.decoder.vocab_size, (rows, length)).astype(np.int32)
        batch = {"tokens": tokens}
        if config.vision is not None:
            tokens[:, 1 : 1 + config.vision.num_tokens] = config.image_token_id
            size = (rows, *config.vision.image_size, config.vision.channels)
            batch["images"] = rng.normal(size=size).astype(np.float32)
        if config.speech is not None:
            tokens[:, 12 : 12 + config.speech.num_tokens] = config.audio_token_id
            size = (rows, config.speech.num_frames, config.speech.mel_bins)
            batch["audio"] = rng.normal(size=size).astype(np.float32)
        return batch

    return draw


@pytest.fixture(params=sorted(MEMBERS))
def member(request):
    """The name of each member, one after the other."""
    return request.param
