"""The reference's own preprocessing: Whisper's log-mel and GLM-4.1V's resized patches."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from glm_edge import preprocess
from glm_edge.configs import SpeechConfig
from glm_edge.kernels.log_mel import mel_filters
from glm_edge.preprocess import (
    AudioProcessing,
    from_patches,
    prepare_image,
    prepare_recording,
    to_patches,
)
from glm_edge.preprocess.processing import GLM4V

ROOT = Path(__file__).parents[2]
GOLDEN = Path(os.environ.get("GLM_EDGE_GOLDEN") or ROOT.parent / "shared" / "golden")
CASE = GOLDEN / "preprocess"
pytestmark = pytest.mark.skipif(
    not (CASE / "outputs.npz").is_file(),
    reason=f"no reference case at {CASE}; set GLM_EDGE_GOLDEN to the folder of cases",
)


@pytest.fixture(scope="module")
def case():
    return np.load(CASE / "inputs.npz"), np.load(CASE / "outputs.npz")


def test_log_mel_is_whispers(case):
    inputs, outputs = case
    expected = outputs["whisper.input_features"][0].T
    config = SpeechConfig(
        mel_bins=expected.shape[1],
        num_frames=expected.shape[0],
        hidden_size=8,
        num_layers=1,
        num_heads=1,
        intermediate_size=8,
        projector_size=8,
    )
    actual = preprocess.prepare_audio(inputs["whisper.waveform"], config)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_mel_filters_are_whispers(case):
    expected = case[1]["whisper.mel_filters"].T
    np.testing.assert_allclose(mel_filters(expected.shape[0], 400, 16000), expected, atol=1e-7)


def test_recordings_are_whispers_chunks(case):
    inputs, outputs = case
    processing = AudioProcessing(mel_bins=16, chunk_s=2)
    mel, audio_frames = prepare_recording(inputs["whisper.waveform"], processing)
    expected = outputs["whisper.input_features"].transpose(0, 2, 1)
    np.testing.assert_allclose(mel, expected, atol=1e-5)
    np.testing.assert_array_equal(audio_frames, outputs["whisper.attention_mask"].sum(axis=1))


@pytest.mark.parametrize("name", ["glm4v_exact", "glm4v_resize", "glm4v_tiny_up", "glm4v_down"])
def test_images_are_glm4vs(case, name):
    inputs, outputs = case
    size = json.loads((CASE / "meta.json").read_text())["subcases"][name]["size"]
    processing = dataclasses.replace(
        GLM4V, min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"]
    )
    image = prepare_image(inputs[f"{name}.image"], processing)
    pixel_values, grids = to_patches([image])
    np.testing.assert_array_equal(grids, outputs[f"{name}.image_grid_thw"])
    np.testing.assert_allclose(pixel_values, outputs[f"{name}.pixel_values"], atol=1e-6)
    [unpacked] = from_patches(outputs[f"{name}.pixel_values"], grids)
    np.testing.assert_allclose(unpacked, image, atol=1e-6)
