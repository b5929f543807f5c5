"""Alternating latency measurements, operations of a traced function, and files run by LiteRT."""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge import params as boxes
from glm_edge.errors import require
from glm_edge.export import function as write_function
from glm_edge.models.text import TextEncoder

# A runtime's threads spin for a while after their work, and would slow the next measurement.
PAUSE_S = 0.02
IMAGES, LOGITS = "images", "logits"
ENGINES = {"jax": "JAX", "litert": "LiteRT"}


def alternate(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Measure the seconds of all sides alternately, so that a busy machine slows them equally.

    Args:
      sides: functions to run by name; each first runs twice as a warm-up.
      rounds: number of measurements of each.

    Returns:
      Seconds by name in the measured order: entries `i` of all sides form one round.
    """
    for run in sides.values():
        run()
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        names = list(sides)
        for name in names if turn % 2 else reversed(names):
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ms(seconds: list[float]) -> float:
    """Return the median of seconds in milliseconds."""
    return 1e3 * statistics.median(seconds)


def ratio_quartiles(seconds: list[float], other: list[float]) -> list[float]:
    """Compute quartiles of the paired ratios `seconds / other`."""
    return np.quantile(np.divide(seconds, other), [0.25, 0.5, 0.75]).tolist()


def in_jax(model: Any, variables: Any, images: np.ndarray) -> Callable[[], np.ndarray]:
    """Return a call of a compiled classifier of `glm_edge.models.cnn`."""
    run = jax.jit(lambda variables, images: model.apply(variables, images)[0])
    variables, images = jax.device_put((variables, jnp.asarray(images)))
    return lambda: np.asarray(run(variables, images))


def export(
    model: Any, variables: Any, path: Path, examples: np.ndarray | None = None, batch: int = 1
) -> int:
    """Write a classifier as a `.tflite` file from `images` to `logits`.

    Args:
      model: model of `glm_edge.models.cnn`.
      variables: its variables; boxes are written dense.
      path: path of the file, which is replaced if it exists.
      examples: calibration images [E, H, W, C] for int8, or None for float32.
      batch: number of images per call of the file.

    Returns:
      The size of the file in bytes.
    """
    dense = jax.tree.map(boxes.dense, variables, is_leaf=boxes.is_box)
    shape = (batch, *model.config.image_size)
    batches = None
    if examples is not None:
        images = np.resize(examples, (max(len(examples), batch), *shape[1:]))
        batches = [
            {IMAGES: images[i : i + batch]} for i in range(0, len(images) - batch + 1, batch)
        ]
    return write_function(
        lambda variables, inputs: {LOGITS: model.apply(variables, inputs[IMAGES])[0]},
        dense,
        {IMAGES: jax.ShapeDtypeStruct(shape, jnp.float32)},
        path,
        batches,
        overwrite=True,
    ).file_bytes


class LiteRT:
    """A file with one input and one output in LiteRT."""

    def __init__(self, path: Path, threads: int = 2):
        interpreter = require("ai_edge_litert.interpreter", extra="export")
        self._run = interpreter.Interpreter(model_path=str(path), num_threads=threads)
        self._run.allocate_tensors()
        self._in = self._run.get_input_details()[0]
        self._out = self._run.get_output_details()[0]["index"]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self._run.set_tensor(self._in["index"], np.asarray(images, self._in["dtype"]))
        self._run.invoke()
        return self._run.get_tensor(self._out)

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Return the class of each image [E]."""
        batch = int(self._in["shape"][0])
        counted = []
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            counted.append(self(np.resize(part, (batch, *part.shape[1:])))[: len(part)].argmax(-1))
        return np.concatenate(counted)


def encoder_times(
    sides: Mapping[str, tuple[TextEncoder, Any]], tokens: int, rounds: int, threads: int
) -> dict[str, list[float]]:
    """Time text encoders of one vocabulary alternately, in JAX and from files in LiteRT.

    Args:
      sides: `(model, params)` by name; boxed parameters run in JAX only.
      tokens: number of tokens per call.
      rounds: number of measurements of each.
      threads: number of LiteRT threads; JAX uses all available cores.

    Returns:
      Seconds by `<engine> <name>`.
    """
    calls: dict[str, Callable[[], Any]] = {}
    vocabulary = next(iter(sides.values()))[0].config.vocab_size
    read = np.random.default_rng(0).integers(0, vocabulary, (1, tokens)).astype(np.int32)
    with tempfile.TemporaryDirectory() as directory:
        for name, (model, params) in sides.items():
            run = jax.jit(
                lambda params, tokens, model=model: model.apply({"params": params}, tokens)[0]
            )
            calls[f"jax {name}"] = lambda run=run, params=params: np.asarray(run(params, read))
            if any(boxes.is_box(leaf) for _, leaf in boxes.path_items(params)):
                continue
            path = Path(directory) / f"{len(calls)}.tflite"
            write_function(
                lambda params, inputs, model=model: {
                    "scores": model.apply({"params": params}, inputs["tokens"])[0]
                },
                params,
                {"tokens": jax.ShapeDtypeStruct(read.shape, jnp.int32)},
                path,
            )
            file = LiteRT(path, threads)
            calls[f"litert {name}"] = lambda file=file: file(read)
        return alternate(calls, rounds)


def multiply_accumulates(function: Callable[..., Any], *arguments: Any) -> int:
    """Count the products of convolutions and matrix products, including those with zeros.

    Args:
      function: traceable function.
      *arguments: arrays or abstract arrays.

    Returns:
      Multiply-accumulates; the number of operations is twice that.
    """
    return sum(_products(jax.make_jaxpr(function)(*arguments).jaxpr))


def _products(jaxpr: Any) -> Iterator[int]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            spec = equation.params["dimension_numbers"].rhs_spec
            yield math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[spec[0]]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            size = math.prod(shape[axis] for axis in contracted)
            yield math.prod(equation.outvars[0].aval.shape) * size
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _products(inner)


def random_variables(model: Any, seed: int) -> dict[str, Any]:
    """Draw untrained variables of a classifier that preserve the size of activations."""
    shape = jnp.zeros((1, *model.config.image_size))
    abstract = jax.eval_shape(model.init, jax.random.key(0), shape)
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: Any) -> Array:
        name = path.rsplit("/", 1)[-1]
        if name in ("var", "scale"):
            return jnp.asarray(rng.uniform(0.5, 1.0, leaf.shape), jnp.float32)
        if name in ("mean", "bias"):
            return jnp.asarray(0.1 * rng.standard_normal(leaf.shape, np.float32))
        inputs = leaf.shape[-1] if name == "weight" else math.prod(leaf.shape[:-1])
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * (1 / inputs) ** 0.5)

    return boxes.map_with_path(draw, abstract)
