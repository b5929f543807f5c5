"""Our models with random weights, in any form, without a float copy of them."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.bench_conversion import random_box
from experiments.runtimes.engine import Task, random_matrix
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.configs import from_dict
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Format
from glm_edge.params.tree import nested

FLOATS = ("float32", "float16")


def random_model(config: dict[str, Any], form: str, seed: int = 0) -> tuple[MultimodalGLM, Any]:
    """A model and its parameters; norms are one, what is added is zero.

    Args:
      config: as `glm_edge.configs.to_dict` writes it.
      form: of every matrix: float32, float16, or what `Format.parse` reads.
      seed: of the weights.

    Returns:
      `(model, params)`.
    """
    model = MultimodalGLM(from_dict(config))
    rng, leaves = np.random.default_rng(seed), {}
    for path, shape in expected_shapes(model).items():
        weight = path.endswith("weight")
        if not weight or len(shape) != 2:
            leaves[path] = jnp.full(shape, 1.0 if weight else 0.0, jnp.float32)
        elif form in FLOATS:
            leaves[path] = jnp.asarray(random_matrix(rng, *shape).astype(form))
        else:
            leaves[path] = random_box(rng, shape, Format.parse(form))
    return model, nested(leaves)


def exported(task: Task, write: Callable[..., Any], **options: Any) -> Any:
    """Writes a random model of a task by one of `ge.export`, and returns what that returns.

    Args:
      task: names the file.
      write: `ge.export.tflite` or another.
      **options: of `write`.
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
