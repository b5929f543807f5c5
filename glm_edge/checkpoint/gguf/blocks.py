"""Values of GGUF's blocks: dequantized, or as `Quantized` boxes with the file's codes and scales.

Letters used for shapes: `R` rows, `C` columns, `G` blocks (groups) per row.
"""

import jax.numpy as jnp
import numpy as np

from glm_edge.gguf_file import BLOCKS
from glm_edge.params.boxes import Quantized, quantized
from glm_edge.params.formats import Format

GROUP = 32
# Types of values that are not in blocks.
PLAIN = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
}
# Format of the boxes that hold the values of a block. `Q4_1` stores the smallest value instead of
# a zero point, and float32 keeps the quotient of that value and the scale.
FORMATS = {
    "Q4_0": Format("int4", GROUP, scale_dtype="float16"),
    "Q4_1": Format("int4", GROUP, symmetric=False, scale_dtype="float16", zero_dtype="float32"),
    "Q8_0": Format("int8", GROUP, scale_dtype="float16"),
}
CHUNK_BYTES = 1 << 22


def dtype_of(kind: str) -> np.dtype:
    """Return the type of a tensor's dense values: float32 for blocks."""
    return PLAIN.get(kind, PLAIN["F32"])


def dequantize(raw: np.ndarray, kind: str) -> np.ndarray:
    """Convert stored bytes to values.

    Args:
      raw: uint8 [R, bytes per row], from `GGUFFile.read_rows`.
      kind: type of the tensor, a key of `glm_edge.gguf_file.BLOCKS`.

    Returns:
      [R, C] in the type of the file, or float32 for blocks.

    References:
      https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c (`dequantize_row_*`).
    """
    if kind in PLAIN:
        return raw.view(PLAIN[kind])
    values, size = BLOCKS[kind]
    rows = np.empty((raw.shape[0], raw.shape[1] // size * values), np.float32)
    # In chunks, so that intermediate arrays stay small beside the result.
    step = max(1, CHUNK_BYTES // max(1, raw.shape[1]))
    for start in range(0, len(raw), step):
        scale, minimum, codes = _split(raw[start : start + step], kind)
        # w = d q, or w = d q + m with q in 0..15; `check_finite` refuses infinite scales.
        with np.errstate(invalid="ignore"):
            levels = codes.astype(np.float32) + (0 if minimum is None else 8)
            grouped = levels * scale.astype(np.float32)[..., None]
            if minimum is not None:
                grouped += minimum.astype(np.float32)[..., None]
        rows[start : start + step] = grouped.reshape(len(grouped), -1)
    return rows


def box(raw: np.ndarray, kind: str) -> Quantized:
    """Convert stored bytes to a box with the same codes and scales.

    The box of a `Q4_0` or `Q8_0` tensor has exactly the values of `dequantize`. For `Q4_1`, the
    zero point is a rounded quotient, so values differ by at most 2^-21 of the largest in a block.

    Args:
      raw: uint8 [R, bytes per row], from `GGUFFile.read_rows`.
      kind: type of the tensor, a key of `FORMATS`.

    Returns:
      The box, of dense shape [R, C].
    """
    scale, minimum, codes = _split(raw, kind)
    zero = None
    if minimum is not None:
        # d q + m = d (level - zero), with level = q - 8 and zero = -8 - m / d.
        step, low = scale.astype(np.float32), minimum.astype(np.float32)
        zero = -8 - np.divide(low, step, out=np.zeros_like(low), where=step != 0)
        # A block of equal values has d = 0: the value becomes the scale, and every level is 1.
        flat = step == 0
        scale, zero = np.where(flat, minimum, scale), np.where(flat, -1, zero)
        codes = np.where(flat[..., None], np.int8(0), codes)
    codes = codes.reshape(len(raw), -1)
    return quantized(
        jnp.asarray(codes),
        jnp.asarray(scale),
        None if zero is None else jnp.asarray(zero, jnp.float32),
        FORMATS[kind],
    )


def _split(raw: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Split blocks into float16 scales [R, G], smallest values or None, and int8 codes [R, G, 32].

    Codes of four bits are in -8..7.
    """
    blocks = raw.reshape(len(raw), -1, BLOCKS[kind][1])
    scale = blocks[..., :2].copy().view("<f2")[..., 0]
    if kind == "Q8_0":
        return scale, None, blocks[..., 2:].view(np.int8)
    minimum = blocks[..., 2:4].copy().view("<f2")[..., 0] if kind == "Q4_1" else None
    nibbles = blocks[..., -GROUP // 2 :]
    # Low nibbles are the first 16 values of a block, high nibbles the others.
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).view(np.int8) - np.int8(8)
    return scale, minimum, codes
