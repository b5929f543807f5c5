"""Every array and configuration that the shrinking transforms give, by their hashes.

`python tests/compress/prune/test_shrunk_bytes.py` from the repository's root writes
`shrunk_bytes.json` anew.
"""

import dataclasses
import functools
import hashlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import configs
from glm_edge import params as boxes
from glm_edge.compress import chain, prune
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.models.speech import SpeechEncoder
from glm_edge.models.text import TextEncoder
from glm_edge.models.vision import VisionEncoder
from tests.tiny_models import init_away_from_constants

FILE = Path(__file__).with_name("shrunk_bytes.json")
IMAGE, AUDIO = 5, 8

_ENCODER = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}
_VISION = {"image_size": (16, 16), "patch_size": 4, "patch_stride": 4, "temporal_patch_size": 1}
_VISION |= {"position_grid": (4, 4), **_ENCODER}
_SPEECH = {"mel_bins": 8, "num_frames": 16, **_ENCODER}


def glm_config(**decoder):
    fields = {"vocab_size": 48, "hidden_size": 24, "num_layers": 3, "num_heads": 4}
    fields |= {"num_kv_heads": 2, "head_dim": 8, "intermediate_size": 40, **decoder}
    return configs.GLMConfig(
        name="glm",
        decoder=configs.DecoderConfig(**fields),
        vision=configs.VisionConfig(projector_size=40, **_VISION),
        speech=configs.SpeechConfig(projector_size=40, **_SPEECH),
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
        pad_token_id=0,
    )


def drawn(model, *inputs):
    return model, init_away_from_constants(model, *inputs)


def equal_neurons(model, params):
    """The first thirty neurons of a layer differ in nothing but their signs."""
    mlp = dict(params["decoder"]["layers"]["0"]["mlp"])
    up, down = (np.array(mlp[name]["weight"]) for name in ("gate_up_proj", "down_proj"))
    signs = np.where(np.arange(30) % 3, 1, -1)
    for rows in (up[:40], up[40:], down.T):
        rows[:30] = rows[:1] * signs[:, None]
    mlp |= {"gate_up_proj": {"weight": jnp.asarray(up)}, "down_proj": {"weight": jnp.asarray(down)}}
    layers = {**params["decoder"]["layers"]}
    layers["0"] = {**layers["0"], "mlp": mlp}
    return model, {**params, "decoder": {**params["decoder"], "layers": layers}}


@functools.cache
def make(name):
    """`(model, params)` by name."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    images = jnp.zeros((1, 16, 16, 3))
    if name == "vision":
        config = configs.VisionConfig(
            projector_size=0, merge_size=1, norm="layer", gated_mlp=False, pooling_head=True,
            attention_bias=True, window=(2, 4), global_layers=(1,), rotary=False, **_VISION
        )  # fmt: skip
        return drawn(VisionEncoder(config), images)
    if name == "speech":
        changes = {"num_heads": 4, "head_dim": 8, "num_kv_heads": 2, "projector_size": 0}
        config = configs.SpeechConfig(**{**_SPEECH, **changes, "merge_size": 1})
        return drawn(SpeechEncoder(config), jnp.zeros((1, 16, 8)))
    if name == "text":
        config = configs.TextConfig(30, 16, 2, 2, 24, num_labels=3, pooler="tanh")
        return drawn(TextEncoder(config), tokens)
    if name == "own heads":
        return drawn(MultimodalGLM(glm_config(num_kv_heads=4, attention_bias=True)), tokens)
    if name == "sandwich":
        return drawn(MultimodalGLM(glm_config(sandwich_norm=True, tie_embeddings=False)), tokens)
    model, params = drawn(MultimodalGLM(glm_config()), tokens)
    return equal_neurons(model, params) if name == "equal neurons" else (model, params)


@functools.cache
def calibration():
    """A batch of all inputs, and one of text."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(10, 48, (2, 24)).astype(np.int32)
    model, _ = make("glm")
    config = model.config
    tokens[:, 1 : 1 + config.vision.num_tokens] = IMAGE
    tokens[:, 18 : 18 + config.speech.num_tokens] = AUDIO
    images = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
    audio = rng.normal(size=(2, 16, 8)).astype(np.float32)
    text = rng.integers(10, 48, (3, 12)).astype(np.int32)
    return [{"tokens": tokens, "images": images, "audio": audio}, {"tokens": text}]


def removed(**options):
    """Units masked and then removed."""
    return chain(prune.mask(**options), prune.compact())


