"""A small multimodal GLM with calibration batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge.configs import DecoderConfig, GLMConfig, SpeechConfig, VisionConfig
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


def _members() -> dict[str, GLMConfig]:
    """A tiny model of each kind: what the decoders and encoders of the family can do."""
    decoder = {"vocab_size": 48, "hidden_size": 24, "num_layers": 2, "num_heads": 4}
    decoder |= {"num_kv_heads": 2, "head_dim": 8, "intermediate_size": 40}
    vision = {"image_size": (16, 16), "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    vision |= {"intermediate_size": 24, "projector_size": 40, "patch_size": 4, "patch_stride": 4}
    vision |= {"temporal_patch_size": 1, "position_grid": (4, 4)}
    speech = SpeechConfig(
        mel_bins=8,
        num_frames=16,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        intermediate_size=24,
        projector_size=40,
    )
    siglip = {"norm": "layer", "gated_mlp": False, "attention_bias": True, "projection_bias": True}
    siglip |= {"rotary": False, "boundary_embeddings": True}
    pruned = {"num_heads": (4, 2), "num_kv_heads": (2, 1), "intermediate_size": (40, 24)}

    def member(name: str, vision=None, speech=None, **changes) -> GLMConfig:
        return GLMConfig(
            name=name,
            decoder=DecoderConfig(**{**decoder, **changes}),
            vision=None if vision is None else VisionConfig(**vision),
            speech=speech,
            image_token_id=IMAGE,
            audio_token_id=8,
            pad_token_id=PAD,
        )

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
        model = MultimodalGLM(MEMBERS[name])
        params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
        leaves, treedef = jax.tree.flatten(params)
        rng = np.random.default_rng(seed)
        shaken = (
            leaf * rng.uniform(0.5, 1.5, leaf.shape) + rng.normal(0, 0.1, leaf.shape)
            for leaf in map(np.asarray, leaves)
        )
        shaken = [jnp.asarray(leaf, jnp.float32) for leaf in shaken]
        return model, jax.tree.unflatten(treedef, shaken)

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
