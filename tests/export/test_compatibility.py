"""Which delegate takes which operator: rules against graphs whose answers the sources give."""

import dataclasses
import re

import numpy as np
import pytest

from glm_edge import export
from glm_edge.errors import ExportError
from glm_edge.export.common.interface import Tensor
from glm_edge.export.delegates.compatibility import NO, UNKNOWN, YES, judge
from glm_edge.export.delegates.conditions import CONDITIONS, GraphContext
from glm_edge.export.delegates.rules import COMMIT, CONDITION_SOURCES, DELEGATES
from glm_edge.export.tflite import file as tflite_file
from glm_edge.export.tflite.flatbuffer import FlatModel, schema
from glm_edge.export.tflite.reader import Graph, Operator, read_graphs

BY_NAME = {delegate.name: delegate for delegate in DELEGATES}


def tensor(kind="float32", shape=(1, 4, 64), constant=False, quantization=""):
    return Tensor("t", kind, shape, constant, quantization)


def operator(name, *inputs, version=1, outputs=None, **options):
    outputs = (tensor(),) if outputs is None else outputs
    places = tuple(range(len(inputs) + len(outputs)))
    return Operator(
        name, version, inputs, outputs, options, places[: len(inputs)], places[len(inputs) :]
    )


def verdicts(result, *others):
    context = GraphContext(Graph("g", {}, {}, (result, *others)))
    return {name: judge(delegate, result, context) for name, delegate in BY_NAME.items()}


def weights(kind, quantization="channel"):
    return tensor(kind, (32, 64), True, quantization)


def test_a_product_is_decided_by_version_weights_and_rows():
    plain = verdicts(operator("FULLY_CONNECTED", tensor(), weights("float32", ""), None))
    accepted = {name: verdict.accepted for name, verdict in plain.items()}
    assert accepted == {"nnapi": YES, "gpu": YES, "hexagon": NO, "qnn": YES, "coreml": NO}
    assert "several rows" in plain["coreml"].reason
    one = operator("FULLY_CONNECTED", tensor(shape=(1, 1, 64)), weights("float32", ""), None)
    assert verdicts(one)["coreml"].accepted == YES

    ours = verdicts(operator("FULLY_CONNECTED", tensor(), weights("int8"), None, version=12))
    assert {name: ours[name].reason for name in ("nnapi", "gpu", "coreml")} == {
        "nnapi": "version 12, at most 5",
        "gpu": "version 12, at most 9",
        "coreml": "version 12, at most 6",
    }
    assert ours["qnn"].accepted == UNKNOWN
    assert "float activations with int8/channel weights" in ours["qnn"].reason


@pytest.mark.parametrize("kind", ["int4", "int2"])
def test_narrow_weights_are_read_by_none_but_qnn(kind):
    result = verdicts(operator("FULLY_CONNECTED", tensor(), weights(kind), None, version=5))
    assert result["gpu"].reason.startswith(f"input 1 of {kind}")
    assert result["coreml"].reason.startswith(f"input 1 of {kind}")
    assert result["qnn"].accepted == UNKNOWN


def test_one_blockwise_weight_costs_qnn_the_whole_signature():
    blocks = operator("FULLY_CONNECTED", tensor(), weights("int4", "blocks of 32"), None)
    alone = operator("RSQRT", tensor())
    assert verdicts(alone)["qnn"].accepted == YES
    beside = verdicts(alone, blocks)["qnn"]
    assert beside.accepted == NO
    assert beside.source.endswith(
        f"{COMMIT}/litert/vendors/qualcomm/compiler/qnn_compiler_plugin.cc"
    )
    assert "blockwise" in beside.reason


def test_8_bit_activations_are_for_hexagon_which_wants_one_scale():
    rows, out = tensor("int8", (1, 64), quantization="tensor"), (tensor("int8", (1, 32)),)
    one = operator("FULLY_CONNECTED", rows, weights("int8", "tensor"), None, version=4, outputs=out)
    each = operator("FULLY_CONNECTED", rows, weights("int8"), None, version=4, outputs=out)
    assert verdicts(one)["hexagon"].accepted == YES
    assert verdicts(one)["coreml"].reason.startswith("the first input is int8")
    assert verdicts(each)["hexagon"].reason == "more than one scale for the weights"


def test_ranks_and_shapes_count():
    wide = tensor(shape=(1, 1, 1, 4, 64))
    assert verdicts(operator("ADD", wide, wide))["gpu"].reason == "a tensor of rank 5, at most 4"
    assert verdicts(operator("ADD", wide, wide))["qnn"].accepted == YES
    unknown = tensor(shape=(1, -1, 64))
    result = verdicts(operator("ADD", unknown, unknown, outputs=(unknown,)))
    assert {result[name].accepted for name in ("nnapi", "gpu", "qnn", "coreml")} == {UNKNOWN}
    assert result["gpu"].source.endswith(f"{COMMIT}/tflite/core/subgraph.cc")
    short = tensor(shape=(4, 64))
    assert verdicts(operator("ADD", tensor(), short))["gpu"].accepted == NO
    assert verdicts(operator("SUB", tensor(), short))["gpu"].accepted == YES


def test_operators_of_the_cache_and_the_embedding():
    cache, at = tensor(shape=(1, 2, 64, 32)), tensor("int32", (4,))
    update = operator("DYNAMIC_UPDATE_SLICE", cache, cache, at, outputs=(cache,))
    assert [v.accepted for v in verdicts(update).values()] == [NO, NO, NO, YES, NO]
    ids = tensor("int32", (4,))
    dense = operator("EMBEDDING_LOOKUP", ids, tensor(shape=(64, 64), constant=True))
    assert verdicts(dense)["nnapi"].accepted == YES
    packed = verdicts(operator("EMBEDDING_LOOKUP", ids, weights("int8"), version=4))
    assert packed["nnapi"].reason == "version 4, at most 1"
    assert packed["qnn"].accepted == UNKNOWN
    assert {v.accepted for v in verdicts(operator("CUSTOM Mine", tensor())).values()} == {NO}


