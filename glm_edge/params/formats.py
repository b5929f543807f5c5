"""Formats: how the values of a compressed weight are stored."""

import re
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from glm_edge.errors import BoxError
from glm_edge.kernels import packing, quantization

# Types of dense weights and of scales.
FLOATING = ("float32", "float16", "bfloat16")
PLAIN = ("float16", "bfloat16")
QTYPES = (*packing.QTYPES, *PLAIN)
PER_TENSOR = "tensor"
_NOMINAL_BITS = {"ternary": 1.6, "ternary34": 1.25, "nf4": 4, "float16": 16, "bfloat16": 16}


_GROUP = re.compile(r"g([1-9]\d{0,8})")
_PARTS = (
    "channel, tensor or g<columns> such as g32; affine; scale=<type>; zero=<type>, with types "
    f"{', '.join(FLOATING)} (and int8 for zero)"
)


@dataclass(frozen=True)
class Format:
    """Storage of the values of a weight, `w' = scale * (level - zero)`.

    A format is written as a string of parts with `-` between them:

        <type>[-channel | -tensor | -g<columns>][-affine][-scale=<type>][-zero=<type>]

    - The type comes first: `int8`, `int6`, `int5`, `int4`, `int3`, `int2`, `ternary`, `ternary34`,
      `nf4`, `float16` or `bfloat16`. `float16` and `bfloat16` stand alone.
    - The grouping says which weights share a scale: `channel` (the default) a row, `tensor` a
      matrix, `g32` 32 columns (inputs) of a row.
    - `affine` adds a zero point to integers; without it a format is symmetric.
    - `scale=` is the type of stored scales: `float32`, `float16` or `bfloat16`. Without it,
      scales of groups are `bfloat16` and others `float32`.
    - `zero=` is the type of zero points: `int8`, the default, or a floating type for zero points
      between levels.

    >>> Format.parse("int8")
    Format(qtype='int8', group_size=None, symmetric=True, scale_dtype='float32', zero_dtype='int8')
    >>> Format.parse("int4-g32-affine").group_size
    32
    >>> Format.parse("ternary-tensor").scale_dtype
    'float32'
    >>> str(Format("int4", 32, scale_dtype="float16"))
    'int4-g32-scale=float16'
    >>> Format.parse("int4-g64-affine-zero=float16") == Format(
    ...     "int4", 64, False, "bfloat16", "float16"
    ... )
    True
    >>> Format.parse("int7-g32")
    Traceback (most recent call last):
        ...
    glm_edge.errors.BoxError: format 'int7-g32': 'int7' is not a type; types: int8, ...
    >>> Format.parse("int4-32")
    Traceback (most recent call last):
        ...
    glm_edge.errors.BoxError: format 'int4-32': '32' is not a part; after the type come: ...

    Attributes:
      qtype: integers `int8`, `int6`, `int5`, `int4`, `int3`, `int2`; `ternary`, five to a byte;
        `ternary34`, three signs and a zero of each four in five bits; `nf4`, levels that suit a
        normal distribution; or `float16` and `bfloat16`, plain arrays without a scale.
      group_size: columns that share a scale; None for one scale per row (per channel), `tensor` for
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
        count = size if isinstance(size, int) and not isinstance(size, bool) else 0
        if size not in (None, PER_TENSOR) and count < 1:
            raise BoxError(
                f"format: group_size must be positive, None or {PER_TENSOR!r}, not {size!r:.60}"
            )
        if not isinstance(self.symmetric, bool):
            raise BoxError(f"format: symmetric must be True or False, not {self.symmetric!r:.60}")
        if self.plain and (size is not None or not self.symmetric):
            raise BoxError(f"format: {self.qtype} has no scales and no zero points")
        if self.qtype == "ternary34" and count % 4:
            raise BoxError(f"format: groups of ternary34 are whole fours, not {size}")
        if not self.symmetric and self.qtype not in quantization.INTEGERS:
            raise BoxError(f"format: {self.qtype} is symmetric; zero points go with integers")
        if self.scale_dtype not in FLOATING:
            raise BoxError(f"format: scale_dtype {self.scale_dtype!r:.60} is not a float type")
        if self.zero_dtype not in ("int8", *FLOATING):
            raise BoxError(
                f"format: zero_dtype must be int8 or a float type: {self.zero_dtype!r:.60}"
            )

    @property
    def plain(self) -> bool:
        """Tests for a floating type, which needs no box."""
        return self.qtype in PLAIN

    @property
    def bits(self) -> float:
        """Bits a packed code takes, scales apart."""
        return quantization.INTEGERS.get(self.qtype) or _NOMINAL_BITS[self.qtype]

    def __str__(self) -> str:
        if self.plain:
            return self.qtype
        if self.group_size is None:
            grouping = "channel"
        else:
            grouping = PER_TENSOR if self.group_size == PER_TENSOR else f"g{self.group_size}"
        parts = [self.qtype, grouping]
        if not self.symmetric:
            parts.append("affine")
        if self.scale_dtype != default_scale_dtype(self.group_size):
            parts.append(f"scale={self.scale_dtype}")
        if self.zero_dtype != "int8":
            parts.append(f"zero={self.zero_dtype}")
        return "-".join(parts)

    @classmethod
    def parse(cls, text: str) -> "Format":
        """Reads a format, such as `int4-g32-affine`; the inverse of `str`.

        Args:
          text: as the docstring of the class explains it.

        Returns:
          The format.

        Raises:
          BoxError: a part is wrong; the message says which, and what is right.
        """
        if not isinstance(text, str):
            raise BoxError(f"a format is a string such as 'int4-g32', not {text!r:.60}")
        qtype, *parts = text.split("-")
        where = f"format {text!r:.60}"
        if qtype not in QTYPES:
            raise BoxError(f"{where}: {qtype!r:.60} is not a type; types: {', '.join(QTYPES)}")
        fields: dict[str, Any] = {}
        for part in parts:
            option, value = _read_part(where, part)
            if option in fields:
                raise BoxError(f"{where}: {part!r:.60} repeats another part")
            fields[option] = value
        group_size = fields.get("group_size")
        try:
            return cls(
                qtype,
                group_size,
                not fields.get("affine", False),
                fields.get("scale", default_scale_dtype(group_size)),
                fields.get("zero", "int8"),
            )
        except BoxError as error:
            raise BoxError(f"{where}: {str(error).removeprefix('format: ')}") from error

    @property
    def columns_per_scale(self) -> int:
        """Returns the columns of a group, or 0 for one scale per row or per tensor."""
        return self.group_size if isinstance(self.group_size, int) else 0

    def num_groups(self, columns: int) -> int:
        """Counts the scales of a row, one where all rows share it.

        Raises:
          BoxError: `columns` is not a whole number of groups.
        """
        if self.qtype == "ternary34" and columns % 4:
            raise BoxError(f"{columns} columns are not whole fours, as ternary34 needs")
        if not isinstance(self.group_size, int):
            return 1
        if columns % self.group_size:
            raise BoxError(f"{columns} columns are not whole groups of {self.group_size}")
        return columns // self.group_size

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the scales of a weight `[..., out, in]`."""
        rows = 1 if self.group_size == PER_TENSOR else shape[-2]
        return (*shape[:-2], rows, self.num_groups(shape[-1]))

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Counts the bytes of a weight `[..., out, in]`, scales and zero points included."""
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


def _read_part(where: str, part: str) -> tuple[str, Any]:
    """Returns what a part of a format says: the option and its value."""
    group = _GROUP.fullmatch(part)
    if part in ("channel", PER_TENSOR) or group:
        size = PER_TENSOR if part == PER_TENSOR else None
        return "group_size", int(group[1]) if group else size
    if part == "affine":
        return "affine", True
    option, _, dtype = part.partition("=")
    if option in ("scale", "zero"):
        known = FLOATING if option == "scale" else ("int8", *FLOATING)
        if dtype not in known:
            raise BoxError(
                f"{where}: {dtype!r:.60} is not a type of a {option}; types: {', '.join(known)}"
            )
        return option, dtype
    raise BoxError(f"{where}: {part!r:.60} is not a part; after the type come: {_PARTS}")


def default_scale_dtype(group_size: int | str | None) -> str:
    """Returns bfloat16 for groups, whose scales take space, and float32 for rows and matrices."""
    return "bfloat16" if isinstance(group_size, int) else "float32"
