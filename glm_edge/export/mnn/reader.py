"""Reader of the weights of an exported directory of MNN graphs."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from glm_edge.errors import ExportError
from glm_edge.export.common.directory import map_weights, read_description
from glm_edge.export.common.parsing import PARSE_ERRORS
from glm_edge.export.common.weights import RANGES, Weight

BITS = {"int8": 8, "int4": 4}
# Most bytes before a weight's codes: a mark, two extents, and all levels.
HEADER_BYTES = 1 + 8 + 1 + 256


def read_weights(
    path: str | Path, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Weight]:
    """Read the quantized weights of an exported directory as its convolutions read them.

    Args:
      path: path of the directory.
      shapes: dense shapes of the parameters by path; None uses those of the file, and only the
        file's size then limits memory.

    Returns:
      Codes and scales by parameter path.

    Raises:
      ExportError: the directory is missing, damaged, or not a glm_edge export.
    """
    path, weights = Path(path), {}
    description = read_description(path)
    try:
        content = map_weights(path)
        for name, (wide, start, length, scales) in description["parameters"].items():
            stored = content[start : start + length + scales]
            shape = _shape(stored, wide)
            if shapes is not None and shapes.get(name) != shape:
                raise ValueError(f"{name}: shape {shape}, expected the model's {shapes.get(name)}")
            if max(length, scales // 4) > HEADER_BYTES + math.prod(shape):
                raise ValueError(
                    f"{name}: {length} bytes of codes and {scales} of scales do not fit shape "
                    f"{shape}"
                )
            weights[name] = _weight(np.array(stored), length, wide)
    except (OSError, *PARSE_ERRORS) as error:
        raise ExportError(f"{path}: not a complete glm_edge MNN export: {error}") from error
    return weights


def _shape(content: np.ndarray, wide: bool) -> tuple[int, ...]:
    extents = content[1:9].tobytes() if wide else content[1:5].tobytes()
    return tuple(np.frombuffer(extents, np.uint32 if wide else np.uint16).tolist())


def _weight(content: np.ndarray, length: int, wide: bool) -> Weight:
    """Read the weight that `_Writer.quantized` wrote."""
    header, shape = 9 if wide else 5, _shape(content, wide)
    kind = "int8" if content[header] == 0 else "int4"
    codes = content[header + 1 + 2 ** BITS[kind] : length]
    if kind == "int4":
        codes = np.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)[: shape[0] * shape[1]]
    codes = (codes.astype(np.int16) + RANGES[kind][0]).astype(np.int8).reshape(shape)
    scale = content[length:].view(np.float32).reshape(shape[0], -1)
    groups = scale.shape[1]
    return Weight(codes, kind, scale, None, shape[1] // groups if groups > 1 else 0)
