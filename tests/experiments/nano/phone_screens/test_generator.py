"""Every screen keeps the exam's limits; drawing is deterministic; labels say what is there."""

import collections
import colorsys
import itertools
import subprocess
import sys

import numpy as np
import pytest

from experiments.nano.phone_screens import digits, generator, painting
from glm_edge.errors import DataError


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    return digits.DigitImages(
        tuple(rng.integers(0, 256, (5, 28, 28)).astype(np.uint8) for _ in range(10))
    )


@pytest.fixture(scope="module")
def screens(source):
    drawer, rng = generator.ScreenGenerator(source), generator.random_stream("eval", 0)
    return {kind: [drawer.draw(rng, kind) for _ in range(250)] for kind in generator.KINDS}


@pytest.fixture(scope="module", params=generator.KINDS)
def some(request, screens):
    return screens[request.param]


def test_the_limits_are_those_of_the_exam():
    assert (generator.MIN_ELEMENTS, generator.MAX_ELEMENTS) == (8, 20)
    assert generator.MIN_OF_TYPE >= 3
    assert generator.MAX_AREA <= 0.03 * generator.HEIGHT * generator.WIDTH
    assert generator.MIN_KEYS_FOR_SPEECH > 1 / 0.2
    assert (generator.HEIGHT, generator.WIDTH) == (192, 96)


def test_images(some):
    for screen in some:
        assert screen.image.shape == (192, 96, 3)
        assert screen.image.dtype == np.float32
        assert 0 <= screen.image.min() < screen.image.max() <= 1


def test_numbers_of_elements(some):
    observed = set()
    for screen in some:
        types = collections.Counter(e.type for e in screen.elements)
        observed.add(len(screen.elements))
        assert 8 <= len(screen.elements) <= 20
        assert min(types.values()) >= 3
    assert max(observed) - min(observed) >= 6


def test_every_element_is_small_and_on_the_screen(some):
    for element in (e for screen in some for e in screen.elements):
        x0, y0, x1, y1 = element.box
        assert 0 <= x0 < x1 <= 96
        assert 0 <= y0 < y1 <= 192
        assert (x1 - x0) * (y1 - y0) <= 0.03 * 96 * 192


def test_elements_do_not_overlap_and_centres_are_a_cell_apart(some):
    for screen in some:
        for a, b in itertools.combinations(screen.elements, 2):
            assert (
                a.box[2] <= b.box[0]
                or b.box[2] <= a.box[0]
                or a.box[3] <= b.box[1]
                or b.box[3] <= a.box[1]
            )
            assert max(abs(p - q) for p, q in zip(a.centre, b.centre, strict=True)) >= 16


def test_elements_are_unique_and_so_are_glyphs(some):
    for screen in some:
        names = [(e.type, e.name) for e in screen.elements]
        assert len(set(names)) == len(names)
        used = [e.name for e in screen.elements if e.type in ("icon", "row")]
        assert len(set(used)) == len(used)


def test_keypads_have_many_digits_in_any_order(screens):
    orders = set()
    for screen in screens["keypad"]:
        keys = [e for e in screen.elements if e.type == "key"]
        assert len({e.name for e in keys}) >= generator.MIN_KEYS_FOR_SPEECH
        orders.add(tuple(e.name for e in sorted(keys, key=lambda e: e.centre[::-1]))[:3])
    assert len(orders) > 150


def test_every_class_appears(screens):
    observed = {e.class_id for group in screens.values() for s in group for e in s.elements}
    assert observed == set(range(1, generator.NUM_CLASSES))
    assert len(generator.CLASSES) == 16 + 10 + 8 + 16


def test_positions_are_not_on_a_grid(some):
    for axis, low, high in ((0, 15, 81), (1, 30, 172)):
        centres = np.array([e.centre[axis] for s in some for e in s.elements])
        inside = centres[(centres >= low) & (centres < high)]
        histogram = np.bincount(inside.astype(int) - low, minlength=high - low)
        assert histogram.min() > 0
        assert histogram.max() < 4 * histogram.mean()
        # Nothing repeats with the period of a cell or a patch.
        for period in (8, 16):
            phases = np.bincount(centres.astype(int) % period, minlength=period) / len(centres)
            assert abs(phases - 1 / period).max() < 0.6 / period


