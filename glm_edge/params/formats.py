"""Formats: how the numbers of a compressed weight are stored."""

import re
from dataclasses import dataclass

import jax.numpy as jnp

from glm_edge.errors import BoxError
from glm_edge.kernels import grid, packing

# Types of dense weights and of scales.
FLOATING = ("float32", "float16", "bfloat16")
PLAIN = ("float16", "bfloat16")
QTYPES = (*packing.QTYPES, *PLAIN)
PER_TENSOR = "tensor"
_NOMINAL_BITS = {"ternary": 1.6, "ternary34": 1.25, "nf4": 4, "float16": 16, "bfloat16": 16}


@dataclass(frozen=True)
class Format:
    """How the numbers of a weight are stored, `f' = scale * (level - zero)`.

    Attributes:
      qtype: integers `int8`, `int6`, `int5`, `int4`, `int3`, `int2`; `ternary`, five to a byte;
        `ternary34`, three signs and a zero of each four in five bits; `nf4`, levels that suit a
        normal distribution; or `float16` and `bfloat16`, plain arrays without a scale.
      group_size: columns that share a scale; None for one scale a row (per channel), `tensor` for
        one scale a matrix.
      symmetric: False adds a zero point to integers.
      scale_dtype: type in which scales are stored.
      zero_dtype: of zero points: `int8`, or a floating type for zeros between levels.
    """

    qtype: str = "int8"
    group_size: int | str | None = None
    symmetric: bool = True
    scale_dtype: str = "float32"
    zero_dtype: str = "int8"

    def __post_init__(self) -> None:
        if self.qtype not in QTYPES:
            raise BoxError(
                f"format: qtype {self.qtype!r:.60} is unknown; known: {', '.join(QTYPES)}"
            )
        size = self.group_size
        whole = isinstance(size, int) and not isinstance(size, bool) and size >= 1
        if size not in (None, PER_TENSOR) and not whole:
            raise BoxError(
                f"format: group_size must be positive, None or {PER_TENSOR!r}, not {size!r:.60}"
            )
        if not isinstance(self.symmetric, bool):
            raise BoxError(f"format: symmetric must be True or False, not {self.symmetric!r:.60}")
        if self.plain and (size is not None or not self.symmetric):
            raise BoxError(f"format: {self.qtype} has no scales and no zero points")
        if self.qtype == "ternary34" and whole and size % 4:
            raise BoxError(f"format: groups of ternary34 are whole fours, not {size}")
        if not self.symmetric and self.qtype not in grid.INTEGERS:
            raise BoxError(f"format: {self.qtype} is symmetric; zero points go with integers")
        if self.scale_dtype not in FLOATING:
            raise BoxError(f"format: scale_dtype {self.scale_dtype!r:.60} is not a float type")
        if self.zero_dtype not in ("int8", *FLOATING):
            raise BoxError(
                f"format: zero_dtype must be int8 or a float type: {self.zero_dtype!r:.60}"
            )

    @property
    def plain(self) -> bool:
        """True for a floating type, which needs no box."""
        return self.qtype in PLAIN

    @property
    def bits(self) -> float:
        """Bits a packed code takes, scales apart."""
        return grid.INTEGERS.get(self.qtype) or _NOMINAL_BITS[self.qtype]

    def __str__(self) -> str:
        if self.plain:
            return self.qtype
        if self.group_size is None:
            grouping = "channel"
        else:
            grouping = PER_TENSOR if self.group_size == PER_TENSOR else f"g{self.group_size}"
        return f"{self.qtype}-{grouping}{'' if self.symmetric else '-affine'}"

    @classmethod
    def parse(cls, text: str) -> "Format":
        """Reads `int8`, `int4-g32`, `int4-g32-affine`, `ternary-tensor` and so on.

        Scales are float32 per channel and per tensor, bfloat16 for groups.

        Raises:
          BoxError: the text names no format.
        """
        found = re.fullmatch(r"(\w+?)(?:-(channel|tensor|g(\d+)))?(-affine)?", text)
        if not found:
            raise BoxError(f"format {text!r} is none such as int8, int4-g32, int4-g32-affine")
        qtype, grouping, size, affine = found.groups()
        group_size = int(size) if size else (PER_TENSOR if grouping == PER_TENSOR else None)
        return cls(qtype, group_size, not affine, default_scale_dtype(group_size))

    def num_groups(self, columns: int) -> int:
        """Number of scales that a row has, or shares with all others.

        Raises:
          BoxError: `columns` is not a whole number of groups.
        """
        if self.qtype == "ternary34" and columns % 4:
            raise BoxError(f"{columns} columns are not whole fours, as ternary34 needs")
        if self.group_size in (None, PER_TENSOR):
            return 1
        if columns % self.group_size:
            raise BoxError(f"{columns} columns are not whole groups of {self.group_size}")
        return columns // self.group_size

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a weight `[..., out, in]`."""
        rows = 1 if self.group_size == PER_TENSOR else shape[-2]
        return (*shape[:-2], rows, self.num_groups(shape[-1]))

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a weight `[..., out, in]` takes, scales and zero points included."""
        *leading, rows, columns = shape
        matrices = 1
        for extent in leading:
            matrices *= extent
        if self.plain:
            return 2 * matrices * rows * columns
        scale_rows, groups = self.scale_shape(shape)[-2:]
        each = jnp.dtype(self.scale_dtype).itemsize
        if not self.symmetric:
            each += jnp.dtype(self.zero_dtype).itemsize
        packed = rows * packing.packed_columns(columns, self.qtype)
        return matrices * (packed + scale_rows * groups * each)


def default_scale_dtype(group_size: int | str | None) -> str:
    """bfloat16 for groups, where scales weigh, and float32 for rows and matrices."""
    return "bfloat16" if isinstance(group_size, int) else "float32"
