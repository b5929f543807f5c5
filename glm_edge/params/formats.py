"""Storage formats of compressed weights."""

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

    A format is written as a string of parts separated by `-`:

        <type>[-channel | -tensor | -g<columns>][-affine][-scale=<type>][-zero=<type>]

    - The type comes first: `int8`, `int6`, `int5`, `int4`, `int3`, `int2`, `ternary`, `ternary34`,
      `nf4`, `float16` or `bfloat16`. `float16` and `bfloat16` have no other parts.
    - The grouping sets the weights that share a scale: `channel` (the default) one row, `tensor`
      one matrix, `g32` 32 columns (inputs) of one row.
    - `affine` adds a zero point to integers and to `ternary`. Without it, a format is symmetric.
    - `scale=` is the type of stored scales: `float32`, `float16` or `bfloat16`. The default is
      `bfloat16` per group, and `float32` per channel or tensor.
    - `zero=` is the type of zero points: `int8` (the default of integers), or a floating type for
      zero points between levels. `ternary` has a default of `bfloat16`: its weights are `scale *
      code + offset` with `offset = -scale * zero`.

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
    >>> Format.parse("ternary-g128-affine").zero_dtype
    'bfloat16'
    >>> Format.parse("int7-g32")
    Traceback (most recent call last):
        ...
    glm_edge.errors.BoxError: format 'int7-g32': 'int7' is not a type; types: int8, ...
    >>> Format.parse("int4-32")
    Traceback (most recent call last):
        ...
    glm_edge.errors.BoxError: format 'int4-32': '32' is not a part; parts after the type: ...

    Attributes:
      qtype: integers `int8`, `int6`, `int5`, `int4`, `int3`, `int2`; `ternary`, five per byte;
        `ternary34`, three signs and one zero per four weights in five bits; `nf4`, quantiles of a
        normal distribution; or `float16` and `bfloat16`, plain arrays without a scale.
      group_size: columns that share a scale; None for one scale per row (per channel), `tensor` for
        one scale per matrix.
      symmetric: False adds a zero point to integers and to `ternary`.
      scale_dtype: type of stored scales.
      zero_dtype: type of zero points: `int8`, or a floating type for zeros between levels.

    References:
      QLoRA (`nf4`), https://arxiv.org/abs/2305.14314.
      PT2-LLM (affine `ternary`), https://arxiv.org/abs/2510.03267.
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
            raise BoxError(f"format: group_size of ternary34 must be a multiple of 4, not {size}")
        if not self.symmetric and self.qtype not in (*quantization.INTEGERS, "ternary"):
            raise BoxError(
                f"format: {self.qtype} is symmetric; only integers and ternary have zero points"
            )
        if self.scale_dtype not in FLOATING:
            raise BoxError(f"format: scale_dtype {self.scale_dtype!r:.60} is not a float type")
        if self.zero_dtype not in ("int8", *FLOATING):
            raise BoxError(
                f"format: zero_dtype must be int8 or a float type: {self.zero_dtype!r:.60}"
            )

    @property
    def plain(self) -> bool:
        """True for a floating type, which is stored as a plain array."""
        return self.qtype in PLAIN

    @property
    def bits(self) -> float:
        """Bits per packed code, without scales."""
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
        if self.zero_dtype != default_zero_dtype(self.qtype, self.symmetric):
            parts.append(f"zero={self.zero_dtype}")
        return "-".join(parts)

    @classmethod
    def parse(cls, text: str) -> "Format":
        """Read a format string such as `int4-g32-affine`; the inverse of `str`.

        Args:
          text: string in the grammar of the class's docstring.

        Returns:
          The format.

        Raises:
          BoxError: a part is wrong. The message names it and lists valid parts.
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
        group_size, symmetric = fields.get("group_size"), not fields.get("affine", False)
        try:
            return cls(
                qtype,
                group_size,
                symmetric,
                fields.get("scale", default_scale_dtype(group_size)),
                fields.get("zero", default_zero_dtype(qtype, symmetric)),
            )
        except BoxError as error:
            raise BoxError(f"{where}: {str(error).removeprefix('format: ')}") from error

    @property
    def columns_per_scale(self) -> int:
        """Return the columns of a group, or 0 for one scale per row or per tensor."""
        return self.group_size if isinstance(self.group_size, int) else 0

    def num_groups(self, columns: int) -> int:
        """Count the scales per row, or 1 for one scale per tensor.

        Args:
          columns: columns per row.

        Returns:
          Count of groups.

        Raises:
          BoxError: `columns` is not a multiple of the group size.
        """
        if self.qtype == "ternary34" and columns % 4:
            raise BoxError(f"{columns} columns are not a multiple of 4, which ternary34 requires")
        if not isinstance(self.group_size, int):
            return 1
        if columns % self.group_size:
            raise BoxError(f"{columns} columns do not divide into groups of {self.group_size}")
        return columns // self.group_size

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the scales of a weight `[..., out, in]`."""
        rows = 1 if self.group_size == PER_TENSOR else shape[-2]
        return (*shape[:-2], rows, self.num_groups(shape[-1]))

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a weight `[..., out, in]`, including scales and zero points."""
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
    """Return the option and the value of a part of a format."""
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
                f"{where}: {dtype!r:.60} is not a {option} type; types: {', '.join(known)}"
            )
        return option, dtype
    raise BoxError(f"{where}: {part!r:.60} is not a part; parts after the type: {_PARTS}")


def default_scale_dtype(group_size: int | str | None) -> str:
    """Return bfloat16 for groups, which have many scales, and float32 for rows and matrices."""
    return "bfloat16" if isinstance(group_size, int) else "float32"


def default_zero_dtype(qtype: str, symmetric: bool) -> str:
    """Return bfloat16 for affine `ternary`, whose zero points are between levels, and else int8."""
    return "bfloat16" if qtype == "ternary" and not symmetric else "int8"
