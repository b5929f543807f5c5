"""Prepared images and videos against transformers' processors."""

import dataclasses
import importlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_edge.errors import ConfigError, DataError
from glm_edge.preprocess.patches import to_patches
from glm_edge.preprocess.processing import GLM4V, GLM4V_VIDEO, GLM_EDGE_V, ImageProcessing
from glm_edge.preprocess.vision import Video, prepare_image, prepare_video, sample_frames

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (61, 97, 3), dtype=np.uint8)
SMALL_EDGE_V = dataclasses.replace(GLM_EDGE_V, size=(56, 56))


def transformers_module(name):
    pytest.importorskip("PIL")
    pytest.importorskip("transformers", reason="a reference that only tests need")
    # Reaching a module through its package would ask for torchvision, which these do without.
    return importlib.import_module(f"transformers.models.{name}")


@pytest.mark.parametrize("size", [(61, 97), (20, 45), (300, 140), (150, 470), (28, 28), (9, 9)])
def test_images_are_glm4vs(size):
    module = transformers_module("glm4v.image_processing_pil_glm4v")
    image = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = module.Glm4vImageProcessorPil()([image], return_tensors="np")
    actual, grids = to_patches([prepare_image(image, GLM4V)])
    np.testing.assert_array_equal(grids, expected["image_grid_thw"])
    np.testing.assert_allclose(actual, expected["pixel_values"], atol=1e-6)


@pytest.mark.parametrize("size", [(61, 97), (20, 45), (300, 140), (56, 56)])
def test_images_that_are_stretched_are_siglips(size):
    module = transformers_module("siglip.image_processing_pil_siglip")
    image = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = module.SiglipImageProcessorPil(size={"height": 56, "width": 56})
    expected = processor([image], return_tensors="np")["pixel_values"][0]
    actual = prepare_image(image, dataclasses.replace(SMALL_EDGE_V, sizing="stretch"))
    np.testing.assert_allclose(actual, expected.transpose(1, 2, 0), atol=1e-6)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(61, 97), (20, 45), (300, 140), (56, 56), (5, 90)])
def test_images_that_are_padded_are_one_tile(size, resample):
    module = transformers_module("mllama.image_processing_pil_mllama")
    image = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = module.MllamaImageProcessorPil(
        size={"height": 56, "width": 56},
        max_image_tiles=1,
        resample={"bilinear": 2, "bicubic": 3}[resample],
    )
    expected = processor([image], return_tensors="np")["pixel_values"][0, 0, 0]
    actual = prepare_image(image, dataclasses.replace(SMALL_EDGE_V, resample=resample))
    np.testing.assert_allclose(actual, expected.transpose(1, 2, 0), atol=1e-6)


def test_floats_and_bytes_are_one_image():
    expected = prepare_image(PIXELS, GLM4V)
    np.testing.assert_array_equal(prepare_image(PIXELS / 255.0, GLM4V), expected)
    actual = prepare_image(PIXELS.astype(np.float32) / np.float32(255), GLM4V)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("image", "pattern"),
    [
        (np.zeros((4, 4)), r"image: must be \[height, width, 3\], found \[4, 4\]"),
        (np.zeros((0, 4, 3)), r"found \[0, 4, 3\]"),
        (np.zeros((4, 4, 4), np.uint8), r"found \[4, 4, 4\]"),
        (np.zeros((4, 4, 3), np.int32), "floats in 0..1 or uint8, found int32"),
        (np.full((4, 4, 3), np.nan), "contains NaN"),
        (np.full((4, 4, 3), 2.0), "values are in 2..2"),
        (np.zeros((10, 2010, 3), np.uint8), "201 times the other"),
    ],
    ids=range(7),
)
def test_arrays_that_are_no_images_are_refused(image, pattern):
    with pytest.raises(DataError, match=pattern):
        prepare_image(image, GLM4V)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"sizing": "crop"}, "'crop' must be one of smart, stretch, pad"),
        ({"resample": "nearest"}, "'nearest' must be one of bilinear, bicubic"),
        ({"sizing": "pad"}, "needs a size"),
        ({"min_pixels": 9, "max_pixels": 8}, "min_pixels 9 must not exceed"),
        ({"std": (1.0, 0.0, 1.0)}, "std must not be 0"),
        ({"mean": (0.5,)}, "must have equal lengths"),
    ],
    ids=range(6),
)
def test_parameters_that_make_no_sense_are_refused(options, pattern):
    with pytest.raises(ConfigError, match=pattern):
        ImageProcessing(**options)