def test_a_comparison_is_taken_by_the_gpu_with_what_reads_it():
    flags = tensor("bool")
    compare = Operator("LESS", 1, (tensor(), tensor()), (flags,), {}, (0, 1), (2,))
    chosen = Operator("SELECT", 1, (flags, tensor(), tensor()), (tensor(),), {}, (2, 0, 1), (3,))
    assert verdicts(compare, chosen)["gpu"].accepted == YES
    assert verdicts(compare)["gpu"].accepted == NO


def test_conditions_that_are_not_read_are_unknown_not_guessed():
    picture, kernel = tensor(shape=(1, 8, 8, 4)), tensor(shape=(4, 3, 3, 4), constant=True)
    result = verdicts(operator("CONV_2D", picture, kernel, outputs=(picture,)))
    assert result["gpu"].accepted == result["nnapi"].accepted == UNKNOWN
    assert verdicts(operator("STABLEHLO_COMPOSITE", tensor()))["qnn"].accepted == UNKNOWN


def test_every_rule_names_what_exists_and_where_it_stands():
    operators = set(vars(schema().BuiltinOperator))
    for delegate in DELEGATES:
        assert set(delegate.rules) <= operators
        for rule in delegate.rules.values():
            assert {*rule.conditions, *delegate.conditions} <= CONDITIONS.keys()
            assert re.fullmatch(rf"https://\S+/{COMMIT}/\S+", rule.source)
    assert set(CONDITION_SOURCES) <= CONDITIONS.keys()
    used = {name for d in DELEGATES for r in d.rules.values() for name in r.conditions}
    assert used | {name for d in DELEGATES for name in d.conditions} == CONDITIONS.keys()


def test_an_exported_file_is_listed_operator_by_operator(exported):
    table = export.compatibility(exported.path)
    model = FlatModel(exported.path.read_bytes())
    total = sum(len(graph.operators) for graph in model.model.subgraphs)
    assert sum(row.count for row in table.rows) == total
    assert set(table.signatures) == set(exported.signatures)
    for name in table.delegates:
        assert sum(table.counts(name).values()) == total
        assert sum(r.count for r in table.fallback(name)) == table.counts(name)[NO]
    decode = {row.types for row in table.fallback("gpu", "decode")}
    assert "float32, int4/blocks of 32, - -> float32" in decode
    assert table.counts("hexagon")[YES] == 0
    # Blocks are in the decoder alone.
    assert table.counts("qnn", "decode")[YES] == 0
    assert table.counts("qnn", "speech")[YES] > 100
    lookups = [row for row in table.rows if row.operator == "EMBEDDING_LOOKUP"]
    assert {row.types for row in lookups} == {"int32, int8/channel -> float32"}


def test_the_table_prints_each_reason_with_its_source(exported):
    text = str(export.compatibility(exported.path))
    rows = [line for line in text.splitlines() if line.startswith("decode ")]
    product = next(line for line in rows if "int4/blocks of 32" in line)
    number = re.findall(r"\[(\d+)\]", product)[1]
    reason = next(line for line in text.splitlines() if line.startswith(f"[{number}] gpu: "))
    assert "version 12, at most 9" in reason
    assert f"{COMMIT}/tflite/delegates/gpu/common/model_builder.cc" in reason
    assert "Core ML delegate, on iOS 13 and later: " in text
    assert all(len(line) < 400 for line in text.splitlines())


def test_a_dense_file_is_taken_further(dense_export, exported):
    dense, compressed = map(export.compatibility, (dense_export.path, exported.path))
    assert dense.counts("qnn", "decode")[YES] > compressed.counts("qnn", "decode")[YES]
    assert dense.counts("qnn")[UNKNOWN] == 0


def test_tensors_are_read_as_they_are(exported):
    graphs = {graph.name: graph for graph in read_graphs(exported.path)}
    decode = graphs["decode"]
    assert decode.inputs["embeddings"].shape == (1, 1, 256)
    assert decode.inputs["input_pos"].type == "int32"
    assert decode.outputs["logits"].shape == (1, 1, 320)
    stored = {t.name: t for o in decode.operators for t in o.inputs if t is not None and t.constant}
    head = stored["embed/weight"]
    assert (head.type, head.shape, head.quantization) == ("int8", (320, 256), "channel")
    assert stored["decoder/layers/0/mlp/down_proj/weight"].quantization == "blocks of 32"
    assert head.fits(np.zeros((320, 256), np.int8))
    assert not head.fits(np.zeros((320, 255), np.int8))


def test_another_programs_file_is_listed_too(exported, tmp_path):
    graph = FlatModel(exported.path.read_bytes())
    graph.model.metadata, graph.model.signatureDefs = [], []
    tflite_file.write(graph.model, tmp_path / "a.tflite", overwrite=False)
    table = export.compatibility(tmp_path / "a.tflite")
    assert table.rows
    assert dataclasses.replace(table, path=exported.path).counts("gpu") == export.compatibility(
        exported.path
    ).counts("gpu")


@pytest.mark.parametrize(
    "content",
    [None, b"", b"no model", b"\x10\0\0\0TFL3" + b"\xff" * 40],
    ids=["absent", "empty", "text", "marked"],
)
def test_files_that_are_none_are_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "a.tflite").write_bytes(content)
    with pytest.raises(ExportError, match=r"a\.tflite"):
        export.compatibility(tmp_path / "a.tflite")
