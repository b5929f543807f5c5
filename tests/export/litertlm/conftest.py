"""Bundles that tests of their writing and of their verification share."""

import dataclasses

import pytest

from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.preprocess import ImageProcessing
from tests.export.litertlm.tiny_bundles import AUDIO, SLOTS, processor, tiny


@pytest.fixture(scope="session")
def tiny_text(small_config, random_params, rounded):
    """A model without encoders, and its quantized weights."""
    model = MultimodalGLM(tiny(small_config, speech=None))
    model = model.clone(config=dataclasses.replace(model.config, vision=None))
    return model, rounded(random_params(model))


@pytest.fixture(scope="session")
def text_bundle(tiny_text, tmp_path_factory):
    """The bundle of a model without encoders."""
    from glm_edge.export.litertlm.export import litertlm

    model, params = tiny_text
    path = tmp_path_factory.mktemp("text") / "text.litertlm"
    return litertlm(model, params, processor(), path, (8, 32), SLOTS)


@pytest.fixture(scope="session")
def heard_and_seen(small_config, random_params, tmp_path_factory):
    """A model that sees images and hears recordings of up to three chunks."""
    from glm_edge.export.litertlm.export import litertlm

    model = MultimodalGLM(tiny(small_config))
    image = ImageProcessing(
        "stretch", (64, 32), eight_bit=False, mean=(0.5, 0.4, 0.3), std=(0.25, 0.3, 0.35)
    )
    image = dataclasses.replace(image, patch_size=8, temporal_patch_size=1)
    path = tmp_path_factory.mktemp("media") / "media.litertlm"
    prepared = processor(image=image, audio=AUDIO)
    return litertlm(model, random_params(model), prepared, path, (32,), SLOTS)
