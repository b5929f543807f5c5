"""Conditions of delegates that depend on more than a version, a type or a rank.

A condition is a function of an operator and its graph. It returns None if the operator satisfies
it, a reason if the delegate rejects the operator, or `Undecided` if the file is not enough to
decide.
"""

import collections
from collections.abc import Callable, Iterable

from glm_edge.export.common.interface import Tensor
from glm_edge.export.tflite.reader import Graph, Operator

FLOATS = ("float32", "float16")
BYTES = ("uint8", "int8")
_ACTIVATIONS = ("none", "RELU", "RELU_N1_TO_1", "RELU6", "TANH", "SIGN_BIT")
_COMPARISONS = {"LESS", "LESS_EQUAL", "GREATER", "GREATER_EQUAL", "EQUAL", "NOT_EQUAL"}
_REFLECT = 0


class Undecided(str):
    """A reason why the file is not enough to decide."""


class GraphContext:
    """Properties of a graph that conditions of one operator use."""

    def __init__(self, graph: Graph) -> None:
        self.consumers: dict[int, list[Operator]] = collections.defaultdict(list)
        self.producers: dict[int, Operator] = {}
        for operator in graph.operators:
            for index in set(operator.input_indices):
                self.consumers[index].append(operator)
            for index in operator.output_indices:
                self.producers[index] = operator
        self.blocks = next(
            (
                tensor.name
                for operator in graph.operators
                for tensor in _present(operator.inputs)
                if tensor.quantization.startswith("blocks")
            ),
            None,
        )


Condition = Callable[[Operator, GraphContext], str | None]
CONDITIONS: dict[str, Condition] = {}


def condition(function: Condition) -> Condition:
    """Register a condition under its name."""
    CONDITIONS[function.__name__] = function
    return function


def _present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _all(operator: Operator) -> list[Tensor]:
    return [*_present(operator.inputs), *operator.outputs]


def _input(operator: Operator, position: int) -> Tensor | None:
    return operator.inputs[position] if position < len(operator.inputs) else None


def _option(operator: Operator, name: str, default: int = 0) -> float:
    return operator.options.get(name, default)


@condition
def static_shapes(operator: Operator, context: GraphContext) -> str | None:
    """Require that the file contains all extents."""
    if any(-1 in tensor.shape for tensor in _all(operator)):
        return Undecided("a shape known only at run time, which may be dynamic")
    return None


@condition
def rank_at_most_4(operator: Operator, context: GraphContext) -> str | None:
    """Require at most four dimensions per tensor."""
    rank = max((tensor.rank for tensor in _all(operator)), default=0)
    return f"a tensor of rank {rank}, at most 4" if rank > 4 else None


@condition
def gpu_tensors(operator: Operator, context: GraphContext) -> str | None:
    """Require computed tensors of a type that the GPU supports, and of rank 4 at most."""
    name = operator.name
    inputs, outputs = {*FLOATS, *BYTES}, {*FLOATS, *BYTES}
    if name in _COMPARISONS:
        outputs |= {"bool"}
    if name == "CAST":
        inputs |= {"bool", "int32"}
        outputs |= {"bool", "int32"}
    if name in ("ONE_HOT", "GATHER"):
        inputs |= {"int32"}
    if name in ("SELECT", "SELECT_V2", "LOGICAL_AND"):
        inputs |= {"bool"}
    if name == "LOGICAL_AND":
        outputs |= {"bool"}
    for tensors, allowed in ((_present(operator.inputs), inputs), (operator.outputs, outputs)):
        for tensor in tensors:
            if tensor.rank > 4:
                return f"a tensor of rank {tensor.rank}, at most 4"
            if not tensor.constant and tensor.type not in allowed:
                return f"a computed tensor of {tensor.type}"
    return None


