"""Export of any traceable function to a `.tflite` file whose weights are constants.

What `glm_edge.export.tflite` does for a GLM's signatures keeps our own integers; this is the short
way for other models, such as the convolutional ones, by the converter's own rules.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
from jax import Array

from glm_edge.errors import ExportError
from glm_edge.export import container, trace
from glm_edge.export.lowering import without_erf
from glm_edge.export.offer import check_fixed

Inputs = Mapping[str, jax.ShapeDtypeStruct]


def write_function(
    function: Callable[[dict[str, Array]], dict[str, Array]],
    inputs: Inputs,
    path: str | Path,
    examples: Iterable[Mapping[str, np.ndarray]] | None = None,
    overwrite: bool = False,
) -> int:
    """Writes a function as a `.tflite` file of one signature, with builtin operators only.

    The converter folds constants, so a batch norm at inference joins the convolution before it,
    and a ReLU becomes part of it.

    Args:
      function: traceable, from arrays by name to arrays by name; it closes over its weights.
      inputs: name to shape, of fixed extents, and type.
      path: of the file.
      examples: inputs by name that the converter runs to choose int8 grids of activations; weights
        become int8 too, per channel where the runtime takes it. Inputs and outputs stay as they
        are. None keeps float32.
      overwrite: replace a file that exists.

    Returns:
      Bytes of the file.

    Raises:
      ExportError: an extent is not fixed, or the converter refuses the function.
      OutputError: the file exists already, or cannot be written.
      MissingExtraError: TensorFlow is not installed.
    """
    path = Path(path)
    for name, struct in inputs.items():
        check_fixed(f"shape of {name}", struct.shape)
    container.check_target(path, overwrite)
    content = _converted(function, inputs, examples)
    return container.write_beside(path, lambda file: file.write(content))


def _converted(
    function: Callable[[dict[str, Array]], dict[str, Array]],
    inputs: Inputs,
    examples: Iterable[Mapping[str, np.ndarray]] | None,
) -> bytes:
    jax2tf, tf = trace.tensorflow()
    lowered = jax2tf.convert(without_erf(function), with_gradient=False)
    specs = {
        name: tf.TensorSpec(struct.shape, tf.as_dtype(struct.dtype), name=name)
        for name, struct in inputs.items()
    }
    traced = tf.function(lambda **values: lowered(values), autograph=False)
    concrete = traced.get_concrete_function(**specs)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], tf.Module())
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    if examples is not None:
        held = [{name: np.asarray(x, np.float32) for name, x in one.items()} for one in examples]
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: iter(held)
    try:
        with trace.quiet():
            return bytes(converter.convert())
    except Exception as error:  # the converter has no exception class of its own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"TensorFlow Lite cannot hold this function: {reason[0]}") from error
