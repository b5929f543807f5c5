"""Rules by which delegates take operators from the CPU, as published.

The rules are those of the delegates' own sources at one commit of LiteRT. An operator that a
delegate's table lacks is refused by it; further conditions of an entry are named in `checks`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

COMMIT = "f67457790c9c2ab67347d6fe53270e8d3df20868"
_ROOT = f"https://github.com/google-ai-edge/LiteRT/blob/{COMMIT}"
NNAPI_CC = f"{_ROOT}/tflite/delegates/nnapi/nnapi_delegate.cc"
GPU_BUILDER = f"{_ROOT}/tflite/delegates/gpu/common/model_builder.cc"
GPU_SHAPES = f"{_ROOT}/tflite/tools/versioning/gpu_compatibility.cc"
HEXAGON_UTILS = f"{_ROOT}/tflite/delegates/hexagon/utils.cc"
QNN_LIST = f"{_ROOT}/litert/vendors/qualcomm/compiler/Qualcomm_QNN_Compiler.md"
QNN_GRAPH = f"{_ROOT}/litert/vendors/qualcomm/compiler/qnn_compose_graph.cc"
QNN_PLUGIN = f"{_ROOT}/litert/vendors/qualcomm/compiler/qnn_compiler_plugin.cc"
COREML_MM = f"{_ROOT}/tflite/delegates/coreml/coreml_delegate.mm"
COREML_BUILDERS = f"{_ROOT}/tflite/delegates/coreml/builders"
DYNAMIC = f"{_ROOT}/tflite/core/subgraph.cc"

FLOAT = ("float32",)
FLOATS = ("float32", "float16")
BYTES = ("uint8", "int8")
FLOAT_OR_BYTES = (*FLOAT, *BYTES)
NUMBERS = (*FLOAT, *BYTES, "int32")
INDEX = ("int32",)
Types = Mapping[int, tuple[str, ...]]


@dataclass(frozen=True)
class Rule:
    """The conditions of a delegate for one operator.

    Attributes:
      version: highest version of the operator, None for any.
      types: by position of an input, the types it may have; an input that is absent may be.
      max_rank: of the first two inputs, None for any.
      constant: positions of inputs that the file must hold.
      runtime: how many inputs may be computed at run time, None for any number.
      checks: names of further conditions, in `delegates.conditions`.
      source: where the rule stands, None for the delegate's own file.
    """

    version: int | None = None
    types: Types = field(default_factory=dict)
    max_rank: int | None = None
    constant: tuple[int, ...] = ()
    runtime: tuple[int, ...] | None = None
    checks: tuple[str, ...] = ()
    source: str | None = None


@dataclass(frozen=True)
class Delegate:
    """An accelerator that takes operators from the CPU.

    Attributes:
      name: column of the table.
      title: of the delegate.
      source: file that lists what it takes.
      rules: by operator; an operator that is not here is refused.
      every: names of conditions for every operator, checked first.
      note: limits of its verdicts.
    """

    name: str
    title: str
    source: str
    rules: Mapping[str, Rule]
    every: tuple[str, ...]
    note: str


def _each(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_NNAPI = {
    **_each("ADD", Rule(2, {0: NUMBERS}, 4, checks=("plain_integers",))),
    **_each("MUL", Rule(2, {0: NUMBERS}, 4, checks=("plain_integers",))),
    **_each("SUB", Rule(3, {0: NUMBERS}, 4, checks=("plain_integers",))),
    **_each("DIV", Rule(1, {0: FLOAT}, 4)),
    **_each("SQUARED_DIFFERENCE", Rule(2, {0: NUMBERS}, 4)),
    **_each("MAXIMUM MINIMUM", Rule(3, {0: NUMBERS})),
    **_each("AVERAGE_POOL_2D MAX_POOL_2D", Rule(2, {0: FLOAT_OR_BYTES})),
    **_each("CONV_2D", Rule(5, checks=("unread",))),
    **_each("DEPTHWISE_CONV_2D", Rule(3, checks=("unread",))),
    **_each("FULLY_CONNECTED", Rule(5, checks=("output_not_int16",))),
    **_each("HARD_SWISH", Rule(None, {0: FLOAT_OR_BYTES})),
    **_each("SOFTMAX", Rule(2, {0: FLOAT_OR_BYTES}, 4)),
    **_each("RESHAPE", Rule(1, {0: NUMBERS}, 4, constant=(1,), checks=("output_rank_4",))),
    **_each("SQUEEZE", Rule(1)),
    **_each("CONCATENATION", Rule(2, {0: (*FLOATS, *BYTES)}, 4, checks=("no_activation",))),
    **_each("DEQUANTIZE", Rule(None, {0: (*BYTES, "float16")}, checks=("half_precision",))),
    **_each("FLOOR", Rule(1)),
    **_each("RELU RELU_N1_TO_1 RELU6 LOGISTIC", Rule(2, {0: FLOAT_OR_BYTES})),
    **_each("TANH", Rule(2, {0: FLOAT_OR_BYTES})),
    **_each("PAD PADV2", Rule(2, {0: FLOAT_OR_BYTES})),
    **_each("STRIDED_SLICE", Rule(2, {0: FLOAT_OR_BYTES})),
    **_each("SLICE", Rule(2, {0: NUMBERS, 1: INDEX, 2: INDEX})),
    **_each("TRANSPOSE", Rule(2, constant=(1,))),
    **_each("ABS EXP LOG POW COS SIN SQRT", Rule(1, {0: FLOAT})),
    **_each("RSQRT", Rule(2, {0: FLOAT_OR_BYTES})),
    **_each("MEAN", Rule(2, {0: FLOAT_OR_BYTES}, 4, checks=("output_not_scalar",))),
    **_each("SUM REDUCE_PROD", Rule(1, {0: FLOAT}, checks=("output_not_scalar",))),
    **_each("REDUCE_MAX REDUCE_MIN", Rule(2, {0: FLOAT_OR_BYTES})),
    **_each("EMBEDDING_LOOKUP", Rule(1, {1: FLOAT})),
    **_each("CAST", Rule(1, {0: NUMBERS}, checks=("casts_numbers",))),
    **_each("PRELU LEAKY_RELU", Rule(1, {0: FLOAT_OR_BYTES})),
    **_each("TILE", Rule(1, {0: NUMBERS, 1: INDEX})),
    **_each("LOGICAL_OR LOGICAL_AND LOGICAL_NOT", Rule(1, {0: ("bool",)})),
    **_each(
        "LESS LESS_EQUAL GREATER GREATER_EQUAL EQUAL NOT_EQUAL", Rule(2, {0: (*NUMBERS, "bool")})
    ),
    **_each("NEG", Rule(2, {0: ("float32", "int32")})),
    **_each("SELECT", Rule(2, {1: NUMBERS}, checks=("condition_of_value_shape",))),
    **_each("GATHER", Rule(2, {0: (*NUMBERS, "float16"), 1: INDEX})),
    **_each("EXPAND_DIMS", Rule(1, {0: (*NUMBERS, "float16"), 1: INDEX}, constant=(1,))),
    **_each("SPLIT", Rule(3, {0: INDEX, 1: NUMBERS}, constant=(0,))),
    **_each("SPLIT_V", Rule(2, {0: NUMBERS, 1: INDEX, 2: INDEX}, constant=(1, 2))),
    **_each("LOG_SOFTMAX ELU", Rule(1, {0: FLOAT})),
    **_each("QUANTIZE", Rule(2, {0: FLOAT_OR_BYTES})),
    **_each("PACK", Rule(2, {0: NUMBERS})),
    **_each("UNPACK", Rule(2, {0: FLOAT_OR_BYTES}, 4)),
    **_each(
        "BATCH_MATMUL",
        Rule(2, {0: ("float32", "int32", "int8")}, 4, checks=("same_types", "no_broadcast")),
    ),
}

# Where a condition stands that is not in the file of the rule that names it.
SOURCES = {
    "gpu_tensors": GPU_BUILDER,
    "no_blocks_in_graph": QNN_PLUGIN,
    "qnn_not_hybrid": QNN_PLUGIN,
    "qnn_tensors": QNN_GRAPH,
    "static_shapes": DYNAMIC,
}

_ONE = Rule(2, runtime=(1,), checks=("no_constants", "one_output"), source=GPU_SHAPES)
_TWO = Rule(2, checks=("two_operands", "known_activation"), source=GPU_SHAPES)
_AXES = Rule(None, {1: INDEX}, constant=(1,), runtime=(1,), source=GPU_SHAPES)
_GPU = {
    **_each("ABS COS ELU EXP FLOOR GELU LOG LOGISTIC NEG RSQRT SIGN SIN SQRT SQUARE TANH", _ONE),
    **_each("DIV SUB MAXIMUM MINIMUM POW SQUARED_DIFFERENCE FLOOR_DIV FLOOR_MOD LOGICAL_AND", _TWO),
    **_each(
        "LESS LESS_EQUAL GREATER GREATER_EQUAL EQUAL NOT_EQUAL", Rule(2, checks=("feeds_float",))
    ),
    **_each("ADD", Rule(2, checks=("two_inputs", "gpu_broadcast"), source=GPU_SHAPES)),
    **_each("MUL", Rule(3, checks=("two_inputs", "gpu_broadcast"), source=GPU_SHAPES)),
    **_each("ADD_N", Rule(2, checks=("two_inputs",), source=GPU_SHAPES)),
    **_each("SUM REDUCE_MAX REDUCE_MIN REDUCE_PROD MEAN", _AXES),
    **_each("BATCH_MATMUL", Rule(checks=("two_inputs", "flat_constant"), source=GPU_BUILDER)),
    **_each("CAST", Rule(runtime=(1,), checks=("gpu_cast",), source=GPU_SHAPES)),
    **_each("CONCATENATION SOFTMAX", Rule(2, checks=("beta_one",), source=GPU_SHAPES)),
    **_each("CONV_2D DEPTHWISE_CONV_2D", Rule(6, runtime=(1, 2), checks=("unread",))),
    **_each("TRANSPOSE_CONV", Rule(3, runtime=(1, 2), checks=("unread",))),
    **_each("AVERAGE_POOL_2D MAX_POOL_2D", Rule(2, runtime=(1,), checks=("unread",))),
    **_each("QUANTIZE", Rule(2, runtime=(1,))),
    **_each("CUMSUM", Rule(1, {0: FLOATS, 1: INDEX}, constant=(1,))),
    **_each("DEPTH_TO_SPACE HARD_SWISH TILE", Rule(runtime=(1,))),
    **_each("SPACE_TO_DEPTH", Rule(2, runtime=(1,))),
    **_each("DEQUANTIZE", Rule(3, {0: (*FLOATS, *BYTES, "int32")})),
    **_each(
        "FULLY_CONNECTED",
        Rule(
            9,
            {1: (*FLOATS, *BYTES)},
            runtime=(1, 2),
            checks=("plain_weights", "same_rank_if_kept"),
        ),
    ),
    **_each("GATHER", Rule(1, {1: INDEX}, checks=("two_operands", "flat_indices"))),
    **_each("PACK SPLIT SPLIT_V UNPACK", Rule()),
    **_each("RELU RELU6 RELU_0_TO_1 RELU_N1_TO_1 LEAKY_RELU", Rule(2)),
    **_each("PRELU", Rule(1)),
    **_each("PAD PADV2 MIRROR_PAD", Rule(2, runtime=(1,), checks=("gpu_paddings",))),
    **_each("RESHAPE", Rule(1, runtime=(1,))),
    **_each("RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR", Rule(3, runtime=(1,))),
    **_each("SELECT SELECT_V2", Rule(1, checks=("gpu_select",), source=GPU_SHAPES)),
    **_each("SLICE", Rule(2, checks=("rank_3_or_4",), source=GPU_SHAPES)),
    **_each("STRIDED_SLICE", Rule(4, checks=("rank_3_or_4", "no_masks"), source=GPU_SHAPES)),
    **_each("TRANSPOSE", Rule(4, runtime=(1,))),
}

_HEXAGON = {
    **_each("ADD MUL SUB", Rule(2, {0: BYTES, 1: BYTES})),
    **_each("MAXIMUM MINIMUM", Rule(2, {0: BYTES, 1: BYTES})),
    **_each("MEAN MIRROR_PAD PAD", Rule(2, {0: BYTES, 1: INDEX}, constant=(1,))),
    **_each(
        "FULLY_CONNECTED",
        Rule(4, {0: BYTES, 1: BYTES, 2: INDEX}, checks=("one_scale", "no_kept_dims")),
    ),
    **_each("CONCATENATION PACK", Rule(2, checks=("all_bytes",))),
    **_each("AVERAGE_POOL_2D MAX_POOL_2D", Rule(2, {0: BYTES}, checks=("no_activation",))),
    **_each(
        "CONV_2D DEPTHWISE_CONV_2D", Rule(3, {0: BYTES, 1: BYTES, 2: INDEX}, checks=("unread",))
    ),
    **_each("RESHAPE NEG HARD_SWISH", Rule(1, {0: BYTES})),
    **_each("SOFTMAX RELU6 TANH LOGISTIC QUANTIZE", Rule(2, {0: BYTES})),
    **_each("RELU", Rule(2, {0: BYTES})),
    **_each("SPACE_TO_DEPTH DEPTH_TO_SPACE", Rule(2, {0: BYTES})),
    **_each("RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR", Rule(3, {0: BYTES}, constant=(1,))),
    **_each("L2_NORMALIZATION", Rule(2, {0: BYTES}, checks=("no_activation",))),
    **_each("ARG_MAX ARG_MIN TRANSPOSE", Rule(2, {0: BYTES, 1: INDEX})),
    **_each("SPLIT", Rule(2, {0: INDEX, 1: BYTES}, constant=(0,))),
    **_each("SLICE", Rule(2, {0: BYTES}, constant=(1, 2))),
    **_each("STRIDED_SLICE", Rule(2, {0: BYTES}, constant=(1, 2, 3))),
    **_each("SQUARED_DIFFERENCE", Rule(2, {0: ("int8",), 1: ("int8",)})),
    **_each("RSQRT", Rule(2, {0: ("int8",)})),
}

_COREML = {
    **_each(
        "ADD MUL",
        Rule(1, checks=("coreml_broadcast",), source=f"{COREML_BUILDERS}/util.cc"),
    ),
    **_each("AVERAGE_POOL_2D MAX_POOL_2D", Rule(1, checks=("no_activation",))),
    **_each(
        "CONCATENATION",
        Rule(
            1,
            checks=("no_activation", "last_axis"),
            source=f"{COREML_BUILDERS}/concatenation_op_builder.cc",
        ),
    ),
    **_each("CONV_2D TRANSPOSE_CONV", Rule(1, {1: FLOATS}, constant=(1,), checks=("unread",))),
    **_each("DEPTHWISE_CONV_2D", Rule(2, {1: FLOATS}, constant=(1,), checks=("unread",))),
    **_each(
        "FULLY_CONNECTED",
        Rule(
            6,
            {1: FLOATS, 2: FLOATS},
            constant=(1, 2),
            checks=("plain_weights", "one_row"),
            source=f"{COREML_BUILDERS}/fully_connected_op_builder.cc",
        ),
    ),
    **_each("HARD_SWISH LOGISTIC RELU RELU_N1_TO_1 RELU6 TANH", Rule(1)),
    **_each(
        "MEAN",
        Rule(
            1,
            constant=(1,),
            checks=("rank_4", "kept_dims", "unread"),
            source=f"{COREML_BUILDERS}/pooling_layer_builder.cc",
        ),
    ),
    **_each("PAD PADV2 MIRROR_PAD", Rule(1, constant=(1,), checks=("rank_4", "unread"))),
    **_each(
        "RESHAPE",
        Rule(1, checks=("never_from_ios_13",), source=f"{COREML_BUILDERS}/reshape_op_builder.cc"),
    ),
    **_each("RESIZE_BILINEAR", Rule(1, checks=("unread",))),
    **_each("SOFTMAX", Rule(1, checks=("beta_one",))),
    **_each("DEQUANTIZE", Rule(None, {0: ("float16",)}, constant=(0,))),
}

_QNN = _each(
    "ABS ADD ARG_MAX ARG_MIN AVERAGE_POOL_2D BATCH_MATMUL BATCH_TO_SPACE_ND BROADCAST_TO CAST CEIL "
    "CONCATENATION CONV_2D CONV_3D COS CUMSUM DEPTHWISE_CONV_2D DEPTH_TO_SPACE DEQUANTIZE DIV "
    "DYNAMIC_UPDATE_SLICE ELU EMBEDDING_LOOKUP EQUAL EXP FLOOR FLOOR_DIV FLOOR_MOD FULLY_CONNECTED "
    "GATHER GATHER_ND GELU GREATER GREATER_EQUAL HARD_SWISH L2_NORMALIZATION L2_POOL_2D LEAKY_RELU "
    "LESS LESS_EQUAL LOG LOGICAL_AND LOGICAL_NOT LOGICAL_OR LOGISTIC LOG_SOFTMAX MAXIMUM "
    "MAX_POOL_2D MEAN MINIMUM MIRROR_PAD MUL NEG NOT_EQUAL ONE_HOT PACK PAD PADV2 POW PRELU "
    "QUANTIZE REDUCE_ALL REDUCE_ANY REDUCE_MAX REDUCE_MIN RELU RELU6 RELU_0_TO_1 RELU_N1_TO_1 "
    "RESHAPE RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR REVERSE_V2 ROUND RSQRT SCATTER_ND SELECT "
    "SELECT_V2 SIGN SIN SLICE SOFTMAX SPACE_TO_BATCH_ND SPACE_TO_DEPTH SPLIT SPLIT_V SQRT SQUARE "
    "SQUARED_DIFFERENCE STRIDED_SLICE SUB SUM TANH TILE TOPK_V2 TRANSPOSE TRANSPOSE_CONV UNPACK",
    Rule(),
) | {"STABLEHLO_COMPOSITE": Rule(checks=("composite_name",))}

DELEGATES = (
    Delegate(
        "nnapi",
        "NNAPI delegate, at the newest feature level",
        NNAPI_CC,
        _NNAPI,
        ("static_shapes",),
        "Android marks NNAPI as deprecated from version 15 on "
        "(https://developer.android.com/ndk/guides/neuralnetworks/migration-guide); the driver of "
        "a phone may refuse what the delegate hands over",
    ),
    Delegate(
        "gpu",
        "TFLite GPU delegate, quantized operators allowed",
        GPU_BUILDER,
        _GPU,
        ("static_shapes", "gpu_tensors"),
        "LiteRT's newer GPU accelerator is shipped as a binary whose rules are not published",
    ),
    Delegate(
        "hexagon",
        "TFLite Hexagon delegate, for chips before HTP",
        HEXAGON_UTILS,
        _HEXAGON,
        ("static_shapes", "rank_at_most_4"),
        "takes 8-bit activations only, so nothing of a file with float activations",
    ),
    Delegate(
        "qnn",
        "Qualcomm AI Engine Direct (HTP) through LiteRT's compiler plugin",
        QNN_LIST,
        _QNN,
        ("qnn_tensors", "no_blocks_in_graph", "static_shapes", "qnn_not_hybrid"),
        "yes means mapped to QNN operators, which QNN's own library may still refuse on a chip",
    ),
    Delegate(
        "coreml",
        "TFLite Core ML delegate, on iOS 13 and later",
        COREML_MM,
        _COREML,
        ("static_shapes", "first_input_float"),
        "yes means handed to Core ML, which itself decides between the Neural Engine, GPU and CPU "
        "(https://developer.apple.com/documentation/coreml/mlcomputeunits); a run of fewer than "
        "two accepted operators stays on the CPU",
    ),
)