@condition
def qnn_tensors(operator: Operator, context: GraphContext) -> str | None:
    """Require a QNN type for every tensor."""
    for tensor in _all(operator):
        if tensor.type in ("int4", "int2"):
            if tensor.quantization not in ("tensor", "channel") and context.blocks is None:
                return f"{tensor.type} without a scale"
        elif tensor.type not in _QNN_TYPES:
            return f"no QNN type for {tensor.type}"
    return None


_QNN_TYPES = {
    *("bool", "float16", "float32", "float64"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
}


@condition
def no_blocks_in_graph(operator: Operator, context: GraphContext) -> str | None:
    """Require that no weight of the signature has blockwise scales."""
    if context.blocks is None:
        return None
    return f"blockwise weights, which stop the compiler for the whole signature: {context.blocks}"


@condition
def qnn_not_hybrid(operator: Operator, context: GraphContext) -> str | None:
    """Require quantized activations for quantized weights."""
    integers = [t for t in _present(operator.inputs) if t.constant and t.quantization]
    floats = [t for t in (*_present(operator.inputs), *operator.outputs) if t.type in FLOATS]
    if integers and floats and operator.name != "DEQUANTIZE":
        return Undecided(f"float activations with {integers[0]} weights: QNN's library decides")
    return None


@condition
def first_input_float(operator: Operator, context: GraphContext) -> str | None:
    """Require float32 activations."""
    position = 2 if operator.name == "TRANSPOSE_CONV" else 0
    tensor = _input(operator, position)
    if operator.name == "DEQUANTIZE" or (tensor is not None and tensor.type == "float32"):
        return None
    return f"the first input is {tensor.type if tensor else 'absent'}, expected float32"


@condition
def plain_integers(operator: Operator, context: GraphContext) -> str | None:
    """Require that integers have no fused activation."""
    tensor = _input(operator, 0)
    return _fused_activation(operator) if tensor and tensor.type == "int32" else None


def _fused_activation(operator: Operator) -> str | None:
    activation = int(_option(operator, "FusedActivationFunction"))
    if not activation:
        return None
    named = _ACTIVATIONS[activation] if 0 <= activation < len(_ACTIVATIONS) else activation
    return f"a fused activation {named}"


@condition
def known_activation(operator: Operator, context: GraphContext) -> str | None:
    """Require that the GPU supports the fused activation, if any."""
    if _option(operator, "FusedActivationFunction") >= _ACTIVATIONS.index("SIGN_BIT"):
        return _fused_activation(operator)
    return None


@condition
def output_not_int16(operator: Operator, context: GraphContext) -> str | None:
    """Require an output that is not int16."""
    return "an int16 output" if operator.outputs and operator.outputs[0].type == "int16" else None


@condition
def no_constants(operator: Operator, context: GraphContext) -> str | None:
    """Require that all inputs are computed."""
    return "a constant input" if any(t.constant for t in _present(operator.inputs)) else None


@condition
def two_operands(operator: Operator, context: GraphContext) -> str | None:
    """Require two operands, of which at most one is a constant."""
    constants = sum(t.constant for t in _present(operator.inputs))
    computed = len(_present(operator.inputs)) - constants
    if (computed, constants) in ((2, 0), (1, 1)):
        return None
    return f"{computed} computed and {constants} constant inputs; expected 2 and 0, or 1 and 1"


@condition
def half_precision(operator: Operator, context: GraphContext) -> str | None:
    """Accept float16 weights if their reader does; limit the version for other types."""
    source = _input(operator, 0)
    if source is not None and source.type == "float16" and source.constant:
        return Undecided("float16 weights are accepted if their reader accepts float16")
    return f"version {operator.version}, at most 2" if operator.version > 2 else None


@condition
def casts_numbers(operator: Operator, context: GraphContext) -> str | None:
    """Require a cast between numeric types."""
    kind = operator.outputs[0].type if operator.outputs else "nothing"
    allowed = ("float32", "int32", *BYTES)
    return None if kind in allowed else f"cast to {kind}, expected one of {', '.join(allowed)}"


@condition
def gpu_cast(operator: Operator, context: GraphContext) -> str | None:
    """Require a cast that the GPU supports."""
    source, target = _input(operator, 0), operator.outputs[0] if operator.outputs else None
    if source is None or target is None:
        return "no input or output"
    pair = (source.type, target.type)
    if pair[0] == "bool" and pair[1] in FLOATS:
        producer = context.producers.get(operator.input_indices[0])
        readers = context.consumers[operator.output_indices[0]]
        if producer is not None and producer.name in _COMPARISONS and len(readers) == 1:
            return None
        return "a cast from bool that does not connect one comparison with one reader"
    numbers = {"float32", "int32"}
    if (pair[0] in FLOATS and pair[1] == "bool") or set(pair) <= numbers:
        return None
    return f"a cast from {pair[0]} to {pair[1]}"


@condition
def feeds_float(operator: Operator, context: GraphContext) -> str | None:
    """Require that one operator reads a comparison and converts it to floats."""
    readers = context.consumers[operator.output_indices[0]] if operator.output_indices else []
    if (
        len(readers) == 1
        and readers[0].name in ("CAST", "SELECT", "SELECT_V2")
        and readers[0].outputs
        and readers[0].outputs[0].type in FLOATS
    ):
        return None
    return "a comparison without a single CAST or SELECT to floats as its reader"


@condition
def condition_of_value_shape(operator: Operator, context: GraphContext) -> str | None:
    """Require a condition of the values' shape."""
    chosen, value = _input(operator, 0), _input(operator, 1)
    if chosen is None or value is None or chosen.shape != value.shape:
        return "condition and values differ in shape"
    return None


@condition
def same_types(operator: Operator, context: GraphContext) -> str | None:
    """Require two inputs of the same type."""
    kinds = [tensor.type for tensor in _present(operator.inputs)[:2]]
    return None if len(set(kinds)) == 1 else f"inputs of {' and '.join(kinds)}"


@condition
def no_broadcast(operator: Operator, context: GraphContext) -> str | None:
    """Require two inputs with the same batch dimensions."""
    a, b = (*_present(operator.inputs), None, None)[:2]
    if a is None or b is None or a.rank < 2 or a.rank != b.rank or a.shape[:-2] != b.shape[:-2]:
        return "batch dimensions differ"
    return None


@condition
def flat_constant(operator: Operator, context: GraphContext) -> str | None:
    """Require that a constant second input is a matrix."""
    second = _input(operator, 1)
    if second is not None and second.constant and second.rank != 2:
        return f"a constant second input of rank {second.rank}, expected 2"
    return None


@condition
def flat_indices(operator: Operator, context: GraphContext) -> str | None:
    """Require a vector of indices."""
    indices = _input(operator, 1)
    return None if indices is not None and indices.rank == 1 else "indices that are not a vector"


@condition
def same_rank_if_kept(operator: Operator, context: GraphContext) -> str | None:
    """Require that `keep_num_dims` preserves the rank."""
    source = _input(operator, 0)
    if source is None or source.constant:
        return "a constant input"
    keeps_rank = _option(operator, "KeepNumDims")
    if keeps_rank and (not operator.outputs or operator.outputs[0].rank != source.rank):
        return "keep_num_dims with a different rank"
    return None


@condition
def gpu_broadcast(operator: Operator, context: GraphContext) -> str | None:
    """Require shapes that broadcast under the GPU's rules."""
    if len(_present(operator.inputs)) != 2:
        return "an absent input"
    a, b = _present(operator.inputs)
    if a.rank <= 1 or b.rank <= 1 or a.rank == b.rank:
        return None
    long, short = (a.shape, b.shape) if a.rank > b.rank else (b.shape, a.shape)
    if len(long) == 4 and (
        (len(short) == 3 and long[0] == 1)
        or (len(short) == 2 and long[0] == short[0] == short[1] == 1)
        or (len(short) == 2 and (long[0], long[3]) == short)
    ):
        return None
    return "shapes that the delegate does not broadcast"


@condition
def gpu_select(operator: Operator, context: GraphContext) -> str | None:
    """Require shapes of condition and values that the GPU's select supports."""
    if len(_present(operator.inputs)) != 3 or not operator.outputs:
        return "expected 3 inputs and an output"
    (chosen, *values), target = _present(operator.inputs), operator.outputs[0].shape
    if chosen.type not in ("bool", *FLOATS):
        return f"a condition of {chosen.type}"
    tail = target[len(target) - chosen.rank :]
    if chosen.rank > len(target) or any(
        c not in (t, 1) for c, t in zip(chosen.shape, tail, strict=False)
    ):
        return "a condition that does not broadcast to the output"
    for value in values:
        if value.rank and value.shape != target and value.shape != (1,):
            return "a value that has neither the output's shape nor is a scalar"
        if value.rank == 2 and not value.constant:
            return "a computed value of rank 2"
    return None


@condition
def gpu_paddings(operator: Operator, context: GraphContext) -> str | None:
    """Require paddings for a tensor of rank 3 or 4."""
    paddings = _input(operator, 1)
    if paddings is None or paddings.shape not in ((3, 2), (4, 2)):
        return "paddings for a tensor that is not of rank 3 or 4"
    if operator.name == "MIRROR_PAD" and _option(operator, "Mode") != _REFLECT:
        return "a padding mode that is not REFLECT"
    return None


@condition
def one_scale(operator: Operator, context: GraphContext) -> str | None:
    """Require one scale per weight tensor."""
    weights = _input(operator, 1)
    if weights is not None and weights.quantization in ("", "tensor"):
        return None
    return "more than one scale for the weights"


@condition
def all_bytes(operator: Operator, context: GraphContext) -> str | None:
    """Require 8-bit inputs."""
    kinds = {tensor.type for tensor in _present(operator.inputs)} - set(BYTES)
    return f"an input of {min(kinds)}, expected 8 bits" if kinds else None


@condition
def one_row(operator: Operator, context: GraphContext) -> str | None:
    """Require one row of activations."""
    source = _input(operator, 0)
    if source is not None and source.rank and source.shape[-1] == source.size:
        return None
    return "an input of several rows, expected one"


@condition
def last_axis(operator: Operator, context: GraphContext) -> str | None:
    """Require a concatenation of rank-3 or rank-4 inputs along the last axis."""
    source, axis = _input(operator, 0), _option(operator, "Axis")
    if len(operator.inputs) < 2 or source is None or source.rank not in (3, 4):
        return "fewer than 2 inputs, or a rank that is not 3 or 4"
    return None if axis in (-1, source.rank - 1) else "an axis that is not the last"


@condition
def coreml_broadcast(operator: Operator, context: GraphContext) -> str | None:
    """Require shapes that broadcast under Core ML's rules."""
    tensors = _present(operator.inputs)[:2]
    if len(tensors) < 2:
        return f"{len(tensors)} inputs, expected 2"
    for tensor in tensors:
        if tensor.type != "float32" and not (tensor.type == "float16" and tensor.constant):
            return f"an input of {tensor.type}"
        if tensor.rank > 4:
            return f"a tensor of rank {tensor.rank}, at most 4"
    a, b = ((1,) * (4 - tensor.rank) + tensor.shape for tensor in tensors)
    if a[0] != b[0] and not any(tensor.constant and tensor.size == 1 for tensor in tensors):
        return "shapes that the delegate does not broadcast"
    if a[1:3] != b[1:3] and (1, 1) not in (a[1:3], b[1:3]):
        return "shapes that the delegate does not broadcast"
    if a[3] != b[3] and 1 not in (a[3], b[3]):
        return "shapes that the delegate does not broadcast"
    return None
