"""Logical axes of parameters and activations, and their sharding over a mesh of devices.

    mesh = jax.make_mesh((2, 4), ("data", "model"))
    model, params = glm_edge.load("path/to/checkpoint", mesh=mesh)
    with glm_edge.params.sharding.on(mesh):
        logits, _ = jax.jit(model.apply)({"params": params}, tokens)

Sharding changes the devices that compute values, never the values: XLA inserts the communication.
Fused gate and up rows, for instance, are split across devices and combined after the product.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from glm_edge.configs.architecture import ModelConfig
from glm_edge.errors import ConfigError
from glm_edge.kernels import packing
from glm_edge.params.boxes import FakeQuantized, Masked, Quantized, Weight
from glm_edge.params.tree import Params, map_with_path

Axes = tuple[str | None, ...]
Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

RULES: Rules = (
    ("batch", "data"),
    ("vocab", "model"),
    ("heads", "model"),
    ("kv_heads", "model"),
    ("neurons", "model"),
    ("merged", "model"),
    ("projected", "model"),
    ("embed", None),
)
"""Tensor parallelism over the mesh axis `model`, rows of a batch over `data`."""

FULLY_SHARDED: Rules = (*RULES[:-1], ("embed", "data"))
"""`RULES`, with every matrix also split over the mesh axis `data`."""

# The first pattern that matches the end of a path names its axes. Biases and norms have one axis.
_TABLE: tuple[tuple[str, Axes], ...] = (
    (r"(embed|head)/weight", ("vocab", "embed")),
    (r"token_type/weight", ("token_types", "embed")),
    (r"q_proj/weight", ("heads", "embed")),
    (r"q_proj/bias", ("heads",)),
    (r"[kv]_proj/weight", ("kv_heads", "embed")),
    (r"[kv]_proj/bias", ("kv_heads",)),
    (r"o_proj/weight", ("embed", "heads")),
    (r"(gate_up_proj|fc1)/weight", ("neurons", "embed")),
    (r"(gate_up_proj|fc1|linear_1)/bias", ("neurons",)),
    (r"(down_proj|fc2|linear_2)/weight", ("embed", "neurons")),
    (r"linear_1/weight", ("neurons", "merged")),
    (r"merge/weight", ("embed", "merged")),
    (r"(projector/proj|pooler)/weight", ("projected", "embed")),
    (r"pooler/bias", ("projected",)),
    (r"(patch|conv1|conv2)/weight", ("embed", "window")),
    (r"classifier/weight", ("labels", "embed")),
    (r"classifier/bias", ("labels",)),
    (r"[qk]_norm/(weight|bias)", ("head_dim",)),
    (r"(position|row|column)", ("positions", "embed")),
    (r"(\w*norm|o_proj|down_proj|fc2|linear_2|merge|patch|conv1|conv2)/(weight|bias)", ("embed",)),
    (r"(begin|end|probe)", ("embed",)),
)
_PATTERNS = tuple((re.compile(rf"(?:.*/)?{pattern}"), axes) for pattern, axes in _TABLE)


def logical_axes(path: str, shape: tuple[int, ...]) -> Axes:
    """Name the axes of a parameter.

    Args:
      path: parameter path such as `decoder/layers/0/attention/q_proj/weight`.
      shape: shape of the dense array. Leading axes of stacked layers have no name.

    Returns:
      A name or None per axis; all None for an unknown path.
    """
    for pattern, axes in _PATTERNS:
        if pattern.fullmatch(path) and len(axes) <= len(shape):
            return (*[None] * (len(shape) - len(axes)), *axes)
    return (None,) * len(shape)


def named_sharding(
    path: str,
    leaf: Weight | jax.ShapeDtypeStruct,
    mesh: Mesh,
    rules: Rules = RULES,
    config: ModelConfig | None = None,
) -> NamedSharding | meta.AxisMetadata:
    """Return the sharding of a parameter, with equal parts and without splitting heads or groups.

    Args:
      path: parameter path.
      leaf: array, abstract array or box. Only shapes of arrays are used.
      mesh: mesh of devices.
      rules: pairs `(logical axis, mesh axis, tuple of mesh axes or None)`; the first matching
        pair applies. Pairs with axes that `mesh` lacks are ignored.
      config: model configuration, for the count of heads. Without it, key and value heads are
        replicated, and query heads may be split.

    Returns:
      A `NamedSharding`, or for a box the same box with a `NamedSharding` per array.

    Raises:
      ConfigError: the rules name no axis of the mesh.
    """
    mesh, rules = automatic(mesh), _rules_of(mesh, rules)
    axes = logical_axes(path, leaf.shape)
    units = tuple(_units(*axis, path, config) for axis in zip(axes, leaf.shape, strict=True))
    if isinstance(leaf, Masked):
        value = named_sharding(path, leaf.value, mesh, rules, config)
        return leaf.replace(value=value, mask=_sharding(mesh, rules, axes, units))
    if not isinstance(leaf, Quantized | FakeQuantized):
        return _sharding(mesh, rules, axes, units)
    if leaf.kernel_shape:
        axes = (None,) * (len(axes) - len(leaf.kernel_shape) + 2)
        units = (1,) * len(axes)
    scale_rows, groups = leaf.scale.shape[-2:]
    column_units = math.gcd(units[-1], _cuttable(leaf), groups if groups > 1 else 0)
    data = _sharding(mesh, rules, axes, (*units[:-1], column_units))
    rows = units[-2] if scale_rows > 1 else 1
    scale = _sharding(mesh, rules, axes, (*units[:-2], rows, column_units if groups > 1 else 1))
    grid = {"scale": scale, "zero": None if leaf.zero is None else scale}
    if isinstance(leaf, FakeQuantized):
        return leaf.replace(value=data, **grid)
    layers = NamedSharding(mesh, PartitionSpec())
    for side in ("input", "output"):
        static = None if getattr(leaf, f"{side}_scale") is None else layers
        grid |= {f"{side}_scale": static, f"{side}_zero": static}
    return leaf.replace(data=data, **grid)


def _cuttable(leaf: Quantized | FakeQuantized) -> int:
    """Count the parts of a row that end at complete bytes, or 1."""
    columns = leaf.value.shape[-1] if isinstance(leaf, FakeQuantized) else leaf.columns
    unit = 1 if isinstance(leaf, FakeQuantized) else packing.unit(leaf.format.qtype)
    return columns // unit if columns % unit == 0 else 1


def shardings(
    params: Params, mesh: Mesh, rules: Rules = RULES, config: ModelConfig | None = None
) -> Params:
    """Return the `named_sharding` of every parameter.

    Args:
      params: tree of concrete or abstract arrays and boxes.
      mesh: mesh of devices.
      rules: see `named_sharding`.
      config: see `named_sharding`.

    Returns:
      Tree of shardings in the structure of `params`.

    Raises:
      ConfigError: the rules name no axis of the mesh.
    """
    return map_with_path(lambda path, leaf: named_sharding(path, leaf, mesh, rules, config), params)


def shard(
    params: Params, mesh: Mesh, rules: Rules = RULES, config: ModelConfig | None = None
) -> Params:
    """Move parameters onto a mesh.

    Args:
      params: tree of arrays and boxes.
      mesh: mesh of devices.
      rules: see `named_sharding`.
      config: see `named_sharding`.

    Returns:
      The tree with every array sharded by `named_sharding`.

    Raises:
      ConfigError: the rules name no axis of the mesh.
    """
    return jax.device_put(params, shardings(params, mesh, rules, config))


@contextlib.contextmanager
def on(mesh: Mesh, rules: Rules = RULES) -> Iterator[Mesh]:
    """Shard the activations of models and puts new arrays on `mesh`, within a context.

    A compiled function keeps the rules that were active when it was traced.

    Args:
      mesh: mesh of devices.
      rules: see `named_sharding`.

    Yields:
      The mesh with `Auto` axes, see `automatic`.

    Raises:
      ConfigError: the rules name no axis of the mesh.
    """
    mesh, rules = automatic(mesh), _rules_of(mesh, rules)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield mesh


def constrain(x: Array, *axes: str | None) -> Array:
    """Constrain an activation to the sharding of the rules of `on`; the identity outside of `on`.

    Args:
      x: any array.
      axes: name or None per axis. An axis that the devices do not divide is replicated. XLA
        decides for an array with another count of axes.

    Returns:
      The array with the same values.
    """
    rules = nn.get_logical_axis_rules()
    sizes = jax.sharding.get_abstract_mesh().shape
    if not rules or not sizes or x.ndim != len(axes):
        return x
    cut = tuple(nn.logical_to_mesh_axes(axes, rules) or ())
    names = [
        name if x.shape[index] % _num_shards(sizes, cut[index]) == 0 else None
        for index, name in enumerate(axes)
    ]
    return nn.with_logical_constraint(x, tuple(names))


def automatic(mesh: Mesh) -> Mesh:
    """Return the mesh with `Auto` axes, along which XLA decides how products are sharded."""
    return mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _rules_of(mesh: Mesh, rules: Rules) -> Rules:
    """Select the rules whose mesh axes exist; other axes are replicated."""
    known = [
        (name, target)
        for name, target in rules
        if target and set(_as_tuple(target)) <= set(mesh.axis_names)
    ]
    if not known:
        named = sorted({axis for _, target in rules for axis in _as_tuple(target)})
        raise ConfigError(
            f"mesh with axes {tuple(mesh.axis_names)}: the sharding rules name none of them, only "
            f"{tuple(named)}; rename the mesh's axes, or pass rules"
        )
    return tuple(known)


def _as_tuple(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (target,) if isinstance(target, str) else tuple(target or ())


def _num_shards(sizes: dict[str, int], target: str | tuple[str, ...] | None) -> int:
    return math.prod(sizes[axis] for axis in _as_tuple(target))


def _sharding(mesh: Mesh, rules: Rules, axes: Axes, units: tuple[int, ...]) -> NamedSharding:
    """Split each axis if the devices along its mesh axis divide its count of units."""
    cut = tuple(nn.logical_to_mesh_axes(axes, rules) or ())
    spec = [
        target if count % _num_shards(mesh.shape, target) == 0 else None
        for target, count in zip(cut, units, strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*spec))


def _units(name: str | None, size: int, path: str, config: ModelConfig | None) -> int:
    """Count the indivisible parts of an axis: heads, or otherwise single rows or columns."""
    if name not in ("heads", "kv_heads"):
        return size
    if config is None:
        return size if name == "heads" else 1
    part: Any = getattr(config, path.split("/", 1)[0], config)
    layer = re.search(r"layers/(\d+)/", path)
    # A pooling head has the widths after those of the layers.
    return getattr(part, name)(int(layer[1]) if layer else part.num_layers)
