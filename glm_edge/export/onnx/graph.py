"""Lowering of a traced function to an ONNX graph whose weights are named, not traced.

A converter folds weights to float. This module keeps a weight as a name, and the graph reads the
tensors that the file stores under that name.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from glm_edge.errors import ExportError, require
from glm_edge.export.common.jaxpr import CALLS, aval

ELEMENTWISE = {
    "abs": "Abs",
    "add": "Add",
    "and": "And",
    "cos": "Cos",
    "div": "Div",
    "eq": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "logistic": "Sigmoid",
    "lt": "Less",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "not": "Not",
    "or": "Or",
    "sign": "Sign",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "tanh": "Tanh",
}
REDUCTIONS = {"reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_sum": "ReduceSum"}
PASSED = {"copy", "copy_p", "stop_gradient", "optimization_barrier"}


@dataclass(frozen=True)
class StoredWeight:
    """A weight as tensors of the file.

    Attributes:
      values: `TensorProto` of floats or integers.
      scale: `TensorProto` of scales, or None for floats.
      zero: `TensorProto` of zero points, or None.
      attributes: attributes of the `DequantizeLinear` that reads it.
      transposed: True if it is stored [in, out], the layout of `MatMul`.
      rows: True if lookups dequantize only the rows that they read.
    """

    values: Any
    scale: Any = None
    zero: Any = None
    attributes: Mapping[str, int] | None = None
    transposed: bool = False
    rows: bool = False


@dataclass(frozen=True)
class Value:
    """A variable of the trace as a tensor of the graph.

    Attributes:
      name: name of the tensor, or None for a constant that is not yet a tensor.
      shape: shape of the tensor, which broadcasts to the variable's shape.
      array: values of a constant.
      weight: path of a weight that is not yet a tensor.
    """

    name: str | None
    shape: tuple[int, ...]
    array: np.ndarray | None = None
    weight: str | None = None


Lowering = Callable[["GraphBuilder", JaxprEqn, list[Value]], Value | str | list[str]]
"""Adds the nodes of one operation to a graph; returns its outputs."""
LOWERINGS: dict[str, Lowering] = {}


def lowers(*primitives: str) -> Callable[[Lowering], Lowering]:
    """Register a function as the lowering of some JAX primitives."""

    def register(lowering: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(primitives, lowering))
        return lowering

    return register


class GraphBuilder:
    """Builder of the nodes and constants of one graph.

    Attributes:
      weights: weights by path, as the file stores them.
      nodes: `NodeProto`s in execution order.
      initializers: `TensorProto` by name.
      products: path of the weight by the output name of its product.
    """

    def __init__(self, weights: Mapping[str, StoredWeight]) -> None:
        self.onnx = require("onnx", extra="onnx")
        self.weights = weights
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.products: dict[str, str] = {}
        self._constants: dict[tuple, str] = {}
        self._read: dict[tuple[str, bool], str] = {}

    def node(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; return the name of its output, or a list of several."""
        names = [f"{operator}_{len(self.nodes)}_{i}" for i in range(outputs)]
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(
            self.onnx.helper.make_node(operator, list(inputs), names, name=name, **attributes)
        )
        return names[0] if outputs == 1 else names

    def constant(self, array: Any) -> str:
        """Add a constant, storing equal ones once; return its name."""
        array = np.asarray(array)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = name
            self.initializers[name] = self.onnx.numpy_helper.from_array(array, name)
        return self._constants[key]

    def sizes(self, values: Iterable[int]) -> str:
        """Add an int64 vector as a constant; return its name."""
        return self.constant(np.asarray(list(values), np.int64))

    def named(self, value: Value) -> str:
        """Return the name of a value's tensor, which may need broadcasting."""
        if value.weight is not None:
            return self.read(value.weight, transposed=False)
        return self.constant(value.array) if value.name is None else value.name

    def full(self, value: Value, shape: tuple[int, ...]) -> str:
        """Return the name of a value's tensor at the variable's shape."""
        name = self.named(value)
        return name if value.shape == shape else self.node("Expand", name, self.sizes(shape))

    def stored(self, path: str) -> tuple[StoredWeight, list[str]]:
        """Add the tensors of a weight; return the weight and their names."""
        weight = self.weights[path]
        tensors = [t for t in (weight.values, weight.scale, weight.zero) if t is not None]
        self.initializers.update({tensor.name: tensor for tensor in tensors})
        return weight, [tensor.name for tensor in tensors]

    def read(self, path: str, transposed: bool) -> str:
        """Read a dense float32 weight, [out, in] or transposed; return the tensor's name."""
        if (path, transposed) not in self._read:
            weight, names = self.stored(path)
            if weight.scale is not None:
                name = self.node("DequantizeLinear", *names, **(weight.attributes or {}))
            elif weight.values.data_type == self.onnx.TensorProto.FLOAT:
                name = names[0]
            else:
                name = self.node("Cast", *names, to=self.onnx.TensorProto.FLOAT)
            if transposed != weight.transposed:
                name = self.node("Transpose", name, perm=[1, 0])
            self._read[path, transposed] = name
        return self._read[path, transposed]

    def look_up(self, path: str, indices: str, count: int) -> str:
        """Read [count, columns] rows of a weight [out, in]; return the tensor's name."""
        weight, names = self.stored(path)
        axis = int(weight.transposed)
        if weight.rows:
            rows = [self.node("Gather", names[0], indices, axis=axis)]
            rows += [self.node("Gather", name, indices, axis=0) for name in names[1:]]
            result = self.node("DequantizeLinear", *rows, axis=axis) if names[1:] else rows[0]
        else:
            result = self.node("Gather", self.read(path, weight.transposed), indices, axis=axis)
        return self.node("Transpose", result, perm=[1, 0]) if weight.transposed else result

    def lower(
        self,
        function: Callable[..., Any],
        params: Mapping[str, jax.ShapeDtypeStruct],
        inputs: Mapping[str, jax.ShapeDtypeStruct],
    ) -> Any:
        """Trace `function(params, inputs)` into nodes.

        Args:
          function: function of two dictionaries; it returns a dictionary of arrays.
          params: dense shape and type by weight path.
          inputs: shape and type by name.

        Returns:
          `GraphProto`; an output with the name of an input gets `_out` appended.

        Raises:
          ExportError: an operation has no lowering to ONNX.
        """
        closed, result = jax.make_jaxpr(function, return_shape=True)(dict(params), dict(inputs))
        names = sorted(params)
        arguments = [Value(None, params[path].shape, weight=path) for path in names]
        arguments += [Value(name, inputs[name].shape) for name in sorted(inputs)]
        constants = [_constant(array) for array in closed.consts]
        values = self._jaxpr(closed.jaxpr, constants, arguments)
        outputs = []
        for value, (name, struct) in zip(values, sorted(result.items()), strict=True):
            name = f"{name}_out" if name in inputs else name
            source = self.full(value, struct.shape)
            self.nodes.append(self.onnx.helper.make_node("Identity", [source], [name], name=name))
            outputs.append(self._info(name, struct))
        described = [self._info(name, struct) for name, struct in sorted(inputs.items())]
        return self.onnx.helper.make_graph(
            self.nodes, "glm_edge", described, outputs, list(self.initializers.values())
        )

    def _info(self, name: str, struct: jax.ShapeDtypeStruct) -> Any:
        return self.onnx.helper.make_tensor_value_info(
            name, self.dtype_number(struct.dtype), struct.shape
        )

    def dtype_number(self, dtype: Any) -> int:
        """Return the ONNX code of a type."""
        return self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def _jaxpr(self, jaxpr: Jaxpr, constants: list[Value], arguments: list[Value]) -> list[Value]:
        values = dict(zip(jaxpr.constvars, constants, strict=True))
        values.update(zip(jaxpr.invars, arguments, strict=True))

        def read(variable: Any) -> Value:
            return _constant(variable.val) if isinstance(variable, Literal) else values[variable]

        for equation in jaxpr.eqns:
            outputs = self._equation(equation, [read(variable) for variable in equation.invars])
            values.update(zip(equation.outvars, outputs, strict=True))
        return [read(variable) for variable in jaxpr.outvars]

    def _equation(self, equation: JaxprEqn, inputs: list[Value]) -> list[Value]:
        name = equation.primitive.name
        if name in CALLS:
            inner = next(v for v in equation.params.values() if isinstance(v, ClosedJaxpr | Jaxpr))
            body, constants = (
                (inner, []) if isinstance(inner, Jaxpr) else (inner.jaxpr, inner.consts)
            )
            return self._jaxpr(body, [_constant(array) for array in constants], inputs)
        if name in PASSED:
            return inputs
        results = [aval(variable) for variable in equation.outvars]
        if all(0 in result.shape for result in results):
            return [_constant(np.zeros(result.shape, result.dtype)) for result in results]
        if name == "broadcast_in_dim":
            return [self._broadcast(equation, inputs[0])]
        if all(value.array is not None for value in inputs):
            outputs = equation.primitive.bind(*[v.array for v in inputs], **equation.params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
            return [_constant(array) for array in outputs]
        if name in ELEMENTWISE:
            return [self.elementwise(ELEMENTWISE[name], inputs)]
        if name in REDUCTIONS:
            source = self.full(inputs[0], aval(equation.invars[0]).shape)
            axes = self.sizes(equation.params["axes"])
            outputs = self.node(REDUCTIONS[name], source, axes, keepdims=0)
        elif name in LOWERINGS:
            outputs = LOWERINGS[name](self, equation, inputs)
        else:
            raise ExportError(f"ONNX: no lowering for {name}")
        outputs = outputs if isinstance(outputs, list) else [outputs]
        return [
            output if isinstance(output, Value) else Value(output, aval(variable).shape)
            for output, variable in zip(outputs, equation.outvars, strict=True)
        ]

    def elementwise(self, operator: str, inputs: list[Value], **attributes: Any) -> Value:
        """Add a node whose inputs broadcast."""
        if operator == "Max":
            least = [v.array is not None and (v.array == -np.inf).all() for v in inputs]
            if any(least):
                return inputs[least.index(False)]
        name = self.node(operator, *[self.named(value) for value in inputs], **attributes)
        return Value(name, np.broadcast_shapes(*[value.shape for value in inputs]))

    def _broadcast(self, equation: JaxprEqn, value: Value) -> Value:
        rank = len(aval(equation.outvars[0]).shape)
        extents = [1] * rank
        shape = (1,) * (len(aval(equation.invars[0]).shape) - len(value.shape)) + value.shape
        for axis, extent in zip(equation.params["broadcast_dimensions"], shape, strict=True):
            extents[axis] = extent
        if _stripped(extents) == _stripped(value.shape):
            return value
        if value.array is not None:
            return _constant(value.array.reshape(extents))
        return Value(self.node("Reshape", self.named(value), self.sizes(extents)), tuple(extents))


@lowers("select_n")
def _lower_select_n(graph: GraphBuilder, equation: JaxprEqn, inputs: list[Value]) -> Value:
    which, *cases = inputs
    if len(cases) != 2 or aval(equation.invars[0]).dtype != bool:
        raise ExportError("ONNX: select_n with more than two cases")
    return graph.elementwise("Where", [which, cases[1], cases[0]])


@lowers("erfc")
def _lower_erfc(graph: GraphBuilder, _: JaxprEqn, inputs: list[Value]) -> Value:
    return graph.elementwise("Sub", [_constant(np.float32(1.0)), graph.elementwise("Erf", inputs)])


@lowers("rsqrt")
def _lower_rsqrt(graph: GraphBuilder, _: JaxprEqn, inputs: list[Value]) -> Value:
    return graph.elementwise("Reciprocal", [graph.elementwise("Sqrt", inputs)])


@lowers("square")
def _lower_square(graph: GraphBuilder, _: JaxprEqn, inputs: list[Value]) -> Value:
    return graph.elementwise("Mul", inputs * 2)


@lowers("integer_pow")
def _lower_integer_pow(graph: GraphBuilder, equation: JaxprEqn, inputs: list[Value]) -> Value:
    exponent = np.asarray(equation.params["y"], aval(equation.invars[0]).dtype)
    return graph.elementwise("Pow", [*inputs, _constant(exponent)])


@lowers("convert_element_type")
def _lower_convert_element_type(
    graph: GraphBuilder, equation: JaxprEqn, inputs: list[Value]
) -> Value:
    if aval(equation.invars[0]).dtype == aval(equation.outvars[0]).dtype:
        return inputs[0]
    to = graph.dtype_number(aval(equation.outvars[0]).dtype)
    return graph.elementwise("Cast", inputs, to=to)


def _operands(graph: GraphBuilder, equation: JaxprEqn, inputs: list[Value]) -> list[str]:
    return [graph.full(v, aval(i).shape) for v, i in zip(inputs, equation.invars, strict=True)]


def _reshape(graph: GraphBuilder, name: str, shape: Sequence[int]) -> str:
    return graph.node("Reshape", name, graph.sizes(shape))


@lowers("reshape", "squeeze", "expand_dims")
def _lower_reshape(graph: GraphBuilder, equation: JaxprEqn, inputs: list[Value]) -> str:
    (operand,) = _operands(graph, equation, inputs)
    return _reshape(graph, operand, aval(equation.outvars[0]).shape)


@lowers("transpose")
def _lower_transpose(graph: GraphBuilder, equation: JaxprEqn, inputs: list[Value]) -> str:
    permutation = list(equation.params["permutation"])
    return graph.node("Transpose", *_operands(graph, equation, inputs), perm=permutation)


@lowers("slice")
def _lower_slice(graph: GraphBuilder, equation: JaxprEqn, inputs: list[Value]) -> str:
    starts, ends = equation.params["start_indices"], equation.params["limit_indices"]
    shape = aval(equation.invars[0]).shape
    steps = equation.params["strides"] or [1] * len(shape)
    source = graph.full(inputs[0], shape)
    axes = [a for a in range(len(shape)) if (starts[a], ends[a]) != (0, shape[a])]
    plain = [a for a in axes if steps[a] == 1]
    if plain:
        bounds = [graph.sizes([bound[a] for a in plain]) for bound in (starts, ends)]
        source = graph.node("Slice", source, *bounds, graph.sizes(plain))
    for axis in (a for a in range(len(shape)) if steps[a] != 1):
        # MNN 3.6.1 reads wrong rows if a Slice with steps follows a Concat.
        rows = graph.sizes(range(starts[axis], ends[axis], steps[axis]))
        source = graph.node("Gather", source, rows, axis=axis)
    return source


@lowers("pad")
def _lower_pad(graph: GraphBuilder, equation: JaxprEqn, inputs: list[Value]) -> str:
    low, high, interior = zip(*equation.params["padding_config"], strict=True)
    if any(interior) or min(low + high) < 0:
        raise ExportError("ONNX: interior or negative padding")
    operand, value = _operands(graph, equation, inputs)
    return graph.node("Pad", operand, graph.sizes(low + high), value)


@lowers("concatenate")
def _lower_concatenate(graph: GraphBuilder, equation: JaxprEqn, inputs: list[Value]) -> str:
    variables, axis = equation.invars, equation.params["dimension"]
    # ONNX interprets an extent of zero as a copy of the input's extent.
    pairs = [(i, v) for i, v in zip(inputs, variables, strict=True) if aval(v).shape[axis]]
    parts = [graph.full(value, aval(variable).shape) for value, variable in pairs]
    return parts[0] if len(parts) == 1 else graph.node("Concat", *parts, axis=axis)


@lowers("stack")
def _lower_stack(graph: GraphBuilder, equation: JaxprEqn, inputs: list[Value]) -> str:
    axis = equation.params["axis"]
    shape = list(aval(equation.outvars[0]).shape)
    shape[axis] = 1
    parts = [_reshape(graph, name, shape) for name in _operands(graph, equation, inputs)]
    return graph.node("Concat", *parts, axis=axis)


@lowers("split")
def _lower_split(graph: GraphBuilder, equation: JaxprEqn, inputs: list[Value]) -> list[str]:
    sizes, axis = equation.params["sizes"], equation.params["axis"]
    source = _operands(graph, equation, inputs)
    names = graph.node("Split", *source, graph.sizes(sizes), outputs=len(sizes), axis=axis)
    return [names] if isinstance(names, str) else names


@lowers("gather")
def _lower_gather(graph: GraphBuilder, equation: JaxprEqn, inputs: list[Value]) -> str:
    numbers, (operand, index) = equation.params["dimension_numbers"], equation.invars
    inner, rank = aval(operand).shape[1:], len(aval(equation.outvars[0]).shape)
    if (
        numbers.collapsed_slice_dims != (0,)
        or numbers.start_index_map != (0,)
        or numbers.operand_batching_dims
        or tuple(equation.params["slice_sizes"]) != (1, *inner)
        or tuple(numbers.offset_dims) != tuple(range(rank - len(inner), rank))
    ):
        raise ExportError("ONNX: gather of anything but rows")
    count = int(np.prod(aval(index).shape))
    indices = _reshape(graph, graph.full(inputs[1], aval(index).shape), [count])
    if inputs[0].weight is not None:
        rows = graph.look_up(inputs[0].weight, indices, count)
    else:
        rows = graph.node("Gather", graph.full(inputs[0], aval(operand).shape), indices, axis=0)
    return _reshape(graph, rows, aval(equation.outvars[0]).shape)


@lowers("dynamic_update_slice")
def _lower_dynamic_update_slice(
    graph: GraphBuilder, equation: JaxprEqn, inputs: list[Value]
) -> str:
    shape, extent = (aval(variable).shape for variable in equation.invars[:2])
    moving = [a for a in range(len(shape)) if shape[a] != extent[a]]
    if not moving:
        return graph.full(inputs[1], extent)
    if len(moving) > 1:
        raise ExportError("ONNX: dynamic_update_slice along several axes")
    return _update(graph, moving[0], equation, inputs)


def _update(graph: GraphBuilder, axis: int, equation: JaxprEqn, inputs: list[Value]) -> str:
    """Select the update or the array for each slot."""
    shape, extent = (aval(variable).shape for variable in equation.invars[:2])
    slots, length = shape[axis], extent[axis]
    start = graph.node("Max", graph.named(inputs[2 + axis]), graph.constant(np.int32(0)))
    start = graph.node("Min", start, graph.constant(np.int32(slots - length)))
    offset = graph.node("Sub", graph.constant(np.arange(slots, dtype=np.int32)), start)
    first, last = graph.constant(np.int32(0)), graph.constant(np.int32(length - 1))
    update = graph.full(inputs[1], extent)
    if length == 1:
        inside = graph.node("Equal", offset, first)
    else:
        after = graph.node("GreaterOrEqual", offset, first)
        inside = graph.node("And", after, graph.node("LessOrEqual", offset, last))
        nearest = graph.node("Min", graph.node("Max", offset, first), last)
        update = graph.node("Gather", update, nearest, axis=axis)
    inside = _reshape(graph, inside, [slots if a == axis else 1 for a in range(len(shape))])
    return graph.node("Where", inside, update, graph.full(inputs[0], shape))


@lowers("dot_general")
def _lower_dot_general(graph: GraphBuilder, equation: JaxprEqn, inputs: list[Value]) -> str:
    contract, batch = equation.params["dimension_numbers"]
    lhs, rhs = equation.invars
    rows = aval(rhs).shape == inputs[1].shape and contract == ((aval(lhs).ndim - 1,), (1,))
    if inputs[1].weight is not None and rows:
        weight = graph.read(inputs[1].weight, transposed=True)
        product = graph.node("MatMul", graph.full(inputs[0], aval(lhs).shape), weight)
        graph.nodes[-1].name = inputs[1].weight
        graph.products[product] = inputs[1].weight
        return product
    operands = []
    for side, variable in enumerate((lhs, rhs)):
        free = [a for a in range(aval(variable).ndim) if a not in contract[side] + batch[side]]
        inner = [list(contract[side]), free] if side else [free, list(contract[side])]
        order = [*batch[side], *inner[0], *inner[1]]
        name = graph.full(inputs[side], aval(variable).shape)
        if order != list(range(len(order))):
            name = graph.node("Transpose", name, perm=order)
        extents = aval(variable).shape
        shape = [extents[a] for a in batch[side]]
        shape += [int(np.prod([extents[a] for a in part])) for part in inner]
        ordered = [extents[a] for a in order]
        operands.append(name if shape == ordered else _reshape(graph, name, shape))
    product = graph.node("MatMul", *operands)
    frees = [
        aval(v).ndim - len(c) - len(b) for v, c, b in zip((lhs, rhs), contract, batch, strict=True)
    ]
    return product if frees == [1, 1] else _reshape(graph, product, aval(equation.outvars[0]).shape)


def _constant(array: Any) -> Value:
    array = np.asarray(array)
    return Value(None, array.shape, array=array)


def _stripped(shape: Sequence[int]) -> tuple[int, ...]:
    leading = next((a for a, extent in enumerate(shape) if extent != 1), len(shape))
    return tuple(shape[leading:])
