"""Glyphs can be told apart, and masks are what their docstrings promise."""

import itertools

import numpy as np
import pytest

from experiments.nano.phone_screens import glyphs


@pytest.mark.parametrize("size", [12, 16])
def test_glyphs_differ_even_when_turned(size):
    drawn = {
        name: [glyphs.glyph(name, size, angle).ravel() for angle in (-12.0, 0.0, 12.0)]
        for name in glyphs.GLYPHS
    }
    for first, second in itertools.combinations(drawn, 2):
        closest = max(
            np.corrcoef(a, b)[0, 1] for a, b in itertools.product(drawn[first], drawn[second])
        )
        assert closest < 0.85, (first, second)


@pytest.mark.parametrize("name", list(glyphs.GLYPHS))
def test_a_glyph_fills_its_square(name):
    mask = glyphs.glyph(name, 14)[..., 0]
    ys, xs = np.nonzero(mask > 0.5)
    assert mask.dtype == np.float32
    assert 0 <= mask.min() <= mask.max() <= 1
    assert max(np.ptp(xs), np.ptp(ys)) >= 10
    assert 0.12 < mask.mean() < 0.75


def test_masks_are_shared_and_read_only():
    mask = glyphs.glyph("star", 13)
    assert glyphs.glyph("star", 13) is mask
    with pytest.raises(ValueError, match="read-only"):
        mask[:] = 0


def test_rounded_rectangle_has_its_area():
    mask = glyphs.rounded_rectangle(14, 30, 5)
    assert mask.sum() == pytest.approx(14 * 30 - (4 - np.pi) * 25, rel=0.01)
    assert glyphs.rounded_rectangle(4, 6, 0).min() == 1


def test_text_lines_have_words_and_no_letters():
    line = glyphs.text_line(3, 40, 159)
    assert line.shape == (3, 40, 1)
    gaps = (line == 0).all((0, 2))
    assert 2 <= gaps.sum() <= 20
