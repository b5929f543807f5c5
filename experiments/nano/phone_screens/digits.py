"""Handwritten digits for the keys of a screen, split so that no image is shared."""

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
      images: ten arrays, uint8 `[N_d, 28, 28]`, `images[d]` holding the digit d.
    """

    images: tuple[np.ndarray, ...]

    def __post_init__(self):
        if len(self.images) != 10:
            raise DataError(f"digit images come in {len(self.images)} classes; 10 are needed")
        for digit, stack in enumerate(self.images):
            if stack.dtype != np.uint8 or stack.ndim != 3 or stack.shape[1:] != (28, 28):
                raise DataError(
                    f"images of digit {digit} are {stack.dtype} {list(stack.shape)}; "
                    "uint8 [N, 28, 28] is needed"
                )
            if not len(stack):
                raise DataError(f"there is no image of digit {digit}; every digit needs one")

    def __len__(self) -> int:
        return sum(len(stack) for stack in self.images)


def from_arrays(images: np.ndarray, labels: np.ndarray) -> DigitImages:
    """Sorts images by digit.

    Args:
      images: uint8 `[N, 28, 28]`.
      labels: the digits shown, integers `[N]`.

    Returns:
      The images by class.

    Raises:
      DataError: a digit is absent or the images have another shape.
    """
    return DigitImages(tuple(images[labels == digit] for digit in range(10)))


def combine(*sources: DigitImages) -> DigitImages:
    """Pools several sources; inside a class each source keeps its own number of images.

    Args:
      *sources: at least one source.

    Returns:
      One source with the images of all.
    """
    return DigitImages(
        tuple(np.concatenate([s.images[digit] for s in sources]) for digit in range(10))
    )


def resampling_matrix(source: int, target: int) -> np.ndarray:
    """Builds the matrix of smooth one-dimensional resampling (a triangle as wide as needed).

    Args:
      source: number of samples given.
      target: number of samples wanted.

    Returns:
      Weights, float32 `[target, source]`, rows summing to one.
    """
    scale = source / target
    centres = (np.arange(target) + 0.5) * scale - 0.5
    distance = np.abs(centres[:, None] - np.arange(source)[None, :]) / max(scale, 1.0)
    weights = np.maximum(1.0 - distance, 0.0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def sklearn_digits(split: str) -> DigitImages:
    """Opens scikit-learn's bundled 8x8 digits, drawn smoothly at 28x28.

    The file's order is kept, so that the splits are nearly disjoint in writers too.

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
    # Interpolated strokes are soft; MNIST's, which share the keys with them, have edges.
    ink = np.clip((smooth - 0.2) / 0.5, 0.0, 1.0)
    images = np.pad((255 * ink).astype(np.uint8), ((0, 0), (4, 4), (4, 4)))
    return from_arrays(images, data.target[part])


def mnist_folder(path: str | Path, split: str) -> DigitImages:
    """Opens a folder of IDX files, the format of MNIST.

    Args:
      path: folder with `*-images-idx3-ubyte.gz` and `*-labels-idx1-ubyte.gz` beside it (not
        compressed is fine too). If it holds one pair only, that pair is every split.
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
        raise DataError(f"{folder} is not a folder; one with *-images-idx3-ubyte.gz is needed")
    files = sorted(f for f in folder.iterdir() if "-images-idx3-ubyte" in f.name)
    if not files:
        raise DataError(f"{folder} holds no *-images-idx3-ubyte.gz, the format of MNIST")
    chosen, part = files, slice(None)
    if len(files) > 1:
        chosen = [f for f in files if f.name.startswith("train") == (split != "eval")]
        if not chosen:
            raise DataError(
                f"{folder} holds no images for the split {split!r}: train, t10k or test pairs "
                f"are needed, found {', '.join(f.name for f in files)}"
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
        raise DataError(f"unknown split {split!r} of digit images; one of {', '.join(SPLITS)}")


def _read_pair(images_file: Path) -> tuple[np.ndarray, np.ndarray]:
    labels_file = images_file.with_name(
        images_file.name.replace("-images-idx3-ubyte", "-labels-idx1-ubyte")
    )
    images = _read_idx(images_file, _IMAGE_MAGIC, 3, "images")
    labels = _read_idx(labels_file, _LABEL_MAGIC, 1, "labels")
    if images.shape[1:] != (28, 28):
        raise DataError(f"{images_file} holds {list(images.shape[1:])} images; 28x28 is needed")
    if len(images) != len(labels):
        raise DataError(f"{labels_file} has {len(labels)} labels for {len(images)} images")
    if labels.size and labels.max() > 9:
        raise DataError(f"{labels_file} holds the label {labels.max()}; digits 0..9 are needed")
    return images, labels


def _read_idx(file: Path, magic: int, axes: int, kind: str) -> np.ndarray:
    wanted = f"an IDX file of {kind} (magic number {magic}), as MNIST's, is needed"
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
            f"{file} promises {size} bytes of {kind} and holds {len(data) - header}; {wanted}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def ink(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Resizes one 28x28 digit, its outer two pixels cut away, to an alpha mask.

    Args:
      image: uint8 `[28, 28]`.
      weights: `resampling_matrix(24, size)`.

    Returns:
      float32 `[size, size, 1]` in 0..1.
    """
    inner = image[2:26, 2:26].astype(np.float32)
    return (weights @ inner @ weights.T)[..., None] * np.float32(1 / 255)