@given(st.integers(1, 2000), st.sampled_from([1.0, 2.0, 3.7, 12.5, 24.0, 29.97, 60.0]))
def test_frames_are_sampled_as_glm4v_does(count, fps):
    module = transformers_module("glm4v.video_processing_glm4v")
    metadata = importlib.import_module("transformers.video_utils").VideoMetadata(
        total_num_frames=count, fps=fps, duration=count / fps
    )
    processor = object.__new__(module.Glm4vVideoProcessor)
    expected = module.Glm4vVideoProcessor.sample_frames(processor, metadata, fps=2)
    np.testing.assert_array_equal(sample_frames(count, fps, GLM4V_VIDEO), expected)


def test_patches_of_a_video_are_glm4vs():
    torch = pytest.importorskip("torch", reason="a reference that only tests need")
    module = transformers_module("glm4v.video_processing_glm4v")
    frames = RNG.random((5, 28, 56, 3), np.float32)
    processor = object.__new__(module.Glm4vVideoProcessor)
    channels_first = torch.tensor(frames).permute(0, 3, 1, 2)[None]
    expected, *grid = module.Glm4vVideoProcessor.patchify(processor, channels_first, 14, 2, 2)
    padded = np.concatenate([frames, frames[-1:]])
    actual, grids = to_patches([padded])
    assert grids.tolist() == [grid]
    np.testing.assert_array_equal(actual, expected[0].numpy())


def test_sampled_frames_keep_their_times():
    frames = np.broadcast_to(np.arange(90, dtype=np.uint8)[:, None, None, None], (90, 60, 60, 3))
    video, seconds = prepare_video(Video(frames, fps=30.0), GLM4V_VIDEO)
    # At two a second: frames 0, 15, 30, 45, 60, 75.
    np.testing.assert_allclose(seconds, [0.0, 1.0, 2.0])
    assert video.shape == (6, 56, 56, 3)
    levels = video[:, 0, 0, 0] * np.float32(GLM4V.std[0]) + np.float32(GLM4V.mean[0])
    np.testing.assert_allclose(levels * 255, [0, 15, 30, 45, 60, 75], atol=1e-3)


def test_timestamped_frames_repeat_the_last():
    """Frames with timestamps are all kept and the last repeated."""
    frames = RNG.integers(0, 256, (3, 56, 56, 3), dtype=np.uint8)
    video, seconds = prepare_video(Video(frames, timestamps=[0.5, 7, 9]), GLM4V_VIDEO)
    assert len(video) == 4
    np.testing.assert_array_equal(video[2], video[3])
    np.testing.assert_array_equal(seconds, [0.5, 9])


@pytest.mark.parametrize(
    ("video", "pattern"),
    [
        (Video(PIXELS, fps=1), r"video: must be \[frames, height, width, 3\]"),
        (Video(PIXELS[None]), "either its frames per second"),
        (Video(PIXELS[None], fps=1, timestamps=[0]), "either its frames per second"),
        (Video(PIXELS[None], fps=0), "fps 0 and duration"),
        (Video(PIXELS[None], fps=np.nan), "must be positive"),
        (Video(PIXELS[None], fps=1, duration_s=-1.0), "must be positive"),
        (Video(PIXELS[None], timestamps=[0, 1]), r"must be finite \[1\], found \[2\]"),
        (Video(PIXELS[None], timestamps=[np.inf]), r"must be finite \[1\]"),
    ],
    ids=range(8),
)
def test_videos_that_are_none_are_refused(video, pattern):
    with pytest.raises(DataError, match=pattern):
        prepare_video(video, GLM4V_VIDEO)