CASES = {
    "structured, magnitude": (
        "glm",
        prune.structured(0.25, neurons=0.3, score="magnitude"),
    ),
    "structured, magnitude, multiples of 8": (
        "sandwich",
        prune.structured(0.5, neurons=0.3, score="magnitude", neuron_multiple=8),
    ),
    "structured, magnitude, one layer": (
        "glm",
        prune.structured(0.5, neurons=0.4, score="magnitude", where="layers/1/"),
    ),
    "structured, magnitude, attention": (
        "glm",
        prune.structured(0.5, neurons=0.4, score="magnitude", where="attention"),
    ),
    "structured, magnitude, own heads": (
        "own heads",
        prune.structured(0.25, neurons=0.3, score="magnitude"),
    ),
    "structured, magnitude, equal neurons": (
        "equal neurons",
        prune.structured(neurons=0.5, score="magnitude"),
    ),
    "structured after magnitude": (
        "glm",
        chain(
            prune.magnitude(0.5, where="mlp"),
            prune.structured(0.25, neurons=0.3, score="magnitude"),
        ),
    ),
    "structured, taylor": ("glm", prune.structured(0.25, neurons=0.3)),
    "structured, taylor, one batch": (
        "own heads",
        prune.structured(0.5, neurons=0.5, where="layers/[01]/", max_batches=1),
    ),
    "encoders, magnitude": (
        "glm",
        prune.encoders(0.5, neurons=0.3, score="magnitude", neuron_multiple=4),
    ),
    "encoders, magnitude, neurons of one": (
        "glm",
        prune.encoders(0.5, neurons=0.3, score="magnitude", where="^speech/.*fc"),
    ),
    "encoders, magnitude, vision": (
        "vision",
        prune.encoders(0.5, neurons=0.3, score="magnitude", where="layers/0/"),
    ),
    "encoders, magnitude, speech": (
        "speech",
        prune.encoders(0.5, neurons=0.3, score="magnitude"),
    ),
    "encoders, magnitude, text": ("text", prune.encoders(0.5, neurons=0.3, score="magnitude")),
    "encoders, taylor": ("glm", prune.encoders(0.5, neurons=0.3)),
    "depth, influence": ("glm", prune.depth(1)),
    "depth, block": ("glm", prune.depth(2, score="block")),
    "depth, loss": ("glm", prune.depth(2, score="loss", max_batches=1)),
    "depth, indices": ("sandwich", prune.depth([0, 2])),
    "depth, vision": ("glm", prune.depth(1, part="vision")),
    "depth, speech on its own": ("speech", prune.depth([1])),
    "vocabulary": ("glm", prune.vocabulary("0-12,15,30-47")),
    "vocabulary, head": ("sandwich", prune.vocabulary([0, 5, 8, 9, 20])),
    "mask of heads": ("own heads", removed(sparsity=0.5, shape="head")),
    "mask of heads, taylor": ("glm", removed(sparsity=0.5, shape="head", score="taylor")),
    "mask of neurons": (
        "glm",
        removed(sparsity=0.4, shape="neuron", score="l1", allocation="global"),
    ),
    "mask of layers": ("sandwich", removed(sparsity=0.34, shape="layer")),
    "mask of vocabulary": ("sandwich", removed(sparsity=0.5, shape="vocab")),
}


def digest(leaf):
    parts = [
        f"{x.dtype}{x.shape}".encode() + np.asarray(x).tobytes() for x in jax.tree.leaves(leaf)
    ]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def differences(before, after):
    """Fields of a configuration that are not those of another."""
    changes = {}
    for field in dataclasses.fields(after):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if old != new:
            nested = dataclasses.is_dataclass(new)
            changes[field.name] = differences(old, new) if nested else new
    return changes


def result(name):
    """The fields and arrays that a case changes, and the bytes that it reports."""
    key, transform = CASES[name]
    model, params = make(key)
    smaller, shrunk, report = transform(model, params, calibration=calibration())
    before = {path: digest(leaf) for path, leaf in boxes.path_items(params)}
    after = {path: digest(leaf) for path, leaf in boxes.path_items(shrunk)}
    arrays = {path: value for path, value in after.items() if before.get(path) != value}
    gone = sorted(set(before) - set(after))
    changes = {"config": differences(model.config, smaller.config), "arrays": arrays}
    changes |= {"gone": gone, "bytes": report.bytes_after}
    return json.loads(json.dumps(changes))


# These compile complete models.
SLOW = ("taylor", "influence", "block", "loss", "depth, vision")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if any(s in name for s in SLOW) else ())
        for name in CASES
    ],
)
def test_shrunk_bytes(name):
    assert result(name) == json.loads(FILE.read_text())[name]


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(result(name))}" for name in CASES]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    sys.exit(0)