def test_no_place_is_a_good_guess(screens):
    hits = np.zeros((192, 96))
    for screen in screens["keypad"]:
        keys = [e for e in screen.elements if e.type == "key"]
        for key in keys:
            x0, y0, x1, y1 = (int(v) for v in key.box)
            hits[y0:y1, x0:x1] += 1 / len(keys)
    assert hits.max() / len(screens["keypad"]) < 0.15


def test_elements_are_visible(some):
    for screen in some[:60]:
        for element in screen.elements:
            x0, y0, x1, y1 = (int(v) for v in element.box)
            grey = screen.image[y0:y1, x0:x1].mean(-1)
            assert np.ptp(np.quantile(grey, [0.02, 0.98])) > 0.12


def test_button_colours_are_what_they_are_called(screens):
    hues = {name: entry[0] for name, entry in painting.COLOURS.items()}
    assert min(abs(a - b) for a, b in itertools.combinations(hues.values(), 2)) >= 25

    def apart(a, b):
        return abs((a - b + 180) % 360 - 180)

    for element, image in ((e, s.image) for s in screens["mixed"] for e in s.elements):
        if element.type == "button":
            x0, y0, x1, y1 = (int(v) for v in element.box)
            colour = np.median(image[y0:y1, x0:x1].reshape(-1, 3), 0)
            hue = 360 * colorsys.rgb_to_hsv(*colour.tolist())[0]
            assert min(hues, key=lambda name: apart(hues[name], hue)) == element.name


def test_same_seed_same_bytes_in_another_process(source):
    code = (
        "import hashlib, numpy as np\n"
        "from experiments.nano.phone_screens import digits, generator\n"
        "rng = np.random.default_rng(0)\n"
        "d = digits.DigitImages(tuple(rng.integers(0, 256, (5, 28, 28)).astype(np.uint8)"
        " for _ in range(10)))\n"
        "g, r = generator.ScreenGenerator(d), generator.random_stream('train', 3)\n"
        "print(hashlib.sha256(b''.join(g.draw(r, k).image.tobytes()"
        " for k in generator.KINDS)).hexdigest())\n"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout != ""
    drawer = generator.ScreenGenerator(source, seed=5)
    other = generator.ScreenGenerator(source, seed=5)
    first, second = drawer.draw(), other.draw()
    assert first.elements == second.elements
    assert first.image.tobytes() == second.image.tobytes()
    assert drawer.draw().image.tobytes() != first.image.tobytes()


def test_streams_of_splits_and_seeds_differ():
    starts = {
        generator.random_stream(split, seed).integers(1 << 60)
        for split in ("train", "calibration", "eval")
        for seed in range(20)
    }
    assert len(starts) == 60


def test_dense_labels_by_their_definition(some):
    for screen in some[:60]:
        classes, offsets, centred = generator.dense_labels(screen)
        assert (classes.dtype, offsets.dtype, centred.dtype) == (np.int32, np.float32, bool)
        for cell in range(72):
            row, column = divmod(cell, 6)
            x, y = 16 * column + 8, 16 * row + 8
            owners = [
                e
                for e in screen.elements
                if 16 * column <= e.centre[0] < 16 * column + 16
                and 16 * row <= e.centre[1] < 16 * row + 16
            ]
            assert len(owners) <= 1
            assert centred[cell] == bool(owners)
            owners = owners or [e for e in screen.elements if e.contains(x, y)]
            if not owners:
                assert classes[cell] == 0
                assert not offsets[cell].any()
                continue
            assert classes[cell] == owners[0].class_id
            expected = ((owners[0].centre[0] - x) / 16, (owners[0].centre[1] - y) / 16)
            np.testing.assert_allclose(offsets[cell], expected, atol=1e-6)
        assert centred.sum() == len(screen.elements)


def test_unknown_names_are_refused(source):
    with pytest.raises(DataError, match="unknown kind 'grid'"):
        generator.ScreenGenerator(source).draw(kind="grid")
    with pytest.raises(DataError, match="unknown split 'test'"):
        generator.random_stream("test", 0)
