"""Placement of a checkpoint's arrays: on the default device, or as shards on a mesh."""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from glm_edge import params as boxes
from glm_edge.checkpoint.safetensors import to_device
from glm_edge.configs.architecture import ModelConfig
from glm_edge.params.sharding import RULES, Rules, shardings
from glm_edge.params.tree import Params


class TensorFile(Protocol):
    """A file whose tensors are read on demand, such as `SafetensorsFile`."""

    def read(self, name: str) -> np.ndarray:
        """Read a tensor."""

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read `tensor[start:stop]`."""


@dataclass(frozen=True)
class Destination:
    """Destination of one array.

    Attributes:
      shape: global shape of the array.
      sharding: sharding on a mesh, or None for the default device.
    """

    shape: tuple[int, ...]
    sharding: NamedSharding | None = None

    @property
    def rows(self) -> tuple[int, int] | None:
        """Rows (first, one past the last) that this process needs, None for all."""
        if self.sharding is None or not self.shape:
            return None
        indices = self.sharding.addressable_devices_indices_map(self.shape).values()
        spans = [index[0].indices(self.shape[0]) for index in indices if index]
        rows = min(start for start, _, _ in spans), max(stop for _, stop, _ in spans)
        return None if rows == (0, self.shape[0]) else rows

    def read(self, file: TensorFile, name: str) -> np.ndarray:
        """Read a tensor of this shape, or only the rows that this process needs."""
        return file.read(name) if self.rows is None else file.read_rows(name, *self.rows)

    def put(self, array: np.ndarray) -> jax.Array:
        """Move the complete array, or the rows from `read`, to the devices of this process."""
        if self.sharding is None:
            return to_device(array)
        skipped = 0 if array.shape == self.shape or self.rows is None else self.rows[0]

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            if skipped and index:
                index = (slice(index[0].start - skipped, index[0].stop - skipped), *index[1:])
            return array[index]

        return jax.make_array_from_callback(self.shape, self.sharding, part)


@dataclass(frozen=True)
class Placement:
    """Placement of a checkpoint's arrays on devices.

    Attributes:
      mesh: mesh of devices, or None for the default device.
      rules: sharding rules, see `glm_edge.params.sharding`.
    """

    mesh: Mesh | None = None
    rules: Rules = RULES

    def plan(self, params: Params, config: ModelConfig | None) -> dict[str, Destination]:
        """Plan the destination of every array.

        Args:
          params: tree of concrete or abstract arrays and boxes.
          config: configuration of the model.

        Returns:
          Destination by name of `glm_edge.params.to_flat`.

        Raises:
          ConfigError: the rules name no axis of the mesh.
        """
        shapes = {name: tuple(array.shape) for name, array in boxes.to_flat(params)[0].items()}
        if self.mesh is None:
            return {name: Destination(shape) for name, shape in shapes.items()}
        spread: dict[str, Any] = boxes.to_flat(shardings(params, self.mesh, self.rules, config))[0]
        return {name: Destination(shape, spread[name]) for name, shape in shapes.items()}
