"""Packed patches: round trips and the order of the reference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_edge.errors import DataError
from glm_edge.preprocess.patches import from_patches, to_patches

RNG = np.random.default_rng(0)


@given(st.data())
def test_images_and_videos_survive_packing(data):
    sizes = {
        "patch_size": data.draw(st.integers(1, 4)),
        "temporal_patch_size": data.draw(st.integers(1, 3)),
        "merge_size": data.draw(st.integers(1, 3)),
    }
    side = sizes["patch_size"] * sizes["merge_size"]
    channels = data.draw(st.integers(1, 3))
    images = []
    for _ in range(data.draw(st.integers(1, 3))):
        shape = (side * data.draw(st.integers(1, 3)), side * data.draw(st.integers(1, 3)), channels)
        time = data.draw(st.integers(0, 3))
        if time:
            shape = (time * sizes["temporal_patch_size"], *shape)
        images.append(RNG.random(shape, np.float32))
    pixel_values, grids = to_patches(images, **sizes)
    assert pixel_values.shape[0] == grids.prod(axis=1).sum()
    result = from_patches(pixel_values, grids, **sizes, channels=channels)
    for image, unpacked in zip(images, result, strict=True):
        single = image.ndim == 4 and len(image) == 1 and unpacked.ndim == 3
        np.testing.assert_array_equal(image[0] if single else image, unpacked)


def test_patch_order_of_values_and_blocks():
    """A patch is channels frames rows columns and blocks come first."""
    height, width = np.meshgrid(np.arange(4), np.arange(8), indexing="ij")
    image = np.stack([height, width, 0 * width], axis=-1).astype(np.float32)
    pixel_values, grids = to_patches([image], patch_size=2)
    np.testing.assert_array_equal(grids, [[1, 2, 4]])
    patches = pixel_values.reshape(8, 3, 2, 2, 2)
    np.testing.assert_array_equal(patches[:, 0, 0, 0, 0], [0, 0, 2, 2, 0, 0, 2, 2])
    np.testing.assert_array_equal(patches[:, 1, 0, 0, 0], [0, 2, 0, 2, 4, 6, 4, 6])
    np.testing.assert_array_equal(patches[:, :, 0], patches[:, :, 1])
    np.testing.assert_array_equal(patches[0, 0, 0], [[0, 0], [1, 1]])


def test_still_images_whose_frames_differ_stay_frames():
    frames = RNG.random((2, 4, 4, 3), np.float32)
    [result] = from_patches(*to_patches([frames], patch_size=2), patch_size=2)
    np.testing.assert_array_equal(result, frames)


@pytest.mark.parametrize(
    ("images", "pattern"),
    [
        ([], "the list is empty"),
        ([np.zeros((28, 28))], r"images\[0\]: must be \[H, W, C\]"),
        ([np.zeros((28, 29, 3))], "28x29 must be multiples of 2 frames and 28 pixels"),
        ([np.zeros((3, 28, 28, 3))], "3 frames of 28x28 must be multiples"),
        ([np.zeros((28, 28, 3)), np.zeros((28, 28, 1))], "same number of channels"),
    ],
    ids=range(5),
)
def test_images_that_do_not_divide_are_refused(images, pattern):
    with pytest.raises(DataError, match=pattern):
        to_patches(images)


@pytest.mark.parametrize(
    ("shape", "grids", "pattern"),
    [
        ((4, 1176), [[1, 2, 4]], r"\[4, 1176\] must be \[8, 1176\]"),
        ((4, 1175), [[1, 2, 2]], r"must be \[4, 1176\]"),
        ((3, 1176), [[1, 1, 3]], "1x3 patches must be multiples of 2"),
        ((0, 1176), [[0, 2, 2]], "must be positive"),
        ((4, 1176), [1, 2, 2], r"found int64 \[3\]"),
        ((4, 1176), [[1.0, 2.0, 2.0]], "must be integers .* found float64"),
    ],
)
def test_grids_that_describe_other_patches_are_refused(shape, grids, pattern):
    with pytest.raises(DataError, match=pattern):
        from_patches(np.zeros(shape, np.float32), np.array(grids))
