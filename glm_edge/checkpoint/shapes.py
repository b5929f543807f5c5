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
    """Infer the dense shape of every parameter by an abstract evaluation of `model.init`.

    Args:
      model: one of `ARCHITECTURES`, of any configuration.

    Returns:
      Shape by parameter path.

    Raises:
      ConfigError: the sizes of the configuration are inconsistent or too large.
    """
    architecture: Any = type(model)
    config = model.config
    try:
        # A name changes no shape, and a model has another one in every directory.
        if isinstance(config, GLMConfig):
            config = dataclasses.replace(config, name="")
        return dict(_traced_shapes(architecture, config, getattr(model, "out_features", 0)))
    except GlmEdgeError:
        raise
    # Inconsistent or huge sizes raise exceptions of many types during tracing.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"the configuration does not define a model: {reason}") from error


def check_depth(config: Any, num_tensors: int, where: str) -> None:
    """Refuse more layers than tensors, before the layers are traced.

    Args:
      config: configuration of a model or an encoder.
      num_tensors: count of stored tensors.
      where: file or directory for the message.

    Raises:
      CheckpointError: there are more layers than tensors.
    """
    parts = [config, *(getattr(config, name, None) for name in ("decoder", "vision", "speech"))]
    depth = sum(getattr(part, "num_layers", 0) for part in parts)
    if depth > num_tensors:
        raise CheckpointError(
            f"{where}: its configuration has {depth} layers, but there are {num_tensors} tensors"
        )


@functools.lru_cache(maxsize=128)
def _traced_shapes(kind: Any, config: Any, out_features: int) -> Shapes:
    if kind is VisionEncoder:
        inputs = jax.ShapeDtypeStruct((1, *config.image_size, config.channels), jnp.float32)
    elif kind is SpeechEncoder:
        inputs = jax.ShapeDtypeStruct((1, config.num_frames, config.mel_bins), jnp.float32)
    else:
        inputs = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    # Tracing time grows with the layers, so only one layer per distinct width is traced.
    like: dict[str, list[int]] = {}
    if kind is MultimodalGLM:
        decoder, like[LAYERS] = _one_of_each(config.decoder)
        config = dataclasses.replace(config, decoder=decoder)
        for name in ("vision", "speech"):
            if (tower := getattr(config, name)) is not None and _alike(tower):
                like[f"{name}/layers/"] = [0] * tower.num_layers
                tower = dataclasses.replace(tower, num_layers=1)
                config = dataclasses.replace(config, **{name: tower})
    elif _alike(config):
        like["layers/"] = [0] * config.num_layers
        config = dataclasses.replace(config, num_layers=1)
    encoder = kind in (VisionEncoder, SpeechEncoder)
    model = kind(config, out_features) if encoder else kind(config)
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    shapes = {path: tuple(leaf.shape) for path, leaf in path_items(variables["params"])}
    for part, traced_layers in like.items():
        layers = {path: shapes.pop(path) for path in list(shapes) if path.startswith(part)}
        for layer, traced in enumerate(traced_layers):
            prefix = f"{part}{traced}/"
            for path, shape in layers.items():
                if path.startswith(prefix):
                    shapes[f"{part}{layer}/{path.removeprefix(prefix)}"] = shape
    return shapes


def _alike(config: Any) -> bool:
    """Test whether all layers of an encoder have the shapes and the checks of its first one."""
    widths = config.num_heads, config.intermediate_size
    return (
        config.num_layers > 1
        and all(isinstance(width, int) for width in widths)
        and not getattr(config, "global_layers", ())
    )


def _one_of_each(config: DecoderConfig) -> tuple[DecoderConfig, list[int]]:
    """Return a decoder with one layer per width, and the index of each layer's width."""
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
    """Check that the stored tensor names are exactly the expected names.

    Args:
      names: stored names.
      expected: shapes by required name, or None for a tensor without a fixed shape.
      where: file or directory for the message.

    Raises:
      CheckpointError: a tensor is missing, or is not part of the model.
    """
    names = set(names)
    missing = [name for name in expected if name not in names]
    if missing:
        shape = expected[missing[0]]
        raise CheckpointError(
            f"{where}: tensor {missing[0]!r} is missing{_others(missing)}; the model "
            f"needs it{'' if shape is None else f' with shape {shape}'}"
        )
    extra = sorted(names - set(expected))
    if extra:
        raise CheckpointError(
            f"{where}: tensor {extra[0]!r} has no place in the model"
            f"{_others(extra)}; the tensor or the configuration belongs to another model"
        )


def check_shape(shape: Iterable[int], expected: Iterable[int], where: str) -> None:
    """Check the shape of a tensor.

    Args:
      shape: stored shape.
      expected: shape that the model needs.
      where: file and tensor for the message.

    Raises:
      CheckpointError: the shapes differ.
    """
    if tuple(shape) != tuple(expected):
        raise CheckpointError(
            f"{where}: has shape {tuple(shape)}, the model needs {tuple(expected)}"
        )


def check_params(params: Any, model: nn.Module, where: str) -> None:
    """Check that a tree of arrays and boxes matches a model.

    Args:
      params: tree of arrays and boxes.
      model: one of `ARCHITECTURES`.
      where: file or directory for the message.

    Raises:
      CheckpointError: a parameter is missing, unexpected, or has another dense shape.
    """
    check_against(params, expected_shapes(model), where)


def check_against(params: Any, expected: Shapes, where: str) -> None:
    """Check the paths and dense shapes of a tree of arrays and boxes.

    Args:
      params: tree of arrays and boxes.
      expected: dense shape by path.
      where: file or directory for the message.

    Raises:
      CheckpointError: a parameter is missing, unexpected, or has another dense shape.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in path_items(params)}
    check_names(shapes, expected, where)
    for path, shape in shapes.items():
        check_shape(shape, expected[path], f"{where}: parameter {path!r}")


def config_from_json(fields: Any, where: str, kind: type = GLMConfig) -> Any:
    """Build a configuration from JSON written by `to_dict`.

    Args:
      fields: JSON value.
      where: file for the message.
      kind: class of the configuration.

    Returns:
      The configuration.

    Raises:
      ConfigError: a field is unknown, missing, of the wrong type, or inconsistent with another.
    """
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: field 'config' must be an object of fields")
    try:
        return from_dict(fields, kind)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(f"{where}: a field has the wrong type: {error}") from error


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
