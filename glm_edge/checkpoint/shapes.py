"""Expected shapes of a model's parameters, and checks of a checkpoint against them."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from glm_edge.configs import (
    DecoderConfig,
    GLMConfig,
    SpeechConfig,
    TextConfig,
    VisionConfig,
    from_dict,
)
from glm_edge.errors import CheckpointError, ConfigError, GlmEdgeError
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.models.speech import SpeechEncoder
from glm_edge.models.text import TextEncoder
from glm_edge.models.vision import VisionEncoder
from glm_edge.params import path_items

Shapes = dict[str, tuple[int, ...]]
LAYERS = "decoder/layers/"

ARCHITECTURES = {
    "MultimodalGLM": (MultimodalGLM, GLMConfig),
    "VisionEncoder": (VisionEncoder, VisionConfig),
    "SpeechEncoder": (SpeechEncoder, SpeechConfig),
    "TextEncoder": (TextEncoder, TextConfig),
}


def expected_shapes(model: nn.Module) -> Shapes:
    """Returns the dense shape of every parameter, by tracing `model.init` without computing it.

    Args:
      model: one of `ARCHITECTURES`, of any configuration.

    Returns:
      Parameter path to shape.
    """
    architecture: Any = type(model)
    try:
        return dict(_traced_shapes(architecture, model.config, getattr(model, "out_features", 0)))
    except GlmEdgeError:
        raise
    # Sizes that contradict each other or exceed any machine raise all sorts of errors while traced.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"config.json: its fields make no model: {reason}") from error


def check_depth(config: Any, num_tensors: int, where: str) -> None:
    """Refuses more layers than there are tensors, before they are traced one by one.

    Args:
      config: of a model or an encoder.
      num_tensors: that are stored.
      where: file or directory, for the message.

    Raises:
      CheckpointError: there are more layers.
    """
    parts = [config, *(getattr(config, name, None) for name in ("decoder", "vision", "speech"))]
    depth = sum(getattr(part, "num_layers", 0) for part in parts)
    if depth > num_tensors:
        raise CheckpointError(
            f"{where}: config.json says {depth} layers, which {num_tensors} tensors cannot fill"
        )


@functools.lru_cache(maxsize=8)
def _traced_shapes(kind: Any, config: Any, out_features: int) -> Shapes:
    if kind is VisionEncoder:
        inputs = jax.ShapeDtypeStruct((1, *config.image_size, config.channels), jnp.float32)
    elif kind is SpeechEncoder:
        inputs = jax.ShapeDtypeStruct((1, config.num_frames, config.mel_bins), jnp.float32)
    else:
        inputs = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    like: list[int] = []
    if kind is MultimodalGLM:
        # Tracing takes time by the layer, and layers of the same widths are alike.
        decoder, like = _one_of_each(config.decoder)
        config = dataclasses.replace(config, decoder=decoder)
    encoder = kind in (VisionEncoder, SpeechEncoder)
    model = kind(config, out_features) if encoder else kind(config)
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    shapes = {path: tuple(leaf.shape) for path, leaf in path_items(variables["params"])}
    layers = {path: shapes.pop(path) for path in list(shapes) if path.startswith(LAYERS)}
    for layer, traced in enumerate(like):
        prefix = f"{LAYERS}{traced}/"
        for path, shape in layers.items():
            if path.startswith(prefix):
                shapes[f"{LAYERS}{layer}/{path.removeprefix(prefix)}"] = shape
    return shapes


def _one_of_each(config: DecoderConfig) -> tuple[DecoderConfig, list[int]]:
    """Returns a decoder with one layer per width, and for each layer the index of its like."""
    widths = [
        (config.heads(layer), config.kv_heads(layer), config.neurons(layer))
        for layer in range(config.num_layers)
    ]
    kinds = list(dict.fromkeys(widths))
    heads, kv_heads, neurons = zip(*kinds, strict=True)
    small = dataclasses.replace(
        config,
        num_layers=len(kinds),
        num_heads=heads,
        num_kv_heads=kv_heads,
        intermediate_size=neurons,
    )
    return small, [kinds.index(width) for width in widths]


def check_names(names: Iterable[str], expected: Mapping[str, Any], where: str) -> None:
    """Refuses a set of tensor names that is not the expected one.

    Args:
      names: names that are stored.
      expected: names that the model needs, with the shape of each, or None where several
        tensors share one.
      where: file or directory, for the message.

    Raises:
      CheckpointError: a tensor is missing, or has no place in the model.
    """
    names = set(names)
    missing = [name for name in expected if name not in names]
    if missing:
        shape = expected[missing[0]]
        raise CheckpointError(
            f"{where}: tensor {missing[0]!r} is missing{_others(missing)}; the model of "
            f"config.json needs it{'' if shape is None else f' with shape {shape}'}"
        )
    extra = sorted(names - set(expected))
    if extra:
        raise CheckpointError(
            f"{where}: tensor {extra[0]!r} has no place in the model of config.json"
            f"{_others(extra)}; it belongs to another model, or config.json does"
        )


def check_shape(shape: Iterable[int], expected: Iterable[int], where: str) -> None:
    """Refuses a tensor of another shape.

    Args:
      shape: stored shape.
      expected: shape that the model needs.
      where: file and tensor, for the message.

    Raises:
      CheckpointError: they differ.
    """
    if tuple(shape) != tuple(expected):
        raise CheckpointError(
            f"{where}: has shape {tuple(shape)}, the model of config.json needs {tuple(expected)}"
        )


def check_params(params: Any, model: nn.Module, where: str) -> None:
    """Refuses a tree of arrays and boxes that does not fit a model.

    Args:
      params: tree of arrays and boxes.
      model: that it should fit.
      where: file or directory, for the message.

    Raises:
      CheckpointError: a parameter is missing, has no place, or is of another dense shape.
    """
    check_against(params, expected_shapes(model), where)


def check_against(params: Any, expected: Shapes, where: str) -> None:
    """Refuses a tree of arrays and boxes whose paths or dense shapes are others.

    Args:
      params: tree of arrays and boxes.
      expected: shape of each parameter by path.
      where: file or directory, for the message.

    Raises:
      CheckpointError: a parameter is missing, has no place, or is of another dense shape.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in path_items(params)}
    check_names(shapes, expected, where)
    for path, shape in shapes.items():
        check_shape(shape, expected[path], f"{where}: parameter {path!r}")


def config_from_json(fields: Any, where: str, kind: type = GLMConfig) -> Any:
    """Builds a configuration from JSON written by `to_dict`.

    Args:
      fields: the JSON value.
      where: file, for the message.
      kind: class of the configuration.

    Returns:
      The configuration.

    Raises:
      ConfigError: a field is unknown, missing, or of a type that makes no model.
    """
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: field 'config' must hold an object of fields")
    try:
        return from_dict(fields, kind)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(f"{where}: a field has a value of the wrong type: {error}") from error


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
