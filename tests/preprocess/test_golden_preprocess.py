"""The reference's own preprocessing: Whisper's log-mel and GLM-4.1V's resized patches."""

import os
from pathlib import Path

import numpy as np
import pytest

from glm_edge import preprocess
from glm_edge.configs import SpeechConfig
from glm_edge.kernels.log_mel import mel_filters

ROOT = Path(__file__).parents[2]
GOLDEN = Path(os.environ.get("GLM_EDGE_GOLDEN") or ROOT.parent / "shared" / "golden")
CASE = GOLDEN / "preprocess"
pytestmark = pytest.mark.skipif(
    not (CASE / "outputs.npz").is_file(),
    reason=f"no reference case at {CASE}; set GLM_EDGE_GOLDEN to the folder of cases",
)
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])
PATCH, MERGE = 14, 2


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
    found = preprocess.prepare_audio(inputs["whisper.waveform"], config)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_mel_filters_are_whispers(case):
    expected = case[1]["whisper.mel_filters"].T
    np.testing.assert_allclose(mel_filters(expected.shape[0], 400, 16000), expected, atol=1e-7)


@pytest.mark.parametrize("name", ["glm4v_exact", "glm4v_resize", "glm4v_tiny_up", "glm4v_down"])
def test_resizing_is_within_two_grey_levels(case, name):
    inputs, outputs = case
    _, rows, columns = outputs[f"{name}.image_grid_thw"][0]
    patches = outputs[f"{name}.pixel_values"].reshape(
        rows // MERGE, columns // MERGE, MERGE, MERGE, 3, 2, PATCH, PATCH
    )
    planes = patches[:, :, :, :, :, 0].transpose(0, 2, 5, 1, 3, 6, 4)
    expected = planes.reshape(rows * PATCH, columns * PATCH, 3) * CLIP_STD + CLIP_MEAN
    found = preprocess.resize(inputs[f"{name}.image"] / 255.0, expected.shape[:2])
    # Pillow rounds 8-bit images to whole grey levels after each of its two passes.
    np.testing.assert_allclose(found, expected, atol=2 / 255)
