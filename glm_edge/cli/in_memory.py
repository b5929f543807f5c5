"""Compression of a complete checkpoint in memory, in float32."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import glm_edge as ge
from glm_edge.compress.report import Report, Row
from glm_edge.params import FakeQuantized, Masked, is_box, path_items, stored_bytes
from glm_edge.params.tree import Params, map_with_path

# Type in which recipes compute.
WIDE = jnp.dtype("float32")


def load_wide(source: Path) -> tuple[nn.Module, Params, Params]:
    """Load a checkpoint in float32.

    Args:
      source: directory of the checkpoint.

    Returns:
      `(model, params, stored)`: the model, float32 parameters, and abstract parameters of the
      stored types.
    """
    model, params = ge.load(source)
    stored = jax.eval_shape(lambda tree: tree, params)
    return model, ge.params.cast(params, WIDE), stored


def as_stored(params: Params, stored: Params, report: Report) -> tuple[Params, Report]:
    """Cast parameters back to their stored types.

    Parameters that are float32 after the recipe return to the source's type. Parameters with
    another type from the recipe (integers, float16) keep it. A new parameter gets the type of all
    source parameters, if they have one type.

    Args:
      params: parameters after the recipe, which computed in float32.
      stored: abstract parameters of the source, from `load_wide`.
      report: report of the recipe.

    Returns:
      `(parameters, report)`; the report's bytes are those of the stored checkpoints.
    """
    sources = dict(path_items(stored))
    types = {path: _type_of(leaf) for path, leaf in sources.items()}
    present = {dtype for dtype in types.values() if dtype is not None}
    common = present.pop() if len(present) == 1 else None

    again: set[str] = set()

    def narrow(path: str, leaf: Any) -> Any:
        dtype = types.get(path, common)
        if dtype is None or dtype.itemsize >= WIDE.itemsize or _type_of(leaf) != WIDE:
            return leaf
        # Weights that the recipe prepared for rounding would otherwise round to different codes.
        if isinstance(leaf, FakeQuantized) and not isinstance(sources.get(path), FakeQuantized):
            return leaf
        again.add(str(dtype))
        return ge.params.cast({path: leaf}, dtype)[path]

    narrowed = map_with_path(narrow, params)
    notes = report.notes
    if again:
        names = ", ".join(sorted(again))
        notes += (f"computed in float32; floating-point parameters are stored as {names} again",)
    report = dataclasses.replace(
        report,
        rows=tuple(_restated(report.rows, types, common, sources)),
        bytes_before=stored_bytes(stored),
        bytes_after=stored_bytes(narrowed),
        notes=notes,
    )
    return narrowed, report


def _type_of(leaf: Any) -> Any:
    """Return the floating-point type of an array or a masked array, None for integers."""
    if isinstance(leaf, Masked | FakeQuantized):
        return _type_of(leaf.value)
    if is_box(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return None
    return jnp.dtype(leaf.dtype)


def _restated(
    rows: Iterable[Row], types: Mapping[str, Any], common: Any, stored: Mapping[str, Any]
) -> Iterable[Row]:
    """Replace the float32 bytes in rows with those of the stored types."""
    last: dict[str, tuple[int, int]] = {}
    fixed: set[str] = set()
    for row in rows:
        path, before, after, bits = row.path, row.bytes_before, row.bytes_after, row.bits
        dtype = types.get(path, common)
        spared = 0 if dtype is None else max(0, WIDE.itemsize - dtype.itemsize)
        if path in last and before == last[path][0]:
            before = last[path][1]
        elif path in stored and path not in last:
            size = stored_bytes(stored[path])
            wide = (
                size + spared * math.prod(stored[path].shape) if types[path] is not None else size
            )
            before = size if before == wide else before
        # A transform that rounds chooses the type of its result.
        if row.transform.startswith("quantize."):
            fixed.add(path)
        if spared and path not in fixed and bits >= 8 * WIDE.itemsize:
            after -= round(spared * 8 * after / bits)
            bits -= 8 * spared
        last[path] = (row.bytes_after, after)
        yield dataclasses.replace(row, bytes_before=before, bytes_after=after, bits=bits)
