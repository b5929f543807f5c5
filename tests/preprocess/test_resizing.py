"""Sizes and 8-bit resampling against the references."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_edge.errors import DataError
from glm_edge.preprocess.resizing import fit_size, resize_uint8, smart_resize

RNG = np.random.default_rng(0)
SIDES = st.one_of(st.integers(1, 60), st.integers(1, 6000))


@settings(max_examples=500)
@given(
    st.integers(2, 64),
    SIDES,
    SIDES,
    st.integers(1, 60000),
    st.integers(60000, 12_000_000),
    st.sampled_from([28, 32, 20]),
)
def test_smart_resize_is_transformers(frames, height, width, fewest, most, factor):
    reference = pytest.importorskip(
        "transformers.models.glm4v.image_processing_pil_glm4v", exc_type=ImportError
    ).smart_resize
    options = {"factor": factor, "min_pixels": fewest, "max_pixels": most, "temporal_factor": 2}
    try:
        expected = reference(frames, height, width, **options)
    except ValueError:
        with pytest.raises(DataError, match="times the other"):
            smart_resize(frames, height, width, **options)
        return
    assert smart_resize(frames, height, width, **options) == expected


@given(SIDES, SIDES)
def test_smart_resize_keeps_its_budget(height, width):
    try:
        rows, columns = smart_resize(2, height, width)
    except DataError:
        assert max(height, width) > 190 * min(height, width)
        return
    assert rows % 28 == columns % 28 == 0
    assert 2 * rows * columns <= max(28 * 28 * 15000, 2 * 28 * max(rows, columns))
    assert 2 * rows * columns >= 112 * 112


def test_half_blocks_round_to_even():
    assert smart_resize(2, 28 * 10 + 14, 28 * 11 + 14) == (280, 336)


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ((2, 28, 28 * 201), "201 times the other; the limit is 200"),
        ((1, 28, 28), "at least 2 frames, found 1"),
        ((2, 0, 28), "0x28 pixels is empty"),
    ],
)
def test_sizes_that_are_none_are_refused(arguments, pattern):
    with pytest.raises(DataError, match=pattern):
        smart_resize(*arguments)


@settings(max_examples=200)
@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.sampled_from(["bicubic", "bilinear"]),
)
def test_resize_is_pillows_to_the_bit(source, target, name):
    pillow = pytest.importorskip("PIL.Image")
    pixels = RNG.integers(0, 256, (*source, 3), dtype=np.uint8)
    lost_rows, lost_columns = source[0] - target[0], source[1] - target[1]
    if int(pillow.__version__.split(".")[0]) < 13 and lost_rows > max(0, 2 * lost_columns):
        return  # There the passes had another order.
    method = pillow.Resampling[name.upper()]
    expected = np.asarray(pillow.fromarray(pixels).resize(target[::-1], method))
    np.testing.assert_array_equal(resize_uint8(pixels, target, name), expected)


@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.integers(0, 255),
)
def test_a_flat_image_stays_flat(source, target, level):
    resized = resize_uint8(np.full((*source, 1), level, np.uint8), target)
    np.testing.assert_array_equal(resized, np.full((*target, 1), level, np.uint8))


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_fit_size_touches_one_side_and_exceeds_none(height, width):
    rows, columns = fit_size(height, width, (96, 64))
    assert 1 <= rows <= 96
    assert 1 <= columns <= 64
    assert rows == 96 or columns == 64
