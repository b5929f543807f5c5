"""Conversion of signatures to a TFLite graph without weights."""

import functools
import os
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.errors import ExportError, require
from glm_edge.export.common.jaxpr import expand_erf
from glm_edge.export.common.quiet import quiet
from glm_edge.export.common.signatures import Signature
from glm_edge.params.tree import nested
from glm_edge.process_wide import QUIET_TENSORFLOW


def skeleton(
    signatures: Iterable[Signature], shapes: Mapping[str, tuple[int, ...]], kind: str = "graph"
) -> tuple[bytes, dict[str, str]]:
    """Convert signatures to one TFLite graph in which every weight is an input.

    Args:
      signatures: signatures to convert.
      shapes: dense shape by parameter path.
      kind: noun for the converted object, for messages.

    Returns:
      `(content, arguments)`: the flatbuffer, and parameter path by input name.

    Raises:
      ExportError: the converter rejects the graph, or needs other operators than builtin ones.
    """
    jax2tf, tf = tensorflow()
    arguments = {f"weight_{index}": path for index, path in enumerate(shapes)}
    module, functions = tf.Module(), {}
    for signature in signatures:
        weights = {
            name: jax.ShapeDtypeStruct(shapes[path], jnp.float32)
            for name, path in arguments.items()
            if path.split("/")[0] in signature.subtrees
        }
        functions[signature.name] = _concrete(jax2tf, tf, signature, weights, arguments)
    module.functions = functions
    with tempfile.TemporaryDirectory() as directory:
        tf.saved_model.save(module, directory, signatures=functions)
        converter = tf.lite.TFLiteConverter.from_saved_model(
            directory, signature_keys=list(functions)
        )
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        # The exporters replace it, and to add it the converter rewrites the whole file in Python.
        converter.exclude_conversion_metadata = True
        return run_converter(converter, kind), arguments


@functools.lru_cache(maxsize=4)
def shared_skeleton(
    signatures: tuple[Signature, ...], shapes: tuple[tuple[str, tuple[int, ...]], ...]
) -> tuple[bytes, dict[str, str]]:
    """Call `skeleton`, whose result does not depend on weights, once for files of one model.

    Args:
      signatures: signatures to convert.
      shapes: pairs of parameter path and dense shape.

    Returns:
      The result of `skeleton`, not to be changed.
    """
    return skeleton(signatures, dict(shapes))


def run_converter(converter: Any, kind: str) -> bytes:
    """Run a TensorFlow Lite converter.

    Args:
      converter: a `TFLiteConverter`.
      kind: noun for the converted object, for messages.

    Returns:
      The flatbuffer.

    Raises:
      ExportError: the converter fails; the message has the first line of its reason.
    """
    try:
        with quiet():
            return bytes(converter.convert())
    except Exception as error:  # the converter has no specific exception class
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"TensorFlow Lite cannot represent this {kind}: {reason[0]}") from error


def _concrete(
    jax2tf: Any,
    tf: Any,
    signature: Signature,
    weights: dict[str, jax.ShapeDtypeStruct],
    arguments: Mapping[str, str],
) -> Any:
    def call(values: dict[str, Array]) -> dict[str, Array]:
        params = nested({arguments[name]: values[name] for name in weights})
        return signature.function(params, {name: values[name] for name in signature.inputs})

    converted = jax2tf.convert(expand_erf(call), with_gradient=False)
    specs = {
        name: tf.TensorSpec(struct.shape, tf.as_dtype(struct.dtype), name=name)
        for name, struct in {**weights, **signature.inputs}.items()
    }
    function = tf.function(lambda **values: converted(values), autograph=False)
    return function.get_concrete_function(**specs)


def tensorflow() -> tuple[Any, Any]:
    """Import jax2tf and TensorFlow with their log messages turned off.

    Returns:
      The modules `jax2tf` and `tensorflow`.

    Raises:
      MissingExtraError: TensorFlow is not installed.
    """
    for variable, value in QUIET_TENSORFLOW.items():
        os.environ.setdefault(variable, value)
    with quiet():
        tf = require("tensorflow", extra="export")
    tf.get_logger().setLevel("ERROR")
    return require("jax.experimental.jax2tf", extra="export"), tf
