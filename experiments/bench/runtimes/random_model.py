"""glm_edge models with random weights in any format, without a float copy."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.bench.runtimes.engine import Task, random_matrix
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.configs import from_dict
from glm_edge.kernels import packing
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Format, Quantized
from glm_edge.params.tree import nested

FLOATS = ("float32", "float16")
# Makes all vectors different, as a file would store equal ones once.
JITTER = np.float32(0.1)


def random_model(config: dict[str, Any], form: str, seed: int = 0) -> tuple[MultimodalGLM, Any]:
    """Make a model and random parameters, with norms near one and biases near zero.

    Args:
      config: configuration from `glm_edge.configs.to_dict`.
      form: format of every matrix: float32, float16, or a string for `Format.parse`. A matrix whose
        columns are not a multiple of the group size has scales per channel.
      seed: seed of the weights.

    Returns:
      `(model, params)`.
    """
    model = MultimodalGLM(from_dict(config))
    rng, leaves = np.random.default_rng(seed), {}
    for path, shape in expected_shapes(model).items():
        weight = path.endswith("weight")
        if not weight or len(shape) != 2:
            values = JITTER * rng.standard_normal(shape, np.float32)
            leaves[path] = jnp.asarray(values + np.float32(weight))
        elif form in FLOATS:
            leaves[path] = jnp.asarray(random_matrix(rng, *shape).astype(form))
        else:
            leaves[path] = random_box(rng, shape, fitting(Format.parse(form), shape[1]))
    return model, nested(leaves)


def fitting(format: Format, columns: int) -> Format:
    """Return the format, or per channel if the columns are not a multiple of the group size."""
    size = format.group_size
    return format if not isinstance(size, int) or columns % size == 0 else Format(format.qtype)


def random_box(rng: np.random.Generator, shape: tuple[int, int], format: Format) -> Quantized:
    """Make a weight of random bytes, valid codes of integer types, and random scales.

    Products with it preserve the mean magnitude of their inputs.
    """
    columns = packing.packed_columns(shape[1], format.qtype)
    data = np.frombuffer(rng.bytes(shape[0] * columns), np.uint8).reshape(shape[0], columns)
    spread = 2.0 ** (format.bits - 1) / 3**0.5
    scale = rng.uniform(0.5, 1.5, format.scale_shape(shape)) / (spread * shape[1] ** 0.5)
    return Quantized(
        data=jnp.asarray(data.view(np.int8) if format.qtype == "int8" else data),
        scale=jnp.asarray(scale, format.scale_dtype),
        zero=None,
        format=format,
        columns=shape[1],
    )


def exported(task: Task, write: Callable[..., Any], **options: Any) -> Any:
    """Write a random model of a task by an exporter, and return the exporter's result.

    Args:
      task: task with the path of the file.
      write: exporter, such as `ge.export.tflite`.
      **options: arguments of `write`.
    """
    model, params = random_model(task.config, task.form)
    return write(
        model,
        params,
        task.path,
        prefill_lengths=task.lengths,
        cache_slots=task.slots,
        overwrite=True,
        **options,
    )
