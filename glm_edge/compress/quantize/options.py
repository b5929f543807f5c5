"""Options that transforms which round weights have in common."""

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

from glm_edge.compress.rounding.grid import SCALES
from glm_edge.compress.transform import check_pattern
from glm_edge.errors import BoxError, RecipeError
from glm_edge.params import Format
from glm_edge.params.formats import default_scale_dtype


def format_options(
    transform: str,
    bits: int | None,
    group_size: int | str | None = None,
    symmetric: bool = True,
    scale_dtype: str | None = None,
    qtype: str | None = None,
    zero_dtype: str = "int8",
) -> Format:
    """The format that a transform's options name.

    Args:
      transform: name, for messages.
      bits: 8, 4, 3 or 2 for integers; not read when `qtype` is given.
      group_size: columns that share a scale; None per channel, `tensor` for one scale a matrix.
      symmetric: False for affine.
      scale_dtype: None is float32 per channel and bfloat16 for groups.
      qtype: see `glm_edge.params.Format`; None is integers of `bits`.
      zero_dtype: of zero points.

    Returns:
      The format.

    Raises:
      RecipeError: there is none such.
    """
    if qtype is None and (not isinstance(bits, int) or bits not in (8, 4, 3, 2)):
        raise RecipeError(
            f"{transform}: bits must be 8, 4, 3 or 2, not {bits!r}; other formats go by qtype="
        )
    held = scale_dtype or default_scale_dtype(group_size)
    try:
        return Format(qtype or f"int{bits}", group_size, symmetric, held, zero_dtype)
    except BoxError as error:
        raise RecipeError(f"{transform}: {error}") from error


def check_rounding(
    transform: str, where: str | None, scale: str, format: Format, fallback_bits: int | None
) -> None:
    """Checks the options `where`, `scale` and `fallback_bits`.

    Raises:
      RecipeError: one has no meaning.
    """
    check_pattern(transform, "where", where)
    if scale not in SCALES:
        raise RecipeError(f"{transform}: scale must be one of {', '.join(SCALES)}, not {scale!r}")
    if scale == "extreme" and (not format.symmetric or not format.qtype.startswith("int")):
        raise RecipeError(
            f"{transform}: scale='extreme' is for symmetric integers; {format} takes max or mse"
        )
    if fallback_bits is not None:
        format_options(transform, fallback_bits)


def fitting(path: str, columns: int, wanted: Format, fallback_bits: int | None) -> Format:
    """The wanted format, or the fallback where columns are not whole groups.

    Raises:
      RecipeError: there is no fallback.
    """
    try:
        wanted.num_groups(columns)
    except BoxError as error:
        if fallback_bits is not None:
            return Format(f"int{fallback_bits}", None, wanted.symmetric)
        raise RecipeError(
            f"{path}: {error}; choose a divisor, or fallback_bits=8 to round such a matrix per "
            "channel"
        ) from error
    return wanted


def check_groups(
    transform: str, shapes: Mapping[str, tuple[int, ...]], options: Mapping[str, Any]
) -> None:
    """Refuses matrices whose columns are not whole groups.

    Args:
      transform: name, for messages.
      shapes: of the matrices by path.
      options: of the transform.

    Raises:
      RecipeError: one does not fit, and there is no fallback.
    """
    names = inspect.signature(format_options).parameters
    format = format_options(transform, **{k: v for k, v in options.items() if k in names})
    stacked = re.compile(options.get("stacked") or "(?!)")
    for path, shape in shapes.items():
        columns = columns_of(path, shape, bool(stacked.search(path)))
        fitting(path, columns, format, options.get("fallback_bits"))


def columns_of(path: str, shape: tuple[int, ...], stacked: bool = False) -> int:
    """Columns of a parameter seen as `[out, in]`; a leaf named `kernel` is `[..., in, out]`.

    Args:
      path: of the parameter.
      shape: of its dense array.
      stacked: a kernel's first axis is a layer axis.
    """
    return math.prod(shape[stacked:-1]) if path.rsplit("/", 1)[-1] == "kernel" else shape[-1]


def spelled_out(values: dict[str, Any], *objects: str) -> dict[str, Any]:
    """The arguments of a factory, `locals()`, as options of its transform."""
    return {name: value for name, value in values.items() if name not in objects}
