"""Boxed parameters, paths and rules over them, byte counts, flat storage, and meshes of devices."""

from glm_edge.params import sharding
from glm_edge.params.boxes import (
    FakeQuantized,
    Masked,
    Narrow,
    Quantized,
    array_fields,
    dense,
    fake_quantized,
    is_box,
    mask,
    narrow,
    quantized,
)
from glm_edge.params.flat import from_flat, to_flat
from glm_edge.params.formats import Format
from glm_edge.params.linear import linear, lookup
from glm_edge.params.sharding import logical_axes, shard
from glm_edge.params.tree import (
    cast,
    combine,
    count,
    is_matrix,
    map_with_path,
    partition,
    path_items,
    select,
    stored_bytes,
)

__all__ = [
    "FakeQuantized",
    "Format",
    "Masked",
    "Narrow",
    "Quantized",
    "array_fields",
    "cast",
    "combine",
    "count",
    "dense",
    "fake_quantized",
    "from_flat",
    "is_box",
    "is_matrix",
    "linear",
    "logical_axes",
    "lookup",
    "map_with_path",
    "mask",
    "narrow",
    "partition",
    "path_items",
    "quantized",
    "select",
    "shard",
    "sharding",
    "stored_bytes",
    "to_flat",
]


def __dir__() -> list[str]:
    return __all__
