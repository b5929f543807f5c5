"""A member of the family: maps between its config.json and tensors and ours."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import numpy as np

from glm_edge.checkpoint.hugging_face.fields import Fields

Arrays = tuple[np.ndarray, ...]


def _unchanged(*arrays: np.ndarray) -> Arrays:
    return arrays


@dataclass(frozen=True)
class TensorMapping:
    """A map between our parameters and the file's tensors with the same values.

    Attributes:
      paths: paths of our parameters.
      names: names of the tensors.
      read: converts the tensors to our arrays, in the orders of `names` and `paths`.
      write: the inverse of `read`.
      by_rows: False if `read` and `write` do more than split, join and reorder rows. Codes and
        scales of a quantized matrix can be converted by rows only.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    read: Callable[..., Arrays] = _unchanged
    write: Callable[..., Arrays] = _unchanged
    by_rows: bool = True

    @property
    def unchanged(self) -> bool:
        """True if our array equals the tensor."""
        return self.read is _unchanged


@dataclass(frozen=True)
class FamilyMember:
    """One `model_type` of config.json.

    Attributes:
      read_config: converts the fields and the model's name to our configuration.
      write_config: converts our configuration to the fields; raises ConfigError if this member
        cannot express it.
      build: builds the module of our configuration.
      entries: lists all parameters of a configuration.
      renames: `(pattern, replacement)` pairs, applied in order, from the names of other dialects
        to the names of `entries`.
      ignored: regular expression of stored tensors that are not read.
      module_renames: `(pattern, replacement)` pairs from the names of `entries` to the names of
        transformers' modules, where these differ.
    """

    read_config: Callable[[Fields, str], Any]
    write_config: Callable[[Any], dict[str, Any]]
    build: Callable[[Any], nn.Module]
    entries: Callable[[Any], list[TensorMapping]]
    renames: tuple[tuple[str, str], ...] = ()
    ignored: Callable[[Any], str] = lambda config: r"(?!)"
    module_renames: tuple[tuple[str, str], ...] = ()


def same(path: str, name: str, *fields: str) -> list[TensorMapping]:
    """Map `path/field` to `name.field` without conversion."""
    return [
        TensorMapping((f"{path}/{field}",), (f"{name}.{field}",)) for field in fields or ("weight",)
    ]


def split(paths: tuple[str, ...], name: str) -> TensorMapping:
    """Map matrices (or biases) of equal height to one tensor that stacks them."""
    return TensorMapping(
        paths,
        (name,),
        read=lambda stacked: tuple(np.split(stacked, len(paths))),
        write=lambda *parts: (np.concatenate(parts),),
    )


def join(path: str, names: tuple[str, ...]) -> TensorMapping:
    """Map one matrix (or bias) to several tensors that store its rows."""
    return TensorMapping(
        (path,),
        names,
        read=lambda *parts: (np.concatenate(parts),),
        write=lambda joined: tuple(np.split(joined, len(names))),
    )


def convolution(path: str, name: str, shape: tuple[int, ...]) -> list[TensorMapping]:
    """Map a convolution's bias and its kernel `[out, channels, *shape]`.

    Our parameter is a matrix `[out, *shape * channels]`, with channels last.
    """

    def read(kernel: np.ndarray) -> Arrays:
        return (np.moveaxis(kernel, 1, -1).reshape(kernel.shape[0], -1),)

    def write(matrix: np.ndarray) -> Arrays:
        return (np.moveaxis(matrix.reshape(matrix.shape[0], *shape, -1), -1, 1),)

    kernel = TensorMapping((f"{path}/weight",), (f"{name}.weight",), read, write, by_rows=False)
    return [kernel, *same(path, name, "bias")]
