"""The loaders on the real folders that GLM_EDGE_DATA holds."""

import os
from pathlib import Path

import numpy as np
import pytest

from experiments.common import tap_items
from experiments.nano.phone_screens import digits, speech

DATA = Path(os.environ.get("GLM_EDGE_DATA", "nowhere"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="GLM_EDGE_DATA names no folder of data")


def test_spoken_digits_have_four_speakers_and_all_digits():
    recorded = speech.fsdd_folder(DATA / "speech_fsdd")
    assert len(recorded) == 2000
    assert {u.speaker for u in recorded} == {"george", "jackson", "lucas", "nicolas"}
    assert {u.digit for u in recorded} == set(range(10))
    assert all(np.abs(u.samples).max() <= 1.0 for u in recorded[:50])


def test_mnist_splits_share_no_image():
    train = digits.mnist_folder(DATA / "vision_mnist", "train")
    held_out = digits.mnist_folder(DATA / "vision_mnist", "eval")
    assert len(train) > len(held_out) > 0
    observed = {image.tobytes() for stack in train.images for image in stack}
    assert not any(
        image.tobytes() in observed for stack in held_out.images for image in stack[:100]
    )


def test_spoken_questions_come_from_the_folder():
    recorded = speech.fsdd_folder(DATA / "speech_fsdd")
    items = tap_items.draw_items(6, 3, str(DATA / "vision_mnist"), recorded)
    assert all(item.question.spoken is not None and item.samples is not None for item in items)
    again = tap_items.draw_items(6, 3, str(DATA / "vision_mnist"), recorded)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(items, again, strict=True))
