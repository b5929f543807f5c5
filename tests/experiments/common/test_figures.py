"""The figure of the main job: a true front, and labels that can be read."""

import itertools

import pytest

from experiments.common import figures


def test_front_holds_what_no_smaller_one_beats():
    points = [(18.4, 1.807), (15.9, 2.034), (15.9, 1.777), (2.7, 1.784), (2.7, 1.784)]
    assert figures.front(points, lower_is_better=True) == [(2.7, 1.784), (15.9, 1.777)]
    taps = [(18.4, 1.0), (15.9, 0.93), (15.9, 0.99), (2.7, 0.99)]
    assert figures.front(taps, lower_is_better=False) == [(2.7, 0.99), (18.4, 1.0)]


@pytest.mark.parametrize("values", [(1.0, 1.0, 1.0), (0.94, 0.95, 0.93), (1.0, 0.5, 0.0)])
def test_labels_of_near_points_do_not_overlap(values):
    points = [(5.0, value, "quantized") for value in values]
    heights = figures.label_heights(points, 10.0, 1.0)
    gaps = [abs(a - b) for a, b in itertools.combinations(heights, 2)]
    assert min(gaps) >= 1 / 16
    far = [(5.0 * index, 1.0, "dense") for index in range(3)]
    assert figures.label_heights(far, 15.0, 1.0) == [1.0, 1.0, 1.0]
