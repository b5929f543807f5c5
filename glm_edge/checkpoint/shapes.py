"""What a model's parameters must look like, and the errors when a checkpoint's do not."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from glm_edge.configs import GLMConfig, from_dict
from glm_edge.errors import CheckpointError, ConfigError
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import path_items

Shapes = dict[str, tuple[int, ...]]


def expected_shapes(model: MultimodalGLM) -> Shapes:
    """Dense shape of every parameter, from tracing `model.init` without computing it.

    Args:
      model: any configuration.

    Returns:
      Parameter path to shape.
    """
    return dict(_traced_shapes(model.config))


@functools.lru_cache(maxsize=8)
def _traced_shapes(config: GLMConfig) -> Shapes:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(MultimodalGLM(config).init, jax.random.key(0), tokens)
    return {path: tuple(leaf.shape) for path, leaf in path_items(variables["params"])}


def check_names(found: Iterable[str], expected: Mapping[str, Any], where: str) -> None:
    """Refuses a set of tensor names that is not the expected one.

    Args:
      found: names that are stored.
      expected: names that the model needs; values are shown when one is missing.
      where: file or directory, for the message.

    Raises:
      CheckpointError: a tensor is missing, or has no place in the model.
    """
    found = set(found)
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"{where}: tensor {missing[0]!r} is missing{_others(missing)}; the model of "
            f"config.json needs it with shape {expected[missing[0]]}"
        )
    extra = sorted(found - set(expected))
    if extra:
        raise CheckpointError(
            f"{where}: tensor {extra[0]!r} has no place in the model of config.json"
            f"{_others(extra)}; it belongs to another model, or config.json does"
        )


def check_shape(found: Iterable[int], expected: Iterable[int], where: str) -> None:
    """Refuses a tensor of another shape.

    Args:
      found: stored shape.
      expected: shape that the model needs.
      where: file and tensor, for the message.

    Raises:
      CheckpointError: they differ.
    """
    if tuple(found) != tuple(expected):
        raise CheckpointError(
            f"{where}: has shape {tuple(found)}, the model of config.json needs {tuple(expected)}"
        )


def check_params(params: Any, model: MultimodalGLM, where: str) -> None:
    """Refuses a tree of arrays and boxes that does not fit a model.

    Args:
      params: tree of arrays and boxes.
      model: that it should fit.
      where: file or directory, for the message.

    Raises:
      CheckpointError: a parameter is missing, has no place, or is of another dense shape.
    """
    expected = expected_shapes(model)
    found = {path: tuple(leaf.shape) for path, leaf in path_items(params)}
    check_names(found, expected, where)
    for path, shape in found.items():
        check_shape(shape, expected[path], f"{where}: parameter {path!r}")


def config_from_json(fields: Any, where: str) -> GLMConfig:
    """Builds a configuration from JSON written by `to_dict`.

    Args:
      fields: the JSON value.
      where: file, for the message.

    Returns:
      The configuration.

    Raises:
      ConfigError: a field is unknown, missing, or of a type that makes no model.
    """
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: field 'config' must hold an object of fields")
    try:
        return from_dict(fields)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(f"{where}: a field has a value of the wrong type: {error}") from error


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
