"""AWQ checkpoints (AutoAWQ) in the layout `gemm`.

`qweight` is int32 [I, O / 8] and `qzeros` int32 [G, O / 8], both packed along the outputs. The
eight codes of a word are those of the outputs 0, 2, 4, 6, 1, 3, 5, 7, lowest bits first. `scales`
is [G, O].
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from glm_edge.checkpoint.hugging_face.fields import Fields
from glm_edge.checkpoint.hugging_face.quantized.matrix import (
    SCALE_TYPES,
    Codes,
    PackedMatrix,
    StoredModule,
    format_of,
    read_group_size,
)
from glm_edge.checkpoint.hugging_face.quantized.words import signed, unpack_words

BITS = 4
MIDDLE = 1 << (BITS - 1)
PER_WORD = 8
# Position in its word of each of eight outputs: the inverse of 0, 2, 4, 6, 1, 3, 5, 7.
POSITIONS = (0, 4, 1, 5, 2, 6, 3, 7)
# Fields of calibration and of kernels.
UNUSED = (
    "backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "lm_head", "meta", "method",
    "modules_to_fuse", "modules_to_not_convert", "quant_method", "desc_act",
)  # fmt: skip


@dataclass(frozen=True)
class AWQ:
    """Options of an AWQ checkpoint.

    Attributes:
      group_size: columns per group, None for one scale per row.
    """

    group_size: int | None
    name: ClassVar[str] = "awq"
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    def is_quantized(self, module: StoredModule) -> bool:
        """Test for packed codes."""
        return "qweight" in module.names

    def open(self, module: StoredModule) -> PackedMatrix:
        """Check the headers of a module's tensors.

        Args:
          module: the module.

        Returns:
          The matrix.

        Raises:
          CheckpointError: a tensor is missing, or has a wrong type or shape.
        """
        columns, words = module.info("qweight", "I32").shape
        groups = module.groups(columns, self.group_size, "qweight")
        module.check("scales", (groups, words * PER_WORD), *SCALE_TYPES)
        module.check("qzeros", (groups, words), "I32")
        return PackedMatrix(
            f"{module.name}.weight",
            module.files["qweight"].path,
            (words * PER_WORD, columns),
            format_of(module, "scales", BITS, self.group_size, False),
            functools.partial(_read, module),
        )


def _read(module: StoredModule) -> Codes:
    scale = np.ascontiguousarray(module.read("scales").T)
    return Codes(_unpack(module.read("qweight")), scale, _unpack(module.read("qzeros")))


def _unpack(words: np.ndarray) -> np.ndarray:
    """Unpack int32 [N, O / 8] to int8 [O, N]."""
    rows, count = words.shape
    codes = unpack_words(words, count * PER_WORD, BITS).reshape(rows, count, PER_WORD)
    return signed(codes[..., POSITIONS].reshape(rows, -1).T, MIDDLE)


def read_config(fields: Fields) -> AWQ:
    """Read the options of a `quantization_config`.

    Args:
      fields: fields of the section.

    Returns:
      The options.

    Raises:
      ConfigError: a field is missing, malformed or unsupported.
    """
    for name in ("version", "format", "checkpoint_format"):
        fields.expect(name, "gemm", "GEMM")
    for name in ("bits", "w_bit"):
        fields.expect(name, BITS)
    fields.expect("zero_point", True)
    fields.expect("sym", False)
    for name in UNUSED:
        fields.take(name)
    older = read_group_size(fields, "q_group_size")
    options = AWQ(older if older is not None else read_group_size(fields, "group_size"))
    fields.finish()
    return options
