"""Export of any traceable function to a `.tflite` file, with the integers of its parameters.

A file of `glm_edge.export.tflite` computes with integers. A file of this module stores each
quantized parameter as integers and dequantizes it when it is loaded, so that any operator can read
it. Products are in float32, as in JAX with a stock module.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr

from glm_edge import __version__
from glm_edge import params as boxes
from glm_edge.errors import DataError, ExportError
from glm_edge.export.common.jaxpr import expand_erf
from glm_edge.export.common.signatures import Signature
from glm_edge.export.common.sizes import check_fixed
from glm_edge.export.common.weights import (
    NO_STATIC_RANGES,
    TFLITE_FUNCTION,
    Conversion,
    box_conversions,
    check_box,
    check_finite,
    pack_nibbles,
    to_array,
)
from glm_edge.export.tflite import file as tflite_file
from glm_edge.export.tflite.converter import run_converter, skeleton, tensorflow
from glm_edge.export.tflite.flatbuffer import Constant, FlatModel
from glm_edge.export.tflite.weights import with_storable_scales
from glm_edge.export.verify.worker import InterpreterProcess
from glm_edge.params import Quantized
from glm_edge.params.tree import Params
from glm_edge.writers import check_target, write_stream

Inputs = Mapping[str, jax.ShapeDtypeStruct]
Function = Callable[[Any, dict[str, Array]], dict[str, Array]]
SIGNATURE = "serving_default"
# Sums in a different order differ by a few units in the last place of float32.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class FunctionVerification:
    """Distances between the outputs of a file and those of its JAX function.

    Attributes:
      distances: norm of the difference, as a fraction of the norm of JAX's output, by output.
      tolerance: largest allowed distance.
    """

    distances: Mapping[str, float]
    tolerance: float

    @property
    def passed(self) -> bool:
        """True if every output is within the tolerance."""
        return all(distance <= self.tolerance for distance in self.distances.values())

    def __str__(self) -> str:
        worst = max(self.distances, key=lambda name: self.distances[name])
        return (
            f"{'passed' if self.passed else 'failed'}: {len(self.distances)} outputs, relative "
            f"distance from JAX at most {self.distances[worst]:.2g} ({worst}); tolerance "
            f"{self.tolerance:g}"
        )


@dataclass(frozen=True)
class ExportedFunction:
    """A written file, with its function and parameters.

    Attributes:
      path: path of the file.
      file_bytes: size of the file.
      stored_bytes: bytes of its packed quantized parameters, including scales.
      conversions: parameters that are stored in a different form than in `params`.
      inputs: shape and type by name.
      function: function that was traced.
      params: parameters with the values that the file stores.
    """

    path: Path
    file_bytes: int
    stored_bytes: int
    conversions: tuple[Conversion, ...]
    inputs: Inputs = field(repr=False)
    function: Function = field(repr=False)
    params: Params = field(repr=False)

    def run(self, **inputs: Any) -> dict[str, np.ndarray]:
        """Run the file in LiteRT, in a separate process.

        Args:
          **inputs: input arrays by name.

        Returns:
          The outputs by name.

        Raises:
          DataError: an input is missing, or has the wrong shape.
          ExportError: LiteRT cannot run the file.
        """
        arrays = self._checked(inputs)
        process = InterpreterProcess(self.path)
        try:
            return process.run(SIGNATURE, arrays)
        finally:
            process.close()

    def verify(
        self,
        examples: Iterable[Mapping[str, Any]] | None = None,
        tolerance: float = TOLERANCE,
        seed: int = 0,
        check: bool = True,
    ) -> FunctionVerification:
        """Run the file and the JAX function on the same inputs.

        Args:
          examples: a few sets of input arrays by name. None draws normal values, or zeros and ones
            for integer inputs.
          tolerance: largest allowed distance of an output; see `FunctionVerification`.
          seed: seed of the random values.
          check: whether to raise if an output exceeds the tolerance.

        Returns:
          The comparison. If it passes with the default tolerance or a smaller one, the file's
          description is marked as verified.

        Raises:
          DataError: an example does not fit the inputs, or `examples` is empty.
          ExportError: an output exceeds the tolerance, or LiteRT cannot run the file.
        """
        examples = [self._random_inputs(seed)] if examples is None else list(examples)
        if not examples:
            raise DataError("examples: must contain at least one example")
        run, process = jax.jit(self.function), InterpreterProcess(self.path)
        squares: dict[str, np.ndarray] = {}
        try:
            for example in map(self._checked, examples):
                outputs, expected = process.run(SIGNATURE, example), run(self.params, example)
                for name in expected:
                    y, reference = (np.asarray(a[name], np.float64) for a in (outputs, expected))
                    sums = np.array([((y - reference) ** 2).sum(), (reference**2).sum()])
                    squares[name] = squares.get(name, 0.0) + sums
        finally:
            process.close()
        distances = {
            name: math.sqrt(wrong / norm) if norm else math.sqrt(wrong)
            for name, (wrong, norm) in squares.items()
        }
        result = FunctionVerification(distances, tolerance)
        if check and not result.passed:
            raise ExportError(f"{self.path}: {result}")
        if result.passed and tolerance <= TOLERANCE:
            tflite_file.mark_verified(self.path)
        return result

    def _checked(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        if inputs.keys() != self.inputs.keys():
            raise DataError(f"inputs: {sorted(inputs)}, expected the file's {sorted(self.inputs)}")
        arrays = {}
        for name, struct in self.inputs.items():
            arrays[name] = np.asarray(inputs[name], struct.dtype)
            if arrays[name].shape != struct.shape:
                raise DataError(
                    f"{name}: shape {arrays[name].shape}, expected the file's {struct.shape}"
                )
        return arrays

    def _random_inputs(self, seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {
            name: rng.normal(size=struct.shape).astype(struct.dtype)
            if np.issubdtype(struct.dtype, np.floating)
            else rng.integers(0, 2, struct.shape).astype(struct.dtype)
            for name, struct in self.inputs.items()
        }


def function(
    function: Function,
    params: Params,
    inputs: Inputs,
    path: str | Path,
    examples: Iterable[Mapping[str, np.ndarray]] | None = None,
    overwrite: bool = False,
) -> ExportedFunction:
    """Write a function of parameters as a `.tflite` file of one signature, builtin operators only.

    The converter folds constants: a batch norm at inference merges into the convolution before it,
    and so does a ReLU after it. Integers are preserved. For a `Quantized` parameter the file stores
    codes of 8 or 4 bits, scales and zero points, per channel, per group or per tensor, and
    dequantizes them when it is loaded. Narrower codes are written in the next wider type. Computing
    with integers, without float32 weights in memory, requires the layers of a GLM: see
    `glm_edge.export.tflite`.

    Args:
      function: traceable function from parameters and arrays by name to arrays by name, such as
        `lambda params, inputs: {"logits": module.apply({"params": params}, inputs["images"])}`.
      params: any tree of its parameters: arrays, `Masked` (written dense, with zeros) or
        `Quantized`.
      inputs: shape with fixed extents, and type, by name.
      path: path of the file.
      examples: calibration inputs by name, on which the converter chooses int8 grids of
        activations. Weights also become int8, per channel where the runtime supports it. Types of
        inputs and outputs do not change. None keeps float32. Not available with `Quantized`
        parameters.
      overwrite: whether to replace an existing file.

    Returns:
      The exported function; its `verify` runs the file.

    Raises:
      ExportError: an argument has the wrong type, an extent is not fixed, the converter rejects the
        function, the function closes over packed integers, or a parameter cannot be stored; the
        message names a supported alternative.
      OutputError: the file already exists or cannot be written.
      MissingExtraError: TensorFlow is not installed.

    Example:
      exported = ge.export.function(
          lambda params, inputs: {"y": net.apply({"params": params}, inputs["x"])},
          params,
          {"x": jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)},
          "net.tflite",
      )
      exported.verify()
    """
    _check_call(function, params, inputs, path)
    path = Path(path)
    for name, struct in inputs.items():
        check_fixed(f"shape of {name}", struct.shape)
    check_target(path, overwrite, None, boxes.stored_bytes(params))
    constants, stored_params, conversions = _to_stored(params)
    if examples is not None and constants:
        raise ExportError(
            f"{next(iter(constants))}: is already quantized, which excludes examples=; omit "
            "examples, or pass dense parameters"
        )
    run, plain = _with_constants(function, stored_params)
    _check_closure(run, plain, inputs, constants, stored_params)
    if examples is not None:
        content = _calibrate(lambda values: run({}, values), inputs, examples)
        size = write_stream(path, lambda file: file.write(content))
    else:
        size = _write(run, inputs, constants, stored_params, conversions, path, overwrite)
    stored = sum(
        constant.data.nbytes + (0 if constant.scale is None else constant.scale.nbytes)
        for constant in constants.values()
    )
    return ExportedFunction(
        path, size, stored, tuple(conversions), dict(inputs), function, stored_params
    )


def _check_call(function: Any, params: Any, inputs: Any, path: Any) -> None:
    """Reject arguments that are swapped or have the wrong type.

    Args:
      function: argument of `function`.
      params: argument of `function`.
      inputs: argument of `function`.
      path: argument of `function`.
    """
    form = "ge.export.function(function, params, inputs, path)"
    if isinstance(function, nn.Module) or not callable(function):
        raise ExportError(
            f"{form}: function is a {type(function).__name__}; use lambda params, "
            'inputs: {"y": module.apply({"params": params}, inputs["x"])}'
        )
    if isinstance(params, nn.Module) or callable(params):
        raise ExportError(
            f"{form}: params is a {type(params).__name__}; use the parameters, such as "
            'module.init(...)["params"]'
        )
    right = 'use {"x": jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)}, or arrays'
    if not isinstance(inputs, Mapping) or not inputs:
        kind = "empty" if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
        raise ExportError(f"{form}: inputs is {kind}; {right}")
    for name, struct in inputs.items():
        if (
            not isinstance(name, str)
            or not hasattr(struct, "shape")
            or not hasattr(struct, "dtype")
        ):
            raise ExportError(f"{form}: inputs[{name!r:.60}] is {struct!r:.60}; {right}")
    if not isinstance(path, str | os.PathLike):
        raise ExportError(f"{form}: path is a {type(path).__name__}; use a file name")


class _Dequantized(Quantized):
    """A box whose data are already its dense rows."""

    def rows(self) -> Array:  # type: ignore[override]  # jitted in the base
        return self.data


def _to_stored(params: Params) -> tuple[dict[str, Constant], Params, list[Conversion]]:
    """Return the constants of quantized parameters, all stored parameters, and the conversions."""
    constants, conversions = {}, []

    def stored(path: str, leaf: Any) -> Any:
        if isinstance(leaf, Quantized):
            constants[path], leaf, changes = _to_constant(path, leaf)
        else:
            leaf, changes = to_array(path, leaf)
            leaf = jnp.asarray(leaf)
            dtype = leaf.dtype
            if jnp.issubdtype(dtype, jnp.floating):
                check_finite(path, np.asarray(leaf))
                if dtype != jnp.float32:
                    changes = [*changes, Conversion(path, f"{dtype} written as float32", False)]
                    leaf = leaf.astype(jnp.float32)
        conversions.extend(changes)
        return leaf

    return constants, boxes.map_with_path(stored, params), conversions


def _to_constant(path: str, box: Quantized) -> tuple[Constant, Quantized, list[Conversion]]:
    kind = check_box(path, box, TFLITE_FUNCTION)
    conversions = box_conversions(path, box, kind)
    check_finite(path, np.asarray(box.scale))
    box = box.replace(**NO_STATIC_RANGES, dtype="float32")
    box, changes = with_storable_scales(path, box, half=False)
    codes = np.asarray(box.codes())
    # One row per scale, so that groups become channels of the constant.
    per_row = (*codes.shape[:-1], box.scale.shape[-1])
    columns = codes.shape[-1] // per_row[-1]
    scale = np.broadcast_to(np.asarray(box.scale).astype(np.float32), per_row).reshape(-1)
    zero = None
    if box.zero is not None:
        zero = np.broadcast_to(np.asarray(box.zero), per_row).reshape(-1)
    data = pack_nibbles(codes) if kind == "int4" else codes.reshape(-1).view(np.uint8)
    constant = Constant(kind, (len(scale), columns), data, np.array(scale), zero=zero)
    return constant, box, conversions + changes


def _with_constants(function: Function, params: Params) -> tuple[Function, set[int]]:
    """Rewrite the function to take dense matrices [..., out, in] by path.

    Returns:
      The rewritten function, and the ids of its plain arrays.
    """
    plain = {id(leaf) for _, leaf in boxes.path_items(params) if not boxes.is_box(leaf)}

    def run(rows: Any, inputs: dict[str, Array]) -> dict[str, Array]:
        matrices = dict(boxes.path_items(rows))

        def dense(path: str, leaf: Any) -> Any:
            if not isinstance(leaf, Quantized):
                return leaf
            fields = {item.name: getattr(leaf, item.name) for item in dataclasses.fields(leaf)}
            return _Dequantized(**{**fields, "data": matrices[path]}).unbox()

        return function(boxes.map_with_path(dense, params), inputs)

    return run, plain


def _row_shapes(params: Params, constants: Mapping[str, Constant]) -> dict[str, tuple[int, ...]]:
    """Return shapes of the quantized parameters as matrices [..., out, in] by path."""
    return {
        path: (*leaf.data.shape[:-1], leaf.columns)
        for path, leaf in boxes.path_items(params)
        if path in constants
    }


def _check_closure(
    run: Function,
    plain: set[int],
    inputs: Inputs,
    constants: Mapping[str, Constant],
    params: Params,
) -> None:
    """Reject packed integers that the function closes over instead of taking as parameters."""
    structs = {
        path: jax.ShapeDtypeStruct(shape, jnp.float32)
        for path, shape in _row_shapes(params, constants).items()
    }
    closed = jax.make_jaxpr(lambda rows, values: run(rows, values))(structs, dict(inputs))
    for constant in _closed_over(closed):
        kind = str(getattr(constant, "dtype", ""))
        if kind in ("int8", "uint8") and np.ndim(constant) >= 2 and id(constant) not in plain:
            raise ExportError(
                f"the function closes over {kind} {list(np.shape(constant))}, probably of a "
                "quantized parameter, whose codes would be written as float32; pass it in params"
            )


def _closed_over(closed: ClosedJaxpr) -> Iterator[Any]:
    yield from closed.consts
    for equation in closed.jaxpr.eqns:
        for value in jax.tree.leaves(
            dict(equation.params), is_leaf=lambda node: isinstance(node, ClosedJaxpr)
        ):
            if isinstance(value, ClosedJaxpr):
                yield from _closed_over(value)


def _write(
    run: Function,
    inputs: Inputs,
    constants: Mapping[str, Constant],
    params: Params,
    conversions: list[Conversion],
    path: Path,
    overwrite: bool,
) -> int:
    shapes = _row_shapes(params, constants)
    subtrees = tuple({name.split("/")[0] for name in shapes})
    content, arguments = skeleton(
        [Signature(SIGNATURE, dict(inputs), run, subtrees)], shapes, "function"
    )
    graph = FlatModel(content)
    attached = {name: (where, constants[where]) for name, where in arguments.items()}
    graph.attach(attached, in_float32=True)
    graph.add_metadata(
        {
            "version": __version__,
            "signatures": [SIGNATURE],
            "parameters": sorted(shapes),
            "conversions": [str(conversion) for conversion in conversions],
            "verified": False,
        }
    )
    graph.compact(names={name.encode() for name in shapes})
    return tflite_file.write(graph.model, path, overwrite)


def _calibrate(
    function: Callable[[dict[str, Array]], dict[str, Array]],
    inputs: Inputs,
    examples: Iterable[Mapping[str, np.ndarray]],
) -> bytes:
    """Convert a function to a file with int8 grids chosen by the converter."""
    jax2tf, tf = tensorflow()
    lowered = jax2tf.convert(expand_erf(function), with_gradient=False)
    specs = {
        name: tf.TensorSpec(struct.shape, tf.as_dtype(struct.dtype), name=name)
        for name, struct in inputs.items()
    }
    traced = tf.function(lambda **values: lowered(values), autograph=False)
    concrete = traced.get_concrete_function(**specs)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], tf.Module())
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    values = [{name: np.asarray(x, np.float32) for name, x in one.items()} for one in examples]
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: iter(values)
    return run_converter(converter, "function")
