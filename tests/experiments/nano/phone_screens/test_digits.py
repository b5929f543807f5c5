"""Digit images are split without sharing any, and files that are not IDX are refused."""

import gzip

import numpy as np
import pytest

from experiments.nano.phone_screens import digits
from glm_edge.errors import DataError


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_pair(folder, prefix, count, seed=0, compress=True):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    pack, end = (gzip.compress, ".gz") if compress else (bytes, "")
    (folder / f"{prefix}-images-idx3-ubyte{end}").write_bytes(pack(idx(images)))
    (folder / f"{prefix}-labels-idx1-ubyte{end}").write_bytes(pack(idx(labels)))
    return images


def content(source):
    return {image.tobytes() for stack in source.images for image in stack}


def test_sklearn_splits_share_no_image():
    pytest.importorskip("sklearn")
    splits = [digits.sklearn_digits(split) for split in digits.SPLITS]
    assert sum(len(s) for s in splits) == 1797
    assert all(len(stack) > 15 for s in splits for stack in s.images)
    for i, first in enumerate(splits):
        for second in splits[i + 1 :]:
            assert not content(first) & content(second)


def test_sklearn_digits_keep_a_border():
    pytest.importorskip("sklearn")
    stack = np.concatenate(digits.sklearn_digits("eval").images)
    assert stack[:, 4:24, 4:24].mean() > 20
    assert not stack[:, :4].any()
    assert not stack[:, :, 24:].any()


@pytest.mark.parametrize(("other", "compress"), [("t10k", True), ("testA", True), ("testA", False)])
def test_mnist_folder_splits_by_file(tmp_path, other, compress):
    train = write_pair(tmp_path, "train", 200, seed=1, compress=compress)
    test = write_pair(tmp_path, other, 50, seed=2, compress=compress)
    results = {split: content(digits.mnist_folder(tmp_path, split)) for split in digits.SPLITS}
    assert results["train"] == {i.tobytes() for i in train[:180]}
    assert results["calibration"] == {i.tobytes() for i in train[180:]}
    assert results["eval"] == {i.tobytes() for i in test}


@pytest.mark.parametrize("split", digits.SPLITS)
def test_one_pair_is_every_split(tmp_path, split):
    images = write_pair(tmp_path, "testB", 40)
    assert content(digits.mnist_folder(str(tmp_path), split)) == {i.tobytes() for i in images}


def test_labels_sort_the_images(tmp_path):
    images = write_pair(tmp_path, "testB", 40)
    result = digits.mnist_folder(tmp_path, "eval")
    np.testing.assert_array_equal(result.images[7], images[7::10])


def test_combine_pools_sources(tmp_path):
    write_pair(tmp_path, "testB", 40)
    one = digits.mnist_folder(tmp_path, "eval")
    both = digits.combine(one, one)
    assert len(both) == 80
    assert both.images[3].shape == (8, 28, 28)


@pytest.mark.parametrize("target", [12, 18, 22, 24, 40])
def test_resampling_keeps_constants_and_slopes(target):
    weights = digits.resampling_matrix(24, target)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    slope = weights @ np.arange(24)
    inside = slice(target // 8, -(target // 8))
    np.testing.assert_allclose(
        slope[inside], ((np.arange(target) + 0.5) * 24 / target - 0.5)[inside], atol=0.1
    )


def test_ink_is_an_alpha_mask():
    mask = digits.ink(np.full((28, 28), 255, np.uint8), digits.resampling_matrix(24, 18))
    assert mask.shape == (18, 18, 1)
    np.testing.assert_allclose(mask, 1, atol=1e-5)


def damage(folder, kind):
    images = folder / "testB-images-idx3-ubyte.gz"
    labels = folder / "testB-labels-idx1-ubyte.gz"
    raw = gzip.decompress(images.read_bytes())
    if kind == "text":
        images.write_bytes(b"not an image")
    elif kind == "truncated":
        images.write_bytes(gzip.compress(raw[:-100]))
    elif kind == "truncated gzip":
        images.write_bytes(images.read_bytes()[:-200])
    elif kind == "huge":
        images.write_bytes(gzip.compress(raw[:4] + b"\xff" * 12 + raw[16:]))
    elif kind == "labels":
        images.write_bytes(labels.read_bytes())
    elif kind == "size":
        images.write_bytes(gzip.compress(idx(np.zeros((40, 14, 14), np.uint8))))
    elif kind == "count":
        labels.write_bytes(gzip.compress(idx(np.zeros(39, np.uint8))))
    elif kind == "label":
        labels.write_bytes(gzip.compress(idx(np.full(40, 11, np.uint8))))
    elif kind == "class":
        labels.write_bytes(gzip.compress(idx(np.zeros(40, np.uint8))))
    elif kind == "missing":
        labels.unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "not an IDX file of images"),
        ("truncated", "declares 31360 bytes"),
        ("truncated gzip", "cannot be read"),
        ("huge", "declares"),
        ("labels", "not an IDX file of images"),
        ("size", "expected 28x28"),
        ("count", "39 labels for 40 images"),
        ("label", "label 11"),
        ("class", "digit 1 has no image"),
        ("missing", "cannot be read"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, kind, message):
    write_pair(tmp_path, "testB", 40)
    damage(tmp_path, kind)
    with pytest.raises(DataError, match=message) as caught:
        digits.mnist_folder(tmp_path, "eval")
    assert "\n" not in str(caught.value)


def test_bad_folders_and_splits_are_refused(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        digits.mnist_folder(tmp_path / "nothing", "eval")
    with pytest.raises(DataError, match="contains no"):
        digits.mnist_folder(tmp_path, "eval")
    with pytest.raises(DataError, match="unknown split 'test'"):
        digits.mnist_folder(tmp_path, "test")
    write_pair(tmp_path, "testA", 20)
    write_pair(tmp_path, "testB", 20)
    with pytest.raises(DataError, match="no images for the split 'train'"):
        digits.mnist_folder(tmp_path, "train")
    with pytest.raises(DataError, match=r"uint8 \[N, 28, 28\]"):
        digits.DigitImages((np.zeros((1, 8, 8), np.uint8),) * 10)
