"""Conversion between Hugging Face's packed `pixel_values` and images or videos.

Letters: `F` frames, `H`, `W` pixels, `C` channels. A packed row is one flattened patch, `C x frames
of the patch x rows x columns`. Patches are ordered by merge block.
"""

from collections.abc import Sequence

import numpy as np

from glm_edge.errors import DataError


def to_patches(
    images: Sequence[np.ndarray],
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
) -> tuple[np.ndarray, np.ndarray]:
    """Pack images and videos as `pixel_values` and their grids.

    Args:
      images: [H, W, C] or [F, H, W, C]. A still image is repeated `temporal_patch_size` times.
        H and W are multiples of `patch_size * merge_size`, F of `temporal_patch_size`.
      patch_size: width and height of a patch in pixels.
      temporal_patch_size: frames per patch.
      merge_size: width and height of a merge block in patches.

    Returns:
      `(pixel_values, grid_thw)`: float32 [patches of all images, C * temporal_patch_size *
      patch_size**2], and int64 [images, 3] patches (time, rows, columns).

    Raises:
      DataError: there is no image, or one does not divide into patches and merge blocks.
    """
    packed, grids = [], []
    for index, image in enumerate(images):
        frames = np.asarray(image, np.float32)
        if frames.ndim == 3:
            frames = np.broadcast_to(frames, (temporal_patch_size, *frames.shape))
        if frames.ndim != 4 or 0 in frames.shape:
            raise DataError(
                f"images[{index}]: must be [H, W, C] or [F, H, W, C], found {list(image.shape)}"
            )
        count, height, width, channels = frames.shape
        side = patch_size * merge_size
        if count % temporal_patch_size or height % side or width % side:
            raise DataError(
                f"images[{index}]: {count} frames of {height}x{width} must be multiples of "
                f"{temporal_patch_size} frames and {side} pixels"
            )
        time, rows, columns = count // temporal_patch_size, height // side, width // side
        blocks = frames.reshape(
            time,
            temporal_patch_size,
            rows,
            merge_size,
            patch_size,
            columns,
            merge_size,
            patch_size,
            channels,
        )
        # Target order: time, block row and column, patch row and column, C, frames, rows, columns.
        blocks = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
        packed.append(blocks.reshape(time * rows * columns * merge_size**2, -1))
        grids.append((time, rows * merge_size, columns * merge_size))
    if not packed:
        raise DataError("images: the list is empty")
    if len({patches.shape[1] for patches in packed}) > 1:
        raise DataError("images: all must have the same number of channels")
    return np.concatenate(packed), np.array(grids, np.int64)


def from_patches(
    pixel_values: np.ndarray,
    grid_thw: np.ndarray,
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    channels: int = 3,
) -> list[np.ndarray]:
    """Unpack `pixel_values` to images and videos.

    Args:
      pixel_values: [patches of all images, channels * temporal_patch_size * patch_size**2].
      grid_thw: int [images, 3], patches (time, rows, columns) per image.
      patch_size: width and height of a patch in pixels.
      temporal_patch_size: frames per patch.
      merge_size: width and height of a merge block in patches.
      channels: channels per pixel.

    Returns:
      One array per image: [H, W, C] for a single temporal patch of equal frames (a still image),
      otherwise [F, H, W, C].

    Raises:
      DataError: the grids do not match the patches.
    """
    pixel_values, grid_thw = np.asarray(pixel_values), np.asarray(grid_thw)
    if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or grid_thw.dtype.kind not in "iu":
        raise DataError(
            f"grid_thw: must be integers [images, 3], found {grid_thw.dtype} {list(grid_thw.shape)}"
        )
    if (grid_thw < 1).any():
        raise DataError(f"grid_thw: must be positive, found {int(grid_thw.min())}")
    expected = (int(grid_thw.prod(axis=1).sum()), channels * temporal_patch_size * patch_size**2)
    if pixel_values.shape != expected:
        raise DataError(
            f"pixel_values: {list(pixel_values.shape)} must be {list(expected)} for these grids"
        )
    images, start = [], 0
    for time, rows, columns in grid_thw.tolist():
        if rows % merge_size or columns % merge_size:
            raise DataError(f"grid_thw: {rows}x{columns} patches must be multiples of {merge_size}")
        count = time * rows * columns
        blocks = pixel_values[start : start + count].reshape(
            time,
            rows // merge_size,
            columns // merge_size,
            merge_size,
            merge_size,
            channels,
            temporal_patch_size,
            patch_size,
            patch_size,
        )
        frames = blocks.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(
            time * temporal_patch_size, rows * patch_size, columns * patch_size, channels
        )
        still = time == 1 and (frames == frames[:1]).all()
        images.append(np.ascontiguousarray(frames[0] if still else frames))
        start += count
    return images
