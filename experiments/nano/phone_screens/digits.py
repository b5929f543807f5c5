"""Handwritten digits for the keys of a screen, in splits without common images."""

import dataclasses
import gzip
import zlib
from pathlib import Path

import numpy as np

from glm_edge.errors import DataError, require

SPLITS = ("train", "calibration", "eval")
_IMAGE_MAGIC = 2051
_LABEL_MAGIC = 2049


@dataclasses.dataclass(frozen=True)
class DigitImages:
    """Grey images of the ten digits, bright ink on black with a border of about four pixels.

    Args:
      images: ten arrays, uint8 `[N_d, 28, 28]`; `images[d]` contains images of digit d.
    """

    images: tuple[np.ndarray, ...]

    def __post_init__(self):
        if len(self.images) != 10:
            raise DataError(f"digit images have {len(self.images)} classes, expected 10")
        for digit, stack in enumerate(self.images):
            if stack.dtype != np.uint8 or stack.ndim != 3 or stack.shape[1:] != (28, 28):
                raise DataError(
                    f"images of digit {digit} are {stack.dtype} {list(stack.shape)}, expected "
                    "uint8 [N, 28, 28]"
                )
            if not len(stack):
                raise DataError(f"digit {digit} has no image; every digit needs at least one")

    def __len__(self) -> int:
        return sum(len(stack) for stack in self.images)


def from_arrays(images: np.ndarray, labels: np.ndarray) -> DigitImages:
    """Sort images by digit.

    Args:
      images: uint8 `[N, 28, 28]`.
      labels: digits of the images, int `[N]`.

    Returns:
      The images by class.

    Raises:
      DataError: a digit has no image, or the images have the wrong shape.
    """
    return DigitImages(tuple(images[labels == digit] for digit in range(10)))


def combine(*sources: DigitImages) -> DigitImages:
    """Combine several sources, with all images of each.

    Args:
      *sources: one or more sources.

    Returns:
      One source with the images of all sources.
    """
    return DigitImages(
        tuple(np.concatenate([s.images[digit] for s in sources]) for digit in range(10))
    )


def resampling_matrix(source: int, target: int) -> np.ndarray:
    """Build the matrix of one-dimensional resampling with a triangle filter.

    Args:
      source: number of input samples.
      target: number of output samples.

    Returns:
      Weights, float32 `[target, source]`; each row sums to one.
    """
    scale = source / target
    centres = (np.arange(target) + 0.5) * scale - 0.5
    distance = np.abs(centres[:, None] - np.arange(source)[None, :]) / max(scale, 1.0)
    weights = np.maximum(1.0 - distance, 0.0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def sklearn_digits(split: str) -> DigitImages:
    """Open scikit-learn's bundled 8x8 digits, resampled to 28x28.

    The order of the file is kept, so the splits have nearly disjoint writers.

    Args:
      split: "train" (first 60 %), "calibration" (next 15 %) or "eval" (last 25 %).

    Returns:
      The images of that split.

    Raises:
      DataError: the split is unknown.
      MissingExtraError: scikit-learn is not installed.
    """
    _check_split(split)
    data = require("sklearn.datasets", extra="data").load_digits()
    count = len(data.target)
    first, second = int(0.6 * count), int(0.75 * count)
    part = {
        "train": slice(0, first),
        "calibration": slice(first, second),
        "eval": slice(second, count),
    }[split]
    weights = resampling_matrix(8, 20)
    smooth = weights @ (data.images[part].astype(np.float32) / 16.0) @ weights.T
    # Interpolated strokes are soft, while MNIST's, on the same keys, have sharp edges.
    ink = np.clip((smooth - 0.2) / 0.5, 0.0, 1.0)
    images = np.pad((255 * ink).astype(np.uint8), ((0, 0), (4, 4), (4, 4)))
    return from_arrays(images, data.target[part])


def mnist_folder(path: str | Path, split: str) -> DigitImages:
    """Open a folder of IDX files, the format of MNIST.

    Args:
      path: folder with pairs of `*-images-idx3-ubyte.gz` and `*-labels-idx1-ubyte.gz`, or
        uncompressed files. If it contains only one pair, every split uses that pair.
      split: "train" (the first 90 % of the files whose names begin with train), "calibration"
        (their last 10 %) or "eval" (every other pair, such as t10k).

    Returns:
      The images of that split.

    Raises:
      DataError: a file is missing, truncated or not an IDX file of 28x28 images.
    """
    _check_split(split)
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; use a folder with *-images-idx3-ubyte.gz")
    files = sorted(f for f in folder.iterdir() if "-images-idx3-ubyte" in f.name)
    if not files:
        raise DataError(f"{folder} contains no *-images-idx3-ubyte.gz, the format of MNIST")
    chosen, part = files, slice(None)
    if len(files) > 1:
        chosen = [f for f in files if f.name.startswith("train") == (split != "eval")]
        if not chosen:
            raise DataError(
                f"{folder} contains no images for the split {split!r}: expected train, t10k or "
                f"test pairs, got {', '.join(f.name for f in files)}"
            )
    pairs = [_read_pair(f) for f in chosen]
    images = np.concatenate([p[0] for p in pairs])
    labels = np.concatenate([p[1] for p in pairs])
    if len(files) > 1 and split != "eval":
        cut = int(0.9 * len(images))
        part = slice(0, cut) if split == "train" else slice(cut, None)
    return from_arrays(images[part], labels[part])


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r} of digit images; use one of {', '.join(SPLITS)}")


def _read_pair(images_file: Path) -> tuple[np.ndarray, np.ndarray]:
    labels_file = images_file.with_name(
        images_file.name.replace("-images-idx3-ubyte", "-labels-idx1-ubyte")
    )
    images = _read_idx(images_file, _IMAGE_MAGIC, 3, "images")
    labels = _read_idx(labels_file, _LABEL_MAGIC, 1, "labels")
    if images.shape[1:] != (28, 28):
        raise DataError(f"{images_file} contains {list(images.shape[1:])} images, expected 28x28")
    if len(images) != len(labels):
        raise DataError(f"{labels_file} has {len(labels)} labels for {len(images)} images")
    if labels.size and labels.max() > 9:
        raise DataError(f"{labels_file} contains the label {labels.max()}, expected digits 0..9")
    return images, labels


def _read_idx(file: Path, magic: int, axes: int, kind: str) -> np.ndarray:
    wanted = f"expected an IDX file of {kind} (magic number {magic}), like MNIST's"
    try:
        data = file.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read ({error}); {wanted}") from error
    header = 4 + 4 * axes
    if len(data) < header or int.from_bytes(data[:4], "big") != magic:
        raise DataError(f"{file} is not an IDX file of {kind}; {wanted}")
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
    size = 1
    for extent in shape:
        size *= extent
    if len(data) - header != size:
        raise DataError(
            f"{file} declares {size} bytes of {kind} but contains {len(data) - header}; {wanted}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def ink(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Crop two pixels from each side of a 28x28 digit and resize it to an alpha mask.

    Args:
      image: digit, uint8 `[28, 28]`.
      weights: matrix `resampling_matrix(24, size)`.

    Returns:
      Alpha mask, float32 `[size, size, 1]` in 0..1.
    """
    inner = image[2:26, 2:26].astype(np.float32)
    return (weights @ inner @ weights.T)[..., None] * np.float32(1 / 255)
